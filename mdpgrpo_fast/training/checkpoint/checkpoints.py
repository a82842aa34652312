"""The checkpoints of a run: written aside, renamed when whole, the newest two kept; read back where all is well."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from ... import durable
from ...config import ConfigError, MDPGRPOConfig, TrainConfig
from ...durable import StorageError
from ...log import reason_of
from ...version import __version__
from . import manifest
from .resume import check_steps, none_whole, setting_notes
from .state import FOLDER, State

# A killed save leaves both of them; the one that is written meanwhile is a third.
TOTAL_LIMIT = 2
PARTIAL = ".partial"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint was of: the steps done and the steps that the run was to have; and what is to be said."""

    step: int
    total: int
    notes: list[str] = field(default_factory=list)


class Checkpoints:
    """Saves and loads a run's state in path/checkpoints/checkpoint_N; each method is called by all ranks together.

    data: fingerprints of what the run learns from, by their names; those of OPTIONAL may change, which is said.
    """

    OPTIONAL = ("held-out prompts",)

    def __init__(self, path: Path, state: State, run: TrainConfig, method: MDPGRPOConfig, data: dict[str, str]) -> None:
        self.path, self.state, self.data = path, state, data
        self.run, self.method = run, method
        self.must_match = [n for n in data if run.keep_best or n not in self.OPTIONAL]
        self.accelerator = state.accelerator
        self.newest_step = -1  # of the checkpoint that this run has written or read

    # ---- writing ----------------------------------------------------------------------------------------------------

    def save(self, step: int, total: int) -> None:
        """The state after `step` of `total` steps; nothing where it is there already.

        Raises: StorageError, on all ranks, where the disk does not take it: then nothing of it is left, and the
        checkpoints of before are as they were.
        """
        if step == self.newest_step:
            return
        acc = self.accelerator
        whole = self.path / "checkpoints" / f"checkpoint_{step}"
        folder = whole.with_name(whole.name + PARTIAL)
        self._together(folder, lambda: self._begin(folder))
        self._together(folder, lambda: self.state.write(folder))
        self._together(folder, lambda: durable.sync_tree(folder) if acc.is_main_process else None)
        names: list[Any] = [None]
        if acc.is_main_process:
            names = [manifest.file_names(folder)]
        broadcast_object_list(names)
        hashes: dict[str, str] = {}
        mine = names[0][acc.process_index :: acc.num_processes]
        self._together(folder, lambda: hashes.update(manifest.digests(folder, mine)))
        for found in gather_object([hashes]):
            hashes |= found
        self._together(folder, lambda: self._finish(folder, whole, hashes, step, total))
        self.newest_step = step

    def _together(self, folder: Path, act: Callable[[], None]) -> None:
        """act() on this rank; where it fails on one, all raise, and what was written until then is removed."""
        acc = self.accelerator
        failed: Exception | None = None
        try:
            with durable.storing(folder, SafetensorError):
                act()
        except StorageError as e:
            failed = e
        except BaseException:
            if acc.num_processes == 1:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        said = next((s for s in gather_object([None if failed is None else str(failed)]) if s), None)
        if said is not None:
            if acc.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            acc.wait_for_everyone()
            raise StorageError(f"no checkpoint could be written: {said}") from failed

    def _begin(self, folder: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        sweep(self.path)
        durable.need_space(self.path, self.size(), "a checkpoint")
        (folder / FOLDER).mkdir(parents=True)

    def _finish(self, folder: Path, whole: Path, hashes: dict[str, str], step: int, total: int) -> None:
        if not self.accelerator.is_main_process:
            return
        values = {
            "version": __version__, "step": step, "total": total, "processes": self.accelerator.num_processes,
            "kind": self.state.kind, "device": self.accelerator.device.type, "data": self.data, "run": asdict(self.run),
            "method": asdict(self.method),
        }  # fmt: skip
        for lines in self.path.glob("*.jsonl"):  # of its steps; later ones are made again
            durable.sync_file(lines)
        durable.sync_folder(self.path)
        manifest.write(folder, values, hashes)
        if whole.exists():  # a damaged one, or of a run that went on from an earlier step
            durable.remove_folder(whole)
        os.rename(folder, whole)
        durable.sync_folder(whole.parent)
        kept = 1
        for old in [p for p in manifest.folders(self.path) if manifest.step_of(p) < step]:
            if kept == TOTAL_LIMIT:
                durable.remove_folder(old)
            kept += kept < TOTAL_LIMIT and manifest.damage(old) is None

    def size(self) -> int:
        """Bytes of a checkpoint: of the newest one, or what the tensors come to."""
        found = manifest.newest(self.path)
        if found is None:
            return self.state.bytes()
        return sum(f["size"] for f in manifest.read(found)["files"].values())

    def space_note(self, model: bool) -> str | None:
        """Where the disk cannot hold what the run will write. model: whether it writes the model at its end."""
        size, there = self.size(), min(TOTAL_LIMIT, len(manifest.folders(self.path)))
        needed = (TOTAL_LIMIT + 1 - there + int(model) / 2) * size
        with suppress(OSError):
            free = durable.free_bytes(self.path)
            if free < needed:
                return (
                    f"the disk may not suffice: {TOTAL_LIMIT + 1} checkpoints while one is saved"
                    f"{' and the model' * model} take about {needed / 1e6:,.1f} MB more, and {str(self.path)!r} has "
                    f"{free / 1e6:,.1f} MB free"
                )
        return None

    # ---- reading ----------------------------------------------------------------------------------------------------

    def load(self, total: int) -> Loaded:
        """Puts back the newest checkpoint that is whole. total: steps that the run is to have. Nothing is changed on
        the disk.

        Raises: ConfigError where none is whole or the disk does not give it, and for one of another number of
        processes, of other data, or of more steps.
        """
        acc, notes = self.accelerator, []
        listed: list[Any] = [None]
        if acc.is_main_process:
            listed = [[str(p) for p in manifest.folders(self.path)]]
        broadcast_object_list(listed)
        for folder in map(Path, listed[0]):
            wrong = self._damage(folder)
            if wrong is None:
                break
            notes.append(f"{folder.name} is damaged, and left out: {wrong}")
        else:
            raise none_whole(self.path, notes)
        was = manifest.read(folder)
        self._check(folder, was, total)
        for name in self.data.keys() & was["data"].keys():
            if self.data[name] != was["data"][name]:
                notes.append(f"the {name} are others than before, {was['data'][name]}; now {self.data[name]}")
        if was["device"] != acc.device.type:
            notes.append(f"the run before was on {was['device']}, this one is on {acc.device.type}: it samples others")
        notes += setting_notes(folder, self.run, self.method)
        try:
            self.state.read(folder)
        except (OSError, SafetensorError, RuntimeError) as e:  # torch's own where a file cannot be opened or mapped
            raise ConfigError(f"{str(folder)!r} cannot be read: {reason_of(e)}") from None
        self.newest_step = was["step"]
        return Loaded(was["step"], was["total"], notes)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same on all ranks, each of which reads a part of it."""
        acc = self.accelerator
        wrong = manifest.damage(folder)
        if acc.num_processes > 1:
            wrong = next((w for w in gather_object([wrong]) if w), None)
        if wrong is None:
            found = gather_object([manifest.hash_damage(folder, acc.process_index, acc.num_processes)])
            wrong = next((w for w in found if w), None)
        return wrong

    def _check(self, folder: Path, was: dict[str, Any], total: int) -> None:
        acc = self.accelerator
        if was["processes"] != acc.num_processes:
            raise ConfigError(
                f"resume needs the {was['processes']} processes that wrote {folder}; got {acc.num_processes}"
            )
        if was["kind"] != self.state.kind:
            raise ConfigError(f"resume needs a launch whose checkpoints are {was['kind']}; got {self.state.kind}")
        check_steps(total, was["step"])
        for name in self.must_match:
            before = was["data"].get(name)
            if before is not None and before != self.data[name]:
                raise ConfigError(
                    f"resume needs the {name} of the run before: they were {before}; got {self.data[name]}"
                )


def sweep(path: Path) -> None:
    """Removes what killed saves have left."""
    for left in (path / "checkpoints").glob("checkpoint_*"):
        if re.fullmatch(rf"checkpoint_\d+({re.escape(PARTIAL)}|{re.escape(durable.OLD)})", left.name):
            shutil.rmtree(left)


def set_aside_later(path: Path, step: int) -> None:
    """Renames checkpoints of later steps than the one that a run goes on from, which are damaged, to N.damaged."""
    sweep(path)
    for folder in manifest.folders(path):
        if manifest.step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
