"""`python benchmarks/bench_packing.py --output FILE`: the training part of a step, packed groups against padded rows.

That is: reference log-probs, forward and backward pass. The same model, tokens and objective; both gradients are
compared before anything is timed, and the two are timed in turn. Memory: bytes of the tensors that the forward pass
keeps for the backward pass, weights aside.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import DEVICE, Wrong, clock, provenance, write_json
from problems.step import SIZES, make_model

from mdpgrpo_fast.config import preset
from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.models.packing import pack
from mdpgrpo_fast.models.policy import Policy

GROUP = 8
CASES = ((512, 256), (256, 256), (64, 256))  # prompt, completion
# Of a model of 34M parameters half are in a head of 32000 words; of a billion, a fifth are, as with 8192 here.
VOCABULARIES = (8192, 32000)


class Kept:
    """Bytes that autograd keeps, each storage once."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.own = {w.untyped_storage().data_ptr() for w in weights}
        self.storages: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # a freed address may come again

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own and storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.alive.append(x.detach())
        return x


def problem(policy: Policy, prompt: int, completion: int, vocab: int) -> dict[str, Callable[[], Any]]:
    """Reference log-probs and forward pass of one group, packed and padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (1, prompt), generator=generator).expand(GROUP, -1).to(DEVICE)
    tokens = torch.randint(3, vocab, (GROUP, completion), generator=generator).to(DEVICE)
    prompt_mask, mask = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    packed = pack(ids, [prompt] * GROUP, tokens, [completion] * GROUP, [list(range(GROUP))])
    inputs = {"padded": ((ids, prompt_mask, tokens, mask), mask), "packed": (packed, None)}
    objective = {"advantage": torch.linspace(-1, 1, GROUP), "kl_beta": torch.full((GROUP,), 0.01)}
    config, lengths = preset("exact", num_generations=GROUP), [completion] * GROUP

    def train(name: str) -> Any:
        refs = policy.logprobs(*inputs[name], lengths, 1.0, "auto")
        moved = {k: v.to(DEVICE) for k, v in objective.items()}
        return policy(*inputs[name], config, lengths, ref_logprobs=refs, **moved)

    return {name: functools.partial(train, name) for name in inputs}


def measure(policy: Policy, prompt: int, completion: int, vocab: int, rounds: int) -> dict[str, Any]:
    weights, passes = list(policy.parameters()), problem(policy, prompt, completion, vocab)
    row: dict[str, Any] = {"vocabulary": vocab, "prompt": prompt, "completion": completion, "group": GROUP}
    gradients = {}
    for name, run in passes.items():
        kept = Kept(weights)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            loss = run().loss
        gradients[name] = torch.autograd.grad(loss, weights)
        row[name] = {"kept_mb": round(sum(kept.storages.values()) / 1e6, 1)}
    gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients["packed"], gradients["padded"], strict=True)]
    row["gradient_error"] = max(gaps)
    # float32 sums in another order; half precision rounds each activation.
    if not max(gaps) < (1e-3 if weights[0].dtype == torch.float32 else 3e-2):
        raise Wrong(f"gradients differ by {max(gaps):.1e}")
    del gradients
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            start = clock()
            torch.autograd.grad(run().loss, weights)
            seconds[name].append(clock() - start)
    for name, values in seconds.items():
        row[name]["ms"] = round(1e3 * statistics.median(values), 1)
    row["time_ratio"] = round(row["packed"]["ms"] / row["padded"]["ms"], 3)
    row["kept_ratio"] = round(row["packed"]["kept_mb"] / row["padded"]["kept_mb"], 3)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    size = SIZES["gpu" if DEVICE.type == "cuda" else "cpu"]
    rows = []
    for vocab in VOCABULARIES if DEVICE.type == "cpu" else (size.vocab,):
        model = make_model(dataclasses.replace(size, vocab=vocab), DEVICE).eval()
        onednn.install(model)
        policy = Policy(model, packing="on").eval()
        assert policy.packing is not None
        rows += [measure(policy, prompt, completion, vocab, args.rounds) for prompt, completion in CASES]
    for row in rows:
        said = [f"{n} {row[n]['ms']:7.0f} ms, {row[n]['kept_mb']:6.0f} MB kept" for n in ("padded", "packed")]
        ratios = f"time {row['time_ratio']:.2f} x, kept {row['kept_ratio']:.2f} x"
        print(f"V {row['vocabulary']:5}, prompt {row['prompt']:3} + {row['completion']}: {'; '.join(said)}; {ratios}")
    document = {
        **provenance(f"python benchmarks/bench_packing.py --output {args.output}"),
        "size": dataclasses.asdict(size),
    }
    write_json(args.output, {**document, "attention": policy.packing.mode, "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
