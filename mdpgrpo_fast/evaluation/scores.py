"""Scores of responses: IFEval's four accuracies, HSR and SSR, rewards, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from ..verifiers import scoring
from .answers import Answer
from .intervals import half_width

if TYPE_CHECKING:
    from ..data import Example
    from ..rewards import Score, Scorer

Estimate = tuple[float | None, float | None]  # a score and half of its 95 % interval


def accuracy(examples: list[Example], flags: list[list[bool]]) -> dict[str, Any]:
    """`mdpgrpo_fast.verifiers.scoring.accuracy` of the examples' constraints."""
    return scoring.accuracy([e.instruction_ids for e in examples], flags)


def from_scores(examples: list[Example], scores: list[Score]) -> dict[str, Any]:
    """`accuracy` of scored responses, with mean and spread of their rewards, each and summed; a dropped sample whose
    constraints were not checked satisfies none."""
    flags = [s.satisfied or [False] * len(e.instruction_ids) for e, s in zip(examples, scores, strict=True)]
    total, *parts = (_mean_and_std(values) for values in rewards_of(scores).values())
    return {
        **accuracy(examples, flags),
        "reward": total["mean"],
        "reward_std": total["std"],
        "rewards": dict(zip(scores[0].parts if scores else (), parts, strict=True)),
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


def rewards_of(scores: Sequence[Score]) -> dict[str, list[float | None]]:
    """The values of "reward", the weighted sum, and of each reward by its name."""
    names = scores[0].parts if scores else ()
    return {"reward": [s.total for s in scores], **{name: [s.parts[name] for s in scores] for name in names}}


def _mean_and_std(values: list[float | None]) -> dict[str, float | None]:
    """Over those that are not None; None where there are none."""
    found = [v for v in values if v is not None]
    return {"mean": fmean(found) if found else None, "std": pstdev(found) if found else None}


def estimate(values: Sequence[float | None], weights: Sequence[float] | None = None) -> Estimate:
    """The (weighted) mean of one value per prompt, None where a prompt has none, and its interval's half."""
    rows = [i for i, value in enumerate(values) if value is not None]
    found = [float(values[i]) for i in rows]  # type: ignore[arg-type]
    if not found:
        return None, None
    if weights is None:
        return sum(found) / len(found), half_width(found)
    given = [weights[i] for i in rows]
    mean = sum(v * w for v, w in zip(found, given, strict=True)) / sum(given)
    return mean, half_width(found, weights=given)


@dataclass(frozen=True)
class Scored:
    """G completions of each of P prompts with their verdicts and rewards; P·G of each, those of a prompt in a row."""

    examples: list[Example]  # P
    temperatures: tuple[float, ...]  # of the G slots
    answers: list[Answer]
    strict: list[list[bool]]
    loose: list[list[bool]]
    scores: list[Score]

    @property
    def samples(self) -> int:
        """G."""
        return len(self.temperatures)

    def only(self, slots: list[int]) -> Scored:
        """The completions of some of the slots."""
        rows = [i for i in range(len(self.answers)) if i % self.samples in slots]
        parts = ([of[i] for i in rows] for of in (self.answers, self.strict, self.loose, self.scores))
        return Scored(self.examples, tuple(self.temperatures[s] for s in slots), *parts)  # type: ignore[arg-type]

    def per_prompt(self, values: Sequence[float | None]) -> list[float | None]:
        """The mean of each prompt's values that are there."""
        groups = (values[i : i + self.samples] for i in range(0, len(values), self.samples))
        found = [[v for v in group if v is not None] for group in groups]
        return [sum(group) / len(group) if group else None for group in found]

    def mean(self, values: Sequence[float | None], weights: Sequence[float] | None = None) -> Estimate:
        """`estimate` of the prompts' means of P·G values; weights: one per prompt."""
        return estimate(self.per_prompt(values), weights)


def score(scorer: Scorer, examples: list[Example], answers: list[list[Answer]], taus: tuple[float, ...]) -> Scored:
    """Verdicts, strict and loose, and rewards of G answers to each example. taus: the slots' temperatures."""
    rows = [example for example, group in zip(examples, answers, strict=True) for _ in group]
    flat = [one for group in answers for one in group]
    texts = [a.scored for a in flat]
    strict, loose = (scorer.verify(rows, texts, mode=mode) for mode in ("strict", "loose"))
    ids = [a.token_ids for a in flat]
    scores = scorer(rows, [a.seen for a in flat], answers=texts, completion_ids=ids)
    return Scored(examples, taus, flat, strict, loose, scores)


def summary(scored: Scored) -> dict[str, Any]:
    """The four accuracies of IFEval (prompt and instruction level, strict and loose), HSR, SSR, rates by type, rewards
    and the truncated share; None where there is nothing to count. Each is a mean over prompts (the instruction level
    and the types weighted by how often a prompt asks) of the mean over the prompt's completions that have it.

    `intervals` has half of the 95 % interval (bootstrap over prompts) of each, by the same names.
    """
    found: dict[str, Estimate] = {}
    sizes = [len(e.instruction_ids) for e in scored.examples]
    for mode, verdicts in (("strict", scored.strict), ("loose", scored.loose)):
        shares = [sum(row) / len(row) if row else None for row in verdicts]
        found[f"prompt_{mode}"] = scored.mean([float(all(row)) if row else None for row in verdicts])
        found[f"instruction_{mode}"] = scored.mean(shares, sizes)
        found[f"ssr_{mode}"] = scored.mean(shares)
    found["hsr"], found["ssr"] = found["prompt_strict"], found["ssr_strict"]
    found["truncated"] = scored.mean([float(not a.finished) for a in scored.answers])
    columns = rewards_of(scored.scores)
    means = {name: scored.mean(values) for name, values in columns.items()}
    found["reward"] = means.pop("reward")
    stds = {name: _mean_and_std(values)["std"] for name, values in columns.items()}
    types = _types(scored)
    return {
        **{name: value for name, (value, _) in found.items()},
        "prompts": len(scored.examples),
        "count": sum(map(bool, sizes)),
        "reward_std": stds["reward"],
        "rewards": {name: {"mean": value, "std": stds[name]} for name, (value, _) in means.items()},
        "dropped": sum(s.total is None for s in scored.scores),
        "types": {t: {"count": n, "strict": s[0], "loose": o[0]} for t, (n, s, o) in types.items()},
        "intervals": {
            **{name: half for name, (_, half) in found.items()},
            "rewards": {name: half for name, (_, half) in means.items()},
            "types": {t: {"strict": s[1], "loose": o[1]} for t, (_, s, o) in types.items()},
        },
    }


def _types(scored: Scored) -> dict[str, tuple[int, Estimate, Estimate]]:
    """Of each instruction type how often it is asked, and its rates, strict and loose."""
    asked = [e.instruction_ids for e in scored.examples]
    found = {}
    for name in sorted({name for ids in asked for name in ids}):
        counts = [ids.count(name) for ids in asked]

        def share(row: list[bool], i: int, name: str = name) -> float | None:
            flags = [ok for ok, other in zip(row, asked[i // scored.samples], strict=True) if other == name]
            return sum(flags) / len(flags) if flags else None

        rates = (
            scored.mean([share(row, i) for i, row in enumerate(verdicts)], counts)
            for verdicts in (scored.strict, scored.loose)
        )
        found[name] = (sum(counts), *rates)
    return found  # type: ignore[return-value]
