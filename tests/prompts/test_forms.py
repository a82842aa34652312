"""Public training sets by their columns: where prompt and constraints stand, and what the note says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import needed
from helpers.prompts import GOOD, write

from mdpgrpo_fast import verifiers
from mdpgrpo_fast.config import ConfigError, PromptConfig
from mdpgrpo_fast.data import forms, read_prompts

USER = [{"role": "user", "content": "Write."}]
ANSWERED = [*USER, {"role": "assistant", "content": "Here."}]
WORDS = "length_constraints:number_words"
FIVE = {"num_words": 5, "relation": "at least"}


def read(path: Path, *rows: object, **knobs: Any) -> Any:
    return read_prompts(write(path / "p.jsonl", *rows), PromptConfig(**knobs))


# ---- IF multi-constraint --------------------------------------------------------------------------------------------

MULTI = [{"instruction_id": ["punctuation:no_comma", WORDS], "kwargs": [None, {**FIVE, "letter": None}]}]


@pytest.mark.parametrize(
    "ground_truth", [repr(MULTI), json.dumps(MULTI), MULTI, MULTI[0], [repr(MULTI)]], ids=lambda g: type(g).__name__
)
def test_if_multi_constraint(tmp_path: Path, ground_truth: Any) -> None:
    row = {"key": "1", "messages": USER, "ground_truth": ground_truth, "dataset": "ifeval", "constraint_type": "multi"}
    got = read(tmp_path, row)
    (example,) = got.examples
    assert example.prompt == USER and example.instruction_ids == MULTI[0]["instruction_id"]
    assert example.kwargs == [{}, FIVE] == example.columns["kwargs"]
    assert example.columns["ground_truth"] == ground_truth and example.columns["dataset"] == "ifeval"
    assert got.notes == [f"{tmp_path / 'p.jsonl'}: {forms.MESSAGES}; {forms.MULTI}"]


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ("[{'instruction_id': 'a', 'kwargs': [None]}]", "instruction_id and kwargs of 'ground_truth' must be lists"),
        ("[{'instruction_id': ['a:b'], 'kwargs': [None]}]", "unknown instruction id 'a:b'"),
        ("[{'instruction_id': ['a:b'], 'kwargs': []}]", r"one entry per instruction id \(1\); got 0"),
    ],
)
def test_if_multi_constraint_rows_that_cannot_be_used(tmp_path: Path, ground_truth: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"p\.jsonl:1: .*{message}"):
        read(tmp_path, {"messages": USER, "ground_truth": ground_truth})


@pytest.mark.parametrize("ground_truth", ["72", "[1, 2]", "[not a list", "{'a': 1}", 72, None, [], ["72", "73"]])
def test_another_ground_truth_is_a_column(tmp_path: Path, ground_truth: Any) -> None:
    (example,) = read(tmp_path, {"prompt": "x", "ground_truth": ground_truth}).examples
    assert example.instruction_ids == [] and example.columns == {"prompt": "x", "ground_truth": ground_truth}


def test_instructions_of_ones_own_come_first(tmp_path: Path) -> None:
    got = read(tmp_path, {**GOOD, "ground_truth": repr(MULTI)})
    assert got.examples[0].instruction_ids == ["punctuation:no_comma"] and not got.notes


# ---- RLVR-IFeval ----------------------------------------------------------------------------------------------------

# function with its arguments, instruction, a response that follows it, one that does not
MAPPED = [
    ("verify_keywords", {"keyword_list": ["C++", "sea "]}, "keywords:existence", "seaside c++", "sea C"),
    ("validate_forbidden_words", {"forbidden_words": ["a.b"]}, "keywords:forbidden_words", "axb", "x A.B y"),
    ("validate_response_language", {"language": "de"}, "language:response_language", "Das ist ein Haus.", "A house."),
    ("validate_word_constraint", {"N": 3, "quantifier": "at least"}, WORDS, "a b c", "a b"),
    ("validate_word_constraint", {"N": 3, "quantifier": "at most"}, WORDS, "a b c", "a b c d"),
    (
        "verify_sentence_constraint",
        {"N": 1, "quantifier": "at most"},
        "length_constraints:number_sentences",
        "One here.",
        "One here. Two there.",
    ),
    (
        "validate_paragraphs",
        {"N": 2, "first_word": "So", "i": 2},
        "length_constraints:nth_paragraph_first_word",
        "A.\n\nSo b.",
        "So a.\n\nB.",
    ),
    ("verify_postscript", {"postscript_marker": "P.S."}, "detectable_content:postscript", "Hi.\nP.S. you", "Hi."),
    ("validate_placeholders", {"N": 2}, "detectable_content:number_placeholders", "[a] [b] [c]", "[a]"),
    ("verify_bullet_points", {"N": 2}, "detectable_format:number_bullet_lists", "* a\n- b", "* a\n* b\n* c"),
    ("validate_title", {}, "detectable_format:title", "<<a>>", "a"),
    (
        "validate_choice",
        {"options": "['My answer is yes.', 'My answer is no.', 'My answer is maybe.']"},
        "detectable_format:constrained_response",
        "My answer is no.",
        "No.",
    ),
    ("validate_highlighted_sections", {"N": 1}, "detectable_format:number_highlighted_sections", "*a*", "a"),
    (
        "validate_sections",
        {"N": 2, "section_splitter": "Part (x)"},
        "detectable_format:multiple_sections",
        "Part (x) 1 a Part (x) 2 b",
        "Part x 1 a Part x 2 b",
    ),
    ("validate_json_format", {}, "detectable_format:json_format", '{"a": 1}', "a"),
    ("validate_repeat_prompt", {"original_prompt": "Say."}, "combination:repeat_prompt", "Say. ok", "ok"),
    ("validate_two_responses", {}, "combination:two_responses", "a******b", "a"),
    ("validate_uppercase", {}, "change_case:english_capital", "THIS IS A HOUSE", "This is a house"),
    ("validate_lowercase", {}, "change_case:english_lowercase", "this is a house", "This is a house"),
    (
        "validate_frequency_capital_words",
        {"N": 1, "quantifier": "at most"},
        "change_case:capital_word_frequency",
        "a NASA b",
        "NASA ESA",
    ),
    ("validate_end", {"end_phrase": "The end."}, "startend:end_checker", "So. The end.", "The end. So."),
    ("validate_quotation", {}, "startend:quotation", '"a"', "a"),
    ("validate_no_commas", {}, "punctuation:no_comma", "a b", "a, b"),
]
EXACT = [
    (
        "verify_keyword_frequency",
        {"word": "sea", "N": 1},
        "keywords:frequency",
        "Sea, and the seaside",
        "sea and sea",
    ),
    ("verify_letter_frequency", {"letter": "z", "N": 2}, "keywords:letter_frequency", "zz", "zzz"),
]


@pytest.mark.parametrize(
    ("rules", "case"), [("ifeval", c) for c in MAPPED] + [("mdpgrpo", c) for c in MAPPED + EXACT], ids=str
)
def test_a_function_becomes_the_instruction_that_asks_for_the_same(tmp_path: Path, rules: str, case: Any) -> None:
    function, arguments, instruction_id, follows, does_not = case
    names = "N quantifier end_phrase keyword_list word forbidden_words letter i first_word postscript_marker options "
    empty = dict.fromkeys((names + "section_splitter original_prompt language").split())
    ground_truth = json.dumps({"func_name": function, **empty, **arguments})
    got = read(tmp_path, {"messages": USER, "ground_truth": ground_truth, "constraint": "x"}, rules=rules)
    (example,) = got.examples
    assert example.instruction_ids == [instruction_id] and forms.RLVR in got.notes[0]
    for response, expected in ((follows, True), (does_not, False)):
        assert verifiers.verify(instruction_id, response, example.kwargs[0], rules=rules) is expected, response


def test_every_function_of_the_table_is_tested() -> None:
    assert {case[0] for case in MAPPED + EXACT} == set(forms.FUNCTIONS)


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ({"func_name": "verify_paragraph_count", "N": 2}, "no IFEval instruction asks for what verify_paragraph_count"),
        ({"func_name": "validate_choice", "options": ["a"]}, r"validate_choice among \['a'\] has no equal: IFEval's"),
        (
            {"func_name": "validate_word_constraint", "N": 9, "quantifier": "around"},
            "validate_word_constraint with quantifier 'around' has no equal under rules 'ifeval': ",
        ),
        (
            {"func_name": "verify_letter_frequency", "N": 9, "letter": "z"},
            "verify_letter_frequency with quantifier 'exactly' has no equal under rules 'ifeval': ",
        ),
        ({"func_name": "validate_end"}, "validate_end has no equal under rules 'ifeval': .*end_phrase: .*missing"),
        (
            {"func_name": "validate_word_constraint", "quantifier": "at most"},
            "validate_word_constraint with quantifier 'at most' has no equal",
        ),
        ({"func_name": "verify_keywords", "keyword_list": [3]}, "verify_keywords has no equal .*got 3"),
        ({"func_name": ["x"]}, "no IFEval instruction"),
    ],
)
def test_a_function_without_an_equal_is_a_bad_row(tmp_path: Path, ground_truth: Any, message: str) -> None:
    row = {"messages": USER, "ground_truth": json.dumps(ground_truth)}
    with pytest.raises(ConfigError, match=rf"p\.jsonl:2: ground_truth \(RLVR-IFeval\): {message}"):
        read(tmp_path, GOOD, row)
    got = read(tmp_path, GOOD, row, on_bad_row="drop")
    assert (
        len(got.examples) == 1 and "RLVR-IFeval" in got.dropped[0].reason and got.dropped[0].prompt == json.dumps(USER)
    )


# ---- TRL, verl, IFEval ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "note"),
    [
        ({"prompt": "The sky is"}, "The sky is", None),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is", None),
        ({"prompt": USER}, USER, None),
        ({"prompt": USER, "completion": ANSWERED[1:]}, USER, None),
        ({"prompt": ANSWERED}, ANSWERED, None),
        ({"messages": USER}, USER, forms.MESSAGES),
        ({"messages": json.dumps(USER)}, USER, forms.MESSAGES),
        ({"messages": ANSWERED}, USER, f"{forms.MESSAGES}; {forms.ANSWER}"),
        ({"messages": ANSWERED, "prompt": "x"}, "x", None),
    ],
)
def test_forms_of_trl(tmp_path: Path, row: Any, prompt: Any, note: str | None) -> None:
    got = read(tmp_path, row)
    assert got.examples[0].prompt == prompt and got.examples[0].columns == row, "a reward still has the answer"
    assert got.notes == ([f"{tmp_path / 'p.jsonl'}: {note}"] if note else [])


def test_messages_by_name_and_forms_that_some_rows_have(tmp_path: Path) -> None:
    rows = [{"messages": ANSWERED, "prompt": "x"}, {"messages": USER, "prompt": "y"}]
    got = read(tmp_path, *rows, prompt_column="messages")
    assert [e.prompt for e in got.examples] == [USER, USER]
    assert got.notes == [f"{tmp_path / 'p.jsonl'}: {forms.ANSWER} (1 of 2)"]
    with pytest.raises(ConfigError, match=r":1: 'messages' is empty"):
        read(tmp_path, {"messages": ANSWERED[1:]})


@pytest.mark.parametrize("own", [None, "own"])
def test_parquet_of_verl(tmp_path: Path, own: str | None) -> None:
    pandas, numpy = needed("pandas"), needed("numpy")
    row: dict[str, Any] = {
        "data_source": "openai/gsm8k",
        "prompt": numpy.array([{"role": "user", "content": "2+2?"}], dtype=object),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0, "split": "train"},
    }
    if own:
        row["ground_truth"] = own
    pandas.DataFrame([row]).to_parquet(tmp_path / "p.parquet")
    got = read_prompts(tmp_path / "p.parquet")
    (example,) = got.examples
    assert example.prompt == [{"role": "user", "content": "2+2?"}] and type(example.prompt) is list
    assert example.columns["ground_truth"] == (own or "4") and example.columns["data_source"] == "openai/gsm8k"
    assert example.columns["extra_info"] == {"index": 0, "split": "train"}
    assert got.notes == ([] if own else [f"{tmp_path / 'p.parquet'}: {forms.VERL}"])


def test_tools_and_calls_from_parquet_lose_what_the_table_filled_in(tmp_path: Path) -> None:
    pa, written = needed("pyarrow"), needed("pyarrow.parquet")
    calls = [{"function": {"name": n, "arguments": a}} for n, a in (("f", {"x": 1}), ("g", {"y": 2}))]
    prompt = [*USER, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "3"}]
    tools = [{"function": {"name": "f", "strict": True}}, {"function": {"name": "g"}}]
    written.write_table(pa.Table.from_pylist([{"prompt": prompt, "tools": tools}]), tmp_path / "p.parquet")
    (example,) = read_prompts(tmp_path / "p.parquet").examples
    assert example.prompt == [USER[0], {**prompt[1], "content": ""}, prompt[2]] and example.columns["tools"] == tools


def test_ifeval_as_the_hub_has_it(tmp_path: Path, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = peer("datasets")
    names = ["num_words", "relation", "num_highlights", "keywords", "language"]
    kwargs = [
        [dict.fromkeys(names), {**dict.fromkeys(names), **FIVE}],
        [{**dict.fromkeys(names), "keywords": ["sea"]}],
    ]
    ids = [["punctuation:no_comma", WORDS], ["keywords:existence"]]
    table = datasets.Dataset.from_dict(
        {"key": [1, 2], "prompt": ["a", "b"], "instruction_id_list": ids, "kwargs": kwargs}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": table}))
    got = read_prompts("google/IFEval")
    assert [e.instruction_ids for e in got.examples] == ids and not got.notes
    assert [e.kwargs for e in got.examples] == [[{}, FIVE], [{"keywords": ["sea"]}]]


# ---- what public reports have ---------------------------------------------------------------------------------------

THREE = [["punctuation:no_comma"], [WORDS], ["detectable_format:number_bullet_lists", "punctuation:no_comma"]]


@pytest.mark.parametrize(
    "name",
    "d03_json_strings.jsonl d04_if_rlvr.jsonl d07_bom.jsonl d08_array.json d09.parquet d09.jsonl.gz "
    "d17a_pandas_floatk.jsonl d17b_nan.jsonl".split(),
)
def test_reported_files_hold_the_same_three_prompts(shared_data, name: str) -> None:
    examples = read_prompts(shared_data(f"reports/{name}")).examples
    assert [e.instruction_ids for e in examples] == THREE
    assert [e.kwargs for e in examples] == [[{}], [FIVE], [{"num_bullets": 2}, {}]]
    assert [e.text[:20] for e in examples] == ["Write a short note a", "Write a short note a", "Tell me about the ma"]
    if name.startswith("d17"):
        assert [e.columns["num_constraints"] for e in examples] == [1, None, 2]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("d05_rlvr_ifeval_func.jsonl", 1, None),
        (
            "d05b_iftrain_id.jsonl",
            0,
            "d05b_iftrain_id.jsonl:1: .*'count:word_count_range'.* known under rules 'ifbench'",
        ),
        ("d06_one_bad_row.jsonl", 6, r"d06_one_bad_row.jsonl:7: .*unexpected argument 'keyword'"),
        ("d09.csv", 3, None),
        ("d11_one_long.jsonl", 4, None),
        ("d12_parts.jsonl", 1, None),
        ("d13_toolcall.jsonl", 1, None),
        ("d14_prefill.jsonl", 1, None),
        ("d15_rendered.jsonl", 1, None),
        ("d16_surrogate.jsonl", 0, r"d16_surrogate.jsonl:1: holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_reported_files_are_read_or_named(shared_data, name: str, count: int, message: str | None) -> None:
    path = shared_data(f"reports/{name}")
    if name.startswith("d05b"):
        assert len(read_prompts(path, PromptConfig(rules="ifbench")).examples) == 1
    if message:
        with pytest.raises(ConfigError, match=message):
            read_prompts(path)
    if count:
        assert len(read_prompts(path, PromptConfig(on_bad_row="drop")).examples) == count
    else:
        with pytest.raises(ConfigError, match="no prompt can be used: left out 1 of 1 rows"):
            read_prompts(path, PromptConfig(on_bad_row="drop"))
