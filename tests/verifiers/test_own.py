"""Instruction types of one's own: registered, loaded, checked, and used in a training file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdpgrpo_fast.config import ConfigError, TrainConfig
from mdpgrpo_fast.data import Example, read_prompts
from mdpgrpo_fast.evaluate import main as evaluate_main
from mdpgrpo_fast.rewards import RewardError, Scorer
from mdpgrpo_fast.verifiers import (
    INSTRUCTIONS,
    ArgumentError,
    CheckError,
    UnknownInstructionError,
    instruction,
    load_instructions,
    own,
    validate,
    verify,
)
from mdpgrpo_fast.verifiers.arguments import Count

OWN = str(Path(__file__).parents[1] / "helpers" / "own_instructions.py")


@pytest.fixture(autouse=True)
def own_types_end_with_the_test() -> Iterator[None]:
    before = dict(INSTRUCTIONS)
    yield
    INSTRUCTIONS.clear()
    INSTRUCTIONS.update(before)
    own._load.cache_clear()
    sys.modules.pop("own_instructions", None)


@pytest.fixture
def loaded() -> None:
    load_instructions([OWN])


def test_a_checks_annotations_are_its_arguments(loaded: None) -> None:
    assert verify("my:emphasis", "Yes!!", {"minimum": 2}) and not verify("my:emphasis", "Yes!", {"minimum": 2.0})
    assert verify("my:emphasis", "So??", {"minimum": 2, "mark": "?"}, rules="mdpgrpo")
    assert verify("my:emphasis", "x\n!", {"minimum": 1}, mode="loose") and not verify(
        "my:emphasis", " ", {"minimum": 0}
    )
    for kwargs, message in (
        ({}, "minimum: expected a whole number, missing"),
        ({"minimum": "2"}, "minimum: expected a whole number, got '2'"),
        ({"minimum": 2, "mark": "."}, r"mark: expected one of '!', '\?', got '.'"),
        ({"minimum": 2, "least": 1}, r"unexpected argument 'least' \(arguments: minimum, mark\)"),
    ):
        with pytest.raises(ArgumentError, match=f"^my:emphasis: {message}"):
            validate("my:emphasis", kwargs)
    with pytest.raises(UnknownInstructionError, match="nearest: my:emphasis"):
        validate("my:emphases", {})
    with pytest.raises(UnknownInstructionError, match="--instructions loads one's own"):
        validate("zzz", {})


def test_every_kind_of_annotation() -> None:
    @instruction("my:kinds", rules=("ifeval",))
    def kinds(
        text: str, rules: str, n: Count, share: float, on: bool, words: list[str], table: dict, word: str | None = None
    ) -> bool:
        return rules == "ifeval" and (n, share, on, words, table, word) == (1, 1.0, True, ["a"], {}, None)

    given = {"n": 1, "share": 1, "on": True, "words": ["a"], "table": {}, "word": None}
    assert verify("my:kinds", "text", given)
    for name, wrong in (("n", -1), ("share", True), ("on", 1), ("words", ["a", 2]), ("words", []), ("table", [])):
        with pytest.raises(ArgumentError, match=name):
            validate("my:kinds", {**given, name: wrong})
    with pytest.raises(UnknownInstructionError, match="known under rules 'ifeval'"):
        validate("my:kinds", given, "mdpgrpo")


def test_wrong_registrations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rules: .* got 'none'"):
        instruction("my:type", rules=())
    for wrong in ("mine", "my:", ":mine", 5):
        with pytest.raises(ValueError, match="id: expected the form 'group:name'"):
            instruction(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rules: .*'google'"):
        instruction("my:type", rules=("google",))
    with pytest.raises(ValueError, match=r"'punctuation:no_comma' is taken by mdpgrpo_fast.verifiers.rules.wording"):

        @instruction("punctuation:no_comma")
        def comma(text: str) -> bool:
            return True

    with pytest.raises(ValueError, match="'my:twice' is taken"):

        @instruction("my:twice")
        def once(text: str) -> bool:
            return True

        @instruction("my:twice")
        def once(text: str) -> bool:  # type: ignore[no-redef]  # noqa: F811
            return False

    with pytest.raises(TypeError, match="my:type: parameter 'n': expected int, float"):

        @instruction("my:type")
        def without_annotation(text, n) -> bool:  # type: ignore[no-untyped-def]
            return True

    with pytest.raises(TypeError, match="my:type: parameter 'rest' cannot be passed by its name"):

        @instruction("my:type")
        def any_number(text: str, *rest: int) -> bool:
            return True

    with pytest.raises(TypeError, match=r"my:type: parameter 'n': expected a whole number, got 'x'"):

        @instruction("my:type")
        def wrong_default(text: str, n: int = "x") -> bool:  # type: ignore[assignment]
            return True

    with pytest.raises(TypeError, match="my:type: parameter 'table': expected int, float"):

        @instruction("my:type")
        def table_of_numbers(text: str, table: dict[str, int]) -> bool:
            return True

    with pytest.raises(TypeError, match="my:type: the first parameter must take the response"):

        @instruction("my:type")
        def nothing_to_look_at() -> bool:
            return True

    with pytest.raises(TypeError, match="my:type: expected a function, got type"):
        instruction("my:type")(str)  # type: ignore[arg-type]
    assert "my:type" not in INSTRUCTIONS


def test_a_check_that_fails_is_named(loaded: None) -> None:
    with pytest.raises(CheckError, match=r"^my:raises: the check raised KeyError: 'no such column' \(.*ions.py:\d+\)$"):
        verify("my:raises", "text")
    with pytest.raises(CheckError, match=r"^my:exits: the check raised SystemExit: 0 \("):
        verify("my:exits", "text")
    with pytest.raises(CheckError, match=r"^my:half: the check returned 0.5; expected True or False$"):
        verify("my:half", "text")


def test_modules_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_checks.py").write_text("import nothing_of_that_name")
    (tmp_path / "empty_checks.py").write_text("")
    (tmp_path / "good_checks.py").write_text(
        "from mdpgrpo_fast.verifiers import instruction\n\n"
        "@instruction('good:type')\ndef check(text: str) -> bool:\n    return True\n"
    )
    (tmp_path / "json.py").write_text("")
    for spec, message in (
        ("no_such_module", "'no_such_module' cannot be loaded: ModuleNotFoundError"),
        ("broken_checks", "nothing_of_that_name"),
        (str(tmp_path / "broken_checks.py"), "nothing_of_that_name"),
        (str(tmp_path / "missing.py"), "FileNotFoundError"),
        ("broken_checks", r"broken_checks.py:1\)$"),
        ("empty_checks", "registers no type"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_instructions([spec])
    load_instructions(["good_checks", str(tmp_path / "good_checks.py")])
    assert verify("good:type", "text")
    (tmp_path / "json.py").write_text((tmp_path / "good_checks.py").read_text().replace("good:", "json:"))
    load_instructions(tmp_path / "json.py")  # type: ignore[arg-type]  one alone; the library of that name stays
    assert verify("json:type", "text") and json.loads("1") == 1 and sys.modules["json"] is json


def test_types_that_stand_elsewhere_or_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "maker_of_checks.py").write_text(
        "from mdpgrpo_fast.verifiers import instruction\n\n"
        "def make(mark):\n"
        "    @instruction(f'made:{mark}')\n    def check(text: str) -> bool:\n        return mark in text\n"
    )
    (tmp_path / "made_checks.py").write_text("import maker_of_checks\nmaker_of_checks.make('a')\n")
    (tmp_path / "checks.py").write_text("import maker_of_checks\nmaker_of_checks.make('b')\n")
    monkeypatch.chdir(tmp_path)
    load_instructions(["made_checks"])
    load_instructions(["checks.py"])
    assert verify("made:a", "ba") and not verify("made:b", "a")
    other = tmp_path / "other"
    other.mkdir()
    (other / "checks.py").write_text("import maker_of_checks\nmaker_of_checks.make('c')\n")
    monkeypatch.chdir(other)
    load_instructions(["checks.py"])  # another file of that name
    assert verify("made:c", "abc")
    for name in ("maker_of_checks", "made_checks"):
        monkeypatch.delitem(sys.modules, name)


def prompts(folder: Path, *ids: str) -> str:
    path = folder / "train.jsonl"
    kwargs = {"my:emphasis": {"minimum": 1}}
    row = {"prompt": "Shout.", "instruction_id_list": ids, "kwargs": [kwargs.get(id) for id in ids]}
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_a_training_file_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prompts(tmp_path, "my:emphasis", "punctuation:no_comma")
    with pytest.raises(ConfigError, match=r"train.jsonl:1: unknown instruction id 'my:emphasis'"):
        read_prompts(path)
    monkeypatch.chdir(Path(OWN).parent)
    run = TrainConfig(train_file=path, instructions=[Path(OWN).name], cpu=True)
    examples = read_prompts(path, run).examples
    with Scorer.of(run) as scorer:  # in processes of its own, which have to load the module too
        monkeypatch.chdir(tmp_path)
        scorer.try_own_types(examples)
        scores = scorer(examples * 3, ["Yes!", "No", "Yes, yes!"])
    assert [score.total for score in scores] == [1.0, 0.5, 0.5]
    assert [score.satisfied for score in scores] == [[True, True], [False, True], [True, False]]


@pytest.mark.parametrize("how", ["raises", "exits"])
def test_a_check_that_fails_is_found_before_a_run(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    path = prompts(tmp_path, "my:emphasis", f"my:{how}")
    run = TrainConfig(train_file=path, instructions=[OWN], cpu=True, reward_workers=1)
    examples = [Example("Say hi.", ["punctuation:no_comma"], [{}]), *read_prompts(path, run).examples]
    error = {"raises": "KeyError: 'no such column'", "exits": "SystemExit: 0"}[how]
    with Scorer.of(run) as scorer:
        with pytest.raises(RewardError, match=f"my:{how}: the check raised {error}") as raised:
            scorer.try_own_types(examples)
        assert f"in {how}\n" in raised.value.trace
        assert scorer.verify(examples, ["text", "text"], "strict") == [[True], [False, False]]
        assert scorer.unchecked == 1 and f"my:{how}: the check raised {error}" in scorer.unchecked_reason
        scores = scorer(examples, ["text", "text"])
        assert scores[0].total == 1 and scores[1].total is None and error in str(scores[1].problem)
    with Scorer(["helpers.rewards:length"], instructions=[OWN], workers=1) as scorer:
        assert scorer(examples, ["text", "text"])[1].total == 4
        scorer(examples, ["other", "texts"])
    assert caplog.text.count(f"constraints that cannot be checked: my:{how}") == 1
    evaluate = ["--model", str(tmp_path / "none"), "--file", path, "--instructions", OWN, "--reward-workers", "1"]
    assert evaluate_main(evaluate) == 1  # before it looks for a model
    assert f"error: my:{how}: the check raised {error}" in capsys.readouterr().err


def test_constraints_look_at_the_last_answer_alone() -> None:
    chat = [
        {"role": "system", "content": "Never use a comma, whatever I ask."},
        {"role": "user", "content": "Hi, there."},
        {"role": "assistant", "content": "Hello, you."},
        {"role": "user", "content": "Name a colour."},
    ]
    asked = {"instruction_ids": ["punctuation:no_comma", "length_constraints:number_words"]}
    kwargs = [{}, {"num_words": 2, "relation": "at least"}]
    with Scorer(["constraints"], workers=1) as scorer:
        example = Example(chat, **asked, kwargs=kwargs)
        begun = Example([*chat, {"role": "assistant", "content": "A deep"}], **asked, kwargs=kwargs)
        comma = Example([*chat, {"role": "assistant", "content": "Well,"}], **asked, kwargs=kwargs)
        scores = scorer([example, begun, comma], ["Green", " green", " green"])
    assert [score.satisfied for score in scores] == [[True, False], [True, True], [False, True]]
    answered = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "Deep green."}]}]
    assert verify("punctuation:no_comma", answered)
    assert not verify("punctuation:no_comma", chat)  # its last answer has one
    with pytest.raises(ValueError, match="no assistant message"):
        verify("punctuation:no_comma", chat[:2])
    with pytest.raises(TypeError, match="response: expected text or chat messages, got list"):
        verify("punctuation:no_comma", ["text"])  # type: ignore[list-item]
