"""What is drawn of one run, and what its charts mean under the run's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import MDPGRPOConfig
from .charts import Curve, Figure, figure
from .run import Row, Run, as_mapping, as_number, lookup, method_of, series

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One chart; `curves` and `held_out` map a label to the keys of its value in a row of training, of evaluation."""

    title: str
    caption: str
    curves: Mapping[str, Keys] = field(default_factory=dict)
    held_out: Mapping[str, Keys] = field(default_factory=dict)
    percent: bool = False
    stacked: bool = False
    from_zero: bool = True
    impossible: str | None = None  # why the numbers can be nothing but 0

    def figure(self, run: Run) -> Figure | None:
        """None where the run has no numbers for it."""
        found = [Curve(label, *series(run.train, *keys)) for label, keys in self.curves.items()]
        found += [held_out_curve(label, run.evals, keys) for label, keys in self.held_out.items()]
        found = [curve for curve in found if len(curve.x)]
        if not found:
            return None
        if self.impossible:
            return Figure(self.title, self.caption, None, [], self.impossible)
        return figure(self.title, self.caption, _aligned(found) if self.stacked else found, percent=self.percent,
                      from_zero=self.from_zero, stacked=self.stacked)  # fmt: skip


def held_out_curve(label: str, evals: list[Row], keys: Keys) -> Curve:
    """A held-out score over the steps, with the half-widths that the evaluations have of it."""
    x, y = series(evals, *keys)
    known = dict(zip(*series(evals, "eval", "intervals", keys[-1]), strict=True))
    return Curve(label, x, y, "points", np.array([known.get(step, math.nan) for step in x]))


def _aligned(curves: list[Curve]) -> list[Curve]:
    """Over the same steps, 0 where one has no value."""
    steps = np.unique(np.concatenate([c.x for c in curves]))
    known = [dict(zip(c.x, c.y, strict=True)) for c in curves]
    return [Curve(c.label, steps, np.array([k.get(s, 0.0) for s in steps])) for c, k in zip(curves, known, strict=True)]


def figures(run: Run) -> dict[str, list[Figure]]:
    """Section of the page → its charts, those that the run has numbers for."""
    sections = {"learning": _learning(run), "group-health": _group_health(run), "pace": _pace(run)}
    drawn = {name: [f for panel in panels if (f := panel.figure(run))] for name, panels in sections.items()}
    return {name: found for name, found in drawn.items() if found}


def _learning(run: Run) -> list[Panel]:
    quality = {"HSR": ("hsr",), "SSR": ("ssr",)}
    checked = any(not math.isnan(as_number(lookup(row, "eval", "hsr"))) for row in run.evals)
    held_out = {k: ("eval", *v) for k, v in quality.items()} if checked else {"reward": ("eval", "reward")}
    greedy = "Greedy answers to prompts that training does not see"
    known = any(as_number(w) >= 0 for row in run.evals for w in as_mapping(lookup(row, "eval", "intervals")).values())
    bars = "; bars: 95 % intervals, by the bootstrap over prompts" * known
    method = method_of(run)
    unmeasured = None if method is None or method.needs_reference else "not measured: both KL coefficients are 0"
    return [
        Panel("Held-out HSR and SSR" if checked else "Held-out reward", f"{greedy}{bars}.", held_out=held_out,
              percent=checked, from_zero=checked),
        Panel("Training HSR and SSR", "Sampled completions of each step; thin: as measured, bold: moving mean.",
              quality, percent=True),
        Panel("Training reward", "Mean over the completions of a step.", {"reward": ("reward",)}, from_zero=False),
        *_reward_panels(run, beside_shares=checked),
        Panel("Loss", loss_caption(run), {"loss": ("loss",)}, from_zero=False),
        Panel("KL to the reference", "How far the policy has moved, in nats per token.", {"KL": ("kl",)},
              impossible=unmeasured),
        Panel("Entropy", "Of the next token, in nats; a collapse to 0 ends exploration.", {"entropy": ("entropy",)}),
        Panel("Clip share", "Tokens whose ratio is clipped and gives no policy gradient.",
              {"low": ("clip_low",), "high": ("clip_high",)}, percent=True),
        Panel("Gradient norm", "Before clipping.", {"gradient norm": ("grad_norm",)}),
        Panel("Completion length", "Mean, in tokens.", {"tokens": ("completion_length",)}),
    ]  # fmt: skip


def loss_caption(run: Run) -> str:
    """What the value of the loss is made of: -J + β·KL, averaged as the run's aggregation says."""
    method, updates = method_of(run), lookup(run.config, "run", "updates_per_rollout")
    parts = lookup(run.config, "run", "mini_batches")
    little = "Its gradient trains; its value says little about progress."
    # What J is other than A where the ratio is 1.
    other = method is None or (
        method.loss not in ("ppo_clip", "gmpo", "luspo") or method.weighs_sampling or method.has_entropy_bonus
        or method.top_entropy_quantile < 1 or method.advantage_clip > 0 or method.off_policy_threshold is not None
    )  # fmt: skip
    if method is None or updates != 1 or parts not in (None, 1) or other:
        kl = "" if method is not None and not method.kl_in_loss else ", plus the KL term"
        return f"Minus the weighted advantages{kl}. {little}"
    moved = " and ".join(["shaping"] * method.prospect + ["the goal anchor"] * (method.alpha > 0))
    alike = method.aggregation == "grpo" and not method.mask_truncated and not method.rescale_per_row
    if alike and not moved:
        kl = "the KL term alone" if method.kl_in_loss else "0"
        return f"Its value is {kl}, as the advantages of a group add up to 0 and the ratio is 1. Its gradient is not 0."
    why = (
        f"which {moved} move{'s' * (' and ' not in moved)} from a mean of 0"
        if moved
        else ("which add up to 0 only where all completions weigh alike")
    )
    return f"Minus the advantages, {why}{', plus the KL term' * method.kl_in_loss}. {little}"


def _reward_panels(run: Run, beside_shares: bool) -> list[Panel]:
    """A chart for each reward, whose scales may differ, and the held-out sum beside HSR and SSR; none where the one
    reward is the share of constraints, which those show."""
    names = list(dict.fromkeys(name for row in run.train for name in as_mapping(row.get("rewards"))))
    if names in ([], ["constraints"]):
        return []
    held_out = Panel("Held-out reward", "Weighted sum, mean over the held-out answers.",
                     held_out={"reward": ("eval", "reward")}, from_zero=False)  # fmt: skip
    return [held_out] * beside_shares + [
        Panel(f"Reward {name}", "Over the completions that it applies to; no spread, no signal.",
              {"mean": ("rewards", name, "mean"), "spread": ("rewards", name, "std")},
              {"held-out mean": ("eval", "rewards", name, "mean")}, from_zero=False)
        for name in names
    ]  # fmt: skip


def _largest_z(method: MDPGRPOConfig) -> float:
    """Of a group in which one member has another reward than all others."""
    g = method.num_generations
    return (g - 1) / math.sqrt(g) if method.group_std == "sample" else math.sqrt(g - 1)


def _group_health(run: Run) -> list[Panel]:
    method = method_of(run)
    temperatures = sorted({t for row in run.train for t in row["slots"]}, key=lambda t: float(t[2:]))
    slot = {key: {t: ("slots", t, key) for t in temperatures} for key in ("reward", "reward_std", "ess")}
    impossible = None
    if method is not None and _largest_z(method) <= 2:
        impossible = f"not possible: |z| ≤ {_largest_z(method):.2f} in a group of {method.num_generations}"
    return [
        Panel("Groups with equal rewards", "Here z is 0 for all: plain GRPO learns nothing from such a group. No "
              "gradient: every advantage is 0 and no KL term acts, so that nothing is learned at all.",
              {"equal rewards": ("zero_variance_groups",), "no gradient": ("zero_gradient_groups",)}, percent=True),
        Panel("Groups with |z| > 2", "A tiny spread blown up to a large step; shaping bounds it.",
              {"groups": ("large_z_groups",)}, percent=True, impossible=impossible),
        Panel("Failing groups rewarded by z", "All members under the goal of 0.5, and z alone would still reinforce "
              "the best of them.", {"groups": ("gain_below_goal_groups",)}, percent=True),
        Panel("Reward by temperature", "Mean over the completions of each sampling temperature.", slot["reward"]),
        Panel("Reward spread by temperature", "Standard deviation over the same completions.", slot["reward_std"]),
        Panel("Effective sample size", "Share of tokens that count after importance weighting, by temperature.",
              slot["ess"], percent=True),
    ]  # fmt: skip


def _pace(run: Run) -> list[Panel]:
    # Earlier runs have "train" for all from reference to optimizer.
    known = ("generate", "reference", "forward", "backward", "train", "optimizer", "score", "other")
    seconds = {stage: series(run.train, "seconds", stage)[1] for stage in known}
    totals = {stage: float(values.sum()) for stage, values in seconds.items() if len(values)}
    total = sum(totals.values())
    shares = ", ".join(f"{stage} {t / total:.0%}" for stage, t in totals.items()) if total else ""
    return [
        Panel("Seconds per step", f"Stacked by stage. Over the run: {shares}.",
              {stage: ("seconds", stage) for stage in totals}, stacked=True),
        Panel("Tokens per second", "Generated tokens over the time of the whole step.",
              {"tokens": ("tokens_per_second",)}),
        Panel("Truncated completions", "Stopped by the length limit.", {"truncated": ("truncated",)}, percent=True),
    ]  # fmt: skip
