"""DeepSpeed's checkpoint of an engine in the format of `tree`: its own is a pickle, which runs what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config import ConfigError
from . import tree

TAG = "deepspeed"


def write(engine: Any, folder: Path) -> None:
    """Called by all ranks. Raises: OSError of this rank's files, once all ranks are through."""
    with _our_files(engine) as files:
        engine.save_checkpoint(str(folder), TAG, save_latest=False)
    for script in (folder / TAG).glob("*.py"):  # which read DeepSpeed's own format
        script.unlink(missing_ok=True)
    for script in folder.glob("*.py"):
        script.unlink(missing_ok=True)
    if files.failed is not None:
        raise files.failed


def read(engine: Any, folder: Path) -> None:
    """Called by all ranks. Raises: ConfigError where DeepSpeed finds nothing to load."""
    with _our_files(engine):
        found, _ = engine.load_checkpoint(str(folder), TAG)
    if found is None:
        raise ConfigError(f"resume needs what DeepSpeed has saved in {str(folder / TAG)!r}, and it finds none")


@contextmanager
def _our_files(engine: Any) -> Iterator[Any]:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    objects = {"LossScaler": LossScaler, "DynamicLossScaler": DynamicLossScaler, "fragment_address": fragment_address}

    class Files(CheckpointEngine):  # type: ignore[misc, unused-ignore]
        """What DeepSpeed asks to save and load. A failure is kept: the other ranks are waited for in between."""

        failed: Exception | None = None

        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            try:
                tree.write(Path(path), state_dict, objects)
            except OSError as e:
                self.failed = self.failed or e

        def load(self, path: str, map_location: Any = None) -> Any:
            return tree.read(Path(path), objects)

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False

    before, engine.checkpoint_engine = engine.checkpoint_engine, Files()
    try:
        yield engine.checkpoint_engine
    finally:
        engine.checkpoint_engine = before
