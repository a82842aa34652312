"""The command line of the verifiers: types listed, response files scored."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.verifiers import INSTRUCTIONS, RULES, MissingRequirementError, validate
from mdpgrpo_fast.verifiers.__main__ import main, score
from mdpgrpo_fast.verifiers.scoring import _opens_block, accuracy, score_files, strict_and_loose, table

PROMPTS = [
    {
        "key": 1,
        "prompt": "Write two words.",
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
        "kwargs": [{"num_words": 2, "relation": "at least", "keyword": None}, {}],
    },
    {"key": 2, "prompt": "Quote.", "instruction_id_list": ["startend:quotation"], "kwargs": [None]},
    {"key": 3, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
]
RESPONSES = [
    {"prompt": "Quote.", "response": 'Here it is:\n"Quoted."'},
    {"prompt": "No commas.", "response": [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "ab"}]},
    {"prompt": "Write two words.", "response": "One, two"},
]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    prompts, responses = lines(tmp_path / "prompts.jsonl", PROMPTS), lines(tmp_path / "responses.jsonl", RESPONSES)
    return ["--prompts", prompts, "--responses", responses]


def test_the_accuracies_of_a_response_file(files: list[str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    output, verdicts = tmp_path / "scores.json", tmp_path / "verdicts.jsonl"
    assert score([*files, "--json", "--output", str(output), "--verdicts", str(verdicts)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.read_text())
    assert (result["prompt_strict"], result["prompt_loose"]) == (1 / 3, 2 / 3)
    assert (result["instruction_strict"], result["instruction_loose"]) == (2 / 4, 3 / 4)
    assert result["ssr"] == pytest.approx((0.5 + 0 + 1) / 3) and result["count"] == 3
    assert result["types"]["punctuation:no_comma"] == {"strict": 0.5, "loose": 0.5, "count": 2}
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert [row["strict"] for row in rows] == [[True, False], [False], [True]]
    assert rows[1]["loose"] == [True] and rows[2]["response"] == "ab" and rows[0]["key"] == 1
    assert score(files) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "3 prompts" and table[3].split() == ["instruction", "level", "0.500", "0.750"]


def test_rows_are_matched_by_prompt_or_by_key(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json.gz"
    prompts.write_bytes(gzip.compress(json.dumps(PROMPTS).encode()))
    by_key = [{"key": key, "response": text} for key, text in ((3, "a, b"), (1, "a b"), (2, None), (3, "ab"))]
    by_key.append({"key": 9, "response": "no prompt's"})
    scored, notes = score_files(prompts, lines(tmp_path / "responses.jsonl", by_key))
    assert [row.strict for row in scored] == [[True, True], [False], [True]]  # the last response to a prompt counts
    assert notes == ["responses left out, to no prompt: 1", "responses left out, to the prompt of a later one: 1"]


def test_columns_of_json_text_and_of_tables(tmp_path: Path) -> None:
    row = {**PROMPTS[0], "instruction_id_list": json.dumps(PROMPTS[0]["instruction_id_list"])}
    row["kwargs"] = '[{"num_words": 2.0, "relation": "at least", "keyword": NaN}, null]'
    scored, notes = score_files(
        lines(tmp_path / "prompts.jsonl", [row]), lines(tmp_path / "responses.jsonl", RESPONSES[2:])
    )
    assert [one.strict for one in scored] == [[True, False]] and notes == []


def test_the_answer_that_a_prompt_began_and_think_blocks(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    asked = [{**PROMPTS[2], "prompt": prompt}, {**PROMPTS[2], "prompt": "Think."}]
    answers = [{"prompt": prompt, "response": "yes"}, {"prompt": "Think.", "response": "<think>a, b</think>ab"}]
    files = lines(tmp_path / "prompts.jsonl", asked), lines(tmp_path / "responses.jsonl", answers)
    assert [row.strict for row in score_files(*files)[0]] == [[False], [False]]
    scored = score_files(*files, strip_thinking=True)[0]
    assert [row.strict for row in scored] == [[False], [True]]
    assert [row.response for row in scored] == ["Well, yes", "ab"]
    answers[0]["response"] = "<think>x</think>ok"  # what the prompt began stays
    files = files[0], lines(tmp_path / "responses.jsonl", answers)
    assert score_files(*files, strip_thinking=True)[0][0].response == "Well, ok"
    asked[0]["prompt"] = answers[0]["prompt"] = [prompt[0], {"role": "assistant", "content": "<think>"}]
    answers[0]["response"] = "a thought without an end"
    files = lines(tmp_path / "prompts.jsonl", asked), lines(tmp_path / "responses.jsonl", answers)
    assert score_files(*files, strip_thinking=True)[0][0].response == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, r: r.pop(), r"responses.jsonl: no response to .*prompts.jsonl:1, prompt \"Write two words"),
        (
            lambda p, r: r[1].pop("response"),
            r"responses.jsonl:2: expected prompt \(or key\) and response; got 'prompt'",
        ),
        (lambda p, r: r[0].update(response=5), r"responses.jsonl:1: response: expected text or chat messages, got int"),
        (lambda p, r: r[0].update(response=0), r"responses.jsonl:1: response: expected text or chat messages, got int"),
        (lambda p, r: r[0].update(response=[]), r"responses.jsonl:1: response: the chat has no assistant message"),
        (
            lambda p, r: [x.update(prompt=[{"role": "assistant", "content": 5}]) for x in (p[1], r[0])],
            "prompts.jsonl:2: response: the content of a message must be text",
        ),
        (lambda p, r: p[1].pop("kwargs"), r"prompts.jsonl:2: .* lists of one length; got 1 and NoneType"),
        (lambda p, r: p[1]["kwargs"].append({}), r"prompts.jsonl:2: .* lists of one length; got 1 and 2"),
        (lambda p, r: p[1].update(kwargs="[{"), r"prompts.jsonl:2: .* lists, or JSON text"),
        (lambda p, r: [p[1].pop(name) for name in ("prompt", "key")], r"prompts.jsonl:2: expected prompt \(or key\)"),
        (lambda p, r: [x.update(instruction_id_list=[], kwargs=[]) for x in p], "no prompts with constraints"),
        (lambda p, r: p[2].update(instruction_id_list=["punctuation:no_coma"]), r":3: .*nearest: punctuation:no_comma"),
        (lambda p, r: p[0]["kwargs"][0].pop("num_words"), r"prompts.jsonl:1: .*num_words: .*missing"),
        (lambda p, r: p.insert(0, 5), r"prompts.jsonl:1: a row must be a JSON object; got int"),
        (lambda p, r: p.clear(), r"prompts.jsonl holds no prompts"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Any, message: str) -> None:
    prompts, responses = json.loads(json.dumps(PROMPTS)), json.loads(json.dumps(RESPONSES))
    change(prompts, responses)
    paths = lines(tmp_path / "prompts.jsonl", prompts), lines(tmp_path / "responses.jsonl", responses)
    with pytest.raises(ConfigError, match=message):
        score_files(*paths)


def test_wrong_command_lines(files: list[str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert score(["--prompts", files[1], "--responses", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl' does not exist" in capsys.readouterr().err
    (tmp_path / "no.jsonl").write_text("{\n")
    assert score(["--prompts", files[1], "--responses", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl:1: no JSON" in capsys.readouterr().err
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-20] + b"x" * 12)
    assert score(["--prompts", files[1], "--responses", str(tmp_path / "cut.gz")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    there = tmp_path / "there.json"
    there.write_text("kept")
    for command, arguments, message in (
        (score, files[:2], "required: --responses"),
        (score, files[2:], "required: --prompts"),
        (main, ["--list", *files], "unrecognized"),
        (main, ["--list", "--get-punkt"], "not allowed with"),
        (main, ["--get-punkt", "--json"], "--json needs --list"),
        (main, ["--rules", "iftrain"], "--rules needs --list"),
        (score, [*files, "--output", str(tmp_path)], "cannot be written"),
        (score, [*files, "--output", str(tmp_path / "none" / "x.json")], "does not exist"),
        (score, [*files, "--output", str(there)], "there.json' exists already; --overwrite replaces it"),
        (score, [*files, "--verdicts", files[3], "--overwrite"], "is another file of this command"),
        (score, [*files, "--output", "x.json", "--verdicts", "x.json"], "'x.json' is another file of this command"),
        (score, [*files, "--rules", "google"], "invalid choice"),
        (main, ["--lists"], "unrecognized"),
    ):
        with pytest.raises(SystemExit) as end:
            command(arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1
    assert there.read_text() == "kept" and Path(files[3]).read_text()


@pytest.mark.parametrize("rules", RULES)
def test_every_type_is_listed_with_an_example_that_it_takes(rules: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["--list", "--rules", rules, "--json"]) == 0
    listed = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(listed) == {id for id, entry in INSTRUCTIONS.items() if rules in entry.rules}
    for id, row in listed.items():
        assert row["description"], id
        try:
            validate(id, row["example"], rules)
        except MissingRequirementError as error:
            assert "pip install" in str(error) or "--get-" in str(error)


def test_the_list_reads_well(capsys: pytest.CaptureFixture) -> None:
    assert main(["--list", "--rules", "mdpgrpo"]) == 0
    said = capsys.readouterr().out
    assert (
        "length_constraints:number_words   (ifeval, mdpgrpo, iftrain, ifbench)\n"
        "    `relation` `num_words` words.\n"
        "    num_words: a whole number from 0\n"
        "    relation: a relation, such as 'at least' or 'less than'\n"
        '    example: {"num_words": 3, "relation": "at least"}\n'
    ) in said


def test_it_runs_without_torch(files: list[str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from mdpgrpo_fast.verifiers.__main__ import score; sys.exit(score())"
    )
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("3 prompts"), done.stderr


def test_own_types_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = str(Path(__file__).parents[1] / "helpers" / "own_instructions.py")
    rows = [{"prompt": "Shout.", "instruction_id_list": ["my:emphasis"], "kwargs": [{"minimum": 1}]}]
    prompts = lines(tmp_path / "prompts.jsonl", rows)
    responses = lines(tmp_path / "responses.jsonl", [{"prompt": "Shout.", "response": "Yes!"}])
    command = [sys.executable, "-m", "mdpgrpo_fast", "score", "--prompts", prompts, "--responses", responses]
    done = subprocess.run([*command, "--instructions", own, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["types"]["my:emphasis"]["strict"] == 1, done.stderr
    rows[0] |= {"instruction_id_list": ["my:exits"], "kwargs": [None]}
    lines(tmp_path / "prompts.jsonl", rows)
    done = subprocess.run([*command, "--instructions", own], capture_output=True, text=True)
    assert done.returncode == 1 and "prompts.jsonl:1: my:exits: the check raised SystemExit: 0" in done.stderr
    lines(tmp_path / "prompts.jsonl", [{**rows[0], "instruction_id_list": ["my:emphasis"]}])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown instruction id 'my:emphasis'" in done.stderr


# ---- on the edge ----------------------------------------------------------------------------------------------------


def test_accuracies_of_nothing_and_of_lists_that_do_not_fit() -> None:
    nothing = {"hsr": None, "ssr": None, "instruction": None, "count": 0, "types": {}}
    assert accuracy([], []) == nothing == accuracy([[], []], [[], []])
    got = strict_and_loose([["a", "b"], ["a"]], [[True, False], [True]], [[True, True], [True]])
    assert got == {
        "prompt_strict": 0.5, "instruction_strict": 2 / 3, "prompt_loose": 1.0, "instruction_loose": 1.0, "hsr": 0.5,
        "ssr": 0.75, "count": 2,
        "types": {"a": {"strict": 1.0, "loose": 1.0, "count": 2}, "b": {"strict": 0.0, "loose": 1.0, "count": 1}},
    }  # fmt: skip
    for ids, verdicts in (([["a"]], []), ([["a", "b"]], [[True]])):
        with pytest.raises(ValueError, match="zip"):
            accuracy(ids, verdicts)
    assert table(got).split("\n") == [
        "2 prompts",
        f"{'':42}  strict   loose",
        f"{'prompt level (all constraints, HSR)':42}   0.500   1.000",
        f"{'instruction level':42}   0.667   1.000",
        f"{'share per prompt (SSR)':42}   0.750",
        f"  {'a':34}    2    1.000   1.000",
        f"  {'b':34}    1    0.000   1.000",
    ]


def test_blank_lines_null_responses_and_what_each_row_was(tmp_path: Path) -> None:
    prompts = "\n\n".join(map(json.dumps, PROMPTS)) + "\n"
    answers = [{"key": 1, "response": None}, {"key": 2, "response": "b"}, {"key": 3, "response": "c"}]
    (tmp_path / "p.jsonl").write_text(prompts)
    (tmp_path / "r.jsonl").write_text("\n" + "\n \n".join(map(json.dumps, answers)))
    scored, notes = score_files(tmp_path / "p.jsonl", tmp_path / "r.jsonl")
    assert [(s.key, s.prompt, s.response) for s in scored] == [
        (1, "Write two words.", ""), (2, "Quote.", "b"), (3, "No commas.", "c"),
    ]  # fmt: skip
    assert notes == []
    (tmp_path / "p.jsonl").write_text(json.dumps({k: v for k, v in PROMPTS[2].items() if k != "key"}))
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": PROMPTS[2]["prompt"], "response": "by its prompt"}))
    assert [s.response for s in score_files(tmp_path / "p.jsonl", tmp_path / "r.jsonl")[0]] == ["by its prompt"]
    with pytest.raises(AttributeError):
        scored[0].key = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="rules: expected one of"):
        score_files(tmp_path / "none", tmp_path / "none", rules="no such")


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ("[2]", "", "p.json: a row must be a JSON object; got int"),
        ('[{"instruction_id_list": [], "kwargs": []}]', "", r"p.json row 1: expected prompt \(or key\); got 'instr"),
        ('{"key": 1, "instruction_id_list": [], "kwargs": []}\n[{}]', "", "p.json:2: a row must be .* got list"),
        ('[{"instruction_id_list": [], "kwargs": []}]', "", "got 'instruction_id_list', 'kwargs'$"),
        ("[]", '[{"key": 1, "response": ""}, {}]', r"r.json row 2: expected prompt \(or key\) and .*; got no columns$"),
        ("[]", '[{"response": ""}]', r"r.json row 1: expected prompt \(or key\) and response; got 'response'$"),
        ('{"key": 1}', "", "p.json:1: instruction_id_list and kwargs must be lists of one length; got NoneType and N"),
        ('{"key": 1, "instruction_id_list": ["no:such"], "kwargs": [{}]}', '{"key": 1, "response": ""}', "no:such"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, prompts: str, responses: str, message: str) -> None:
    (tmp_path / "p.json").write_text(prompts)
    (tmp_path / "r.json").write_text(responses or '[{"key": 1, "response": ""}]')
    with pytest.raises(ConfigError, match=message):
        score_files(tmp_path / "p.json", tmp_path / "r.json")


def test_a_chat_opens_a_think_block_where_its_last_message_ends_in_one() -> None:
    said = {"role": "user", "content": "a"}
    opened, closed = ({"role": "assistant", "content": text} for text in ("So: <think>\n", "<think> b </think>"))
    for chat, inside in (
        ([said, opened], True), ([opened, said], False), ([said, closed], False), ([], False), (["<think>"], False),
        ([said, {"role": "assistant", "content": None}], False), ([opened, said, said], False),
        ([said, said, opened], True), ([{"role": "assistant"}], False),
    ):  # fmt: skip
        assert _opens_block(chat) is inside, chat
