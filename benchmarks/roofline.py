"""The ceilings that everything else is compared with, measured: copy bandwidth and, on a GPU, the bf16 matrix rate.

`python benchmarks/roofline.py` writes benchmarks/results/<device>/roofline.json. Copies count bytes read and written;
all operands are random, as zeros can run faster than data does.
"""

from __future__ import annotations

import statistics
import sys

import torch
from harness import (
    COPY_BYTES,
    CUDA,
    DEVICE,
    Candidate,
    alternate,
    copy_gb_s,
    device_slug,
    provenance,
    results_folder,
    short,
    write_json,
)

N = 8192  # of the square matrices


def matmul_tflop_s() -> float:
    """bfloat16, N x N x N, median."""
    a, b = (torch.randn(N, N, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = Candidate(lambda: torch.matmul(a, b, out=out))
    return 2 * N**3 / statistics.median(alternate({"matmul": product}, 1.0)["matmul"]) / 1e9


def main() -> int:
    found = {"copy_gb_s": short(copy_gb_s(COPY_BYTES)), "copy_mb": round(COPY_BYTES / 1e6, 1)}
    if CUDA:
        found |= {"matmul_tflop_s": short(matmul_tflop_s()), "matmul_n": N, "matmul_dtype": "bfloat16"}
    path = results_folder() / "roofline.json"
    write_json(
        path, {"op": "roofline", "device": device_slug(), **provenance("python benchmarks/roofline.py"), **found}
    )
    print(f"copy {found['copy_gb_s']} GB/s, read and written", end="")
    print(f"; bf16 matmul {found['matmul_tflop_s']} TFLOP/s" if CUDA else "", f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
