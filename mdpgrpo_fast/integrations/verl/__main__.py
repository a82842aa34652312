"""`python -m mdpgrpo_fast.integrations.verl`: what is registered with verl, where the configs are, and data for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from ...cli.ending import end, report_errors
from ...config import ConfigError, PromptConfig
from ...config.extras import needs_package
from .data import write_parquet

CONFIGS = Path(__file__).parent / "configs"
PLUGIN = f"{__package__}.plugin"
DEMO = Path(__file__).parents[2] / "demo"


def _versions() -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for name in ("verl", "ray", "torch", "transformers", "TransferQueue", "vllm", "sglang", "flash-attn"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, None))
    return found


def check() -> int:
    """Prints what is registered and what not; 1 where a part is not, 0 otherwise."""
    if find_spec("verl") is None:
        raise ConfigError(f"--check {needs_package('verl')}")
    from .plugin import PARTS, register

    told = {name: found or "not installed" for name, found in _versions()}
    print("  ".join(f"{name} {found}" for name, found in told.items()))
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    found_by_verl = [e.name for e in entry_points(group="verl.plugins") if e.module == PLUGIN]
    allowed = policy == "auto" or bool({p.strip() for p in policy.split(",")} & set(found_by_verl))
    as_module = PLUGIN in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")
    loaded = (bool(found_by_verl) and allowed) or as_module
    how = "entry point " + (", ".join(found_by_verl) or "missing: install the package") + f", plug-ins {policy}"
    rows = [("found by verl", how, None if loaded else f"set VERL_USE_EXTERNAL_MODULES={PLUGIN}")]
    rows += [(part.what, part.name, part.problem) for part in map(register, PARTS)]
    for what, name, problem in rows:
        print(f"{'no ' if problem else 'yes'}  {what}: {name}" + (f" ({problem})" if problem else ""))
    vendor = os.environ.get("VERL_ENGINE_VENDOR")
    print(f"VERL_ENGINE_VENDOR is {vendor or 'unset'} here; our configs set it to mdpgrpo_fast for the workers")
    if told["TransferQueue"] == "not installed":
        print(f"verl's trainer (v1) {needs_package('TransferQueue')}")
    if told["vllm"] == told["sglang"] == "not installed":
        print("no engine to sample with: install vllm or sglang in the version that verl names")
    return 1 if any(problem for *_, problem in rows) else 0


def make_data(train: str, validation: str, output: Path, config: PromptConfig) -> None:
    """train.parquet and val.parquet in a folder, both or none. Raises: ConfigError as `write_parquet`."""
    sources = {"train": train, "val": validation}
    files = {output / f"{split}.parquet": (split, source) for split, source in sources.items()}
    for path, count in write_parquet(files, config).items():
        print(f"{path}: {count} prompts of {files[path][1]}")
    if config.rules != PromptConfig.rules:
        print(f"Train with +reward.custom_reward_function.reward_kwargs.rules={config.rules}")


def run(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m mdpgrpo_fast.integrations.verl", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--check", action="store_true", help="what is registered with verl; status 1 where a part is not"
    )
    action.add_argument("--configs", action="store_true", help="print the folder for verl's --config-dir")
    action.add_argument("--data", type=Path, metavar="FOLDER", help="write train.parquet and val.parquet there")
    parser.add_argument("--train-file", default=str(DEMO / "train.jsonl"), help="prompts (default: the embedded ones)")
    parser.add_argument(
        "--val-file",
        default=str(DEMO / "heldout.jsonl"),
        help="prompts for validation (default: the embedded held-out ones)",
    )
    parser.add_argument(
        "--rules", default=PromptConfig.rules, help="verifier rules of the prompts (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.configs:
        print(CONFIGS)
        return 0
    if args.check:
        return check()
    make_data(args.train_file, args.val_file, args.data, PromptConfig(rules=args.rules))
    return 0


def main() -> int:
    with report_errors():
        return run()


if __name__ == "__main__":
    end(main)
