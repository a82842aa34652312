"""The pool of processes: time limits, deaths, what cannot be sent, and that nothing of it is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import questions
from helpers.inputs import ROOT

from mdpgrpo_fast.rewards import processes
from mdpgrpo_fast.rewards.processes import Pool
from mdpgrpo_fast.rewards.worker import Lost

sys.path.insert(0, str(Path(__file__).parents[1]))  # spawned processes inherit it


@contextlib.contextmanager
def pool(count: int = 1, limit: float = 20.0, make: Callable[[], Any] = questions.make) -> Iterator[Pool]:
    made = Pool(make, count, limit)
    try:
        yield made
    finally:
        made.stop()


def asked(made: Pool, *what: tuple[str, Any], limit: float = 60.0) -> list[Any]:
    return made.answers(made.ask(what), limit)


def is_gone(pid: int) -> bool:
    """A zombie is not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))


def test_answers_come_in_order_and_from_all_processes() -> None:
    with pool(2) as made:
        assert asked(made, *[("echo", i) for i in range(500)]) == list(range(500))
        assert len(made.processes) == 2 and asked(made) == []
        assert len(set(asked(made, ("sleep", 0.3), ("sleep", 0.3)))) == 2


def test_one_question_that_waits_takes_a_process_that_is_idle() -> None:
    with pool(2) as made:
        asked(made, ("sleep", 0.1), ("sleep", 0.1))
        busy = made.ask([("sleep", 3.0)])
        began = time.monotonic()
        assert asked(made, ("echo", 1)) == [1] and time.monotonic() - began < 2
        assert not busy.done.is_set()


def test_a_limit_is_of_one_question_and_not_of_its_wait_in_the_queue() -> None:
    with pool(1, limit=1.0) as made:
        assert len(set(asked(made, *[("sleep", 0.4)] * 4))) == 1, "1.6 s in all, by one process"


@pytest.mark.parametrize("kind", ["sleep", "deaf"])
def test_a_late_process_is_killed_and_replaced(kind: str) -> None:
    with pool(1, limit=0.5) as made:
        (first,) = asked(made, ("pid", 0))
        began = time.monotonic()
        late, second = asked(made, (kind, 30), ("pid", 0))
        assert late == Lost("the scoring process gave no answer within 0.5 s", "worker timeout")
        assert time.monotonic() - began < 5 and is_gone(first) and second != first


@pytest.mark.parametrize("kind", ["exit", "exit, and a child keeps the pipes"])
def test_a_process_that_ends_costs_its_question_and_says_its_exit_code(kind: str) -> None:
    with pool(1, limit=5.0) as made:
        died, fine = asked(made, (kind, 7), ("echo", 1))
    assert died == Lost("the scoring process died with exit code 7", "worker exit 7") and fine == 1


def test_what_cannot_be_sent_is_said() -> None:
    with pool(1) as made:
        back, there, raised, fine = asked(
            made, ("lambda", 0), ("echo", lambda: 0), ("raise", KeyboardInterrupt("stop")), ("echo", 1)
        )
    assert back.reason.startswith("the scoring process raised ") and "<lambda>" in back.reason
    assert there.reason.startswith("a completion cannot be sent to a scoring process: ") and "<lambda>" in there.reason
    assert "the scoring process raised KeyboardInterrupt: stop (" in raised.reason and fine == 1


def test_a_process_that_dies_idle_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STARTS", 1)  # however many they are, none has failed to start
    with pool(2) as made:
        before = asked(made, ("sleep", 0.3), ("sleep", 0.3))
        for process in made.processes:
            process.kill()
            process.join()
        after = asked(made, *[("pid", 0)] * 4)
        assert all(isinstance(pid, int) for pid in after) and not set(before) & set(after)


def test_processes_that_cannot_start_lose_all_that_waits() -> None:
    with pool(2, make=questions.dies) as made:
        (first, *others) = asked(made, *[("echo", 1)] * 50)
        assert first == Lost("the scoring processes died 4 times, the last with exit code 9", "workers")
        assert set(others) == {first}
    with pool(1, make=lambda: None) as made:
        (lost,) = asked(made, ("echo", 1))
        assert lost.reason.startswith("the scoring processes cannot be started: ") and "<lambda>" in lost.reason


def test_no_wait_is_without_a_limit() -> None:
    with pool(1, make=questions.hangs) as made:
        began = time.monotonic()
        assert {a.reason for a in asked(made, ("echo", 1), ("echo", 2), limit=1.0)} == {
            "no scoring process was done with it after 1 s"
        }
        assert time.monotonic() - began < 5 and not made.processes


def test_nothing_is_left_after_stop_and_more_can_be_asked() -> None:
    with pool(2, limit=0.5) as made:
        asked(made, ("echo", 1))  # with the first process comes multiprocessing's tracker, which stays
        made.stop()
        before = open_files(), threading.active_count()
        for _ in range(2):
            pids = [a for a in asked(made, ("pid", 0), ("sleep", 30), ("exit", 1), ("pid", 0)) if isinstance(a, int)]
            made.ask([("sleep", 30)] * 8)
            pids += [process.pid or 0 for process in made.processes]
            began = time.monotonic()
            made.stop()
            made.stop()
            assert time.monotonic() - began < 3 and all(map(is_gone, pids))
            assert (open_files(), threading.active_count()) == before
        assert asked(made, ("echo", 1)) == [1]


def test_one_that_waits_learns_of_a_stop() -> None:
    with pool(1) as made:
        threading.Timer(0.5, made.stop).start()
        assert {a.reason for a in asked(made, *[("sleep", 30)] * 3)} == {"the scoring processes were stopped"}


def test_ctrl_c_ends_the_processes() -> None:
    with pool(1) as made:
        (pid,) = asked(made, ("pid", 0))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            asked(made, *[("sleep", 30)] * 3)
        assert is_gone(pid) and not made.processes


def test_a_pool_that_is_forgotten_ends() -> None:
    made = Pool(questions.make, 1, 20.0)
    asked(made, ("echo", 1))
    (process,) = made.processes
    del made
    gc.collect()
    process.join(10)
    assert process.exitcode == 0


def test_the_interpreter_ends_while_processes_are_busy(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, time\nfrom helpers import questions\nfrom mdpgrpo_fast.rewards.processes import Pool\n"
        "pool = Pool(questions.make, 1, 100.0)\n(pid,) = pool.answers(pool.ask([('pid', 0)]), 60)\nprint(pid)\n"
        "if sys.argv[1:]:\n    print('waits', flush=True)\n    time.sleep(60)\n"
        "pool.ask([('deaf', 30)] * 3)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "script.py")]
    started: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": paths}, "text": True, "start_new_session": True}
    done = subprocess.run(command, capture_output=True, timeout=20, **started)
    assert done.returncode == 0 and not done.stderr and is_gone(int(done.stdout))
    with subprocess.Popen([*command, "waits"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **started) as program:
        assert program.stdout is not None and program.stderr is not None
        pid = int(program.stdout.readline())
        program.stdout.readline()
        os.killpg(program.pid, signal.SIGINT)
        assert program.stderr.read().count("Traceback") == 1, "that of the program alone"
        assert program.wait(20) and is_gone(pid)
