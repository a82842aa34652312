"""What runs in vLLM's workers: the checksum of weights, and methods that clash with none of its own."""

from __future__ import annotations

import ast

import pytest
import torch
from helpers.vllm import FusedModel, Worker, class_body, vllm_sources
from torch import Tensor, nn

from mdpgrpo_fast.rollout.vllm import checksums
from mdpgrpo_fast.rollout.vllm.checksums import bit_sum
from mdpgrpo_fast.rollout.vllm.worker import WeightSync, repack_tied_heads


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
    monkeypatch.setattr(checksums, "_STEP", 7)
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
    reload = ast.parse((root / "model_executor/model_loader/reload/layerwise.py").read_text(encoding="utf-8"))
    functions = {n.name: n for n in ast.walk(reload) if isinstance(n, ast.FunctionDef)}
    assert [a.arg for a in functions["initialize_layerwise_reload"].args.args] == ["model"]
    assert [a.arg for a in functions["finalize_layerwise_processing"].args.args] == ["model", "model_config"]
    # What sums a layer before it is repacked stands in the place of this method.
    assert "quant_method.process_weights_after_loading(layer)" in ast.unparse(functions["_layerwise_process"])
    assert "reset_lora_state" in {
        n.name
        for n in class_body(root / "v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin")
        if isinstance(n, ast.FunctionDef)
    }
    llama = class_body(root / "model_executor/models/llama.py", "LlamaForCausalLM")
    assigned = {ast.unparse(n.targets[0]): n.value for n in llama if isinstance(n, ast.Assign)}
    packed = ast.literal_eval(assigned["packed_modules_mapping"])
    assert packed["qkv_proj"] == FusedModel.packed_modules_mapping["qkv_proj"]


class Packs:
    """A quantisation method with a copy of its own of a weight, which it may take away, as vLLM's CPU kernels."""

    def __init__(self, removes: bool = False) -> None:
        self.removes = removes

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight.detach().clone()
        if self.removes:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Layerwise(nn.Module):
    """An embedding with a tied head and a linear layer, each repacked once it is loaded, as vLLM's reload does it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.linear = (
            nn.Embedding(5, 4),
            nn.Linear(4, 5, bias=False),
            nn.Linear(4, 4, bias=False),
        )
        self.head.weight = self.embed.weight
        for layer, method in ((self.embed, Packs()), (self.head, Packs()), (self.linear, Packs(removes=True))):
            layer.quant_method = method

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            layer = self.get_submodule(name.removesuffix(".weight"))
            layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
            layer.quant_method.process_weights_after_loading(layer)
        self.head.weight = self.embed.weight


def test_sums_are_of_what_was_loaded_where_a_layer_is_repacked() -> None:
    model = Layerwise()
    one, named = Worker(model), {"embed.weight": torch.randn(5, 4), "linear.weight": torch.randn(4, 4)}
    assert one.mdpgrpo_start("a")["held"] == {"embed.weight": "float32", "linear.weight": "float32"}
    assert one.mdpgrpo_load("a", list(named.items())) == ["a"] and one.mdpgrpo_load("b", []) == ["a"]
    assert one.mdpgrpo_finish("b") is None and one.mdpgrpo_finish("a") == {n: bit_sum(x) for n, x in named.items()}
    assert model.linear.weight.numel() == 0 and torch.equal(model.linear.packed, named["linear.weight"])
    assert not any("process_weights_after_loading" in vars(m.quant_method) for m in model.children())
    assert one.mdpgrpo_finish("a") == {n: bit_sum(x) for n, x in named.items()}, "asked again"
    one.mdpgrpo_start("b")
    assert one.mdpgrpo_finish("a") is None, "it is over"


def test_what_is_quantised_after_loading_is_summed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantises(Packs):
        """Another dtype, and a scale that was no parameter before, as vLLM's online fp8."""

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.weight = nn.Parameter(layer.weight.half(), requires_grad=False)
            layer.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    class Model(Layerwise):
        def restore(self) -> None:
            """As vLLM's reload: parameters as they are loaded."""
            self.linear.weight = nn.Parameter(torch.empty(4, 4), requires_grad=False)
            if hasattr(self.linear, "scale"):
                del self.linear.scale

    model = Model()
    model.linear.quant_method = Quantises()
    one, named = Worker(model), {"embed.weight": torch.randn(5, 4), "linear.weight": torch.randn(4, 4)}
    monkeypatch.setattr(one, "_mdpgrpo_begin_reload", model.restore)
    for update in ("a", "b"):
        assert one.mdpgrpo_start(update)["held"] == {"embed.weight": "float32", "linear.weight": "float32"}
        one.mdpgrpo_load(update, list(named.items()))
        sums = one.mdpgrpo_finish(update)
        assert {n: sums[n] for n in named} == {n: bit_sum(x) for n, x in named.items()}
        assert model.linear.weight.dtype == torch.float16


def test_a_weight_that_changes_after_it_is_loaded_is_seen() -> None:
    one = Worker(Layerwise())
    one.mdpgrpo_start("a")
    one.mdpgrpo_load("a", [("embed.weight", torch.ones(5, 4))])
    one.model.embed.weight.mul_(2)
    assert one.mdpgrpo_finish("a")["embed.weight"] == bit_sum(torch.full((5, 4), 2.0))


def test_an_update_left_open_is_dropped() -> None:
    one = Worker(Layerwise())
    one.mdpgrpo_start("a")
    one.mdpgrpo_start("b")
    assert one.reloads == 1 and one.mdpgrpo_load("a", [("no such", torch.ones(1))]) == ["b"]
    name, problem = one.mdpgrpo_load("b", [("no such", torch.ones(1))])
    assert name == "b" and problem.startswith("AttributeError")


def test_a_tied_head_is_repacked_with_the_embeddings() -> None:
    model = Layerwise()
    model.load_weights([("embed.weight", torch.ones(5, 4))])
    assert not hasattr(model.head, "packed"), "what vLLM leaves"
    repack_tied_heads(model)
    assert torch.equal(model.head.packed, torch.ones(5, 4)) and not hasattr(model.linear, "packed")
