"""verl finds our plug-in by its entry point, in any process of its own, and the command tells what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.inputs import ROOT

from mdpgrpo_fast.integrations.verl.plugin import PARTS


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, in which nothing of verl's or ours is set but what is given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


def check(**environment: str) -> tuple[int, list[str]]:
    """Exit status of `--check`, and its lines on what is registered."""
    done = python("-m", "mdpgrpo_fast.integrations.verl", "--check", **environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith(("yes  ", "no   "))]


def test_verl_loads_the_plug_in_by_its_entry_point(tmp_path: Path) -> None:
    code = """
import verl
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
print(*("mdp_grpo" in found for found in (ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, _agent_loop_registry)))
"""
    for folder in (ROOT, tmp_path):  # the source tree lies first on the path of what is started in it
        done = python("-c", code, cwd=folder)
        assert done.stdout.split()[-3:] == ["True"] * 3, done.stderr
    done = python("-c", code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.stdout.split()[-3:] == ["False"] * 3, done.stderr


def test_the_check_says_yes_to_every_part() -> None:
    status, lines = check()
    assert status == 0 and len(lines) == 1 + len(PARTS)
    assert all(line.startswith("yes  ") for line in lines), lines
    assert "entry point mdpgrpo_fast" in lines[0]


def test_the_check_says_how_a_plug_in_that_is_turned_off_can_be_loaded() -> None:
    status, lines = check(VERL_USE_EXTERNAL_PLUGINS="none")
    remedy = "VERL_USE_EXTERNAL_MODULES=mdpgrpo_fast.integrations.verl.plugin"
    assert status == 1 and lines[0].startswith("no   found by verl") and remedy in lines[0]
    name, _, value = remedy.partition("=")
    assert check(VERL_USE_EXTERNAL_PLUGINS="none", **{name: value})[0] == 0


def test_a_part_that_cannot_be_registered_is_told(tmp_path: Path) -> None:
    """As of a verl that has moved it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['verl.experimental.agent_loop.single_turn_agent_loop'] = None\n"
    )
    status, lines = check(PYTHONPATH=str(tmp_path))
    (said,) = [line for line in lines if line.startswith("no   ")]
    assert status == 1 and "agent loop: mdp_grpo" in said and "single_turn_agent_loop" in said


@pytest.mark.parametrize("config", ["one_node", "paper", "ray_cluster"])
def test_verls_command_takes_each_config(config: str, tmp_path: Path) -> None:
    folder = python("-m", "mdpgrpo_fast.integrations.verl", "--configs").stdout.strip()
    flags = ["--config-dir", folder, "--config-name", config, "--cfg", "job", "--resolve"]
    done = python("-m", "verl.trainer.main_ppo", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adv_estimator: mdp_grpo" in done.stdout and "VERL_ENGINE_VENDOR: mdpgrpo_fast" in done.stdout
