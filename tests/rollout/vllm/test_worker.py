"""What runs in vLLM's workers: the checksum of weights, and methods that clash with none of its own."""

from __future__ import annotations

import ast

import pytest
import torch
from helpers.vllm import FusedModel, class_body, vllm_sources

from mdpgrpo_fast.rollout.vllm import worker
from mdpgrpo_fast.rollout.vllm.worker import WeightSync, bit_sum


def bit_sum_by_hand(bits: list[int]) -> int:
    """bit_sum of sign-extended bit patterns, in Python's integers."""
    total = 0
    for x in bits:
        for odd, shift in ((0x9E3779B97F4A7C15, 32), (0xC4CEB9FE1A85EC53, 29)):
            x = x * odd % 2**64
            x ^= x >> shift
        total += x
    return (total + 2**63) % 2**64 - 2**63


def test_bit_sum_is_the_sum_of_the_mixed_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STEP", 7)
    g = torch.Generator().manual_seed(0)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        x = torch.randn(5, 9, generator=g).to(dtype)
        assert bit_sum(x) == bit_sum_by_hand(x.view(bits).flatten().tolist())
    assert bit_sum(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_bit_sum_survives_fusing_sharding_padding_and_transposing(dtype: torch.dtype) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = bit_sum(x[:10]) + bit_sum(x[10:])
    assert (parts - bit_sum(x)) % 2**64 == 0
    assert bit_sum(x.t()) == bit_sum(x)
    assert bit_sum(torch.cat([x, torch.zeros(8, 16).to(dtype)])) == bit_sum(x)


def test_bit_sum_sees_one_bit_and_changes_that_cancel() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = {bit_sum(x)}
    for i in range(16):
        y = x.clone()
        y.view(torch.int16)[500] ^= -(2**15) if i == 15 else 2**i
        sums.add(bit_sum(y))
    y = x.clone()
    y.view(torch.int16)[3] += 1
    y.view(torch.int16)[4] -= 1
    sums.add(bit_sum(y))
    assert len(sums) == 18


def test_worker_methods_clash_with_none_of_the_installed_vllm() -> None:
    root = vllm_sources()
    for path, name in (("v1/worker/worker_base.py", "WorkerBase"), ("v1/worker/gpu_worker.py", "Worker")):
        methods = {n.name for n in class_body(root / path, name) if isinstance(n, ast.FunctionDef)}
        assert "get_model" in methods and not methods & set(vars(WeightSync)) - {"__init__"}
    llama = class_body(root / "model_executor/models/llama.py", "LlamaForCausalLM")
    assigned = {ast.unparse(n.targets[0]): n.value for n in llama if isinstance(n, ast.Assign)}
    packed = ast.literal_eval(assigned["packed_modules_mapping"])
    assert packed["qkv_proj"] == FusedModel.packed_modules_mapping["qkv_proj"]
