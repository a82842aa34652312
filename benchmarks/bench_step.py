"""One training step of ours and of TRL's GRPOTrainer: the same model, prompts, new tokens, optimiser and precision.

`python benchmarks/bench_step.py --output FILE` takes a model of a GPU's size where there is one. Both trainers live in
one process and take steps in turn, TRL inside its own `train()`: one each that does not count, then medians of --steps.
Peak memory is measured after that, in a process of its own for each. Every step is verified: all completions have
their full length, rewards differ within groups, loss and gradient are finite. At the end the weights have moved.

TRL runs without gradient checkpointing, which is faster, and in one case with it, as is its default; all else that
costs time is at TRL's defaults. Its stages are timed around its own methods.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from harness import CUDA, DEVICE, ROOT, clock, provenance, release, short, write_json
from problems.step import SIZES, Case, Size, Step, Wrong, even_share, must_move, verify, write_problem

LEARNING_RATE = 1e-5
PROMPTS = 16  # of the data set
HOW_MEMORY = (
    "torch.cuda.max_memory_allocated" if CUDA else "VmHWM of /proc/self/status, interpreter and libraries included"
) + ", each trainer alone in a process, over two steps"


CASES = {
    "kl": Case(0.01, {"gradient_checkpointing": False}),
    "kl, TRL checkpointing": Case(0.01, {"gradient_checkpointing": True}),
    "kl, PyTorch's linear layers": Case(0.01, {"gradient_checkpointing": False}, plain_linear=True),
    "no kl": Case(0.0, {"gradient_checkpointing": False}),
}


# ---- the two trainers -----------------------------------------------------------------------------------------------


@contextmanager
def our_steps(size: Size, case: Case, folder: Path, steps: int) -> Iterator[Callable[[], Step]]:
    """A function that takes the next step."""
    from mdpgrpo_fast.config import TrainConfig, preset
    from mdpgrpo_fast.rewards import Scorer
    from mdpgrpo_fast.training.loop import TrainingLoop
    from mdpgrpo_fast.training.run_dir import RunDir
    from mdpgrpo_fast.training.task import prepare

    run = TrainConfig(
        preset="grpo",
        model=str(folder / "model"),
        train_file=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "ours"),
        reward=["problems.step:even_share"],
        prompts_per_step=size.prompts,
        steps=steps,
        cpu_linear="torch" if case.plain_linear else "auto",
        max_prompt_length=size.prompt_length,
        max_completion_length=size.completion_length,
        learning_rate=LEARNING_RATE,
        dtype=size.dtype,
        cpu=not CUDA,
    )
    method = preset("grpo", num_generations=size.generations, kl_beta_pos=case.beta)
    numbers = itertools.count(1)
    with Scorer(run.reward) as scorer:
        trainer = TrainingLoop(prepare(run), run, method, RunDir(run.output_dir), scorer)
        lengths = {len(ids) for ids in trainer.task.train_ids}
        if lengths != {size.prompt_length}:
            raise Wrong(f"prompts must have {size.prompt_length} tokens; got {lengths}")

        def step() -> Step:
            number = next(numbers)
            first = (number - 1) * size.prompts
            start = clock()
            row = trainer.step(number, [(first + i) % PROMPTS for i in range(size.prompts)])
            seconds = clock() - start
            stages = {name: s for name, s in row["seconds"].items() if name != "other"}
            stages["other"] = seconds - sum(stages.values())
            seen = {
                # None is longer than the limit, so a mean of the limit says it of all.
                "shortest": row["completion_length"],
                "longest": size.completion_length,
                "loss": row["loss"],
                "grad_norm": row["grad_norm"],
                "equal_groups": row["zero_variance_groups"],
            }
            verify("ours", seen, size)
            return Step(seconds, stages, seen)

        with must_move("ours", trainer.lm):
            yield step


def trl_steps(size: Size, case: Case, folder: Path, steps: int, between: Callable[[], None]) -> list[Step]:
    """All steps of a `train()` of TRL, with a call of `between` behind each, which is not counted."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    options = {
        "output_dir": str(folder / "trl"),
        "model_init_kwargs": {"dtype": size.dtype},
        "per_device_train_batch_size": size.micro_batch,
        "gradient_accumulation_steps": size.prompts * size.generations // size.micro_batch,
        "num_generations": size.generations,
        "max_completion_length": size.completion_length,
        "temperature": 1.0,
        "beta": case.beta,
        "loss_type": "grpo",
        "learning_rate": LEARNING_RATE,
        "max_steps": steps,
        "use_cpu": not CUDA,
        "bf16": False,  # autocast: the weights have the precision already
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    prompts = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    taken: list[Step] = []
    logged: list[dict[str, float]] = []
    stages: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, stage: str, when: Callable[[], bool] = lambda: True) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return function(*args, **kwargs)
            start = clock()
            result = function(*args, **kwargs)
            stages[stage] += clock() - start
            return result

        setattr(owner, name, call)

    class Turns(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            timed(kwargs["optimizer"], "step", "optimizer")
            self.began = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds = clock() - self.began
            taken.append(Step(seconds, {**stages, "other": seconds - sum(stages.values())}))
            between()
            stages.clear()
            self.began = clock()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                logged.append(logs)

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        args=GRPOConfig(**{**options, **case.trl}),
        reward_funcs=even_share,
        train_dataset=Dataset.from_list([json.loads(line) for line in prompts]),
        callbacks=[Turns()],
    )
    timed(trainer, "_generate_single_turn", "generate")
    timed(trainer, "_calculate_rewards", "score")
    timed(trainer, "_get_per_token_logps_and_entropies", "reference", lambda: not torch.is_grad_enabled())
    timed(trainer, "compute_loss", "forward")
    timed(trainer.accelerator, "backward", "backward")
    timed(trainer.accelerator, "clip_grad_norm_", "optimizer")
    with must_move("trl", trainer.model):
        trainer.train()
    if (trainer.ref_model is not None) != (case.beta > 0):
        raise Wrong(f"trl: a reference model must be there for beta above 0 alone; beta is {case.beta}")
    rows = size.prompts * size.generations
    for number, (step, logs) in enumerate(zip(taken, logged, strict=True), 1):
        tokens = number * rows * (size.prompt_length + size.completion_length)
        if logs["num_tokens"] != tokens:
            raise Wrong(f"trl: {tokens} tokens must have been seen after step {number}; got {logs['num_tokens']}")
        step.seen = {
            "shortest": logs["completions/min_length"],
            "longest": logs["completions/max_length"],
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "equal_groups": logs["frac_reward_zero_std"],
        }
        verify("trl", step.seen, size)
    return taken


# ---- one process each -----------------------------------------------------------------------------------------------


def peak_mb() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    # Not ru_maxrss, which a process starts with at its parent's size.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def work(job: str, size: Size, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """`memory_ours`, `memory_trl`: the peak; `time`: all steps of both, the first of each left out."""
    if job == "memory_trl":
        trl_steps(size, case, folder, 2, lambda: None)
        return {"peak_mb": peak_mb()}
    if job == "memory_ours":
        with our_steps(size, case, folder, 2) as step:
            step()
            step()
        return {"peak_mb": peak_mb()}
    ours: list[Step] = []
    with our_steps(size, case, folder, steps + 1) as step:
        theirs = trl_steps(size, case, folder, steps + 1, lambda: ours.append(step()))
    return {"ours": [asdict(s) for s in ours[1:]], "trl": [asdict(s) for s in theirs[1:]]}


def run_alone(job: str, size: str, case: str, folder: Path, steps: int) -> dict[str, Any]:
    """`work` in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("model", "prompts.jsonl"):
            (Path(scratch) / name).symlink_to(folder / name)
        result = Path(scratch) / "result.json"
        command = [sys.executable, __file__, "--output", str(result), "--steps", str(steps)]
        command += ["--job", job, "--size", size, "--cases", case, "--folder", scratch]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        if done.returncode:
            raise RuntimeError(f"{job} of case {case!r} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        print(f"{case}, {job}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return json.loads(result.read_text(encoding="utf-8"))


# ---- the table ------------------------------------------------------------------------------------------------------


def middle(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the steps and of each stage, with each stage's share of all stages."""
    stages = {name: statistics.median(s["stages"].get(name, 0.0) for s in steps) for name in steps[0]["stages"]}
    whole = sum(stages.values())
    return {
        "seconds": short(statistics.median(s["seconds"] for s in steps)),
        "all_seconds": [short(s["seconds"]) for s in steps],
        "stages": {n: {"seconds": short(s), "share": short(s / whole)} for n, s in stages.items()},
        "seen": steps[-1]["seen"],
    }


def compare(name: str, timed: dict[str, Any], memory: dict[str, float]) -> dict[str, Any]:
    """The case's row of the result file; memory: none where it has not been measured yet."""
    steps = {who: {**middle(timed[who]), **({"peak_mb": short(memory[who])} if memory else {})} for who in timed}
    return {
        "case": name,
        **asdict(CASES[name]),
        "ratio": short(steps["trl"]["seconds"] / steps["ours"]["seconds"]),
        **({"memory_ratio": short(memory["trl"] / memory["ours"])} if memory else {}),
        "steps": steps,
    }


def table(row: dict[str, Any]) -> str:
    """The case in plain text: the stages of both, side by side."""
    lines = [f"{row['case']} (beta {row['beta']:g}): {row['ratio']:.2f} x"]
    columns = []
    for who in ("ours", "trl"):
        step = row["steps"][who]
        column = [f"{who:<12}{'s':>8}{'share':>8}"]
        column += [f"{n:<12}{s['seconds']:>8.2f}{s['share']:>8.0%}" for n, s in step["stages"].items()]
        column += [f"{'step':<12}{step['seconds']:>8.2f}"]
        column += [f"{'peak MB':<12}{step['peak_mb']:>8.0f}"] if "peak_mb" in step else []
        columns.append(column)
    lines += [f"  {a:<32}{b}".rstrip() for a, b in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="result file")
    parser.add_argument("--small", action="store_true", help="a model of nearly no size: that everything runs")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--problem", type=Path, help="directory of the model and prompts, made there if it is missing")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each")
    parser.add_argument("--make-problem-only", action="store_true", help="make --problem and stop")
    for name in ("--job", "--size", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"argument --steps: must be at least 1; got {args.steps}")
    if args.job:
        case, size = CASES[args.cases[0]], SIZES[args.size]
        write_json(args.output, work(args.job, size, case, Path(args.folder), args.steps))
        return 0
    name = "small" if args.small else "gpu" if CUDA else "cpu"
    size = SIZES[name]
    command = "python benchmarks/bench_step.py " + shlex.join(argv if argv is not None else sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.problem or Path(temporary)
        count = folder / "parameters.txt"
        if not count.exists():
            folder.mkdir(parents=True, exist_ok=True)
            count.write_text(str(write_problem(size, PROMPTS, folder, DEVICE)))
            release()
        parameters = int(count.read_text())
        if args.make_problem_only:
            return 0
        document: dict[str, Any] = {
            **provenance(command),
            "size": {"name": name, "parameters": parameters, **asdict(size)},
            "tokens_per_step": size.prompts * size.generations * size.completion_length,
            "memory": HOW_MEMORY,
            "results": [],
        }
        for case in args.cases:
            timed = run_alone("time", name, case, folder, args.steps)
            document["results"].append(compare(case, timed, {}))
            write_json(args.output, document)
            print(table(document["results"][-1]), flush=True)
            if args.no_memory:
                continue
            memory = {w: run_alone(f"memory_{w}", name, case, folder, 2)["peak_mb"] for w in ("ours", "trl")}
            document["results"][-1] = compare(case, timed, memory)
            write_json(args.output, document)
            print(table(document["results"][-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
