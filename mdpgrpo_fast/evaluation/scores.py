"""Scores of responses: IFEval's four accuracies, HSR and SSR, rewards, each with its interval; a table of them."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from ..verifiers import scoring
from .answers import MUCH_TRUNCATED, truncation_note
from .intervals import half_width

if TYPE_CHECKING:
    from ..data import Example
    from ..rewards import Score, Scorer


def accuracy(examples: list[Example], flags: list[list[bool]]) -> dict[str, Any]:
    """`mdpgrpo_fast.verifiers.scoring.accuracy` of the examples' constraints."""
    return scoring.accuracy([e.instruction_ids for e in examples], flags)


def from_scores(examples: list[Example], scores: list[Score]) -> dict[str, Any]:
    """`accuracy` of scored responses, with mean and spread of their rewards, each and summed; a dropped sample whose
    constraints were not checked satisfies none."""
    flags = [s.satisfied or [False] * len(e.instruction_ids) for e, s in zip(examples, scores, strict=True)]
    total = _mean_and_std([s.total for s in scores])
    names = scores[0].parts if scores else ()
    return {
        **accuracy(examples, flags),
        "reward": total["mean"],
        "reward_std": total["std"],
        "rewards": {name: _mean_and_std([s.parts[name] for s in scores]) for name in names},
    }


def intervals(examples: list[Example], scores: list[Score]) -> dict[str, float | None]:
    """Half of the 95 % intervals (bootstrap over prompts) of `from_scores`' hsr, ssr and reward."""
    pairs = zip(examples, scores, strict=True)
    flags = [s.satisfied or [False] * len(e.instruction_ids) for e, s in pairs if e.instruction_ids]
    return {
        "hsr": half_width([all(row) for row in flags]),
        "ssr": half_width([sum(row) / len(row) for row in flags]),
        "reward": half_width([s.total for s in scores if s.total is not None]),
    }


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Over those that are not None; None where there are none."""
    found = [v for v in values if v is not None]
    return {"mean": fmean(found) if found else None, "std": pstdev(found) if found else None}


def strict_and_loose(
    scorer: Scorer, examples: list[Example], responses: list[str]
) -> tuple[dict[str, Any], list[list[bool]]]:
    """The four accuracies of IFEval (prompt and instruction level, strict and loose), SSR, HSR and per-type rates.

    Second: the strict verdicts of each response, by position.
    """
    strict, loose = (scorer.verify(examples, responses, mode) for mode in ("strict", "loose"))
    result = scoring.strict_and_loose([e.instruction_ids for e in examples], strict, loose)
    return {**result, "unchecked": scorer.unchecked, "unchecked_reason": scorer.unchecked_reason}, strict


def table(result: dict[str, Any]) -> str:
    """The result of `strict_and_loose` as plain text."""
    lines = [scoring.table(result)]
    if "truncated" in result:
        lines.append(f"{'cut at the length limit':42}{result['truncated']:8.3f}")
        if result["truncated"] > MUCH_TRUNCATED:
            lines.append(truncation_note(result["truncated"], result["max_completion_length"]))
    if result["unchecked"]:
        lines.append(
            f"{result['unchecked']} checks ended without an answer and count as not satisfied, the first one as "
            f"{result['unchecked_reason']}"
        )
    return "\n".join(lines)
