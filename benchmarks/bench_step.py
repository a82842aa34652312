"""One training step, four ways: TRL's GRPOTrainer, the same on our kernels, that with packed groups, and ours.

`python benchmarks/bench_step.py --output FILE` takes a model of a GPU's size where there is one. Model, prompts, new
tokens, optimiser and precision are the same. All trainers live in one process and take steps in turn: one each that
does not count, then medians of --steps. A turn of TRL's is a `train()` of one step on the trainer and optimiser that
are there, timed from its start to its log; what `train()` does before, and emptying the device's cache, is left out.
Peak memory is measured after that, in a process of its own for each. Every step is verified: all completions have
their full length, rewards differ within groups, loss and gradient are finite. At the end the weights have moved.

- trl: GRPOTrainer as it is. All that costs time is at TRL's defaults, but for gradient checkpointing, which is off
  (that is faster) and in one case on, as is TRL's default.
- trl_kernels: `accelerate_trl` of that.
- trl_packed: `MDPGRPOTrainer` with the method's components off, which leaves GRPO, and packing on. TRL shuffles the
  completions of a step; this trainer keeps a group's together, so that a pass holds its prompt once.
- ours: `TrainingLoop`, preset grpo.

Stages of TRL's are timed around its own methods. On our kernels the head's gradients are made in the forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator, Sequence
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
WAYS = ("trl", "trl_kernels", "trl_packed", "ours")
# GRPO by MDPGRPOTrainer, at TRL's default where the method's is another.
PACKED_GRPO = {
    **dict.fromkeys(("multi_temperature", "dual_anchor", "prospect", "asymmetric_kl"), False),
    "use_bias_correction_kl": True,
    "packing": "on",
}


# ---- the trainers ---------------------------------------------------------------------------------------------------


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


def trl_trainer(way: str, options: dict[str, Any], **others: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    if way == "trl":
        return GRPOTrainer(args=GRPOConfig(**options), **others)
    from mdpgrpo_fast.integrations.trl import MDPGRPOConfig, MDPGRPOTrainer, accelerate_trl

    if way == "trl_kernels":
        return accelerate_trl(GRPOTrainer(args=GRPOConfig(**options), **others))
    return MDPGRPOTrainer(args=MDPGRPOConfig(**options, **PACKED_GRPO), **others)


@contextmanager
def trl_steps(way: str, size: Size, case: Case, folder: Path) -> Iterator[Callable[[], Step]]:
    """A function that takes the next step, a `train()` of its own that goes on with the model and the optimiser."""
    from datasets import Dataset
    from transformers import TrainerCallback

    options = {
        "output_dir": str(folder / way),
        "model_init_kwargs": {"dtype": size.dtype},
        "per_device_train_batch_size": size.micro_batch,
        "gradient_accumulation_steps": size.prompts * size.generations // size.micro_batch,
        "num_generations": size.generations,
        "max_completion_length": size.completion_length,
        "temperature": 1.0,
        "beta": case.beta,
        "loss_type": "grpo",
        "learning_rate": LEARNING_RATE,
        "max_steps": 1,
        "use_cpu": not CUDA,
        "bf16": False,  # autocast: the weights have the precision already
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    prompts = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    taken: list[Step] = []
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

    class Turn(TrainerCallback):
        began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stages.clear()
            self.began = clock()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" not in logs:  # of all steps, at the end
                return
            seconds = clock() - self.began
            seen = {
                "shortest": logs["completions/min_length"],
                "longest": logs["completions/max_length"],
                "loss": logs["loss"],
                "grad_norm": logs["grad_norm"],
                "equal_groups": logs["frac_reward_zero_std"],
                "tokens": logs["num_tokens"],
            }
            taken.append(Step(seconds, {**stages, "other": seconds - sum(stages.values())}, seen))

    trainer = trl_trainer(
        way,
        {**options, **case.trl},
        model=str(folder / "model"),
        reward_funcs=even_share,
        train_dataset=Dataset.from_list([json.loads(line) for line in prompts]),
        callbacks=[Turn()],
    )
    if (trainer.ref_model is not None) != (case.beta > 0):
        raise Wrong(f"{way}: a reference model must be there for beta above 0 alone; beta is {case.beta}")
    # A longer `train()` empties the device's cache once, and not between two steps.
    trainer.accelerator.free_memory = lambda: None
    timed(trainer, "_generate_single_turn", "generate")
    timed(trainer, "_calculate_rewards", "score")
    timed(trainer, "_get_per_token_logps_and_entropies", "reference", lambda: not torch.is_grad_enabled())
    timed(trainer, "compute_loss", "forward")
    timed(trainer.accelerator, "backward", "backward")
    timed(trainer.accelerator, "clip_grad_norm_", "optimizer")
    timed(trainer.create_optimizer(), "step", "optimizer")
    tokens = size.prompts * size.generations * (size.prompt_length + size.completion_length)

    def step() -> Step:
        trainer.train()
        (done,) = taken
        taken.clear()
        if done.seen["tokens"] != tokens:
            raise Wrong(f"{way}: {tokens} tokens must have been seen in a step; got {done.seen['tokens']}")
        verify(way, done.seen, size)
        return done

    with must_move(way, trainer.model):
        yield step


def steps_of(
    way: str, size: Size, case: Case, folder: Path, steps: int
) -> contextlib.AbstractContextManager[Callable[[], Step]]:
    return our_steps(size, case, folder, steps) if way == "ours" else trl_steps(way, size, case, folder)


# ---- one process each -----------------------------------------------------------------------------------------------


def peak_mb() -> float:
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    # Not ru_maxrss, which a process starts with at its parent's size.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def work(job: str, ways: Sequence[str], size: Size, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """`memory`: the peak of two steps; `time`: all steps of all ways, the first of each left out."""
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    count = 2 if job == "memory" else steps + 1
    with contextlib.ExitStack() as stack:
        step = {way: stack.enter_context(steps_of(way, size, case, folder, count)) for way in ways}
        for _ in range(count):
            for way in ways:
                taken[way].append(asdict(step[way]()))
    return {"peak_mb": peak_mb()} if job == "memory" else {way: all_[1:] for way, all_ in taken.items()}


def run_alone(job: str, ways: Sequence[str], size: str, case: str, folder: Path, steps: int) -> dict[str, Any]:
    """`work` in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("model", "prompts.jsonl"):
            (Path(scratch) / name).symlink_to(folder / name)
        result = Path(scratch) / "result.json"
        command = [sys.executable, __file__, "--output", str(result), "--steps", str(steps)]
        command += ["--job", job, "--size", size, "--cases", case, "--folder", scratch, "--ways", *ways]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        what = f"{case}, {job} of {', '.join(ways)}"
        if done.returncode:
            raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
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
    """The case's row of the result file; memory: none where it has not been measured yet. Ratios: TRL's over each."""
    steps = {way: {**middle(timed[way]), **({"peak_mb": short(memory[way])} if memory else {})} for way in timed}
    for step in steps.values() if "trl" in steps else ():
        step["ratio"] = short(steps["trl"]["seconds"] / step["seconds"])
        step |= {"memory_ratio": short(steps["trl"]["peak_mb"] / step["peak_mb"])} if memory else {}
    return {"case": name, **asdict(CASES[name]), "steps": steps}


def table(row: dict[str, Any]) -> str:
    """The case in plain text: the stages of all ways, side by side."""
    lines, columns = [f"{row['case']} (beta {row['beta']:g})"], []
    for way, step in row["steps"].items():
        column = [f"{way:<12}{'s':>8}{'share':>8}"]
        column += [f"{n:<12}{s['seconds']:>8.2f}{s['share']:>8.0%}" for n, s in step["stages"].items()]
        column += [f"{'step':<12}{step['seconds']:>8.2f}" + (f"{step['ratio']:>7.2f}x" if "ratio" in step else "")]
        column += [f"{'peak MB':<12}{step['peak_mb']:>8.0f}"] if "peak_mb" in step else []
        columns.append(column)
    rows = itertools.zip_longest(*columns, fillvalue="")
    lines += ["  " + "".join(f"{cell:<32}" for cell in cells).rstrip() for cells in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="result file")
    parser.add_argument("--size", choices=list(SIZES), help="of the model and the step; unset: gpu or cpu")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--problem", type=Path, help="directory of the model and prompts, made there if it is missing")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each")
    parser.add_argument("--make-problem-only", action="store_true", help="make --problem and stop")
    for name in ("--job", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"argument --steps: must be at least 1; got {args.steps}")
    if args.job:
        case, size = CASES[args.cases[0]], SIZES[args.size]
        write_json(args.output, work(args.job, args.ways, size, case, Path(args.folder), args.steps))
        return 0
    name = args.size or ("gpu" if CUDA else "cpu")
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
            timed = run_alone("time", args.ways, name, case, folder, args.steps)
            document["results"].append(compare(case, timed, {}))
            write_json(args.output, document)
            print(table(document["results"][-1]), flush=True)
            if args.no_memory:
                continue
            memory = {w: run_alone("memory", [w], name, case, folder, args.steps)["peak_mb"] for w in args.ways}
            document["results"][-1] = compare(case, timed, memory)
            write_json(args.output, document)
            print(table(document["results"][-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
