"""What a call of `linear_token_loss` does on a GPU, counted without one: matmuls, bytes, launches, and a prediction.

    python benchmarks/compiled/linear_counts.py          # a table, and results/compiled/linear_counts.json

The op runs on CPU tensors of a small vocabulary, cut into the chunks of the real one, with the kernels' launches
recorded instead of made and everything else traced by the profiler. Bytes follow from the passes that the code makes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
import torch
import triton
from triton.runtime.jit import JITFunction

from mdpgrpo_fast.kernels.schemas import Rows, Settings
from mdpgrpo_fast.ops.linear import op, select
from mdpgrpo_fast.ops.linear.chunks import Chunking, bytes_per_row, chunking

RESULT = Path(__file__).parents[1] / "results" / "compiled" / "linear_counts.json"
TOKENS, VOCAB, WIDTH, BUDGET = 8192, 128256, 3072, 256 << 20
# One H200: multiprocessors, and the measured rates of the project's notes on it.
MULTIPROCESSORS, COPY_TB_S, MATMUL_TFLOP_S = 132, 4.3, 790
SMALL_VOCAB, SMALL_WIDTH = 64, 8
MATMULS = ("aten::mm", "aten::addmm", "aten::baddbmm")
# Operations that launch nothing.
VIEWS = """view reshape slice select unsqueeze squeeze transpose t expand as_strided empty empty_strided empty_like
new_empty detach unbind split alias view_as permute lift_fresh resolve_conj resolve_neg result_type to _to_copy
is_nonzero item _local_scalar_dense size stride numel set_""".split()
CASES = {  # name: hidden trained, weight trained, sequence level, two temperatures
    "trained": (True, True, False, False),
    "frozen": (True, False, False, False),
    "value": (False, False, False, False),
    "trained, sequence": (True, True, True, False),
    "trained, two temperatures": (True, True, False, True),
}


def size() -> Chunking:
    properties = type("Properties", (), {"multi_processor_count": MULTIPROCESSORS})
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties):
        row = bytes_per_row(VOCAB, torch.bfloat16, False)
        return chunking(WIDTH, row, BUDGET, torch.device("cuda"))


def count(hidden: bool, weight: bool, sequence: bool, two: bool) -> dict[str, Any]:
    """Multiply-adds in units of T x V x D, kernels by name, and other launches of one call."""
    chunk, b = size(), 8
    x, w = torch.zeros(b, TOKENS // b, SMALL_WIDTH), torch.zeros(SMALL_VOCAB, SMALL_WIDTH)
    each, row = torch.ones(b), torch.zeros(TOKENS)
    rows = Rows(row.long(), advantage=each, kl_beta=each, old_logprobs=row, ref_logprobs=row)
    settings = Settings(epsilon_low=0.2, epsilon_high=0.2, sequence=int(sequence), two_temperatures=int(two))
    launched: dict[str, int] = {}

    def record(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        launched[name] = launched.get(name, 0) + 1

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(op, "chunking", lambda *args: chunk),
        mock.patch.object(select, "may_look", lambda device: False),
        torch.profiler.profile(with_flops=True) as trace,
    ):
        op._token_loss(
            x, w, None, [hidden, weight, False], None, TOKENS // b, True, list(rows), b, None, settings.numbers,
            settings.flags, 1.0, False, "triton", BUDGET, "",
        )  # fmt: skip
    events = trace.key_averages()
    flops = sum(e.flops for e in events if e.key in MATMULS) / 2
    own = {e.key.removeprefix("aten::"): e.count for e in events if e.key.startswith("aten::")}
    others = sum(n for name, n in own.items() if name not in VIEWS and f"aten::{name}" not in MATMULS)
    return {
        "matmuls": flops / (TOKENS * SMALL_VOCAB * SMALL_WIDTH),
        "kernels": launched,
        "other_launches_at_most": others,
    }


def predict(matmuls: float, weight: bool, two: bool) -> dict[str, float]:
    """Milliseconds: the matmuls alone, with the passes that no matmul can hide, and with all passes, none hidden."""
    chunks = -(-TOKENS // size().rows)
    logits, d_weight = 2 * TOKENS * VOCAB, 4 * VOCAB * WIDTH
    alone = 1e3 * matmuls * 2 * TOKENS * VOCAB * WIDTH / MATMUL_TFLOP_S / 1e12
    # The row kernels: one read, one write; a read more where statistics and gradient are two launches.
    kernel = (0 if matmuls < 2 else logits) + logits * (2 if two else 1)
    # d weight is written, then read and written by every further chunk's matmul, then rounded to its dtype.
    sums = d_weight * (1 + 2 * (chunks - 1)) if weight else 0
    rounding = d_weight * 1.5 if weight else 0
    per_ms = 1e9 * COPY_TB_S
    hidden = (kernel + rounding) / per_ms
    return {"matmuls": alone, "sums_hidden": alone + hidden, "nothing_hidden": alone + hidden + sums / per_ms}


def main() -> int:
    chunk, found = size(), {}
    for name, (hidden, weight, sequence, two) in CASES.items():
        found[name] = count(hidden, weight, sequence, two)
        found[name]["predicted_ms"] = {k: round(v, 2) for k, v in predict(found[name]["matmuls"], weight, two).items()}
        print(f"{name:26} {found[name]}")
    document = {
        "command": "python benchmarks/compiled/linear_counts.py",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "shape": {"tokens": TOKENS, "vocab": VOCAB, "width": WIDTH, "dtype": "bfloat16"},
        "chunk": {"rows": chunk.rows, "rows_of_a_logits_matmul": chunk.call, "chunks": -(-TOKENS // chunk.rows)},
        "assumed": {"copy_tb_s": COPY_TB_S, "matmul_tflop_s": MATMUL_TFLOP_S, "multiprocessors": MULTIPROCESSORS},
        "cases": found,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
