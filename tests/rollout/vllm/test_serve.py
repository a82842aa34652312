"""`mdpgrpo vllm-serve`: the command line it becomes, and what it refuses before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.inputs import ROOT
from helpers.vllm import vllm_sources

import mdpgrpo_fast.__main__ as console
from mdpgrpo_fast.rollout.vllm import serve
from mdpgrpo_fast.rollout.vllm.door import GUARD

FIXED = [
    "--enable-scale-out",
    "--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "mdpgrpo_fast.rollout.vllm.worker.WeightSync",
    "--generation-config", "vllm",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def arguments(*argv: str) -> list[str]:
    """What vLLM gets."""
    words = serve.command(list(argv))
    assert words[:4] == [sys.executable, "-m", serve.MODULE, "--model"]
    return words[4:]


def test_it_listens_to_its_own_machine_alone() -> None:
    assert arguments("some/model") == ["some/model", *FIXED, "--host", "127.0.0.1"]
    own = ["--port", "8001", "--enforce-eager", "--lora-modules", "a=b", "c=d"]
    assert arguments("m", *own) == ["m", *own, *FIXED, "--host", "127.0.0.1"]
    for host in ("localhost", "::1", "127.0.0.2"):
        assert arguments("m", "--host", host, "-tp", "2") == ["m", "-tp", "2", *FIXED, "--host", host]
    # vLLM takes the beginning of a flag for the flag, and the last one counts.
    assert arguments("m", "--hos", "0.0.0.0")[-2:] == ["--host", "127.0.0.1"]


def test_with_a_key_every_path_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "some-key")
    for host in ("0.0.0.0", "127.0.0.1"):
        words = arguments("m", f"--host={host}", "--middleware", "own.Thing")
        # The last middleware is the outermost.
        assert words == ["m", "--middleware", "own.Thing", *FIXED, "--host", host, "--middleware", GUARD]
        assert "some-key" not in " ".join(words)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["m", "--host", "0.0.0.0"], "--host must be 127.0.0.1, or VLLM_API_KEY be set: whoever reaches '0.0.0.0'"),
        (["m", "--host=::"], "VLLM_API_KEY be set"),
        (["m", "--host="], "VLLM_API_KEY be set"),
        (["m", "--host", "127.0.0.1", "--host", "10.1.2.3"], "whoever reaches '10.1.2.3'"),
        (["m", "--host", "trainer.example"], "VLLM_API_KEY be set"),
        (["m", "--host"], "--host"),
        (["m", "--api-key", "secret"], "--api-key must be left out"),
        (["m", "--api_key=secret"], "--api-key must be left out"),
        (["m", "--api-k=secret"], "--api-key must be left out"),
        (["m", "--logprobs-mode", "raw_logprobs"], "--logprobs-mode must be left out: vllm-serve sets it"),
        (["m", "--worker_extension_cls=x"], "--worker-extension-cls must be left out"),
        (["--port", "8000"], "needs a MODEL"),
        (["--host", "127.0.0.1"], "needs a MODEL"),
    ],
)
def test_refusals(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("vLLM was started"))
    with pytest.raises(SystemExit) as e:
        console.main(["vllm-serve", *argv])
    shown = capsys.readouterr()
    assert e.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and said in shown.err and shown.err.count("\n") == 1
    assert "secret" not in shown.err


def test_a_bad_key_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    with pytest.raises(SystemExit):
        serve.main(["m", "--host", "0.0.0.0"])
    shown = capsys.readouterr().err
    assert shown.startswith("error: VLLM_API_KEY must be printable") and "secret" not in shown


def test_without_vllm_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as e:
        serve.main(["m"])
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: vllm-serve needs the package vllm: pip install 'mdpgrpo-fast[vllm]'\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mdpgrpo vllm-serve MODEL") and "VLLM_API_KEY" in text


def test_it_becomes_vllm(tmp_path: Path) -> None:
    """Against a stand-in package whose module shows what it was started with."""
    module = tmp_path / (serve.MODULE.replace(".", "/") + ".py")
    module.parent.mkdir(parents=True)
    module.write_text(
        "import json, os, sys\nprint(json.dumps([os.getpid(), sys.argv[1:], os.environ['VLLM_SERVER_DEV_MODE']]))\n"
        "sys.exit(7)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "VLLM_API_KEY": "some-key"}
    with subprocess.Popen(
        [sys.executable, "-m", "mdpgrpo_fast", "vllm-serve", "some/model", "--port", "8001", "--host", "0.0.0.0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        out, err = process.communicate(timeout=100)
    pid, words, mode = json.loads(out)
    assert process.returncode == 7 and pid == process.pid and mode == "1"
    expected = ["--model", "some/model", "--port", "8001", *FIXED, "--host", "0.0.0.0", "--middleware", GUARD]
    assert words == expected and " ".join(expected) in err and "some-key" not in err


def test_what_it_starts_is_in_the_installed_vllm() -> None:
    root = vllm_sources()
    text = (root.parent / (serve.MODULE.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":' in text
    register = (root / "entrypoints/serve/middleware/register.py").read_text(encoding="utf-8")
    assert register.rindex("args.middleware") > register.rindex("AuthenticationMiddleware"), "ours is the outermost"
