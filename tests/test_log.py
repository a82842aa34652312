"""What is printed of others' text: nothing of it is a command to the terminal."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import mdpgrpo_fast.train as train
from mdpgrpo_fast import evaluate
from mdpgrpo_fast.cli import report_errors
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.data import Example
from mdpgrpo_fast.log import log, printable, say_once
from mdpgrpo_fast.rewards import RewardError, Score
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.training.run_dir import completion_row
from mdpgrpo_fast.training.show.progress import sample_table, say
from mdpgrpo_fast.verifiers import __main__ as commands

# A window's title, a screen wiped, the line written over, the start of a sequence in one byte, text turned round.
EVIL = "\x1b]0;title\x07 \x1b[2J \rover \x9b31m \u202eback\u2066 \u2028 \ud800 \x00\x7f"
SHOWN = r"\x1b]0;title\x07 \x1b[2J \rover \x9b31m \u202eback\u2066 \u2028 \ud800 \x00\x7f"


def test_what_a_terminal_would_obey_is_spelled() -> None:
    assert printable(EVIL) == SHOWN and printable(SHOWN) == SHOWN
    assert printable("a\tb\nc é 日本 𝄞 עברית 👩‍🚀") == "a\tb\nc é 日本 𝄞 עברית 👩‍🚀"
    assert all(printable(chr(c)) != chr(c) for c in [*range(32), *range(127, 160)] if chr(c) not in "\t\n")


def test_commands_and_the_log_print_no_sequences(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(EVIL)
    row = completion_row(1, "train", Example("a"), EVIL, 1.0, Score(1.0, {}, [True]), 0.0, True)
    assert row["response"] == EVIL  # files keep it
    say(sample_table([row]))
    with pytest.raises(SystemExit), report_errors():
        raise ConfigError(EVIL)
    for failure in (RewardError(EVIL, f"Traceback {EVIL}"), RolloutError(EVIL)):
        train._say_failure(None, failure)

    def fails(config: Any) -> Any:
        raise RewardError(EVIL, EVIL)

    monkeypatch.setattr("mdpgrpo_fast.evaluation.run.run", fails)
    assert evaluate.main([]) == 1
    monkeypatch.setattr("mdpgrpo_fast.evaluation.tables.table", lambda result: EVIL)
    found = {"notes": [EVIL], "suite": {"error": EVIL}}
    monkeypatch.setattr("mdpgrpo_fast.evaluation.run.run", lambda config: found)
    assert evaluate.main([]) == 1
    assert commands._reported(lambda: (_ for _ in ()).throw(RuntimeError(EVIL))) == 1  # type: ignore[arg-type]
    log.warning("%s", EVIL)
    say_once(logging.WARNING, f"once {EVIL}")
    printed = capsys.readouterr()
    assert printed.out == f"{SHOWN}\n" and printed.err.count(SHOWN) >= 10
    assert [r.getMessage() for r in caplog.records] == [SHOWN, f"once {SHOWN}"]
    assert not any(c in printed.err for c in "\x1b\x07\x9b\u202e\x00\ud800")
