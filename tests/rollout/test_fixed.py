"""Decode steps of fixed shapes: the tokens of the model as it is, without a wait for the device, captured or not."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.inputs import make_model, unavailable
from helpers.losses import DEVICE, gpu
from transformers.models.llama import modeling_llama as llama_module
from transformers.models.llama.modeling_llama import LlamaMLP

from mdpgrpo_fast.kernels.triton.decode import blocks
from mdpgrpo_fast.kernels.triton.decode.attention import launch_attention, takes
from mdpgrpo_fast.log import say_once
from mdpgrpo_fast.rollout import loop
from mdpgrpo_fast.rollout.captured import attention, fixed, graphs
from mdpgrpo_fast.rollout.captured.attention import plain_attention
from mdpgrpo_fast.rollout.captured.fixed import FixedSteps
from mdpgrpo_fast.rollout.captured.fused import Fused, Merged
from mdpgrpo_fast.rollout.captured.graphs import CapturedSteps
from mdpgrpo_fast.rollout.generate import Rollout, generate

VOCAB = 290
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51], [60, 61, 62, 63], [70]]
TAUS = [0.4, 0.7, 1.0, 1.3, 0.5, 1.6]
ENDS = list(range(1, VOCAB, 7))  # so that rows leave at different steps
TRUNCATIONS = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param, VOCAB)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", VOCAB)


def drawn(model: Any, steps: str, seed: int = 0, **knobs: Any) -> Rollout:
    options: dict[str, Any] = {"num_generations": 6, "temperature": TAUS * len(PROMPTS), "eos": ENDS}
    torch.manual_seed(seed)
    return generate(model, PROMPTS, **{**options, "max_new_tokens": 40, **knobs}, steps=steps)


def assert_same(a: Rollout, b: Rollout) -> None:
    for name in ("tokens", "lengths", "finished", "mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("sampling_logprobs", "policy_logprobs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=2e-4)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each fixed step from here on; batches of two and more become smaller."""
    monkeypatch.setattr(fixed, "SMALLEST", 2)
    monkeypatch.setattr(loop, "WINDOW", 4)
    found: list[int] = []
    real = FixedSteps.step

    def step(self: FixedSteps, model: Any, num_rows: int) -> None:
        found.append(num_rows)
        real(self, model, num_rows)

    monkeypatch.setattr(FixedSteps, "step", step)
    return found


# ---- against the model as it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": None}, {"eos": [2]}, *TRUNCATIONS[:3], {"num_generations": 1, "temperature": TAUS[:4]}],
    ids=str,
)
def test_the_same_tokens(model: Any, sizes: list[int], knobs: dict[str, Any]) -> None:
    a, b = drawn(model, "eager", **knobs), drawn(model, "fixed", **knobs)
    assert_same(a, b)
    assert sizes and (knobs or len(set(sizes)) > 1), "fixed steps ran, of fewer and fewer rows"


def test_without_padding(model: Any, sizes: list[int]) -> None:
    options: dict[str, Any] = {"temperature": None, "eos": ENDS, "max_new_tokens": 30}
    rows = [[40, 41, 42], [50, 51, 52], [60, 61, 62]]
    assert_same(*(generate(model, rows, **options, steps=steps) for steps in ("eager", "fixed")))
    assert sizes


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_limits(llama: Any, sizes: list[int], limit: int) -> None:
    a, b = (drawn(llama, steps, max_new_tokens=limit) for steps in ("eager", "fixed"))
    assert_same(a, b)
    assert len(sizes) == limit - 1


def test_all_rows_end_at_once(llama: Any, sizes: list[int]) -> None:
    r = drawn(llama, "fixed", eos=list(range(VOCAB)))
    assert r.lengths.tolist() == [1] * 24 and r.finished.all() and len(sizes) == 4


def test_what_a_row_draws_does_not_depend_on_who_is_beside_it(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = drawn(llama, "eager")
    monkeypatch.setitem(loop.CHECK_EVERY, "cpu", 7)
    assert_same(a, drawn(llama, "eager"))
    assert not torch.equal(a.tokens, drawn(llama, "eager", seed=1).tokens[:, : a.tokens.shape[1]])


# ---- nothing waits --------------------------------------------------------------------------------------------------

WAITS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu", "numpy")


@pytest.mark.parametrize("knobs", [{}, {"temperature": None}, *TRUNCATIONS[:1], *TRUNCATIONS[2:3]], ids=str)
def test_no_step_waits_for_the_device(model: Any, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]) -> None:
    """top_p is not here: on the CPU it looks how far it has to sort, on a GPU it sorts the row."""
    waits: Counter[str] = Counter()
    inside = [False]

    def counted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            waits[name] += inside[0]
            return real(*args, **kwargs)

        return call

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    real_run = FixedSteps.run

    def run(self: FixedSteps, *args: Any) -> None:
        inside[0] = True
        real_run(self, *args)
        inside[0] = False
        waits["steps"] += 1

    monkeypatch.setattr(FixedSteps, "run", run)
    drawn(model, "fixed", **knobs)
    assert waits["steps"] > 5 and set(+waits) == {"steps"}, waits


# ---- attention ------------------------------------------------------------------------------------------------------


def exact(q: Any, k: Any, v: Any, first: Any, last: int, scale: float, softcap: Any, window: Any) -> torch.Tensor:
    """Each row and head by itself, in float64, over what it may see and nothing else."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for r in range(len(q)):
        begin = int(first[r]) if window is None else max(int(first[r]), last - window + 1)
        for h in range(q.shape[1]):
            keys, values = (x[r, h // group, begin : last + 1].double() for x in (k, v))
            scores = keys @ q[r, h].double() * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            out[r, h] = scores.softmax(0) @ values
    return out


def cache(rows: int, heads: int, kv_heads: int, length: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, size), (rows, kv_heads, length, size), (rows, kv_heads, length, size))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 9), (3.0, 9)])
def test_plain_attention(softcap: float | None, window: int | None) -> None:
    q, k, v = cache(3, 4, 2, 40, 8, torch.float64)
    first, last = torch.tensor([0, 5, 20]), torch.tensor([23])
    got = plain_attention(q, k, v, first, last, 0.3, softcap, window)
    torch.testing.assert_close(got, exact(q, k, v, first, 23, 0.3, softcap, window))


# Triton's interpreter has no dot product of bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "length", "last"),
    [(4, 2, 8, 40, 23), (8, 1, 64, 300, 299), (3, 3, 24, 260, 130), (12, 2, 128, 64, 0)],
)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 9), (3.0, 70)])
def test_kernel_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, length: int, last: int, softcap: Any, window: Any
) -> None:
    q, k, v = cache(3, heads, kv_heads, length, size, dtype)
    first = torch.tensor([0, min(5, last), min(20, last)])
    k[:, :, last + 1 :] = v[:, :, last + 1 :] = torch.nan
    for r, n in enumerate(first):
        k[r, :, :n] = v[r, :, :n] = torch.nan
    # As models have it: heads between the rows' tokens.
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    args = (x.to(DEVICE) for x in (q, k, v, first, torch.tensor([last])))
    got = launch_attention(*args, 0.3, softcap, window)
    assert got.dtype == dtype and got.shape == q.shape
    expected = exact(q, k, v, first, last, 0.3, softcap, window)
    tolerance = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_no_number_stays_none() -> None:
    """Also where it is in one part of several."""
    q, k, v = cache(2, 4, 2, 300, 64, torch.float32)
    k[0, 0, 100] = torch.nan
    first, last = torch.zeros(2, dtype=torch.int64), torch.tensor([299])
    got = launch_attention(*(x.to(DEVICE) for x in (q, k, v, first, last)), 0.3).cpu()
    expected = plain_attention(q, k, v, first, last, 0.3)
    assert expected.isnan().sum() == 2 * 64
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_the_kernel_takes() -> None:
    q, k, v = cache(2, 4, 2, 40, 16, torch.float32)
    assert takes(q, k, v) and takes(q[:1], k[:1], v[:1])
    assert not takes(q, k, v[..., :8].contiguous()), "narrower values"
    assert not takes(q, k, v[:, :, :20].contiguous()) and not takes(
        q, k, v.transpose(1, 2).contiguous().transpose(1, 2)
    )
    assert not takes(q, k, v.half()) and not takes(q.double(), k.double(), v.double())


def test_rows_of_a_larger_buffer() -> None:
    q, k, v = cache(4, 4, 2, 40, 16, torch.float32)
    first, last = torch.zeros(4, dtype=torch.int64), torch.tensor([17])
    q, k, v, first, last = (x.to(DEVICE) for x in (q, k, v, first, last))
    got = launch_attention(q[:2], k[:2], v[:2], first[:2], last, 0.5)
    torch.testing.assert_close(got, plain_attention(q, k, v, first, last, 0.5)[:2], rtol=1e-5, atol=1e-5)


# ---- the other kernels ----------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels of a GPU's decode step, on the CPU in Triton's interpreter."""
    for module in (attention, fixed):
        monkeypatch.setattr(module, "has_kernels", lambda device, dtype: True)


def test_steps_of_kernels(model: Any, sizes: list[int], kernels: None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "num_generations": 2, "temperature": [0.5, 1.5] * len(PROMPTS)}
    rotary = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    model = copy.deepcopy(model).to(DEVICE)
    a, b = (drawn(model, steps, **options) for steps in ("eager", "fixed"))
    assert_same(a, b)
    assert sizes
    found = Fused(model)
    norms, gates, heads = (
        [m for m in model.modules() if type(m).__name__.endswith(end)] for end in ("RMSNorm", "MLP", "Attention")
    )
    gates = [m for m in gates if "silu" in str(getattr(m, "act_fn", "")).lower()]
    count = len(norms) + len(gates) + 3 * sum(hasattr(m, "q_proj") for m in heads)
    assert len(found.forwards) == count and len(found.rotaries) == (rotary is not None)
    assert all("forward" not in vars(m) for m in model.modules()), "only for the time of a step"
    assert getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None) is rotary


class ClampedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7))


class ScaledMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * 1.01


class TwoArguments(LlamaMLP):
    def forward(self, x: torch.Tensor, scale: Any) -> Any:
        return super().forward(x) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaMLP, ClampedMLP, ScaledMLP, TwoArguments])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_what_is_gated_by_silu(kind: Any, act: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=64, intermediate_size=96, hidden_act=act)
    found = Fused(kind(config).to(DEVICE, dtype))
    assert len(found.forwards) == len(found.merged) == (kind is LlamaMLP and act == "silu")


def test_what_there_is_no_room_for_is_not_merged() -> None:
    found = Fused(LlamaMLP(tf.LlamaConfig(hidden_size=32, intermediate_size=16)))
    layers = {"small": torch.nn.Linear(8, 8), "large": torch.nn.Linear(8, 32), "other": torch.nn.Linear(8, 8)}
    module = torch.nn.ModuleDict(layers)
    found.room = 1100.0
    assert found._merge(module, "large", "small") is None
    assert found._merge(module, "small", "other") is not None and found.room == 1100 - 2 * 4 * 64


@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float32), (100, torch.float32), (2048, torch.float16)])
@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm(size: int, dtype: torch.dtype, one_plus: bool) -> None:
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(3, 2, size)).to(DEVICE, dtype), torch.randn(size).to(DEVICE, dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + one_plus)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(blocks.rms_norm(x, weight, 1e-5, one_plus).double(), expected, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 1, 2 * 1100)).to(DEVICE, dtype)
    gate, up = x.double().chunk(2, -1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        blocks.gated(x).double(), torch.nn.functional.silu(gate) * up, rtol=4 * eps, atol=4 * eps
    )


def test_merged_layers_follow_their_weights() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, n) for n in (6, 4, 2)]
    merged = Merged(*layers)
    for _ in range(2):
        x, other = torch.randn(2, 3, 1, 8)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(merged.part(i, x), layer(x))
        assert merged.x is None and merged.parts is None
        merged.part(0, x)
        torch.testing.assert_close(merged.part(1, other), layers[1](other))
        where = merged.weight.data_ptr(), merged.bias.data_ptr()
        with torch.no_grad():
            for p in layers[1].parameters():
                p += 1
            merged.refresh()
        assert where == (merged.weight.data_ptr(), merged.bias.data_ptr())


def test_kernels_see_weights_that_change(captures: list[int], kernels: None) -> None:
    model = make_model("llama", VOCAB).to(DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 16, "num_generations": 1, "temperature": None}
    for _ in range(2):
        assert_same(drawn(model, "auto", **options), drawn(model, "eager", **options))
        with torch.no_grad():
            for p in model.parameters():
                p *= 1.1
    assert captures.count(4) == 1


@pytest.mark.parametrize("size", [8, 24, 128])
def test_rotate_and_append(size: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 1, h, size).transpose(1, 2).to(DEVICE) for h in (6, 2, 2))
    cos, sin = torch.randn(2, 3, 1, size).to(DEVICE)
    expected = llama_module.apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(blocks.rotate(q, k, cos, sin), expected, rtol=1e-5, atol=1e-6)
    keys, values = torch.zeros(2, 5, 2, 40, size).to(DEVICE)
    blocks.append(k, v, keys[:3], values[:3], torch.tensor([17]).to(DEVICE))
    assert torch.equal(keys[:3, :, 17:18], k) and torch.equal(values[:3, :, 17:18], v)
    assert keys.count_nonzero() == k.count_nonzero() and values.count_nonzero() == v.count_nonzero()


# ---- what is left to the model as it is -----------------------------------------------------------------------------


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Any:
    say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [r.message for r in caplog.records if "not captured" in r.message]


def assert_falls_back(model: Any, reasons: Any, reason: str, sizes: list[int]) -> None:
    a, b = drawn(model, "eager"), drawn(model, "fixed")
    assert_same(a, b)
    assert not sizes and len(found := reasons()) == 1 and reason in found[0], found


def tiny(name: str, config: str, **knobs: Any) -> Any:
    if not hasattr(tf, config):
        unavailable(f"transformers has no {config}")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": VOCAB, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return getattr(tf, f"{name}ForCausalLM")(getattr(tf, config)(**shape, **more, **knobs)).eval()


def test_states_are_not_fixed(sizes: list[int], reasons: Any) -> None:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "vocab_size": VOCAB}
    model = tf.Lfm2ForCausalLM(tf.Lfm2Config(**shape, **more, pad_token_id=0, eos_token_id=1)).eval()
    assert_falls_back(model, reasons, "its cache has", sizes)


def test_positions_that_come_from_the_mask(sizes: list[int], reasons: Any) -> None:
    torch.manual_seed(3)
    config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_head=4, n_layer=2)
    assert_falls_back(tf.BloomForCausalLM(config).eval(), reasons, "takes no position_ids", sizes)


LATENT = {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
          "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2}  # fmt: skip


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_keys_and_values_of_different_widths(name: str, sizes: list[int], reasons: Any) -> None:
    model = tiny(name, f"{name}Config", **LATENT)
    assert_falls_back(model, reasons, "its keys and values have different shapes", sizes)


def llama4(**knobs: Any) -> Any:
    """Of a layer with rotary positions and one without, whose queries grow with every fourth place."""
    more = {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 5, "num_local_experts": 2}
    options = {**more, "num_key_value_heads": 2, "head_dim": 8, "floor_scale": 4, "attn_scale": 1.0, **knobs}
    return tiny("Llama4", "Llama4TextConfig", no_rope_layers=[1, 0], **options)


@pytest.mark.parametrize("layer_types", [None, ["full_attention"] * 2])
def test_chunked_attention(sizes: list[int], reasons: Any, layer_types: Any) -> None:
    model = llama4(attention_chunk_size=8, layer_types=layer_types)
    assert_falls_back(model, reasons, "its attention is over chunks", sizes)


def test_a_layer_that_asks_how_much_is_in_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama4(attention_chunk_size=8, layer_types=["full_attention"] * 2)
    with torch.no_grad():
        graphs._trial(model, torch.device("cpu"))  # raises where the steps are not the model's
        monkeypatch.setattr(fixed.FixedLayer, "get_seq_length", lambda self, *args: 256)
        with pytest.raises(graphs.Unfit):
            graphs._trial(model, torch.device("cpu"))


def test_too_little_memory(sizes: list[int], reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCAB)
    drawn(model, "fixed", max_new_tokens=2)  # a trial's cache is small
    sizes.clear()
    for share, fits in ((1.99, False), (2.01, True)):
        monkeypatch.setattr(fixed, "free_memory", lambda device, n=share: n * 24 * 256 * 2 * 2 * 2 * 8 * 4)
        drawn(model, "fixed")
        assert bool(sizes) == fits, "not remembered"
    assert len(found := reasons()) == 1 and "too much of the free memory" in found[0]


def test_training_and_hooks_and_autocast(sizes: list[int], reasons: Any) -> None:
    model = make_model("llama", VOCAB)
    handle = model.model.norm.register_forward_hook(lambda *args: None)
    assert_falls_back(model, reasons, "its modules have hooks", sizes)
    handle.remove()
    say_once.cache_clear()
    assert_falls_back(model.train(), lambda: reasons()[1:], "it is in training mode", sizes)
    with torch.autocast("cpu", torch.bfloat16):
        say_once.cache_clear()
        assert_falls_back(model.eval(), lambda: reasons()[2:], "autocast is on", sizes)


def test_a_model_that_computes_something_else(sizes: list[int], reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model does with its cache that fixed steps do not know shows in the trial."""
    real = fixed.decode_attention
    monkeypatch.setattr(fixed, "decode_attention", lambda *args: real(*args) * 1.01)
    model = make_model("llama", VOCAB)
    assert_falls_back(model, reasons, "its logits differ", sizes)
    monkeypatch.undo()
    drawn(model, "fixed")
    assert list(graphs._trials[model].values()) == [reasons()[0].split("graph: ")[1]], "not tried again"


def test_not_by_default_on_the_cpu(llama: Any, sizes: list[int]) -> None:
    drawn(llama, "auto")
    assert not sizes


# ---- what is captured when, without a GPU ---------------------------------------------------------------------------


class Again:
    """A graph that runs its step again in place of replaying it."""

    def __init__(self, steps: CapturedSteps, model: Any, num_rows: int) -> None:
        own, of = weakref.ref(steps), weakref.ref(model)
        self.replay = lambda: FixedSteps.step(own(), of(), num_rows)


@pytest.fixture
def captures(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each capture from here on; everything of CUDA is replaced."""
    found: list[int] = []

    def capture(self: CapturedSteps, model: Any, num_rows: int) -> Again:
        found.append(num_rows)
        return Again(self, model, num_rows)

    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "_stream", lambda device: None)
    real, host = torch.cuda.get_device_properties, SimpleNamespace(total_memory=1 << 30)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: host if device == torch.device("cpu") else real(device)
    )
    monkeypatch.setattr(CapturedSteps, "_aside", lambda self, work: work())
    monkeypatch.setattr(CapturedSteps, "_without_waits", FixedSteps.step)
    monkeypatch.setattr(CapturedSteps, "_capture", capture)
    graphs._kept.clear()
    return found


def test_a_capture_for_each_size_and_once(captures: list[int]) -> None:
    model = make_model("llama", VOCAB)
    expected = drawn(model, "eager")
    assert_same(drawn(model, "auto"), expected)
    assert captures[0] == 24 and captures == sorted(set(captures), reverse=True) and len(captures) > 1
    first = list(captures)
    assert_same(drawn(model, "auto"), expected)
    assert captures == first, "kept"
    with torch.no_grad():
        model.lm_head.weight *= 1.5
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert captures == first, "written in place"
    with torch.inference_mode():
        assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert captures.count(24) == 2, "its buffers cannot be written outside of it"
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert captures.count(24) == 3
    model.set_attn_implementation("eager")
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert captures.count(24) == 4 and set(graphs._trials[model]) == {"sdpa", "eager"}
    first = list(captures)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / 2)
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert captures[len(first)] == 24, "another weight is another graph"
    count = len(captures)
    for knobs in ({"temperature": None}, {"top_k": 5}, {"max_new_tokens": 30}):
        assert_same(drawn(model, "auto", **knobs), drawn(model, "eager", **knobs))
        assert captures[count] == 24
        count = len(captures)
    assert len(graphs._kept) == 1
    drawn(model, "auto", max_new_tokens=4)
    assert len(captures) == count, "a few steps are not worth it"
    del model
    gc.collect()
    assert not graphs._kept


def test_a_large_cache_is_given_back(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCAB)
    drawn(model, "auto")
    size = graphs._kept[model].nbytes
    assert size == sum(x.nbytes for layer in graphs._kept[model].layers for x in layer[:2])
    for share, is_kept in ((size, True), (size - 1, False)):
        graphs._kept.clear()
        monkeypatch.setattr(graphs, "KEPT_SHARE", share / (1 << 30))
        assert_same(drawn(model, "auto"), drawn(model, "eager"))
        assert (model in graphs._kept) == is_kept


def test_a_step_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    streams = [SimpleNamespace(wait_stream=lambda x, own=own: done.append(f"{own} waits")) for own in ("it", "we")]
    steps = SimpleNamespace(stream=streams[0], place=torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(ZeroDivisionError):
        CapturedSteps._aside(steps, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert done == ["it waits", "we waits"]


def test_a_capture_that_fails(captures: list[int], monkeypatch: pytest.MonkeyPatch, reasons: Any) -> None:
    model = make_model("llama", VOCAB)
    real = CapturedSteps._capture

    tried = []

    def fails(self: CapturedSteps, model: Any, num_rows: int) -> Any:
        tried.append(num_rows)
        if num_rows <= fewer:
            raise RuntimeError("no more")
        return real(self, model, num_rows)

    monkeypatch.setattr(CapturedSteps, "_capture", fails)
    fewer = 23
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert "of 12 rows are not captured: RuntimeError: no more" in reasons()[0]
    graphs._kept.clear()
    fewer = 24
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert "decode steps of LlamaForCausalLM are not captured in a CUDA graph: RuntimeError: no more" in reasons()[-1]
    assert captures == [24] and not graphs._kept
    count = len(tried)
    assert_same(drawn(model, "auto"), drawn(model, "eager"))
    assert len(tried) == count, "not at every call"


def test_adapters_are_captured_anew(captures: list[int], peer: Any) -> None:
    peft = peer("peft")
    model = peft.get_peft_model(make_model("llama", VOCAB), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.5)
    with_adapter = drawn(model, "auto")
    assert captures and model not in graphs._kept
    assert_same(with_adapter, drawn(model, "eager"))
    with model.disable_adapter():
        assert_same(drawn(model, "auto"), drawn(model, "eager"))
        assert not torch.equal(drawn(model, "auto").tokens[:, :9], with_adapter.tokens[:, :9])


# ---- a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu() -> Any:
    graphs._kept.clear()
    return lambda family, dtype: make_model(family, VOCAB).to("cuda", dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_captured_steps(on_gpu: Any, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the same steps uncaptured; in float32 also those of the model as it is."""
    monkeypatch.setattr(fixed, "SMALLEST", 2)
    monkeypatch.setattr(loop, "WINDOW", 4)
    model = on_gpu(family, dtype)
    for knobs in ({"temperature": None}, {}):
        captured, plain = drawn(model, "auto", **knobs), drawn(model, "fixed", **knobs)
        found = graphs._kept[model].graphs
        assert all(found.values()) and (len(found) > 1 or knobs), "all sizes were captured"
        assert_same(captured, plain)
        if dtype == torch.float32 and family != "gemma2":
            assert_same(captured, drawn(model, "eager", **knobs))


@gpu
@pytest.mark.parametrize("knobs", TRUNCATIONS, ids=str)
def test_captured_truncation(on_gpu: Any, knobs: dict[str, Any], reasons: Any) -> None:
    model = on_gpu("llama", torch.float32)
    assert_same(drawn(model, "auto", **knobs), drawn(model, "eager", **knobs))
    assert model in graphs._kept and not reasons()


@gpu
def test_graphs_read_the_weights_as_they_are_now(on_gpu: Any) -> None:
    model = on_gpu("llama", torch.float32)
    before = drawn(model, "auto", temperature=None, eos=[2])
    kept = graphs._kept[model]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = drawn(model, "auto", temperature=None, eos=[2])
    assert graphs._kept[model] is kept, "captured once"
    assert not torch.equal(after.tokens, before.tokens)
    assert_same(after, drawn(model, "eager", temperature=None, eos=[2]))
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.5)
    assert_same(drawn(model, "auto", eos=[2]), drawn(model, "eager", eos=[2]))
    assert graphs._kept[model] is not kept, "another weight is another graph"


@gpu
def test_longer_prompts_take_the_same_graphs(on_gpu: Any) -> None:
    model = on_gpu("llama", torch.float32)
    options: dict[str, Any] = {"temperature": None, "eos": [2], "max_new_tokens": 20}
    kept = []
    for width in (3, 9, 30):
        rows = [list(range(40, 40 + width)), [50, 51]]
        assert_same(*(generate(model, rows, **options, steps=steps) for steps in ("auto", "eager")))
        kept.append(graphs._kept[model])
    assert kept[0] is kept[1] is kept[2]


@gpu
def test_a_step_that_waits_is_left_to_the_model(on_gpu: Any, reasons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu("llama", torch.float32)
    real = model.model.norm.forward

    def waits(x: torch.Tensor) -> torch.Tensor:
        return real(x) if float(x.sum()) == float(x.sum()) else x

    expected = drawn(model, "eager")
    monkeypatch.setattr(model.model.norm, "forward", waits)
    stream = torch.cuda.current_stream()
    assert_same(drawn(model, "auto"), expected)
    assert model not in graphs._kept and "synchroniz" in reasons()[0]
    assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
