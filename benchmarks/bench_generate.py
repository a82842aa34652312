"""`python benchmarks/bench_generate.py --output FILE`: completions of a group by several ways, in turn in one process.

`separate`: one model.generate call per slot of the group, each over all prompts, as the method's released code does it;
`one_call`: one model.generate call over all rows, each at its own temperature; `static`: the same with transformers'
static cache (and its compiled decode on a GPU); `ours`: mdpgrpo_fast.rollout.generate, which records both log-probs
besides, with the linear layers that the trainer takes here; `ours_plain`: with PyTorch's; `vllm`, where it is installed
($(VENV)/vllm of `make test-vllm`): vLLM in this process, compiled and in the dtype of the others, which records
log-probs too. All draw completions of the same length; times are of P * G of them.

On a GPU a Llama of 1.2 billion parameters by `one_call` and `ours` (captured decode steps; `first_ms`: the call that
captures them), half a minute in all. `floor_ms`: what reading the weights once for each token takes at the speed of a
copy.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from harness import CUDA, DEVICE, DTYPE, Wrong, ceiling_gb_s, provenance, short, write_json
from torch import Tensor

from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.rollout.captured import graphs
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.vllm.completion import Completion
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine

GROUP = 8
CASES = {
    "small": {"prompts": 1, "prompt": 32, "completion": 32, "hidden": 128, "layers": 4, "vocab": 4000},
    "main": {"prompts": 2, "prompt": 256, "completion": 256, "hidden": 512, "layers": 6, "vocab": 32000},
}
LLAMA_1B = {"prompt": 256, "completion": 256, "hidden": 2048, "layers": 16, "vocab": 128256, "kv_heads": 8}
GPU_CASES = {"rows8": {"prompts": 1, **LLAMA_1B}, "rows64": {"prompts": 8, **LLAMA_1B}}
GPU_WAYS = ("one_call", "ours")
PEER = "one_call" if CUDA else "separate"
SHORT = 16  # tokens of the calls that only verify
if CUDA:
    CASES = GPU_CASES
VLLM = importlib.util.find_spec("vllm") is not None and not CUDA
NO_TOKEN = -1  # as the end, so that every completion has the full length


def make_model(case: dict[str, int]) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=case["vocab"],
        hidden_size=case["hidden"],
        intermediate_size=case["hidden"] * 4 if CUDA else case["hidden"] * 11 // 4,
        num_hidden_layers=case["layers"],
        num_attention_heads=case["hidden"] // 64,
        num_key_value_heads=case.get("kv_heads", case["hidden"] // 128),
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(DEVICE):  # a billion random weights take long on a CPU
        return tf.LlamaForCausalLM(config).to(DTYPE).eval()


class RowTemperatures(tf.LogitsProcessor):
    def __init__(self, temperature: Tensor) -> None:
        self.temperature = temperature[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


def candidates(model: Any, ids: Tensor, taus: list[float], length: int) -> dict[str, Callable[[], Tensor]]:
    """name -> a call that returns the tokens (P * G, L), those of a prompt next to each other."""
    p, g = len(ids), len(taus)
    common = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": length, "pad_token_id": 0}

    def call(rows: Tensor, tau: float, *processors: tf.LogitsProcessor, **more: Any) -> Tensor:
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            generation_config=tf.GenerationConfig(temperature=tau, **common, **more),
            logits_processor=tf.LogitsProcessorList(processors),
        )
        return out[:, rows.shape[1] :]

    def separate() -> Tensor:
        return torch.stack([call(ids, tau) for tau in taus], 1).flatten(0, 1)

    def one_call(cache: str | None = None) -> Tensor:
        processor = RowTemperatures(torch.tensor(taus * p, device=ids.device))
        more = {} if cache is None else {"cache_implementation": cache, "disable_compile": DEVICE.type == "cpu"}
        return call(ids.repeat_interleave(g, 0), 1.0, processor, **more)

    loaded = model if CUDA else copy.deepcopy(model)
    onednn.install(loaded)

    def ours(model: Any) -> Tensor:
        return generate(
            model, ids.tolist(), temperature=taus * p, eos=[NO_TOKEN], max_new_tokens=length, num_generations=g
        ).tokens

    own = {"ours": partial(ours, loaded), "ours_plain": partial(ours, model)}
    if VLLM:
        engine = vllm_engine(model, ids.shape[1] + length)

        def sampled(count: int, temperature: list[float] | None, length: int) -> Tensor:
            drawn = engine.generate(
                ids.tolist(), temperature=temperature, eos=[NO_TOKEN], max_new_tokens=length, num_generations=count
            )
            return drawn.tokens

        greedy = generate(model, ids.tolist(), temperature=None, eos=[NO_TOKEN], max_new_tokens=SHORT).tokens
        if not torch.equal(sampled(1, None, SHORT), greedy):
            raise Wrong("the greedy tokens of vLLM differ from ours")
        own["vllm"] = partial(sampled, g, taus * p, length)
    ways = {"separate": separate, "one_call": one_call, "static": partial(one_call, "static"), **own}
    return {name: way for name, way in ways.items() if not CUDA or name in GPU_WAYS}


class Endless(VLLMEngine):
    """No token ends a completion: vLLM takes none that is not of the vocabulary."""

    def _complete(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[Completion]:
        return super()._complete(prompts, [{**row, "stop_token_ids": []} for row in settings])


def vllm_engine(model: Any, length: int) -> VLLMEngine:
    """vLLM with the model's weights, on as many threads as the others have."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        engine = Endless(
            folder, device=DEVICE, dtype=dtype, sleep_mode=False, max_model_len=length, skip_tokenizer_init=True
        )
    if torch.get_num_threads() != int(os.environ["OMP_NUM_THREADS"]):
        raise Wrong(f"vLLM left this process {torch.get_num_threads()} threads")
    return engine


def verify(model: Any, ids: Tensor, ways: dict[str, Callable[[], Tensor]], shape: tuple[int, int]) -> None:
    for name, way in ways.items():
        if (got := tuple(way().shape)) != shape:
            raise Wrong(f"{name} returns tokens of shape {got}, {shape} is expected")
    if model.dtype == torch.float32:
        greedy = tf.GenerationConfig(max_new_tokens=16, pad_token_id=0, do_sample=False)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[:, ids.shape[1] :]
        own = generate(model, ids.tolist(), temperature=None, eos=[NO_TOKEN], max_new_tokens=16).tokens
        if not torch.equal(theirs, own):
            raise Wrong("the greedy tokens differ from those of model.generate")


def seconds(way: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    way()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> dict[str, Any]:
    case = CASES[name]
    model, taus = make_model(case), MDPGRPOConfig(num_generations=GROUP).slot_temperatures
    ids = torch.randint(1, case["vocab"], (case["prompts"], case["prompt"]), device=DEVICE)
    rows, length = case["prompts"] * GROUP, case["completion"]
    ways = candidates(model, ids, taus, length)
    tried = SHORT if CUDA else length
    verify(model, ids, candidates(model, ids, taus, tried) if CUDA else ways, (rows, tried))
    first = {"ours": {"first_ms": short(1e3 * seconds(ways["ours"]))}} if CUDA else {}
    if CUDA and model not in graphs._kept:
        raise Wrong("the decode steps were not captured; the log says why")
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            times[way].append(seconds(run))
    middle, least = ({way: f(t) for way, t in times.items()} for f in (statistics.median, min))
    floor = length * sum(p.nbytes for p in model.parameters()) / ceiling_gb_s() / 1e6 if CUDA else 0.0
    entries = {
        way: {
            "ms": short(1e3 * middle[way]),
            "ms_low": short(1e3 * least[way]),
            "tokens_per_second": short(rows * length / middle[way]),
            f"x_{PEER}": short(middle[PEER] / middle[way]),
            f"x_{PEER}_low": short(least[PEER] / least[way]),
            **({"ms_per_step": short(1e3 * middle[way] / length)} if CUDA else {}),
            **({"percent_of_floor": short(floor / middle[way] / 10)} if CUDA else {}),
            **first.get(way, {}),
        }
        for way in ways
    }
    size = sum(p.numel() for p in model.parameters())
    common = {"case": name, **case, "group": GROUP, "parameters": size, "rounds": rounds}
    if CUDA:
        common |= {"floor_ms": short(floor), "copy_gb_s": short(ceiling_gb_s())}
    return {**common, "candidates": entries}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2 if CUDA else 5)
    options = parser.parse_args()
    document = provenance("python benchmarks/bench_generate.py --output FILE")
    document["results"] = []
    for name in CASES:
        row = measure(name, options.rounds)
        document["results"].append(row)
        write_json(options.output, document)
        for way, entry in row["candidates"].items():
            print(f"{name:6} {way:10} {entry['ms']:10.1f} ms {entry['tokens_per_second']:9.1f} tokens/s "
                  f"{entry[f'x_{PEER}']:6.2f} x {PEER}, {entry[f'x_{PEER}_low']:.2f} of the fastest")  # fmt: skip
            if CUDA:
                print(f"{'':17} {entry['ms_per_step']:.2f} ms a step, {entry['percent_of_floor']:.0f} % of the floor; "
                      f"first call: {entry.get('first_ms', entry['ms']):.0f} ms")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
