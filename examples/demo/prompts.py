"""Generated prompts of the demo task: 1 to 5 constraints each in IFEval's wordings, never in conflict.

`python examples/demo/prompts.py` rewrites the two shipped files, byte for byte the same under one seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import words
from writer import write

DEMO = Path(__file__).resolve().parents[2] / "mdpgrpo_fast" / "demo"
NUM_TRAIN = 2400
NUM_HELDOUT = 300
WORDING_WEIGHTS = (2, 2, 2, 3)
CONSTRAINTS_PER_PROMPT = {1: 0.15, 2: 0.30, 3: 0.30, 4: 0.15, 5: 0.10}
INSTRUCTION_IDS = tuple(words.WORDINGS)

# Pairs that contradict each other, or that IFEval's rules count in ways a reader would not expect (a bullet is also a
# highlight, "P.S." may count as sentences). Contradictions by threshold are found by `write`, which returns None.
CONFLICTS = frozenset(
    frozenset(pair)
    for pair in (
        ("length_constraints:number_sentences", "length_constraints:number_words"),
        ("length_constraints:number_sentences", "detectable_format:number_bullet_lists"),
        ("length_constraints:number_sentences", "detectable_content:postscript"),
        ("detectable_format:number_bullet_lists", "detectable_format:number_highlighted_sections"),
        ("detectable_format:number_bullet_lists", "startend:quotation"),
        ("startend:end_checker", "detectable_content:postscript"),
        ("startend:end_checker", "change_case:english_lowercase"),
        ("detectable_content:postscript", "change_case:english_lowercase"),
        ("keywords:existence", "keywords:frequency"),
    )
)


@dataclass(frozen=True)
class Prompt:
    """One prompt and the constraints it states, in IFEval's form."""

    prompt: str
    instruction_id_list: list[str]
    kwargs: list[dict[str, Any]]

    @property
    def topic(self) -> str:
        """The noun that the request is about."""
        found = re.search(rf"\bthe ({'|'.join(words.TOPICS)})\b", self.prompt)
        assert found is not None, f"no topic in {self.prompt!r}"
        return found.group(1)


def conflict(instruction_ids: Iterable[str]) -> bool:
    """Whether two of the instruction ids must not stand in one prompt."""
    ids = list(instruction_ids)
    return any(frozenset((a, b)) in CONFLICTS for i, a in enumerate(ids) for b in ids[:i])


def sample_kwargs(instruction_id: str, topic: str, taken: set[str], rng: random.Random) -> dict[str, Any]:
    """Draws the thresholds and words of one constraint; its words join `taken`, so that no two clash."""

    def pick(pool: Iterable[str], k: int = 1) -> list[str]:
        chosen = rng.sample([word for word in pool if word not in taken], k)
        taken.update(chosen)
        return chosen

    match instruction_id:
        case "length_constraints:number_sentences":
            relation, n = rng.choice((("at least", 2), ("at least", 3), ("less than", 3), ("less than", 4)))
            return {"relation": relation, "num_sentences": n}
        case "length_constraints:number_words":
            relation, n = rng.choice((("at least", 10), ("at least", 14), ("less than", 15), ("less than", 20)))
            return {"relation": relation, "num_words": n}
        case "keywords:existence":
            return {"keywords": pick(words.KEYWORDS, rng.choice((1, 1, 1, 2)))}
        case "keywords:forbidden_words":
            return {"forbidden_words": pick((topic,) if rng.random() < 0.5 else words.ADJECTIVES)}
        case "keywords:frequency":
            return {"relation": "at least", "keyword": pick(words.KEYWORDS)[0], "frequency": rng.choice((2, 2, 3))}
        case "startend:end_checker":
            return {"end_phrase": rng.choice(words.END_PHRASES)}
        case "detectable_format:number_bullet_lists":
            return {"num_bullets": rng.choice((2, 3))}
        case "detectable_format:number_highlighted_sections":
            return {"num_highlights": rng.choice((1, 2))}
        case "detectable_content:postscript":
            return {"postscript_marker": rng.choice(("P.S.", "P.S.", "P.P.S"))}
        case "detectable_content:number_placeholders":
            return {"num_placeholders": rng.choice((1, 2, 3))}
        case _:
            return {}


def describe(wording: str, kwargs: dict[str, Any]) -> str:
    """A wording filled from the constraint's kwargs."""
    listed = kwargs.get("keywords") or kwargs.get("forbidden_words") or []
    counts = [value for value in kwargs.values() if isinstance(value, int)]
    return wording.format(
        relation=kwargs.get("relation"),
        n=counts[0] if counts else None,
        s="s" if len(listed) > 1 else "",
        words=" and ".join(listed),
        word=kwargs.get("keyword"),
        phrase=kwargs.get("end_phrase"),
        marker=kwargs.get("postscript_marker"),
    )


def sample_prompt(rng: random.Random, count: int | None = None, include: str | None = None) -> Prompt:
    """Draws a prompt whose constraints can all be satisfied at once by a short response.

    `count` fixes the number of constraints, and `include` is an instruction id that is among them.
    """
    if count is None:
        count = rng.choices(list(CONSTRAINTS_PER_PROMPT), list(CONSTRAINTS_PER_PROMPT.values()))[0]
    while True:
        ids = rng.sample(INSTRUCTION_IDS, count)
        if conflict(ids) or (include is not None and include not in ids):
            continue
        topic, taken = rng.choice(words.TOPICS), set[str]()
        kwargs = [sample_kwargs(name, topic, taken, rng) for name in ids]
        if write(topic, ids, kwargs, [True] * count, rng) is None:
            continue
        request = rng.choice(words.REQUESTS).format(topic=topic)
        wordings = [rng.choices(words.WORDINGS[name], WORDING_WEIGHTS)[0] for name in ids]
        stated = [describe(wording, values) for wording, values in zip(wordings, kwargs, strict=True)]
        return Prompt(" ".join([request, *stated]), ids, kwargs)


def generate(count: int, seed: int | str, exclude: Iterable[str] = ()) -> list[Prompt]:
    """`count` prompts with distinct texts, none of them in `exclude`."""
    rng, seen, prompts = random.Random(seed), set(exclude), list[Prompt]()
    while len(prompts) < count:
        prompt = sample_prompt(rng)
        if prompt.prompt not in seen:
            seen.add(prompt.prompt)
            prompts.append(prompt)
    return prompts


def shipped(seed: int = 0) -> dict[str, list[Prompt]]:
    """The two shipped sets under a seed, by file name; they share no prompt."""
    heldout = generate(NUM_HELDOUT, f"heldout {seed}")
    train = generate(NUM_TRAIN, f"train {seed}", exclude=[prompt.prompt for prompt in heldout])
    return {"train.jsonl": train, "heldout.jsonl": heldout}


def to_jsonl(prompts: Iterable[Prompt]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts)


def read_jsonl(path: Path) -> list[Prompt]:
    """Reads what `to_jsonl` wrote."""
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str] | None = None) -> None:
    """Writes train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, prompts in shipped(args.seed).items():
        (args.output / name).write_text(to_jsonl(prompts), encoding="utf-8")
        print(f"{args.output / name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
