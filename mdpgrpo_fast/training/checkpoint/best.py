"""The best held-out score of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ... import durable
from ...config import ConfigError
from .rows import first_evaluation


class Best:
    """The best held-out score of a run, resumed or not, and the step that it came after; on all ranks."""

    def __init__(self, accelerator: Accelerator, path: Path, resume: bool) -> None:
        self.accelerator, self.file = accelerator, path / "best.json"
        self.found: dict[str, Any] | None = None
        if not resume:
            return
        found: list[Any] = [None]
        if accelerator.is_main_process:
            found = [self._before(path)]
        broadcast_object_list(found)
        if isinstance(found[0], str):
            raise ConfigError(found[0])
        self.found = found[0]

    def _before(self, path: Path) -> dict[str, Any] | str | None:
        """The best so far, or what is wrong with its file."""
        first = first_evaluation(path)
        if self.file.exists():
            try:
                found = json.loads(self.file.read_text(encoding="utf-8"))
                return {"step": int(found["step"]), "score": float(found["score"])}
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                return f"resume needs {str(self.file)!r} as it was written, or not at all: it cannot be read"
        if first is not None and (score := self.score(first)) is not None:
            return {"step": 0, "score": score}
        return None

    @staticmethod
    def score(result: dict[str, Any]) -> float | None:
        """HSR, or the reward where no prompt has constraints."""
        score: float | None = result["reward"] if result["hsr"] is None else result["hsr"]
        return score

    def keep(self, step: int, result: dict[str, Any], save: Callable[[], None]) -> None:
        """Calls save() where the score is above all before; of the untrained model (step 0) only the score counts."""
        score = self.score(result)
        if score is None or (self.found is not None and score <= self.found["score"]):
            return
        self.found = {"step": step, "score": score}
        if step:
            save()
            # Only now: a run that is resumed would not save it again.
            if self.accelerator.is_main_process:
                durable.write_text(self.file, json.dumps(self.found) + "\n")
