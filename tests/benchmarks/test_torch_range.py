"""What the trial of another torch takes for a failure: a backend that is here and raises."""

from __future__ import annotations

import sys

import pytest
from helpers.inputs import ROOT

import mdpgrpo_fast
from mdpgrpo_fast.ops import backends

sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))

from torch_range import TRIAL

REAL = mdpgrpo_fast.token_loss


class InterpreterError(Exception):
    """Of the name that Triton's interpreter gives its own."""


def trial(monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception) -> None:

    def token_loss(*args: object, backend: str = "auto", **how: object) -> object:
        if backend == failing:
            raise error
        return REAL(*args, backend="torch", **how)  # type: ignore[arg-type]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(mdpgrpo_fast, "token_loss", token_loss)
    reasons = {"cpu": "it is not built", "cuda": "it is not built", "triton": None}
    monkeypatch.setattr(backends, "refuses", lambda name, *_: reasons[name])
    exec(TRIAL, {})


def test_a_backend_that_is_here_has_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, error in (("torch", ValueError("broken")), ("triton", ValueError("broken"))):
        with pytest.raises(ValueError, match="broken"):
            trial(monkeypatch, name, error)
    with pytest.raises(InterpreterError):
        trial(monkeypatch, "torch", InterpreterError("of another"))


def test_what_is_not_here_and_the_interpreter_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial(monkeypatch, "triton", InterpreterError("no scalar"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "backend 'torch': its loss is right",
        "backend 'cpu' is not here: it is not built",
        "backend 'triton' does not run in Triton's interpreter: no scalar",
    ]
