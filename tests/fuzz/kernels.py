"""Random calls of the compiled CPU kernels against float64, on four threads: `kernels.py SEED SECONDS` prints JSON."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from helpers import losses  # noqa: E402

import mdpgrpo_fast  # noqa: E402

KINDS = ("logprobs", "logprobs", "logprobs", "logprobs", "logprobs", "logprobs", "logprobs", "logprobs", "token_loss")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logprobs(seed: int) -> None:
    """Log-probs and entropies of rows of any width, contiguous or in part of a wider tensor, some masked."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, vocab, dtype = r.randrange(9), r.choice([1, 2, 7, 31, 64, 65, 257, 1000]), r.choice(DTYPES)
    wide = torch.randn(rows, vocab + r.choice([0, 0, 1, 5]), generator=g) * r.choice([0.0, 1.0, 10.0, 80.0])
    if r.random() < 0.1 and vocab > 1:
        wide[:, 1:vocab] = -torch.inf
    logits = wide.to(dtype)[:, :vocab]
    tokens = torch.randint(0, vocab, (rows,), generator=g)
    tokens = tokens if r.random() < 0.8 else torch.zeros_like(tokens)
    mask = (torch.rand(rows, generator=g) < 0.8) if r.random() < 0.5 else None
    more: dict[str, Any] = {"temperature": r.choice([1.0, 0.3, 2.0, 0.5 + torch.rand(rows, generator=g)])}
    softcap = r.choice([None, None, 5.0])
    given = {"mask": mask, "softcap": softcap, **more}
    found = mdpgrpo_fast.token_logprobs(logits, tokens, **given, backend="cpu")
    exact = {k: losses.to(v, dtype=torch.float64) for k, v in given.items()}
    truth = mdpgrpo_fast.token_logprobs(logits.double(), tokens, **exact, backend="torch")
    own = mdpgrpo_fast.token_logprobs(logits, tokens, **given, backend="torch")
    for name, *values in zip(("logprobs", "entropy"), found, truth, own, strict=True):
        losses.assert_within(*values, name)


def token_loss(seed: int) -> None:
    """Loss, gradient and statistics under a random mixture of all options."""
    batch, config, more = losses.pick_options(seed)
    truth, own = losses.reference(batch, config, **more)
    got = losses.run("cpu", batch, config, **more)
    for name in losses.FLAGS:
        a, b = getattr(got.out, name), getattr(truth.out, name)
        if not torch.equal(a, b) and torch.equal(a, getattr(own.out, name)):
            return  # in the rounding of the batch's precision a ratio lies on the other side of its bound
    losses.assert_matches("cpu", batch, config, **more)


def main() -> int:
    seed, seconds = int(sys.argv[1]) * 10_000_000, float(sys.argv[2])
    torch.set_num_threads(4)
    end, cases = time.monotonic() + seconds, dict.fromkeys(KINDS, 0)
    faults: dict[str, dict[str, Any]] = {}
    while time.monotonic() < end:
        kind = KINDS[seed % len(KINDS)]
        try:
            globals()[kind](seed)
        except Exception as e:
            said = " ".join(str(e).split())[:400]
            name = "Difference" if isinstance(e, AssertionError) else type(e).__name__
            fault = faults.setdefault(
                f"{name} {kind} {said.split(':')[0][:60]}", {"times": 0, "said": said, "input": seed}
            )
            fault["times"] += 1
        cases[kind] += 1
        seed += 1
    print(json.dumps({"cases": cases, "faults": [{"kind": k, **f} for k, f in faults.items()]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
