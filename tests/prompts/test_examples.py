"""Rows as examples: the library's own columns in every spelling, each kind of bad row, what is left out, data order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.prompts import GOOD, write

from mdpgrpo_fast.config import ConfigError, PromptConfig
from mdpgrpo_fast.data import BadRow, batches, read_prompts
from mdpgrpo_fast.demo import DEMO_DIR

WORDS = "length_constraints:number_words"
DROP = PromptConfig(on_bad_row="drop")


def only(path: Path, row: object, **knobs: Any) -> Any:
    (example,) = read_prompts(write(path / "p.jsonl", row), PromptConfig(**knobs)).examples
    return example


def test_reads_constraints_chat_messages_and_further_columns(tmp_path: Path) -> None:
    chat = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}], "answer": 42}
    nones = {**GOOD, "kwargs": [{"num_words": None, "relation": None}]}
    plain, messages, cleaned = read_prompts(write(tmp_path / "p.jsonl", GOOD, "", chat, nones)).examples
    assert plain.instruction_ids == ["punctuation:no_comma"] and plain.num_constraints(7) == 1
    assert messages.text == "Hi?" and messages.columns["answer"] == 42 and messages.num_constraints(7) == 7
    assert cleaned.kwargs == [{}] == cleaned.columns["kwargs"], "None stands for an absent argument"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"num_constraints": 3}, 3),
        ({"num_constraints": 3.0}, 3),
        ({"num_constraints": "3"}, 3),
        ({"num_constraints": None}, None),
        ({"num_constraints": float("nan")}, None),
        ({"instruction_id_list": None, "kwargs": None}, None),
        ({"instruction_id_list": float("nan"), "kwargs": float("nan"), "num_constraints": float("nan")}, None),
        ({"instruction_id_list": []}, None),
    ],
)
def test_k_and_missing_cells(tmp_path: Path, columns: dict[str, Any], expected: int | None) -> None:
    example = only(tmp_path, {"prompt": "x", **columns})
    assert example.instruction_ids == [] and example.num_constraints(2) == (expected or 2)
    assert example.columns == {"prompt": "x", **dict.fromkeys(columns, expected)}
    assert not isinstance(example.columns.get("num_constraints"), float)


@pytest.mark.parametrize(
    ("ids", "kwargs"),
    [
        ([WORDS], [{"num_words": 5.0, "relation": "at least", "end_phrase": float("nan")}]),
        (f'["{WORDS}"]', '[{"num_words": 5, "relation": "at least", "end_phrase": null}]'),
        (f"['{WORDS}']", "[{'num_words': 5, 'relation': 'at least', 'end_phrase': None}]"),
        ([WORDS], ['{"num_words": 5, "relation": "at least"}']),
    ],
)
def test_constraints_in_every_spelling(tmp_path: Path, ids: Any, kwargs: Any) -> None:
    example = only(tmp_path, {"prompt": "x", "instruction_id_list": ids, "kwargs": kwargs})
    assert example.instruction_ids == [WORDS] == example.columns["instruction_id_list"]
    assert example.kwargs == [{"num_words": 5, "relation": "at least"}] == example.columns["kwargs"]
    assert type(example.kwargs[0]["num_words"]) is int


def test_content_as_parts_is_text_and_empty_keys_go(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Say ", "image": None}, {"type": "text", "text": "hi."}]
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]
    example = only(
        tmp_path,
        {
            "prompt": [
                {"role": "user", "content": parts, "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": call},
                {"role": "tool", "content": "sun"},
            ],
            "tools": '[{"type": "function", "function": {"name": "f", "strict": null}}]',
        },
    )
    assert example.prompt[0] == {"role": "user", "content": "Say hi."} and example.text == "Say hi."
    assert example.prompt[1]["content"] == "", "or a template that adds it to text would refuse it"
    assert example.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}, "tables fill in what is absent"
    assert example.columns["tools"] == [{"type": "function", "function": {"name": "f"}}]


def user(content: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"p\.jsonl:2: not JSON"),
        ('["a"]', r":2: a row must be a JSON object; got list"),
        ({"text": "x"}, r":2: column 'prompt' is missing; the row has 'text' \(prompt_column names another\)"),
        ({}, r":2: column 'prompt' is missing; the row has no columns"),
        ({"prompt": 3}, r":2: 'prompt' must be text or chat messages; got int"),
        ({"prompt": ""}, r":2: 'prompt' is empty"),
        ({"prompt": " \n"}, r":2: 'prompt' is empty"),
        ({"prompt": None}, r":2: 'prompt' is empty"),
        ({"prompt": []}, r":2: 'prompt' is empty"),
        ({"prompt": [{"role": "user"}]}, r":2: each message of 'prompt' must have a role and a content text"),
        ({"prompt": [{"content": "x"}]}, r":2: each message"),
        ({"prompt": ["x"]}, r":2: each message"),
        (user(None), r":2: each message"),
        (user([{"type": "image_url", "image_url": "u"}]), r":2: a message of 'prompt' has a part of type 'image_url'"),
        (user([{"type": "text", "text": "a"}, 3]), r":2: .* part of type 'int'; text alone is supported"),
        (user([{"type": "text", "text": 3}]), r":2: a message of 'prompt' has a part whose text is no text"),
        (
            {"prompt": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            r":2: 'prompt' ends with an assistant message without text",
        ),
        ({"prompt": "x", "tools": "f"}, r":2: 'tools' must be a list of JSON schemas, or JSON text of one; got str"),
        ({"prompt": "x", "tools": ["f"]}, r":2: 'tools' must be a list of JSON schemas"),
        ({"prompt": "x", "instruction_id_list": ["punctuation:no_comma"]}, r":2: column 'kwargs' is missing"),
        ({**GOOD, "kwargs": ["a"]}, r":2: each entry of 'kwargs' must be an object"),
        ({**GOOD, "instruction_id_list": 3}, r":2: 'kwargs' must be a list .*instruction_id_list is no list"),
        ({**GOOD, "instruction_id_list": "punctuation:no_comma"}, r":2: .*instruction_id_list is no list"),
        (
            {"prompt": "x", "num_constraints": 0},
            r":2: 'num_constraints' must be a whole number of at least 1 and below 2.31; got 0",
        ),
        ({"prompt": "x", "num_constraints": 1.5}, r":2: 'num_constraints' must be a whole number .* got 1.5"),
        ({"prompt": "x", "num_constraints": True}, r":2: 'num_constraints' must be a whole number .* got True"),
        ({"prompt": "x", "num_constraints": "x"}, r":2: 'num_constraints' must be a whole number"),
        ({**GOOD, "kwargs": [{}, {}]}, r":2: 'kwargs' must be a list with one entry per instruction id \(1\); got 2"),
        ({**GOOD, "instruction_id_list": ["punctuation:no_coma"]}, r":2: unknown instruction id .*no_comma"),
        ({**GOOD, "instruction_id_list": [3]}, r":2: unknown instruction id 3"),
        ({**GOOD, "instruction_id_list": [WORDS]}, r":2: .*(num_words|relation)"),
        ({"prompt": "x", "num_constraints": 2**63}, r":2: 'num_constraints' must be .* below 2.31; got 9223372036"),
        ({"prompt": "x", "num_constraints": "9" * 5000}, r":2: 'num_constraints' must be .* below 2.31; got '999"),
        ({"prompt": "x", "num_constraints": 1e300}, r":2: 'num_constraints' must be .* below 2.31; got 1e.300"),
        ('{"prompt": "x", "a": ' + "[" * 101 + "]" * 101 + "}", r":2: is nested more than 100 levels deep"),
        ('{"prompt": [{"role": "user", "content": "x", "a": ' + "[" * 950 + "]" * 950 + "}]}", r":2: is nested more"),
        ('{"prompt": "half \\ud83d"}', r":2: holds '\\ud83d', half of a surrogate pair, which is no text"),
        ('{"prompt": "x", "answer": ["\\ude00"]}', r":2: holds '\\ude00'"),
        (
            {"prompt": "x", "instruction_id_list": '["startend:end_checker"]', "kwargs": '[{"end_phrase": "\\ud83d"}]'},
            r":2: holds '\\ud83d'",
        ),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, line)
    with pytest.raises(ConfigError, match=message) as e:
        read_prompts(path)
    read = read_prompts(path, DROP)
    (row,) = read.dropped
    assert str(e.value) == f"{row.where}: {row.reason}" and "\n" not in str(e.value)
    assert [e.prompt for e in read.examples] == ["Say hi."]
    assert read.notes == [f"left out 1 of 2 rows: 1 like {row.where}: {row.reason}"]
    row.prompt.encode()  # fit to be printed and written


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": ""}, *({**GOOD, "kwargs": [{}] * n} for n in (2, 3)), GOOD]
    unknown = [{**GOOD, "instruction_id_list": [f"x:{c}"]} for c in "abcde"]
    path = write(tmp_path / "p.jsonl", *rows, *unknown)
    read = read_prompts(path, DROP)
    assert len(read.examples) == 1 and [r.where for r in read.dropped] == [
        f"{path}:{n}" for n in (1, 2, 3, *range(5, 10))
    ]
    (note,) = read.notes
    assert note.startswith(f"left out 8 of 9 rows: 2 like {path}:2: 'kwargs' must be a list")
    assert f"1 like {path}:1: 'prompt' is empty" in note and note.endswith("; 2 for 2 further reasons")
    assert isinstance(read.dropped[0], BadRow) and read.dropped[1].prompt == "Say hi."


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": ""})
    with pytest.raises(
        ConfigError, match=r"no prompt can be used: left out 1 of 1 rows: 1 like .*:1: 'prompt' is empty"
    ):
        read_prompts(path, DROP)


# ---- columns by other names -----------------------------------------------------------------------------------------


def test_prompt_column_and_renamed_columns(tmp_path: Path) -> None:
    row = {"question": "2+2?", "solution": "4", "prompt": "not this", "level": 1}
    example = only(tmp_path, row, prompt_column="question", columns=["answer=solution"])
    assert example.prompt == "2+2?" == example.text
    assert example.columns == {"question": "2+2?", "prompt": "not this", "level": 1, "answer": "4"}


def test_a_file_that_has_the_new_name_already(tmp_path: Path) -> None:
    assert only(tmp_path, {"prompt": "x", "answer": "4"}, columns=["answer=solution"]).columns["answer"] == "4"


def test_columns_of_ours_by_other_names(tmp_path: Path) -> None:
    row = {"q": "x", "ids": [WORDS], "args": [{"num_words": 5, "relation": "at least"}], "a": 1, "b": 2}
    knobs = ["prompt=q", "instruction_id_list=ids", "kwargs=args", "a=b", "b=a"]
    example = only(tmp_path, row, columns=knobs)
    assert example.prompt == "x" and example.instruction_ids == [WORDS]
    assert example.columns["a"] == 2 and example.columns["b"] == 1, "two columns may change places"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"columns": ["answer=solutoin"]}, r"columns answer=solutoin: no row of '.*' has a column 'solutoin'"),
        ({"prompt_column": "quest"}, r":1: column 'quest' is missing; the row has 'prompt', 'instruction_id_list'"),
        ({"chat_template": "no.jinja"}, r"chat_template must be auto, on, off or a file .*'no.jinja' does not exist"),
        ({"chat_template": "{{ x }}" * 9999}, r"chat_template must .*…' is jinja text, which is not accepted inline"),
    ],
)
def test_knobs_that_fit_no_row(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        only(tmp_path, GOOD, **knobs)
    assert len(str(e.value)) < 250


# ---- whole files, data order ----------------------------------------------------------------------------------------


def test_shared_prompt_files_are_read_whole(shared_data) -> None:
    ours = read_prompts(shared_data("mdpgrpo_test.jsonl"), PromptConfig(rules="mdpgrpo"))
    assert len(ours.examples) == 500 and len({i for e in ours.examples for i in e.instruction_ids}) == 26
    ifeval = read_prompts(shared_data("ifeval_prompts.jsonl"))
    assert len(ifeval.examples) == 541 and sum(len(e.instruction_ids) for e in ifeval.examples) == 834
    assert not ours.notes and not ifeval.notes, "the library's own form needs no word"


def test_embedded_prompts_are_read_whole() -> None:
    assert len(read_prompts(DEMO_DIR / "train.jsonl").examples) >= 2000
    assert len(read_prompts(DEMO_DIR / "heldout.jsonl").examples) >= 256


def test_batches_visit_every_prompt_once_an_epoch_in_seeded_order() -> None:
    first = [i for rows in batches(10, 4, 5, seed=1) for i in rows]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10))
    assert first == [i for rows in batches(10, 4, 5, seed=1) for i in rows]
    assert first != [i for rows in batches(10, 4, 5, seed=2) for i in rows]
