"""The embedded default: prompts without conflicts, and a seed policy that loads and reproduces."""

import json
import random

import pytest
import torch
import words
from prompts import DEMO, INSTRUCTION_IDS, conflict, read_jsonl, shipped, to_jsonl
from seed_policy import OBEY, OBEY_LAST, Recipe, check_tokenizer, make, obey_probability
from transformers import AutoModelForCausalLM, AutoTokenizer
from writer import write

from mdpgrpo_fast.verifiers import validate, verify_all

FILES = ("train.jsonl", "heldout.jsonl")
POLICY = DEMO / "seed_policy"
PROMPTS = {name: read_jsonl(DEMO / name) for name in FILES}
EVERY = [prompt for prompts in PROMPTS.values() for prompt in prompts]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POLICY)


@pytest.mark.parametrize("name", FILES)
def test_form(name):
    for line in (DEMO / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"prompt", "instruction_id_list", "kwargs"}
        assert len(row["instruction_id_list"]) == len(row["kwargs"])
        for instruction_id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            validate(instruction_id, kwargs)


def test_counts():
    assert len(PROMPTS["train.jsonl"]) >= 2000
    assert len(PROMPTS["heldout.jsonl"]) >= 256
    for prompts in PROMPTS.values():
        used = [name for prompt in prompts for name in prompt.instruction_id_list]
        assert set(used) == set(INSTRUCTION_IDS) and len(INSTRUCTION_IDS) >= 10
        assert {len(prompt.kwargs) for prompt in prompts} == {1, 2, 3, 4, 5}
        assert min(used.count(name) for name in INSTRUCTION_IDS) >= 0.03 * len(used)


def test_no_prompt_twice():
    assert len({prompt.prompt for prompt in EVERY}) == len(EVERY)


def test_no_conflict():
    for prompt in EVERY:
        assert not conflict(prompt.instruction_id_list), prompt
    assert conflict(["length_constraints:number_words", "startend:quotation", "length_constraints:number_sentences"])


def test_oracle_satisfies_every_prompt():
    """The proof that no constraints of a prompt contradict each other."""
    rng = random.Random(0)
    for prompt in EVERY:
        ids = prompt.instruction_id_list
        response = write(prompt.topic, ids, prompt.kwargs, [True] * len(ids), rng)
        assert response is not None, prompt
        assert all(verify_all(ids, response, prompt.kwargs, prompt=prompt.prompt)), (prompt, response)


def test_teacher_breaks_what_it_is_told_to_break():
    rng, broken = random.Random(1), dict.fromkeys(INSTRUCTION_IDS, 0)
    for prompt in PROMPTS["train.jsonl"][:800]:
        ids = prompt.instruction_id_list
        flags = [rng.random() < 0.5 for _ in ids]
        response = write(prompt.topic, ids, prompt.kwargs, flags, rng)
        if response is None:  # flags that contradict each other
            continue
        assert verify_all(ids, response, prompt.kwargs, prompt=prompt.prompt) == flags, (prompt, flags, response)
        for name, flag in zip(ids, flags, strict=True):
            broken[name] += not flag
    assert min(broken.values()) > 10


def test_thresholds_in_conflict_have_no_oracle():
    ids = ["length_constraints:number_words", "detectable_format:number_bullet_lists"]
    kwargs = [{"relation": "less than", "num_words": 8}, {"num_bullets": 4}]
    assert write("river", ids, kwargs, [True, True], random.Random(0)) is None


def test_shipped_prompts_regenerate():
    for name, prompts in shipped().items():
        assert (DEMO / name).read_text(encoding="utf-8") == to_jsonl(prompts)


def test_obey_probability_depends_on_the_wording():
    odds = [obey_probability(prompt, i) for prompt in EVERY for i in range(len(prompt.kwargs))]
    assert set(odds) == {OBEY, OBEY_LAST}
    assert 0.28 < odds.count(OBEY_LAST) / len(odds) < 0.38  # WORDING_WEIGHTS: one third


def test_policy_size(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert (POLICY / "model.safetensors").stat().st_size <= 4 * 2**20
    assert {path.suffix for path in POLICY.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_policy_tokens(model, tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    check_tokenizer(tokenizer)
    for text in ("The river is *cold*.\nP.S. Ask [name].", "naïve 日本 🙂\n\n  x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer):
    asked = [{"role": "user", "content": "Describe the river."}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Describe the river.<|assistant|>"
    whole = [*asked, {"role": "assistant", "content": "It is cold."}]
    assert tokenizer.apply_chat_template(whole, tokenize=False) == text + "It is cold.<|end|>"
    lengths = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": p.prompt}], return_dict=False)) for p in EVERY
    ]
    assert max(lengths) <= 96


def test_policy_follows_some_constraints_greedily(model, tokenizer):
    prompts = PROMPTS["heldout.jsonl"][:100]
    chats = [[{"role": "user", "content": prompt.prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=48, do_sample=False)[:, batch["input_ids"].shape[1] :]
    responses = tokenizer.batch_decode(out, skip_special_tokens=True)
    hard = [
        all(verify_all(prompt.instruction_id_list, response, prompt.kwargs))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert 0.3 < sum(hard) / len(hard) < 0.6
    assert (out == tokenizer.eos_token_id).any(dim=1).float().mean() > 0.95


@pytest.fixture
def torch_as_before():
    """What `make` sets for its own process is not for the tests that come after."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("torch_as_before")
def test_training_is_deterministic(tmp_path):
    recipe = Recipe(steps=3, batch_size=8, vocab_pairs=2000)
    first, second = make(tmp_path / "a", recipe), make(tmp_path / "b", recipe)
    assert first == second
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in POLICY.iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_tokenizer_check_names_split_words(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "KEYWORDS", ("lamp", "xylophone"))
    with pytest.raises(ValueError, match=r"\['xylophone'\]"):
        check_tokenizer(tokenizer)
