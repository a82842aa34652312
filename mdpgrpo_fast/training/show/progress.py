"""The steps of a run on the terminal: a progress bar, and lines above it where there is something to tell."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from tqdm.auto import tqdm

from ...config import MDPGRPOConfig, TrainConfig
from ...log import printable
from ..metrics import step_notes


class Progress:
    """The bar of a run of so many steps, `done` of them before; nothing is shown unless `visible`."""

    def __init__(self, run: TrainConfig, method: MDPGRPOConfig, total: int, done: int, visible: bool) -> None:
        self.run, self.method, self.total, self.visible = run, method, total, visible
        self.notes: set[str] = set()  # that were printed
        self.bar = tqdm(total=total, initial=done, disable=not visible, dynamic_ncols=True, mininterval=1.0)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def step(self, row: dict[str, Any], completions: list[dict[str, Any]]) -> None:
        """One more step is done. row: its metrics; completions: some of its lines of completions.jsonl."""
        self.bar.update()
        self.bar.set_postfix_str(printable(progress_values(row)), refresh=False)
        number = row["step"]
        for kind, text in step_notes(row, self.run, self.method):
            if kind not in self.notes:
                self.notes.add(kind)
                say(f"step {number}: {text}", self.visible)
        if number % max(1, self.total // 4) == 0 and self.run.log_completions:
            say(f"step {number}, some completions:\n{sample_table(completions)}", self.visible)


def say(text: str, visible: bool = True) -> None:
    """A line on stderr, above the progress bar where there is one."""
    if visible:
        tqdm.write(printable(text), file=sys.stderr)


def progress_values(row: dict[str, Any]) -> str:
    """The numbers of the progress bar."""
    shares = "" if row["hsr"] is None else f"HSR {row['hsr']:.2f} SSR {row['ssr']:.2f} "
    rewards = f"r {mean_and_spread(row['reward'], row['reward_std'])} "
    # The one reward that there is, under its own name, would be said twice.
    if len(row["rewards"]) > 1:
        rewards += "".join(f"{name} {mean_and_spread(x['mean'], x['std'])} " for name, x in row["rewards"].items())
    return (
        f"{shares}{rewards}KL {row['kl']:.4f} clip {row['clip_low'] + row['clip_high']:.3f} "
        f"H {row['entropy']:.2f} cut {row['truncated']:.0%} {row['tokens_per_second']:.0f} tok/s"
    )


def mean_and_spread(mean: float | None, std: float | None) -> str:
    return "–" if mean is None else f"{mean:.2f}±{std or 0.0:.2f}"


def sample_table(rows: list[dict[str, Any]], limit: int = 4) -> str:
    """A few completions of a step as a plain-text table that fits the terminal."""
    width = max(40, shutil.get_terminal_size((120, 20)).columns)
    lines = []
    for row in rows[:limit]:
        marks = "".join("+" if ok else "-" for ok in row["satisfied"] or [])
        reward = "dropped" if row["reward"] is None else f"{row['reward']:.2f}"
        cut = "" if row["finished"] else "cut "
        head = f"  τ {row['temperature']:<4g} r {reward:<5} {marks:<6} {cut}"
        text = printable(" ".join(row["response"].split()))
        room = width - len(head) - 1
        lines.append(head + (text if len(text) <= room else text[: room - 1] + "…"))
    return "\n".join(lines)
