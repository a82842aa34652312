"""Random configurations of the loss, each with changes that must not change the result: order of rows, completions and
groups, micro-batches, padding, packing, repetition, scale of rewards, a head for logits, its chunks, the backend.

    TRITON_INTERPRET=1 python tests/metamorphic.py [--configurations 10000] [--seconds 1500] [--jobs N] [--output FILE]

Seeded: the first N of one run are those of any other. Ends with status 1 where a relation failed, naming its seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import linear, losses
from helpers.inputs import LossInputs
from helpers.losses import GIVEN, PER_TOKEN, Result
from torch import Tensor

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.kernels.schemas import KNOBS
from mdpgrpo_fast.reference import default_denominator

ROOT = Path(__file__).resolve().parents[1]
# Of the size of the result. float64: sums in another order. float32: the same, after a few roundings.
TOLERANCE = {"torch": 1e-9, "cpu": 5e-5}
TRITON_SHARE = 0.02  # Triton's interpreter takes a second
CHANGES = 2  # of one configuration


@dataclass
class Case:
    """What a loss is called with; B completions of P groups. more: rewards by a map of groups, or nothing."""

    backend: str
    batch: LossInputs
    config: MDPGRPOConfig
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return "completion" in self.batch.kwargs

    @property
    def completions(self) -> int:
        return self.batch.kwargs["num_completions"] if self.packed else len(self.batch.tokens)

    def mask(self) -> Tensor:
        return torch.ones_like(self.batch.tokens, dtype=torch.bool) if self.batch.mask is None else self.batch.mask != 0

    def run(self) -> Result:
        return losses.run(self.backend, self.batch, self.config, "cpu", **self.more)

    def apply(self, change: Callable[[str, Tensor], Tensor], **kwargs: Any) -> Case:
        """The same with every tensor of the batch changed."""
        b = self.batch
        mask = None if b.mask is None else change("mask", b.mask)
        names = {n: change(n, x) if isinstance(x, Tensor) and x.ndim else x for n, x in b.kwargs.items()}
        batch = LossInputs(
            change("logits", b.logits), change("tokens", b.tokens), mask, change("advantage", b.advantage),
            change("kl_beta", b.kl_beta), {**names, **kwargs},
        )  # fmt: skip
        return replace(self, batch=batch)

    def per_completion(self, name: str, x: Tensor) -> bool:
        """Of a packed batch: one value for each completion, also where there are as many rows."""
        return name in KNOBS and tuple(x.shape) == (self.completions,)


def draw(seed: int) -> Case:
    """A random case, in float64 on torch or in float32 on cpu; rewards by groups become rewards with a map."""
    r = random.Random(seed)
    batch, config, more = losses.pick_options(seed)
    backend = r.choice(["torch", "cpu"] if "cpu" in losses.BACKENDS else ["torch"])
    real = torch.float64 if backend == "torch" else torch.float32
    case = Case(backend, batch, config).apply(lambda name, x: x if name == "mask" else losses.to(x, dtype=real))
    if more and "groups" not in more:
        more["groups"] = torch.arange(case.completions) // config.num_generations
        more |= {n: more[n].flatten() for n in ("rewards", "valid")}
    return replace(case, more={n: x if n == "valid" else losses.to(x, dtype=real) for n, x in more.items()})


# ---- relations: the changed case, and what its result is to be ------------------------------------------------------

Expected = tuple[Tensor, Tensor, dict[str, Tensor]]  # loss, gradient, values by rows or completions


def values(result: Result) -> dict[str, Tensor]:
    return {n: getattr(result.out, n).double() for n in PER_TOKEN}


def deviation(got: Result | Expected, expected: Expected) -> float:
    loss, grad, per = got if isinstance(got, tuple) and not isinstance(got, Result) else (
        got.out.loss, got.grad, values(got))  # fmt: skip
    pairs = [(loss, expected[0]), (grad, expected[1]), *((per[n], x) for n, x in expected[2].items())]
    found = 0.0
    for x, y in pairs:
        x, y = x.detach().double(), y.detach().double()
        if x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()):
            return float("inf")
        if x.numel():
            found = max(found, ((x - y).nan_to_num().abs().max() / (1 + y.nan_to_num().abs().max())).item())
    return found


def as_expected(result: Result, rows: Any = slice(None), completions: Any = slice(None)) -> Expected:
    """A result with rows (flat) and completions in another order."""
    flat = result.out.logprobs.ndim

    def picked(name: str, x: Tensor) -> Tensor:
        if name == "totals":
            return x
        return x[completions] if name == "completion_kl" else x.flatten(0, flat - 1)[rows]

    return result.out.loss, result.grad.flatten(0, flat - 1)[rows], {
        n: picked(n, x) for n, x in values(result).items()
    }  # fmt: skip


def by_rows(result: Result) -> Expected:
    return as_expected(result)


def rows(case: Case, base: Result, r: random.Random) -> float | None:
    """Packed rows in another order; padded ones packed in any."""
    seed = r.randrange(1 << 30)
    if not case.packed:
        # With as many rows as completions, a knob of one value per row would be read as one per completion.
        drop = r.random() < 0.5 and int(case.mask().sum()) != case.completions
        bare = replace(case.batch, mask=case.mask())
        order = losses.packed_order(bare, seed, drop)
        changed = replace(case, batch=losses.packed(bare, seed, drop))
        return deviation(by_rows(changed.run()), as_expected(base, order))
    order = torch.randperm(len(case.batch.tokens), generator=torch.Generator().manual_seed(seed))
    changed = case.apply(lambda name, x: x if case.per_completion(name, x) else x[order])
    return deviation(by_rows(changed.run()), as_expected(base, order))


def completions(case: Case, base: Result, r: random.Random) -> float | None:
    """Completions in another order, and groups by other numbers."""
    b, g = case.completions, torch.Generator().manual_seed(r.randrange(1 << 30))
    order = torch.randperm(b, generator=g)
    if case.packed:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(b))
        changed = case.apply(lambda name, x: x[order] if case.per_completion(name, x) else x)
        changed.batch.kwargs["completion"] = place[case.batch.kwargs["completion"].long()]
        index: Any = slice(None)
    else:
        changed = case.apply(lambda name, x: x[order])
        width = case.batch.tokens.shape[1]
        index = (order[:, None] * width + torch.arange(width)).flatten()
    if case.more:
        numbers = torch.randperm(b // case.config.num_generations, generator=g)
        k = torch.empty_like(case.more["num_constraints"]).index_copy_(0, numbers, case.more["num_constraints"])
        moved = {n: case.more[n][order] for n in ("rewards", "valid")}
        changed.more = {**case.more, **moved, "groups": numbers[case.more["groups"]][order], "num_constraints": k}
    return deviation(by_rows(changed.run()), as_expected(base, index, order))


def micro_batches(case: Case, base: Result, r: random.Random) -> float | None:
    """The losses of two parts, over the denominator of the whole, add up; their gradients are those of the whole."""
    if case.packed or case.completions < 2:
        return None
    batch = replace(case.batch, kwargs=dict(case.batch.kwargs), mask=case.mask())
    if case.more:
        given = {n: x for n, x in case.more.items() if n not in GIVEN}
        made = mdpgrpo_fast.advantages(config=case.config, backend=case.backend, **given)
        batch.advantage, batch.kl_beta = made.advantage, made.kl_beta
    lengths = batch.mask.sum(1)
    batch.kwargs.setdefault(
        "denominator", default_denominator(lengths, case.config.aggregation, losses.MAX_LENGTH).double()
    )
    order = torch.randperm(case.completions, generator=torch.Generator().manual_seed(r.randrange(1 << 30)))
    cut = r.randrange(1, case.completions)
    parts = [replace(case, batch=batch.rows(part), more={}).run() for part in (order[:cut], order[cut:])]
    grad = torch.empty_like(base.grad).index_copy_(0, order, torch.cat([p.grad for p in parts]))
    per = {n: torch.cat([values(p)[n] for p in parts])[order.argsort()] for n in PER_TOKEN if n != "totals"}
    expected = {n: x for n, x in values(base).items() if n != "totals"}
    return deviation((parts[0].out.loss + parts[1].out.loss, grad, per), (base.out.loss, base.grad, expected))


def padding(case: Case, base: Result, r: random.Random) -> float | None:
    """More tokens that do not count, whatever they hold."""
    more, shape = r.randrange(1, 4), case.batch.tokens.shape
    batch = replace(case.batch, mask=case.mask())
    dim = 0 if case.packed else 1
    if case.packed and shape[0] + more == case.completions:
        return None  # a knob of one value per row would be read as one per completion

    def wider(name: str, x: Tensor) -> Tensor:
        if x.shape[: len(shape)] != shape or (case.packed and case.per_completion(name, x)):
            return x
        fill = 0 if not x.is_floating_point() else 1.0 if name in KNOBS else float("nan")
        size = [*x.shape]
        size[dim] = more
        return torch.cat([x, x.new_full(size, fill)], dim)

    changed = replace(case, batch=batch).apply(wider)
    got = changed.run()
    kept = torch.arange(got.out.logprobs.numel()).view(got.out.logprobs.shape).narrow(dim, 0, shape[dim]).flatten()
    return max(
        deviation(as_expected(got, kept), by_rows(base)), got.grad.narrow(dim, shape[dim], more).abs().sum().item()
    )


def repetition(case: Case, base: Result, r: random.Random) -> float | None:
    """Every group twice: a mean stays, a sum over a given denominator doubles."""
    if case.more and case.config.scale_rewards == "batch" and case.config.group_std == "sample":
        return None  # whose divisor is n - 1
    b, twice = case.completions, lambda x: torch.cat([x, x])
    changed = case.apply(lambda name, x: twice(x), **({"num_completions": 2 * b} if case.packed else {}))
    if case.packed:
        completion = case.batch.kwargs["completion"]
        changed.batch.kwargs["completion"] = torch.cat([completion, completion + b])
        if len(completion) == b and any(tuple(x.shape) == (2 * b,) for n, x in changed.batch.kwargs.items()
                                        if n in KNOBS and isinstance(x, Tensor)):  # fmt: skip
            return None
    if case.more:
        groups = case.more["groups"]
        doubled = {n: twice(case.more[n]) for n in ("rewards", "valid", "num_constraints")}
        changed.more = {**case.more, **doubled, "groups": torch.cat([groups, groups + groups.max() + 1])}
    got = changed.run()
    # Denominators are at least 1, also of a batch that nothing counts in; and a batch of one may double to 2.
    factor = 1.0 if "denominator" in case.batch.kwargs else 0.5
    if factor == 0.5 and not case.mask().any():
        return None
    given = case.batch.kwargs.get("denominator")
    first = (got.out.loss * (0.5 if given is not None else 1.0), got.grad[: len(base.grad)], {})
    return deviation(first, (base.out.loss, base.grad * factor, {}))


def scaled_rewards(case: Case, base: Result, r: random.Random) -> float | None:
    """Without the goal, rewards count by what they are in their group, or batch, alone."""
    if not case.more or case.config.scale_rewards == "none":
        return None
    plain = replace(case, config=replace(case.config, dual_anchor=False, group_std="population"))
    changed = replace(plain, more={**case.more, "rewards": case.more["rewards"] * r.choice([0.25, 2.0, 64.0])})
    return deviation(by_rows(changed.run()), by_rows(plain.run()))


def of_a_head(case: Case, workspace: int | None) -> Result:
    vocab = case.batch.logits.shape[-1]
    hidden = case.batch.logits.detach().requires_grad_()
    head = linear.Head(torch.eye(vocab, dtype=hidden.dtype))
    options = {"workspace_bytes": workspace, "skip_idle": False, **case.more}  # which leaves out statistics
    out = linear.call(case.backend, hidden, head, case.batch, case.config, **options)
    return Result(out, torch.autograd.grad(out.loss, hidden)[0])


def a_head(case: Case, base: Result, r: random.Random) -> float | None:
    """Hidden states that are the logits, under a head that is the identity."""
    if case.batch.logits.shape[-1] > 200:
        return None
    return deviation(by_rows(of_a_head(case, None)), by_rows(base))


def chunks(case: Case, base: Result, r: random.Random) -> float | None:
    """The same, a few rows at a time."""
    vocab = case.batch.logits.shape[-1]
    if vocab > 200:
        return None
    size = r.randrange(1, 6) * vocab * case.batch.logits.element_size()
    return deviation(by_rows(of_a_head(case, size)), by_rows(base))


RELATIONS: tuple[Callable[[Case, Result, random.Random], float | None], ...] = (
    rows, completions, micro_batches, padding, repetition, scaled_rewards, a_head, chunks,
)  # fmt: skip


def backends(seed: int, r: random.Random) -> str | None:
    """The fused backends against float64, within the budget of the tests; the name of one that is not."""
    batch, config, more = losses.pick_options(seed)
    for name in losses.BACKENDS:
        if name == "cpu" or losses.DEVICE == "cuda" or r.random() < TRITON_SHARE:
            try:
                losses.assert_matches(name, batch, config, **more)
            except AssertionError as e:
                # The budget is of each row's own weight, which may be the difference of two that cancel.
                if str(e).startswith("gradient") and batch.logits.dtype == torch.float32:
                    truth, got = (x.grad.detach().cpu().double() for x in (
                        losses.reference(batch, config, **more)[0], losses.run(name, batch, config, **more)
                    ))  # fmt: skip
                    if (got - truth).abs().max() <= 1e-6 * truth.abs().max():
                        continue
                return f"{name}: {str(e).splitlines()[0]}"
    return None


# ---- a run ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    counts: dict[str, int] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=partial(defaultdict, float))
    failures: list[str] = field(default_factory=list)
    configurations: int = 0

    def add(self, other: Tally) -> None:
        self.configurations += other.configurations
        self.failures += other.failures
        for name, n in other.counts.items():
            self.counts[name] += n
        for name, x in other.largest.items():
            self.largest[name] = max(self.largest[name], x)


def check(seed: int, tally: Tally) -> None:
    """One configuration: its backends, or some relations on one of them."""
    r = random.Random(seed + 1)
    tally.configurations += 1
    if r.random() < 0.25:
        tally.counts["backends"] += 1
        if (problem := backends(seed, r)) is not None:
            tally.failures.append(f"seed {seed}: backends: {problem}")
        return
    case = draw(seed)
    base, done = case.run(), 0
    for relation in r.sample(RELATIONS, len(RELATIONS)):
        name = f"{relation.__name__} ({case.backend})"
        found = relation(case, base, r)
        if found is None:
            continue
        tally.counts[name] += 1
        tally.largest[name] = max(tally.largest[name], found)
        if not found <= TOLERANCE[case.backend]:
            tally.failures.append(f"seed {seed}: {name}: off by {found:.2e}")
        done += 1
        if done == CHANGES:
            break


def check_all(seeds: range, until: float) -> Tally:
    """until: by time.monotonic(), which processes share."""
    torch.set_num_threads(1)
    tally = Tally()
    for seed in seeds:
        if time.monotonic() > until:
            break
        check(seed, tally)
    return tally


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=1500.0, help="ends sooner after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args(argv)
    tally, start, end = Tally(), time.monotonic(), args.first + args.configurations
    parts = [range(i, min(i + 100, end)) for i in range(args.first, end, 100)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(check_all, parts, [start + args.seconds] * len(parts)):
            tally.add(found)
    seconds = time.monotonic() - start
    print(f"{tally.configurations} configurations, {sum(tally.counts.values())} relations in {seconds:.0f} s; "
          f"{len(tally.failures)} failures", *tally.failures[:20], sep="\n")  # fmt: skip
    for name, n in sorted(tally.counts.items()):
        print(f"{name:28} {n:6} {tally.largest.get(name, 0.0):.1e}")
    if args.output is not None:
        sys.path.append(str(ROOT / "benchmarks"))
        from harness import provenance

        document = {
            **provenance("python tests/metamorphic.py"), "first_seed": args.first,
            "configurations": tally.configurations, "seconds": round(seconds),
            "relations": dict(sorted(tally.counts.items())),
            "largest_deviation": {n: float(f"{x:.2e}") for n, x in sorted(tally.largest.items())},
            "tolerance": TOLERANCE, "failures": tally.failures,
        }  # fmt: skip
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if tally.failures or tally.configurations < args.configurations else 0


if __name__ == "__main__":
    raise SystemExit(main())
