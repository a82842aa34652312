"""Logits processors in the decode loop: transformers' own on each row unpadded, the records, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.processors import check_generation_kwargs, generation_kwargs
from mdpgrpo_fast.rollout.vllm.sampler import RolloutEngine
from mdpgrpo_fast.training.before.checks import check, check_settings
from mdpgrpo_fast.training.collect import Collector

PROMPTS = [[40, 41, 42, 43, 40, 41, 42], [50, 51], [60, 61, 60, 61], [70], [52, 53]]
TAUS = [0.3, 0.8, 1.0, 1.7, 1.2]
NEVER = 2
PENALTY = {"repetition_penalty": 1.7}
ALL: list[dict[str, Any]] = [
    PENALTY,
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"min_new_tokens": 6, "suppress_tokens": list(range(100, 200))},
    {"min_length": 9, "begin_suppress_tokens": [n for n in range(290) if n != 17]},
    {"bad_words_ids": [[n] for n in range(3, 90)] + [[100, 101]]},
    {"sequence_bias": [[[n], 4.0] for n in range(200, 220)] + [[[205, 206], -9.0]]},
    {"exponential_decay_length_penalty": [2, 1.6]},
    {"forced_eos_token_id": NEVER, **PENALTY},
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, model_dirs: dict[str, str]) -> Any:
    return load(model_dirs[request.param])[0].eval()


@pytest.fixture(scope="module")
def llama(model_dirs: dict[str, str]) -> Any:
    return load(model_dirs["llama"])[0].eval()


def transformers_greedy(model: Any, prompt: list[int], eos: list[int], limit: int, kwargs: dict[str, Any]) -> list[int]:
    """What `model.generate` says to this prompt alone."""
    quiet = tf.GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=eos, pad_token_id=0, **kwargs)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=quiet)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kwargs", ALL, ids=lambda k: "+".join(k))
def test_greedy_is_what_transformers_generates_row_by_row(model: Any, kwargs: dict[str, Any]) -> None:
    """In one batch, padded, with rows that leave; the padding is an eos, and a penalty must not see it."""
    eos = [NEVER, *range(5, 290, 11)]
    plain = generate(model, PROMPTS, temperature=None, eos=eos, max_new_tokens=14)
    found = generate(model, PROMPTS, temperature=None, eos=eos, max_new_tokens=14, generation_kwargs=kwargs, pad=eos[0])
    expected = [transformers_greedy(model, p, eos, 14, kwargs) for p in PROMPTS]
    assert found.rows == expected
    assert found.rows != plain.rows, "these settings change something"


def processed(
    raw: torch.Tensor, ids: list[int], prompt: int, kwargs: dict[str, Any], eos: list[int], limit: int
) -> torch.Tensor:
    """Logits (V,) after transformers' own choice of processors, in float64."""
    model: Any = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    model._merge_criteria_processor_list = lambda a, b: a
    config = tf.GenerationConfig(max_length=prompt + limit, **kwargs)
    config._eos_token_tensor = torch.tensor(eos)
    made = tf.GenerationMixin._get_logits_processor(model, config, prompt, device="cpu")
    return made(torch.tensor([ids]), raw[None].float())[0].double()


@pytest.mark.parametrize("cut", [{}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.02}], ids=str)
@pytest.mark.parametrize("kwargs", [ALL[2], ALL[3], ALL[6]], ids=lambda k: "+".join(k))
def test_what_is_recorded(llama: Any, kwargs: dict[str, Any], cut: dict[str, Any]) -> None:
    """sampling_logprobs of the processed distribution, cut; policy_logprobs of the model's own logits."""
    torch.manual_seed(0)
    eos, limit = list(range(1, 290, 9)), 10
    r = generate(
        llama, PROMPTS, temperature=[t for t in TAUS for _ in range(2)], eos=eos, max_new_tokens=limit,
        num_generations=2, generation_kwargs=kwargs, **cut,
    )  # fmt: skip
    assert len(set(r.lengths.tolist())) > 1, "rows leave at different steps"
    for i, row in enumerate(r.rows):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            raw = llama(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        for t, token in enumerate(row):
            own = processed(raw[t], prompt + row[:t], len(prompt), kwargs, eos, limit) / TAUS[i // 2]
            whole = own.log_softmax(0)
            drawn = whole[token].item() - r.log_kept[i, t].item()
            assert r.sampling_logprobs[i, t].item() == pytest.approx(drawn, abs=1e-3), (i, t)
            assert (r.log_kept[i, t] == 0) if not cut else (r.log_kept[i, t] <= 0)
            if cut.get("min_p"):
                kept = whole[whole >= whole.max() + torch.tensor(0.02).log()].logsumexp(0).item()
                assert r.log_kept[i, t].item() == pytest.approx(kept, abs=1e-3)
            policy = raw[t].double().log_softmax(0)[token].item()
            assert r.policy_logprobs[i, t].item() == pytest.approx(policy, abs=1e-3), (i, t)


def test_steps_of_fixed_shapes_are_not_taken(llama: Any) -> None:
    found = []
    for steps in ("eager", "fixed", "auto"):
        torch.manual_seed(0)
        knobs: dict[str, Any] = {"eos": [NEVER], "max_new_tokens": 20, "generation_kwargs": PENALTY, "steps": steps}
        found.append(generate(llama, PROMPTS, temperature=TAUS, **knobs))
    assert found[0].rows == found[1].rows == found[2].rows


def test_a_row_without_a_token_left_is_said(llama: Any) -> None:
    nothing = {"suppress_tokens": list(range(llama.config.vocab_size))}
    for taus in (TAUS, None):
        with pytest.raises(FloatingPointError, match="generation_kwargs must leave a token to draw; none is left in"):
            generate(llama, PROMPTS, temperature=taus, eos=[NEVER], max_new_tokens=2, generation_kwargs=nothing)


# ---- settings of a run ----------------------------------------------------------------------------------------------


def test_settings_of_a_run() -> None:
    assert generation_kwargs(TrainConfig()) is None
    run = TrainConfig(
        repetition_penalty=1.2, generation_kwargs=["no_repeat_ngram_size=3", "bad_words_ids=[[1, 2], [3]]"]
    )
    want = {"no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2], [3]], "repetition_penalty": 1.2}
    assert generation_kwargs(run) == want
    check_settings(run)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_repeat_ngram=3", "unknown name in generation_kwargs .*; did you mean 'no_repeat_ngram_size'"),
        ("zzz=3", "unknown name in generation_kwargs 'zzz'; known: bad_words_ids, "),
        ("temperature=0.5", r"generation_kwargs: temperature is set elsewhere \(--temperature or --temperatures\)"),
        ("top_p=0.5", r"generation_kwargs: top_p is set elsewhere \(--top-p\)"),
        ("repetition_penalty=2", r"repetition_penalty is set elsewhere \(--repetition-penalty\)"),
        ("max_new_tokens=5", r"max_new_tokens is set elsewhere \(--max-completion-length\)"),
        ("num_return_sequences=5", r"num_return_sequences is set elsewhere \(--num-generations\)"),
        ("do_sample=false", r"do_sample is set elsewhere \(--temperature: completions are always sampled\)"),
        ("eos_token_id=5", r"eos_token_id is set elsewhere \(the tokenizer's and the model's\)"),
        ("num_beams=4", "num_beams is no logits processor that comes before the temperature; known: sequence_bias, "),
        ("typical_p=0.4", "typical_p is no logits processor that comes before the temperature"),
        ("no_repeat_ngram_size=three", "generation_kwargs: no_repeat_ngram_size cannot be 'three': "),
        ("no_repeat_ngram_size=-1", "generation_kwargs: no_repeat_ngram_size cannot be -1: "),
        ("suppress_tokens=7", "generation_kwargs: suppress_tokens cannot be 7: "),
        ("sequence_bias=[1]", r"generation_kwargs: sequence_bias cannot be \[1\]: "),
        ("no_repeat_ngram_size=True", "no_repeat_ngram_size cannot be True: a number is wanted"),
        ("suppress_tokens=[3, true]", r"suppress_tokens cannot be \[3, True\]: a number is wanted"),
        ("remove_invalid_values=yes", "generation_kwargs: remove_invalid_values must be True or False; got 'yes'"),
        ("remove_invalid_values=1", "generation_kwargs: remove_invalid_values must be True or False; got 1"),
        ("begin_suppress_tokens=[1.5]", "tokens of begin_suppress_tokens must be whole numbers from 0; got 1.5"),
        ("suppress_tokens=[-1]", "tokens of suppress_tokens must be whole numbers from 0; got -1"),
        ("remove_invalid_values=True", None),
        ("remove_invalid_values=false", None),
        ("forced_eos_token_id=0", None),
        ("bad_words_ids=[]", None),
        ("min_new_tokens=null", None),
    ],
)  # fmt: skip
def test_what_a_run_cannot_have_is_said_at_the_door(given: str, message: str | None) -> None:
    run = TrainConfig(generation_kwargs=[given])
    if message is None:
        check_settings(run)
        return
    with pytest.raises(ConfigError, match=message) as e:
        check_settings(run)
    assert "\n" not in str(e.value)


def test_tokens_that_the_model_does_not_have(tmp_path: Any) -> None:
    run = TrainConfig(output_dir=str(tmp_path / "run"), generation_kwargs=["bad_words_ids=[[999999]]"])
    with pytest.raises(ConfigError, match=r"vocabulary size is .*999999"):
        check(run, MDPGRPOConfig())
    for item in ("suppress_tokens=[5, 999999]", "begin_suppress_tokens=[999999]", "forced_eos_token_id=999999"):
        run = TrainConfig(output_dir=str(tmp_path / "run"), generation_kwargs=[item])
        with pytest.raises(ConfigError, match=r"whole numbers from 0 below the vocabulary size \d+; got 999999"):
            check(run, MDPGRPOConfig())


def test_how_bools_are_spelt_and_a_name_given_twice() -> None:
    for text, value in (("True", True), ("true", True), ("False", False)):
        assert generation_kwargs(TrainConfig(generation_kwargs=[f"remove_invalid_values={text}"])) == {
            "remove_invalid_values": value
        }
    twice = TrainConfig(generation_kwargs=["min_length=3", "min_length=4"])
    with pytest.raises(ConfigError, match="generation_kwargs: min_length is given twice"):
        generation_kwargs(twice)


def test_vllm_takes_the_penalty_alone(engine_settings: Any) -> None:
    run = TrainConfig(rollout="vllm", repetition_penalty=1.3)
    check_generation_kwargs(run)
    assert engine_settings(generation_kwargs(run))["repetition_penalty"] == 1.3
    with pytest.raises(ValueError, match="must be repetition_penalty alone; got no_repeat_ngram_size"):
        engine_settings({"no_repeat_ngram_size": 3})
    with pytest.raises(ConfigError, match=r"generation_kwargs need rollout = transformers: .*; got min_length=3"):
        check_generation_kwargs(TrainConfig(rollout="vllm", generation_kwargs=["min_length=3"]))


@pytest.fixture
def engine_settings() -> Any:
    """The settings that a row's request has, by generation_kwargs."""

    class Asked(Exception):
        pass

    class Engine(RolloutEngine):
        _rpc = _send = _reset_cache = _set_label = _load_adapter = sleep = lambda self, *args: None

        def _complete(self, prompts: Any, settings: list[dict[str, Any]]) -> Any:
            raise Asked(settings[0])

    def asked(kwargs: dict[str, Any] | None) -> dict[str, Any]:
        with pytest.raises(Asked) as e:
            Engine("cpu").generate([[5]], temperature=[1.0], eos=[1], max_new_tokens=2, generation_kwargs=kwargs)
        return e.value.args[0]

    return asked


def test_a_run_samples_with_them(llama: Any) -> None:
    collector: Any = SimpleNamespace(
        method=MDPGRPOConfig(),
        run=TrainConfig(repetition_penalty=1.2),
        lm=llama,
        task=SimpleNamespace(train_ids=[[5, 6]], eos=[1], tokenizer=SimpleNamespace(pad_token_id=7)),
    )
    seen = Collector.asked(collector, [0])
    assert seen["generation_kwargs"] == {"repetition_penalty": 1.2} and seen["pad"] == 7
