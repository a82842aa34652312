"""Rollouts one step ahead against the stand-in server: what samples by which weights, beside what, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers.ranks import spawn_fleet
from helpers.runs import make_trainer, rows, run_small
from helpers.vllm import ARGS, GENERATE, PROMPTS, FakeServer, client

import mdpgrpo_fast.train as train
from mdpgrpo_fast.config import ConfigError, TrainConfig, preset, with_correction, without_effect
from mdpgrpo_fast.rollout.vllm.ahead import Ahead
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.server import VLLMServer
from mdpgrpo_fast.training.before.checks import check_ahead
from mdpgrpo_fast.training.checkpoint import check_resume
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.update.updates import Updates

EXACT = preset("exact", num_generations=4, sampler_correction=True)
PER_STEP = 8  # requests: two prompts, four completions
PATIENCE = 60  # seconds until a test fails in place of hanging
MARK = "/mark"  # what the trainer does in between, told to the stand-in so that it has one order of all


def first_weights(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    return repr(dict(named)["model.embed_tokens.weight"].detach().double().sum().item())


def tell(engine: VLLMServer, what: str, number: int, weights: str) -> None:
    engine._call(MARK, {"what": what, "number": number, "weights": weights}, lambda answer: answer)


def watch(patch: pytest.MonkeyPatch, before_update: Callable[[int], Any] = lambda number: None) -> None:
    """Syncs and updates tell the stand-in. A sync does nothing else: its model is none of a trainer's."""
    apply, init, engines = Updates.apply, VLLMServer.__init__, []

    def sync(self: VLLMServer, named: Any, version: int) -> None:
        tell(self, "sync", version, first_weights(named))

    def keep(self: VLLMServer, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        engines.append(self)

    def applied(self: Updates, batch: Any, number: int, *args: Any) -> Any:
        before_update(number)
        row = apply(self, batch, number, *args)
        tell(engines[-1], "update", number, first_weights(self.policy.model.named_parameters()))
        return row

    patch.setattr(VLLMServer, "sync", sync)
    patch.setattr(VLLMServer, "follow_sync", lambda self, named, version: list(named))
    patch.setattr(VLLMServer, "__init__", keep)
    patch.setattr(Updates, "apply", applied)


class Order:
    """What the stand-in saw, in order. Requests are of step 1, 2, … by their count, where none is refilled."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.arrived = threading.Condition()
        self.late: list[str] = []

    def saw(self, handler: Any, path: str, body: Any) -> bool:
        with self.arrived:
            self.arrived.notify_all()
        return False

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        with self.arrived:
            if not self.arrived.wait_for(reached, PATIENCE):
                self.late.append(what)

    @property
    def prompts(self) -> list[list[int]]:
        return [body["token_ids"] for _, path, body in self.server.log if path == GENERATE]

    def marks(self, what: str) -> dict[int, str]:
        found = [body for _, path, body in self.server.log if path == MARK]
        return {b["number"]: b["weights"] for b in found if b["what"] == what}

    @property
    def story(self) -> list[str]:
        """Runs of requests as their number, between syncs and updates."""
        told = [
            f"{body['what']} {body['number']}" if path == MARK else "asked"
            for _, path, body in self.server.log
            if path in (MARK, GENERATE) and body
        ]
        grouped = [(name, len(list(group))) for name, group in itertools.groupby(told)]
        return [f"{n} asked" if name == "asked" else name for name, n in grouped]


def knobs_of(server: FakeServer, **knobs: Any) -> dict[str, Any]:
    vllm = {"rollout": "vllm", "vllm_url": server.url, "vllm_retries": 0, "async_rollout": 1}
    return {**vllm, "steps": 4, **knobs}


@pytest.fixture
def order(server: FakeServer) -> Order:
    made = Order(server)
    server.fault = made.saw
    return made


@pytest.mark.parametrize("updates", [{}, {"updates_per_rollout": 2, "mini_batches": 2}], ids=str)
def test_the_next_step_is_sampled_by_the_weights_of_before_while_one_trains(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, updates: dict[str, Any]
) -> None:
    def hold(handler: Any, path: str, body: Any) -> bool:
        order.saw(handler, path, body)
        if path == GENERATE and len(order.prompts) > PER_STEP:  # of step 2 and later
            step = (len(order.prompts) - 1) // PER_STEP + 1
            order.wait_for(f"update {step - 1}", lambda: step - 1 in order.marks("update"))
        return False

    def all_asked(number: int) -> None:
        if number < 4:
            order.wait_for(f"step {number + 1}", lambda: len(order.prompts) == PER_STEP * (number + 1))

    server.fault = hold
    watch(monkeypatch, all_asked)
    trainer = run_small(tmp_path, EXACT, **knobs_of(server, **updates))
    assert order.late == [], "each request of a step was there before the update of the step before, and outlasted it"
    assert order.story == [
        "sync 1", "16 asked", "update 1", "sync 2", "8 asked", "update 2", "sync 3", "8 asked", "update 3", "update 4",
    ]  # fmt: skip
    synced, updated = order.marks("sync"), order.marks("update")
    assert len({*synced.values(), *updated.values()}) == 5, "every update changes the weights"
    assert synced[2] == updated[1] and synced[3] == updated[2]
    logged = rows(trainer)
    assert [r["staleness"] for r in logged] == [0, 1, 1, 1]
    assert ["generate" in r["stage_tokens_per_second"] for r in logged] == [True, False, False, False]
    assert all(slot["ess"] is not None for r in logged for slot in r["slots"]), "weights are taken"


def test_the_prompts_are_those_of_a_run_that_samples_at_once(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watch(monkeypatch)
    run_small(tmp_path, EXACT, **knobs_of(server))
    ahead, server.log = order.prompts, []
    at_once = run_small(tmp_path, EXACT, "at_once", **knobs_of(server, async_rollout=0))
    assert order.story == [x for n in range(1, 5) for x in (f"sync {n}", "8 asked", f"update {n}")]
    assert [r["staleness"] for r in rows(at_once)] == [0] * 4
    steps = [[sorted(p[i : i + PER_STEP]) for i in range(0, 4 * PER_STEP, PER_STEP)] for p in (ahead, order.prompts)]
    assert steps[0] == steps[1] and steps[0][0] != steps[0][1]


def test_groups_are_refilled_by_the_weights_of_the_rest(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The stand-in's completions of a group are alike: without a KL none has a gradient, and all are drawn again.
    watch(monkeypatch, lambda n: n < 3 and order.wait_for("ahead", lambda: order.story[-1] in ("24 asked", "8 asked")))
    method = preset("grpo", num_generations=4, kl_beta_pos=0.0, temperature_objective="corrected")
    trainer = run_small(tmp_path, method, **knobs_of(server, steps=3, refill=1))
    assert order.late == []
    assert order.story == [
        "sync 1", "24 asked", "update 1", "8 asked", "sync 2", "8 asked", "update 2", "8 asked", "update 3",
    ]  # fmt: skip
    assert [r["staleness"] for r in rows(trainer)] == [0, 1, 1]


def interrupt(row: dict[str, Any]) -> bool:
    raise KeyboardInterrupt


def fail(row: dict[str, Any]) -> bool:
    raise ZeroDivisionError("of the caller")


@pytest.mark.parametrize("end", [lambda row: row["step"] == 1, interrupt, fail], ids=["on_step", "Ctrl-C", "error"])
def test_a_run_that_ends_early_waits_for_no_request(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: Any
) -> None:
    over = threading.Event()

    def hold(handler: Any, path: str, body: Any) -> bool:
        order.saw(handler, path, body)
        if path == GENERATE and len(order.prompts) > PER_STEP:
            over.wait(PATIENCE)
        return False

    server.fault = hold
    watch(monkeypatch, lambda _: order.wait_for("step 2", lambda: len(order.prompts) == 2 * PER_STEP))
    trainer = make_trainer(tmp_path, EXACT, save_model=False, **knobs_of(server))
    trainer.on_step = end
    before = set(threading.enumerate())
    if end is fail:
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    else:
        trainer.train()
    assert trainer.done == 1 and order.late == []
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:  # which the end of the process would wait for
            thread.join(PATIENCE / 2)
            assert not thread.is_alive(), thread.name
    assert not over.is_set(), "the stand-in has answered none"
    over.set()
    with pytest.raises(RolloutError, match="is asked for nothing more: the run has ended"):
        trainer.collector.engine.generate(PROMPTS, **ARGS)  # type: ignore[union-attr]


def test_a_server_that_fails_in_the_background_ends_the_step_that_waits(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(handler: Any, path: str, body: Any) -> bool:
        order.saw(handler, path, body)
        if path != GENERATE or len(order.prompts) <= PER_STEP:
            return False
        order.wait_for("answers", lambda: 1 in order.marks("update"))  # it waits for none of them meanwhile
        if body["sampling_params"]["temperature"] != 0.9:
            return False
        handler.send({"error": {"message": "out of memory"}}, 400)
        return True

    server.fault = refuse
    watch(monkeypatch)
    trainer = make_trainer(tmp_path, EXACT, **knobs_of(server, vllm_retries=1))
    with pytest.raises(RolloutError, match=r"HTTP 400 out of memory; [0-6] of 8 completions kept") as e:
        trainer.train()
    assert order.late == [] and [r["step"] for r in rows(trainer)] == [1]
    folder = trainer.out.path
    file = folder / "partial_rollout.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len(kept) == sum(c is not None for c in e.value.partial) and all(r["step"] == 2 for r in kept)
    assert (folder / "model" / "model.safetensors").exists()


def test_a_resumed_run_samples_its_first_step_at_once(
    order: Order, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watch(monkeypatch)
    whole = run_small(tmp_path, EXACT, "whole", **knobs_of(server))
    whole_prompts, server.log = order.prompts, []
    first = make_trainer(tmp_path, EXACT, "cut", **knobs_of(server, save_every=2))
    first.on_step = lambda row: row["step"] == 3
    first.train()
    updated, server.log = order.marks("update"), []
    second = run_small(tmp_path, EXACT, "cut", **knobs_of(server, save_every=2, resume=True))
    assert order.story[0] == "sync 3" and order.marks("sync")[3] == updated[2], "by the weights of the checkpoint"
    assert [(r["step"], r["staleness"]) for r in rows(second)] == [(1, 0), (2, 1), (3, 0), (4, 1)]
    assert [r["staleness"] for r in rows(whole)] == [0, 1, 1, 1]
    assert sorted(order.prompts) == sorted(whole_prompts[2 * PER_STEP :])
    with pytest.raises(ConfigError, match="resume needs the settings of the run before: async_rollout was 1; got 0"):
        check_resume(replace(second.run, async_rollout=0), second.method)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_closing_the_client_wakes_who_waits(
    server: FakeServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    if scheme == "https":
        certificates = request.getfixturevalue("certificates")
        server.encrypt(str(certificates / "server.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    engine, other, held, arrived = client(server), client(server), threading.Event(), threading.Semaphore(0)
    server.fault = lambda handler, path, body: arrived.release() or not held.wait(PATIENCE)  # type: ignore[func-returns-value]
    ahead = Ahead(engine)
    ahead.begin(engine.request(PROMPTS, **ARGS))
    assert ahead.pending
    for _ in range(6):
        assert arrived.acquire(timeout=PATIENCE)
    engine.close()
    with pytest.raises(RolloutError, match="; 0 of 6 completions kept"):
        ahead.take()[1]()
    assert not held.is_set()
    held.set()
    ahead.close()
    assert other.generate(PROMPTS, **ARGS).tokens.shape == (6, 4), "another client goes on"


def test_a_connection_made_while_the_client_closes_is_shut_too(server: FakeServer) -> None:
    engine, held = client(server, retries=0), threading.Event()
    server.fault = lambda handler, path, body: path == GENERATE and not held.wait(PATIENCE)
    watched = engine._watch

    def closing(event: str, found: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            engine.close()
        watched(event, found)

    engine._watch = closing  # type: ignore[method-assign]
    engine._http.close()
    engine._http = type(engine._http)()  # no connection of before
    with pytest.raises(RolloutError, match="failed 1 times"):
        engine.generate(PROMPTS[:1], **{**ARGS, "num_generations": 1, "temperature": None})
    assert not held.is_set()
    held.set()


# ---- several ranks --------------------------------------------------------------------------------------------------


def run_on_a_rank(rank: int, ranks: int, url: str, folder: str) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true",
        "no_proxy": "127.0.0.1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        watch(patch)
        from mdpgrpo_fast.rewards import Scorer
        from mdpgrpo_fast.training.run_dir import RunDir
        from mdpgrpo_fast.training.task import prepare

        run = TrainConfig(
            prompts_per_step=2, max_completion_length=12, steps=3, eval_samples=2, output_dir=folder, rollout="vllm",
            vllm_url=url, vllm_retries=0, async_rollout=1, cpu=True, learning_rate=1e-3,
        )  # fmt: skip
        with Scorer(run.reward, workers=1) as scorer:
            trainer = TrainingLoop(prepare(run), run, EXACT, RunDir(folder, create=rank == 0), scorer)
            said = None
            try:
                trainer.train()
            except RolloutError as e:
                said = str(e)
        return {"steps": trainer.done, "said": said, "staleness": [r["staleness"] for r in trainer.history]}


@pytest.mark.long
def test_ranks_sample_ahead_together_and_stop_together(server: FakeServer, tmp_path: Path) -> None:
    lock, under_way, disturbed = threading.Lock(), [0], []
    whole = 2 * 3 * PER_STEP  # requests of the first run; the second has one refused in its second step

    def fault(handler: Any, path: str, body: Any) -> bool:
        if path == MARK and body["what"] == "sync":
            disturbed.append(under_way[0])
        if path != GENERATE or not body:
            return False
        with lock:
            under_way[0] += 1
            asked.append(body)
            number = len(asked)
        if number % 3 == 0:
            time.sleep(0.2)  # one rank has its completions before the other
        with lock:
            under_way[0] -= 1
        if number == whole + 2 * PER_STEP + 4:
            handler.send({"error": {"message": "no more"}}, 400)
        return number == whole + 2 * PER_STEP + 4

    asked: list[Any] = []
    server.fault = fault
    tasks = {name: (run_on_a_rank, server.url, str(tmp_path / name)) for name in ("whole", "refused")}
    found = spawn_fleet(tasks, 2, tmp_path)
    assert found["whole"] == [{"steps": 3, "said": None, "staleness": [0, 1, 1]}] * 2
    assert [f["steps"] for f in found["refused"]] == [1, 1]
    assert all("HTTP 400 no more; " in f["said"] for f in found["refused"])
    assert disturbed == [0] * 3, "weights come while no rank samples: before steps 1 and 2, and the second run's first"


# ---- settings -------------------------------------------------------------------------------------------------------

SERVER = ["--rollout", "vllm", "--vllm-url", "http://x", "--async-rollout", "1"]


def test_one_flag_turns_the_correction_on() -> None:
    run, method, given = train.read([*SERVER, "--preset", "exact"])
    assert method.sampler_correction and "sampler_correction" not in given
    assert not train.read(["--preset", "exact"])[1].sampler_correction
    assert not train.read([*SERVER, "--preset", "trl"])[1].sampler_correction, "`corrected` weighs by itself"
    assert without_effect(run, method, given) == []
    with pytest.raises(ConfigError, match=r"sampler_correction must be on with async_rollout: older .*; got False"):
        train.read([*SERVER, "--preset", "exact", "--no-sampler-correction"])
    with pytest.raises(ConfigError, match="async_rollout needs temperature_objective = corrected or per_row"):
        train.read([*SERVER, "--preset", "paper"])
    assert with_correction(TrainConfig(), preset("paper")) == preset("paper")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({}, "the model itself samples .*; got rollout = transformers, vllm_url = None"),
        ({"rollout": "vllm"}, "vLLM in this process samples .*; got rollout = vllm, vllm_url = None"),
    ],
)
def test_what_samples_in_the_trainers_own_thread_cannot_sample_ahead(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"async_rollout needs a server \(--rollout vllm --vllm-url URL\): {said}"):
        check_ahead(TrainConfig(async_rollout=1, **knobs))
    check_ahead(TrainConfig(**knobs))


@pytest.mark.parametrize("value", [2, -1])
def test_more_than_one_step_ahead_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=f"async_rollout must be 0 or 1; got {value}"):
        TrainConfig(async_rollout=value)


def test_a_run_of_one_step_has_none_ahead() -> None:
    (said,) = without_effect(*train.read([*SERVER, "--preset", "exact", "--steps", "1"]))
    assert said == "--async-rollout has no effect: there is no next step (--steps)"


def test_the_command_line_says_what_it_turned_on(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(monkeypatch)
    folder = tmp_path / "run"
    argv = [
        "--output-dir", str(folder), "--cpu", "--preset", "exact", "--steps", "2", "--prompts-per-step", "2",
        "--max-completion-length", "8", "--eval-samples", "2", "--no-save-model", "--rollout", "vllm", "--vllm-url",
        server.url, "--async-rollout", "1",
    ]  # fmt: skip
    assert train.main(argv) == 0
    said = capsys.readouterr().err
    assert "note       the server samples one step ahead" in said and "(sampler_correction)" in said
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["run"]["async_rollout"] == 1 and saved["method"]["sampler_correction"] is True
