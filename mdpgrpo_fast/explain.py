"""Show what each component of MDP-GRPO makes of one group of rewards, beside plain GRPO.

`python -m mdpgrpo_fast.explain --rewards 0.5,0.5,0.5,0.75 --constraints 4`
"""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from typing import get_type_hints

import torch
from torch import Tensor

from . import reference
from .cli import parse, report_errors
from .config import PRESETS, ConfigError, MDPGRPOConfig, knob, preset, require
from .ops.advantages import advantages
from .ops.checks import MAX_REWARD

ADVANTAGE_KNOBS = (
    "group_std",
    "scale_rewards",
    "baseline",
    "advantage_clip",
    "dual_anchor",
    "dual_anchor_alpha",
    "goal_mean",
    "goal_std",
    "prospect",
    "prospect_beta",
    "prospect_gain",
    "prospect_loss",
    "prospect_on_goal",
    "asymmetric_kl",
    "kl_beta_pos",
    "kl_beta_neg",
)
MAX_CONSTRAINTS = 10_000


@dataclass(frozen=True)
class Explained:
    """One group under a configuration and under plain GRPO. Vectors are (G,) float64, the rest numbers."""

    config: MDPGRPOConfig
    num_constraints: int
    rewards: Tensor
    mean: float
    std: float
    goal_mean: float
    goal_std: float
    z: Tensor
    delta: Tensor
    shaped_z: Tensor
    shaped_delta: Tensor
    advantage: Tensor
    kl_beta: Tensor
    grpo_std: float
    grpo_advantage: Tensor
    grpo_kl_beta: Tensor


def explain_group(rewards: list[float], num_constraints: int, config: MDPGRPOConfig) -> Explained:
    """All quantities of one group of G = config.num_generations rewards of a prompt with K constraints.

    Raises: ValueError for a number of rewards other than G, a non-finite reward or one beyond ±1e6, or K < 1.
    """
    r, k = torch.tensor([rewards], dtype=torch.float64), torch.tensor([num_constraints])
    ours = advantages(r, k, config)
    plain = preset("grpo", num_generations=config.num_generations, kl_beta_pos=config.kl_beta_pos)
    grpo = advantages(r, k, plain)

    def shape(v: Tensor, on: bool) -> Tensor:
        knobs = (config.prospect_beta, config.prospect_gain, config.prospect_loss)
        return reference.prospect_shape(v, *knobs) if on else v

    # The goal anchor is affine in the reward: what it makes of rewards 0 and 1 tells the m and s that were used.
    probe = torch.zeros_like(r)
    probe[0, 1] = 1
    low, high = reference.goal_anchor(probe, ours.mean, k, config.goal_mean, config.goal_std)[0, :2].tolist()
    return Explained(
        config=config,
        num_constraints=num_constraints,
        rewards=r[0],
        mean=float(ours.mean),
        std=float(ours.std),
        goal_mean=-low / (high - low),
        goal_std=1 / (high - low),
        z=ours.z[0],
        delta=ours.delta[0],
        shaped_z=shape(ours.z, config.prospect)[0],
        shaped_delta=shape(ours.delta, config.prospect and config.prospect_on_goal)[0],
        advantage=ours.advantage[0],
        kl_beta=ours.kl_beta[0],
        grpo_std=float(grpo.std),
        grpo_advantage=grpo.advantage[0],
        grpo_kl_beta=grpo.kl_beta[0],
    )


def _signed(value: float) -> str:
    # Adding 0.0 turns the -0.0 of rounding into 0.0.
    return f"{round(value, 4) + 0.0:+.4f}" if round(value, 4) else "0.0000"


def table(x: Explained) -> str:
    """One row per completion, aligned; the last two columns are plain GRPO's."""
    columns: list[tuple[str, list[str]]] = [
        ("#", [str(i) for i in range(1, len(x.rewards) + 1)]),
        ("reward", [f"{r:.4f}" for r in x.rewards.tolist()]),
        ("z", [_signed(v) for v in x.z.tolist()]),
        ("δ", [_signed(v) for v in x.delta.tolist()]),
        ("ψ(z)", [_signed(v) for v in x.shaped_z.tolist()]),
        ("ψ(δ)", [_signed(v) for v in x.shaped_delta.tolist()]),
        ("A", [_signed(v) for v in x.advantage.tolist()]),
        ("β", [f"{v:g}" for v in x.kl_beta.tolist()]),
        ("│", ["│"] * len(x.rewards)),
        ("GRPO A", [_signed(v) for v in x.grpo_advantage.tolist()]),
        ("GRPO β", [f"{v:g}" for v in x.grpo_kl_beta.tolist()]),
    ]
    widths = [max(map(len, [name, *cells])) for name, cells in columns]
    rows = [[name for name, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    rule = "".join("┼" if c == "│" else "─" for c in lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def _listed(chosen: Tensor) -> str:
    picked = [str(i + 1) for i, on in enumerate(chosen.tolist()) if on]
    if len(picked) == len(chosen):
        return f"all {len(picked)} completions"
    listed = picked[0] if len(picked) == 1 else f"{', '.join(picked[:-1])} and {picked[-1]}"
    return f"completion{'s' if len(picked) > 1 else ''} {listed}"


def _relative_sentences(x: Explained) -> list[str]:
    """What the relative anchor does: a collapse to zero, or how far one constraint is stretched."""
    c, a = x.config, float(x.advantage[0])
    if x.std == 0:
        out = [
            f"{'Both' if len(x.rewards) == 2 else f'All {len(x.rewards)}'} rewards are {x.mean:g}: the spread is zero, "
            "so z = 0 and plain GRPO has no policy gradient for this group."
        ]
        if a:
            direction = "less" if a < 0 else "more"
            out.append(
                f"The goal anchor still gives A = {_signed(a)} to each of them (δ = {_signed(float(x.delta[0]))}, "
                f"weight α = {c.alpha:g}): all of them become {direction} likely."
            )
        elif c.alpha == 0:
            out.append("The goal anchor has no weight (α = 0), so A = 0 here too: this group teaches nothing.")
        else:
            out.append(f"The rewards lie exactly on the goal mean {x.goal_mean:g}: δ = 0, so A = 0 here too.")
        return out
    top = int(x.z.abs().argmax())
    z, gap, mean = float(x.z[top]), float(x.rewards[top] - x.mean) * x.num_constraints, "the group mean"
    if c.baseline == "leave_one_out":
        gap, mean = gap * len(x.rewards) / (len(x.rewards) - 1), "the mean of the others"
    text = f"Completion {top + 1} is {abs(gap):.2f} constraints {'above' if gap > 0 else 'below'} {mean}; "
    if c.scale_rewards == "none":
        text += f"undivided that is z = {_signed(z)}."
    else:
        text += f"divided by a standard deviation worth {x.std * x.num_constraints:.2f} constraints that becomes "
        text += f"z = {_signed(z)}{', low variance amplified' if abs(z) > 2 else ''}."
    out = [text]
    if c.scale_rewards == "batch":
        out.append(
            "In a run the deviation is that of all rewards of a step (scale_rewards = batch), not of this group."
        )
    if c.prospect:
        shaped = float(x.shaped_z[top])
        name, bound = ("λ₊", c.prospect_gain) if z >= 0 else ("λ₋", c.prospect_loss)
        out.append(
            f"Shaping makes it ψ(z) = {_signed(shaped)}, {abs(shaped) / bound:.0%} of the bound {name} = {bound:g}; "
            f"plain GRPO uses {_signed(float(x.grpo_advantage[top]))}, unbounded."
        )
    else:
        limit = f"the clip alone bounds A, at ±{c.advantage_clip:g}" if c.advantage_clip else "nothing bounds z"
        out.append(f"Prospect shaping is off: {limit}.")
    return out


def _goal_sentences(x: Explained) -> list[str]:
    """Where the group stands against the goal, and what the goal anchor changes because of it."""
    c, pull = x.config, x.config.alpha * x.shaped_delta
    side = "at" if math.isclose(x.mean, x.goal_mean) else "below" if x.mean < x.goal_mean else "above"
    out = [f"The group mean {x.mean:.4f} is {side} the goal mean {x.goal_mean:.4f}."]
    if c.alpha > 0 and x.std > 0:
        low, high = _signed(float(pull.min())), _signed(float(pull.max()))
        out.append(f"The goal anchor adds α ψ(δ) to A: from {low} to {high}.")
    for verb, chosen, place in (
        ("reinforces", (x.rewards < x.goal_mean) & (x.z > 0), "below"),
        ("punishes", (x.rewards > x.goal_mean) & (x.z < 0), "above"),
    ):
        if not bool(chosen.any()):
            continue
        strongest = int(torch.where(chosen, x.z.abs(), -1.0).argmax())
        text = f"z alone {verb} {_listed(chosen)} although {place} the goal"
        if c.alpha > 0:
            change = f"{_signed(float(x.shaped_z[strongest]))} into A = {_signed(float(x.advantage[strongest]))}"
            text += f"; mixing in the goal anchor turns ψ(z) = {change} for completion {strongest + 1}"
        out.append(text + ".")
    if c.alpha == 0:
        out.append("The goal anchor has no weight (α = 0): the distance to the goal changes nothing.")
    return out


def sentences(x: Explained) -> list[str]:
    """What happened to this group, computed from its numbers."""
    c, out = x.config, [*_relative_sentences(x), *_goal_sentences(x)]
    cut = ((1 - c.alpha) * x.shaped_z + c.alpha * x.shaped_delta).abs() > (c.advantage_clip or math.inf)
    if bool(cut.any()):
        out.append(f"The clip cuts A to ±{c.advantage_clip:g} for {_listed(cut)}.")
    flipped = (x.advantage * x.grpo_advantage) < 0
    if bool(flipped.any()):
        out.append(f"Against plain GRPO the sign of A changes for {_listed(flipped)}.")
    negative, (pos, neg) = int((x.advantage < 0).sum()), c.betas
    if c.kl_in == "reward":
        out.append(
            f"The KL is in the reward: {c.kl_beta_pos:g} times a completion's KL is taken off before (kl_in = reward), "
            "and the loss has no KL term; read the rewards here as what is left."
        )
    elif pos == neg:
        out.append(f"One KL coefficient for all: β = {pos:g}.")
    else:
        out.append(
            f"A < 0 for {negative} of {len(x.rewards)} completions: KL coefficient β = {neg:g} there, {pos:g} "
            f"elsewhere; plain GRPO uses {float(x.grpo_kl_beta[0]):g} for all."
        )
    return out


def render(x: Explained) -> str:
    c = x.config
    kind = "divisor G" if c.group_std == "population" else "divisor G - 1"
    bounds = f"bounds λ₊ = {c.prospect_gain:g}, λ₋ = {c.prospect_loss:g}"
    relative = f"mean {x.mean:.4f}{' (each against the mean of the others)' * (c.baseline == 'leave_one_out')}, "
    if c.scale_rewards == "none":
        relative += f"undivided: the standard deviation {x.std:.4f} plays no part"
    else:
        relative += f"standard deviation {x.std:.4f} ({kind}; plain GRPO {x.grpo_std:.4f})"
    shaping = f"slope {c.prospect_beta:g}, {bounds}" if c.prospect else "off"
    if c.prospect and not c.prospect_on_goal:
        shaping += ", relative anchor only: ψ(δ) = δ"
    facts = [
        ("group", f"G = {len(x.rewards)} completions, K = {x.num_constraints} constraints"),
        ("relative anchor", relative),
        ("goal anchor", f"mean {x.goal_mean:.4f}, standard deviation {x.goal_std:.4f}, weight α = {c.alpha:g}"),
        ("shaping ψ", shaping),
        *([("clip", f"|A| at most {c.advantage_clip:g}")] if c.advantage_clip else []),
    ]
    head = "\n".join(f"{name:<16} {text}" for name, text in facts)
    return "\n\n".join([head, table(x), "\n".join(f"- {s}" for s in sentences(x))])


# ---- command line ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupConfig:
    """The group to explain, as the command line has it."""

    rewards: list[str] = knob([], "rewards of the group, by commas or spaces")
    constraints: int | None = knob(None, "number of constraints of the prompt")
    preset: str = knob("paper", f"method settings to start from: {', '.join(PRESETS)}")


def _resolve(argv: list[str] | None) -> tuple[list[float], int, MDPGRPOConfig]:
    """Rewards, number of constraints and configuration of a command line: the preset's settings, then flags."""
    hints = get_type_hints(MDPGRPOConfig)
    known = [f for f in fields(MDPGRPOConfig) if f.name in ADVANTAGE_KNOBS]
    knobs = make_dataclass("Knobs", [(f.name, hints[f.name], knob(f.default, f.metadata["help"])) for f in known])
    read = partial(parse, argv, GroupConfig, knobs, prog="mdpgrpo explain", description=__doc__)
    group, _ = read()
    for name, value in (("--rewards", group.rewards), ("--constraints", group.constraints)):
        if value in ([], None):
            raise ConfigError(f"{name} is required")
    require(
        1 <= group.constraints <= MAX_CONSTRAINTS, "--constraints", group.constraints, f"from 1 to {MAX_CONSTRAINTS}"
    )
    rewards = _rewards(group.rewards)
    # Temperatures play no part here, and their list need not divide this G.
    start = preset(group.preset, num_generations=len(rewards), multi_temperature=False)
    _, flags = read(layers=[(f"preset {group.preset}", {f.name: getattr(start, f.name) for f in known})])
    config = replace(start, **vars(flags))
    if config.running_goal:
        raise ConfigError("goal_mean and goal_std running are of a whole run: one group does not tell them")
    return rewards, group.constraints, config


def _rewards(words: list[str]) -> list[float]:
    rewards = []
    for word in ",".join(words).split(","):
        try:
            rewards.append(float(word))
        except ValueError:
            raise ConfigError(f"--rewards must be numbers, by commas; got {word.strip()!r}") from None
        require(math.isfinite(rewards[-1]), "--rewards", word.strip(), "finite")
        require(abs(rewards[-1]) <= MAX_REWARD, "--rewards", word.strip(), f"within ±{MAX_REWARD:g}")
    if len(rewards) < 2:
        raise ConfigError("--rewards needs at least two: a group of one has no relative anchor")
    return rewards


def _warnings(rewards: list[float], k: int) -> list[str]:
    out = []
    outside = [r for r in rewards if not 0 <= r <= 1]
    if outside:
        out.append(f"reward {outside[0]:g} is outside [0, 1]: the goal anchor takes rewards for shares of constraints")
    between = [r for r in rewards if 0 <= r <= 1 and not math.isclose(r * k, round(r * k), abs_tol=0.005 * k)]
    if between:
        out.append(f"reward {between[0]:g} is no whole number of {k} constraints")
    return out


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Greek letters on a terminal without them
    with report_errors():
        rewards, num_constraints, config = _resolve(argv)
        text = render(explain_group(rewards, num_constraints, config))
    for warning in _warnings(rewards, num_constraints):
        print(f"warning: {warning}", file=sys.stderr)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
