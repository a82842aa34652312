"""Prompt files: both forms, every kind of bad line, tokenisation, data order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.data import batches, read_prompts, tokenize
from mdpgrpo_fast.demo import DEMO_DIR

GOOD = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_reads_constraints_chat_messages_and_further_columns(tmp_path: Path) -> None:
    chat = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}], "answer": 42}
    nones = {**GOOD, "kwargs": [{"num_words": None, "relation": None}]}
    plain, messages, cleaned = read_prompts(write(tmp_path / "p.jsonl", GOOD, "", chat, nones))
    assert plain.instruction_ids == ["punctuation:no_comma"] and plain.num_constraints(7) == 1
    assert messages.text == "Hi?" and messages.columns["answer"] == 42 and messages.num_constraints(7) == 7
    assert cleaned.kwargs == [{}], "None stands for an absent argument"


def test_num_constraints_column(tmp_path: Path) -> None:
    (example,) = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "x", "num_constraints": 3}))
    assert example.num_constraints(1) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"p\.jsonl:2: not JSON"),
        ('["a"]', r":2: a line must be a JSON object; got list"),
        ({"text": "x"}, r":2: column 'prompt' is missing; the line has 'text'"),
        ({"prompt": 3}, r":2: 'prompt' must be text or chat messages; got int"),
        ({"prompt": ""}, r":2: 'prompt' is empty"),
        ({"prompt": [{"role": "user"}]}, r":2: each message"),
        ({"prompt": "x", "instruction_id_list": ["punctuation:no_comma"]}, r":2: column 'kwargs' is missing"),
        ({**GOOD, "kwargs": ["a"]}, r":2: each entry of 'kwargs' must be an object"),
        ({**GOOD, "instruction_id_list": 3}, r":2: 'kwargs' must be a list .*instruction_id_list is no list"),
        ({"prompt": "x", "num_constraints": 0}, r":2: 'num_constraints' must be a whole number of at least 1; got 0"),
        ({"prompt": "x", "num_constraints": "x"}, r":2: 'num_constraints' must be a whole number"),
        ({**GOOD, "kwargs": [{}, {}]}, r":2: 'kwargs' must be a list with one entry per instruction id \(1\); got 2"),
        ({**GOOD, "instruction_id_list": ["punctuation:no_coma"]}, r":2: unknown instruction id .*no_comma"),
        ({**GOOD, "instruction_id_list": ["length_constraints:number_words"]}, r":2: .*(num_words|relation)"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", GOOD, line))


def test_null_columns_are_absent_columns(tmp_path: Path) -> None:
    row = {"prompt": "x", "instruction_id_list": None, "kwargs": None, "num_constraints": None}
    (example,) = read_prompts(write(tmp_path / "p.jsonl", row))
    assert example.instruction_ids == [] and example.num_constraints(2) == 2


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*none\.jsonl' does not exist"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(write(tmp_path / "e.jsonl", "", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path)


class FakeTokenizer:
    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        return type("Out", (), {"input_ids": ([0] if add_special_tokens else []) + list(map(ord, text))})

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def test_chat_template_is_applied_where_there_is_one(tmp_path: Path) -> None:
    chat = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}
    examples = read_prompts(write(tmp_path / "p.jsonl", GOOD, chat))
    tokenizer = FakeTokenizer()
    with pytest.raises(ConfigError, match="prompt 2 is chat messages, but the tokenizer has no chat template"):
        tokenize(examples, tokenizer, 100)
    tokenizer.chat_template = "yes"
    plain, messages = tokenize(examples, tokenizer, 100)
    assert "".join(map(chr, plain)) == "[user]Say hi.[assistant]", "and no second bos"
    assert "".join(map(chr, messages)) == "[system]S[user]U[assistant]"
    with pytest.raises(ConfigError, match="prompt 1 has 24 tokens, over the limit of 23"):
        tokenize(examples, tokenizer, 23)

    def refuse(*args: object, **kwargs: object) -> str:
        raise KeyError("system role not supported")

    tokenizer.apply_chat_template = refuse  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"prompt 1: the tokenizer's chat template refuses it: .*system role"):
        tokenize(examples, tokenizer, 100)


def test_batches_visit_every_prompt_once_an_epoch_in_seeded_order() -> None:
    first = [i for rows in batches(10, 4, 5, seed=1) for i in rows]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first == [i for rows in batches(10, 4, 5, seed=1) for i in rows]
    assert first != [i for rows in batches(10, 4, 5, seed=2) for i in rows]


def test_shared_prompt_files_are_read_whole(shared_data) -> None:
    ours = read_prompts(shared_data("mdpgrpo_test.jsonl"), rules="mdpgrpo")
    assert len(ours) == 500 and len({i for e in ours for i in e.instruction_ids}) == 26
    ifeval = read_prompts(shared_data("ifeval_prompts.jsonl"))
    assert len(ifeval) == 541 and sum(len(e.instruction_ids) for e in ifeval) == 834


def test_embedded_prompts_are_read_whole() -> None:
    assert len(read_prompts(DEMO_DIR / "train.jsonl")) >= 2000
    assert len(read_prompts(DEMO_DIR / "heldout.jsonl")) >= 256
