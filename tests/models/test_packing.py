"""Groups with their prompt once: equal to the padded pass in loss and gradients, in every corner, or refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import flash_stand_in
from helpers.losses import config_for

from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.models import shared_prompt
from mdpgrpo_fast.models.packing import PackedRow, Packing, Unpackable, bins, masks, pack
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.models.shared_prompt import PackedLayout, shared_prompt_attention
from mdpgrpo_fast.ops import backends
from mdpgrpo_fast.training.batch import micro_batch_budget

VOCAB = 97
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FLASH = {"attn_implementation": "flash_attention_2"}
WINDOW = {"head_dim": 8, "sliding_window": 5}
MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "llama": (tf.LlamaConfig, {}, "blocks"),
    "llama eager": (tf.LlamaConfig, {"attn_implementation": "eager"}, "masks"),
    "llama flex": (tf.LlamaConfig, {"attn_implementation": "flex_attention"}, "flex"),
    "qwen2": (tf.Qwen2Config, {}, "blocks"),
    # Sliding window and soft-cap, which eager attention alone has: some releases of transformers take sdpa by default.
    "gemma2": (tf.Gemma2Config, {**WINDOW, "attn_implementation": "eager"}, "masks"),
    "gemma3": (tf.Gemma3TextConfig, WINDOW, "blocks"),  # sliding window under sdpa: blocks where it does not reach
    "mistral": (tf.MistralConfig, {"sliding_window": 5}, "blocks"),
    "llama flash": (tf.LlamaConfig, FLASH, "blocks"),
    # Its soft-cap too, and the window where it does not reach.
    "gemma2 flash": (tf.Gemma2Config, {**FLASH, "head_dim": 8, "sliding_window": 16}, "blocks"),
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}, "blocks"),
}
PROMPTS = [6, 1, 3]
LENGTHS = [[4, 1, 7], [2, 9], [3, 0]]  # a single token, an empty completion, and 6 + 7 positions beyond the window


def build(name: str) -> Any:
    kind, more, _ = MODELS[name]
    more = dict(more)
    attention = more.pop("attn_implementation", None)
    torch.manual_seed(0)
    sizes = {**SIZES, **HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
    if name == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k in more or k.endswith("_id") or k == "vocab_size"}
    model = tf.AutoModelForCausalLM.from_config(
        kind(**sizes), **({"attn_implementation": attention} if attention else {})
    )
    for p in model.parameters():  # away from the small initial weights: attention has to matter
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def packing_of(model: Any, dtype: torch.dtype = torch.float32) -> Packing:
    return Packing(model, torch.device("cpu"), dtype)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int], list[list[int]]]:
    """Prompt ids and mask, tokens and mask, lengths of both, and the groups' rows."""
    generator = torch.Generator().manual_seed(1)
    lengths = [n for group in LENGTHS for n in group]
    prompt_lengths = [s for s, group in zip(PROMPTS, LENGTHS, strict=True) for _ in group]
    rows, groups = iter(range(len(lengths))), []
    for group in LENGTHS:
        groups.append([next(rows) for _ in group])
    prompts = torch.randint(3, VOCAB, (len(PROMPTS), max(PROMPTS)), generator=generator)
    ids = torch.stack([prompts[g] for g, group in enumerate(groups) for _ in group])
    tokens = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    at = torch.arange(max(PROMPTS))
    prompt_mask = at >= max(PROMPTS) - torch.tensor(prompt_lengths)[:, None]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids, prompt_mask, tokens, mask, prompt_lengths, lengths, groups


def packed(groups: list[list[int]] | None = None) -> PackedRow:
    ids, _, tokens, _, prompt_lengths, lengths, all_groups = batch()
    return pack(ids, prompt_lengths, tokens, lengths, groups or all_groups)


def gradients(
    policy: Policy, inputs: Any, mask: Any, lengths: list[int], **given: Any
) -> tuple[Any, list[torch.Tensor]]:
    out = policy(inputs, mask, config_for(), lengths, denominator=7.0, **given)
    found = torch.autograd.grad(out.loss, [p for p in policy.model.parameters()], allow_unused=True)
    return out, [g for g in found if g is not None]


@pytest.mark.parametrize("lm_head", ["fused", "logits"])
@pytest.mark.parametrize("name", [n for n in MODELS if "flex" not in n])
def test_packed_equals_padded(name: str, lm_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "flash" in name:
        flash_stand_in.stand_in(monkeypatch)
    policy = Policy(build(name), lm_head, packing="on")
    assert policy.packing is not None and policy.packing.mode == MODELS[name][2]
    ids, prompt_mask, tokens, mask, _, lengths, _ = batch()
    one = packed()
    advantage, beta, tau = torch.linspace(-1, 1, 7), torch.full((7,), 0.05), torch.linspace(0.5, 1.3, 7)
    refs = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)) - 4
    rows = torch.tensor(one.rows)
    expected, wanted = gradients(
        policy, (ids, prompt_mask, tokens, mask), mask, lengths, advantage=advantage, kl_beta=beta, temperature=tau,
        ref_logprobs=refs,
    )  # fmt: skip
    out, found = gradients(
        policy, one, None, one.lengths, advantage=advantage[rows], kl_beta=beta[rows], temperature=tau[rows],
        ref_logprobs=refs.flatten()[one.source],
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logprobs, expected.logprobs.flatten()[one.source], rtol=1e-4, atol=2e-5)
    assert out.totals[0] == expected.totals[0] == sum(lengths)
    assert len(found) == len(wanted) > 10
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * max(1.0, theirs.abs().max().item()))


def test_flex_attention_scores_as_the_padded_pass() -> None:
    """Forward alone: PyTorch has no backward pass of it on the CPU."""
    ids, prompt_mask, tokens, mask, _, lengths, _ = batch()
    one = packed()
    with torch.compiler.set_stance("force_eager"):  # transformers compiles it, which takes a minute here
        policy = Policy(build("llama flex"), packing="on")
        assert policy.packing is not None and policy.packing.mode == "flex"
        expected = policy.logprobs((ids, prompt_mask, tokens, mask), mask, lengths, 1.0, "auto")
        found = policy.logprobs(one, None, one.lengths, 1.0, "auto")
    torch.testing.assert_close(found, expected.flatten()[one.source], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_log_probs_do_not_depend_on_the_other_groups(name: str) -> None:
    policy = Policy(build(name), packing="on")
    whole = packed()
    together = policy.logprobs(whole, None, whole.lengths, 1.0, "auto")
    at = 0
    for rows in batch()[-1]:
        one = packed([rows])
        alone = policy.logprobs(one, None, one.lengths, 1.0, "auto")
        torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-5)
        at += len(alone)


def test_a_sliding_window_takes_masks_only_where_it_reaches() -> None:
    packing = packing_of(build("mistral"))
    assert "shared_prompt" not in packing.arguments(packed())
    assert "shared_prompt" in packing.arguments(packed([[3]])), "1 + 2 positions fit into the window"


def test_flash_attn_is_tried_where_the_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU before a run moves it, where flash-attn has no kernels; what is wrong with a model shows there too."""
    flash_stand_in.stand_in(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no kernels on the CPU")

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(sys.modules["flash_attn"], name, on_the_cpu)
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        monkeypatch.setattr(sys.modules["flash_attn.flash_attn_interface"], name, on_the_cpu)
    model = build("gemma2 flash")
    packing = Packing(model, torch.device("cuda"), torch.bfloat16)
    assert packing.mode == "blocks" and model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(NotImplementedError, match="no kernels on the CPU"):
        model.model(**packing.arguments(packed()))
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids=None, **more: forward(*args, **more))
    with pytest.raises(Unpackable, match="its hidden states differ when groups are packed, by"):
        Packing(model, torch.device("cuda"), torch.bfloat16)
    assert model.config._attn_implementation == "flash_attention_2"


def test_flash_attn_takes_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a sliding window there is no way to pack for it, and that is said before a run begins."""
    flash_stand_in.stand_in(monkeypatch)
    model = build("gemma2 flash")
    model.config.sliding_window = 12
    packing = packing_of(model)
    assert packing.mode_for(12) == "blocks" and packing.mode_for(13) is None
    with pytest.raises(Unpackable, match="longer than the sliding window of 12 positions, and flash_attention_2 takes"):
        packing.arguments(packed())
    run, method = TrainConfig(max_completion_length=7), preset("paper")
    budget, said = micro_batch_budget(packing, [6], run, method)
    assert budget == 0 and said is not None and "sliding window of 12" in said
    with pytest.raises(ConfigError, match=r"prompts cannot be shared inside a group: .* sliding window of 12"):
        micro_batch_budget(packing, [6], dataclasses.replace(run, packing="on"), method)
    with pytest.raises(Unpackable, match=r"flash_attention_2 has no kernels for torch.float32 of 8 on cuda"):
        Packing(model, torch.device("cuda"), torch.float32)


# ---- layout ---------------------------------------------------------------------------------------------------------


def test_layout_of_a_packed_row() -> None:
    one = packed()
    assert one.layout.prompts == [(0, 6), (18, 19), (30, 33)]
    assert one.layout.completions == [[(6, 10), (10, 11), (11, 18)], [(19, 21), (21, 30)], [(33, 36)]]
    assert one.rows == [0, 1, 2, 3, 4, 5] and one.lengths == [4, 1, 7, 2, 9, 3] and one.layout.longest == 13
    assert one.positions[0, :11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 6], "positions restart after the prompt"
    assert one.predictors[:6].tolist() == [5, 6, 7, 8, 5, 5], "the prompt's last state predicts every first token"
    ids, _, tokens, *_ = batch()
    assert one.ids[0, :6].equal(ids[0]) and one.ids[0, 18] == ids[3, -1] and one.ids[0, 11:18].equal(tokens[2, :7])
    assert one.tokens.equal(tokens.flatten()[one.source]) and one.completion.bincount().tolist() == one.lengths


def test_a_batch_without_a_token_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="groups must hold a completion with at least one token"):
        packed([[6]])


def test_bins_hold_whole_groups_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        costs = torch.randint(
            1, 100, (int(torch.randint(1, 20, (), generator=generator)),), generator=generator
        ).tolist()
        budget = int(torch.randint(max(costs), 300, (), generator=generator))
        found = bins(costs, budget)
        assert sorted(i for b in found for i in b) == list(range(len(costs)))
        assert all(0 < sum(costs[i] for i in b) <= budget for b in found)
        assert len(found) <= 2 * -(-sum(costs) // budget)
    with pytest.raises(ValueError, match="tokens_per_micro_batch must hold the largest group, 9 tokens; got 8"):
        bins([3, 9], 8)


def test_masks_by_their_definition() -> None:
    one = packed()
    where = {i: (g, 0) for g, (a, b) in enumerate(one.layout.prompts) for i in range(a, b)}
    for g, spans in enumerate(one.layout.completions):
        where |= {i: (g, j) for j, (a, b) in enumerate(spans, 1) for i in range(a, b)}
    for window in (None, 3):
        found, at = masks(one.layout, one.positions, window), one.positions[0].tolist()
        for q in range(len(at)):
            for k in range(len(at)):
                allowed = where[q][0] == where[k][0] and where[k][1] in (0, where[q][1]) and at[k] <= at[q]
                assert found[q, k] == (allowed and (window is None or at[q] - at[k] < window)), (q, k)


# ---- attention ------------------------------------------------------------------------------------------------------


def qkv(layout: PackedLayout, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    length = layout.own[-1][1]
    return [torch.randn(1, h, length, 8, generator=generator, dtype=dtype).requires_grad_() for h in (6, 2, 2)]


def expected_attention(inputs: list[torch.Tensor], one: PackedRow, scale: float, softcap: float = 0.0) -> torch.Tensor:
    q, k, v = inputs
    allowed = masks(one.layout, one.positions)
    if softcap:
        scores = softcap * (q @ k.repeat_interleave(3, 1).transpose(2, 3) * scale / softcap).tanh()
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ v.repeat_interleave(3, 1)).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=allowed, scale=scale
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("peaked", [1.0, 30.0])
def test_attention_over_blocks_is_that_under_a_mask(peaked: float) -> None:
    one = packed()
    inputs = qkv(one.layout)
    out, expected = shared_prompt_attention(*inputs, one.layout, peaked), expected_attention(inputs, one, peaked)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def emulated(monkeypatch: pytest.MonkeyPatch, kernels: str, softcap: float) -> Any:
    """What a GPU calls, by what it is documented to do."""
    if kernels == "flash_attn":
        return shared_prompt.FlashAttn(flash_stand_in, softcap)

    def forward(*args: Any, scale: float) -> Any:
        *rows, dropout, causal, debug = args
        assert dropout == 0 and debug is False
        return *flash_stand_in.varlen_forward(*rows, scale, causal), torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(*args: Any, scale: float) -> Any:
        *rows, _, _, _, causal, _, _ = args
        return flash_stand_in.varlen_backward(*rows, scale, causal)

    for name, fake in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward)):
        real = getattr(torch.ops.aten, name).default._schema
        assert [a.name for a in real.arguments[:4]] in (
            ["query", "key", "value", "cum_seq_q"], ["grad_out", "query", "key", "value"]
        )  # fmt: skip
        monkeypatch.setattr(torch.ops.aten, name, fake)
    return shared_prompt._cuda


@pytest.mark.parametrize("one_token", [False, True])
@pytest.mark.parametrize(("kernels", "softcap"), [("torch", 0.0), ("flash_attn", 0.0), ("flash_attn", 1.5)])
def test_the_gpus_calls(monkeypatch: pytest.MonkeyPatch, kernels: str, softcap: float, one_token: bool) -> None:
    """Segments, layouts and merging of the GPU's paths. A prompt and a completion of one token: no single queries."""
    called = emulated(monkeypatch, kernels, softcap)
    one = pack(torch.tensor([[4]]), [1], torch.tensor([[5]]), [1], [[0]]) if one_token else packed()
    inputs = qkv(one.layout)
    out = shared_prompt_attention(*inputs, one.layout, 0.3, called)
    expected = expected_attention(inputs, one, 0.3, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_bfloat16_attention_is_as_good_as_pytorchs_own() -> None:
    one = packed()
    exact = expected_attention(qkv(one.layout), one, 0.3)
    inputs = [x.detach().bfloat16() for x in qkv(one.layout)]
    ours = shared_prompt_attention(*inputs, one.layout, 0.3).double() - exact
    theirs = expected_attention(inputs, one, 0.3).double() - exact
    assert ours.abs().max() < 2 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:
    """The real kernels: as far from float64 as PyTorch's own attention under a mask, forward and backward."""
    one = packed()
    exact = qkv(one.layout)
    scale, grad = 0.3, torch.randn(1, one.layout.own[-1][1], 6, 8, dtype=torch.float64)
    wanted = expected_attention(exact, one, scale)
    truth = [wanted, *torch.autograd.grad(wanted, exact, grad)]
    found = []
    for function in (shared_prompt_attention, None):
        leaves = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
        device = PackedRow(**{**vars(one), "positions": one.positions.cuda()})
        out = function(*leaves, one.layout, scale) if function else expected_attention(leaves, device, scale)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to("cuda", dtype))])
    for ours, theirs, want in zip(*found, truth, strict=True):
        error, own = ((x.double().cpu() - want).norm() / want.norm() for x in (ours, theirs))
        assert error < 2 * own + torch.finfo(dtype).eps


# ---- models that cannot ---------------------------------------------------------------------------------------------


def mamba() -> Any:
    return tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()


def test_a_model_without_positions_or_attention_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    backends.say_once.cache_clear()
    assert Policy(mamba(), packing="auto").packing is None
    assert "prompts are not shared inside a group: it has layers of other kinds than attention" in caplog.text
    with pytest.raises(ConfigError, match="packing = on cannot be had for this model: it has layers of other kinds"):
        Policy(mamba(), packing="on")
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(Unpackable, match="its forward pass takes no position_ids"):
        packing_of(bloom)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_whose_states_differ_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Positions that are ignored, for one: the trial sees what comes out."""
    model = build("llama").to(dtype)
    assert packing_of(model, dtype).mode == "blocks", "as it is, it passes"
    forward = model.model.forward

    def deaf(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", deaf)
    with pytest.raises(Unpackable, match="its hidden states differ when groups are packed, by"):
        packing_of(model, dtype)


def test_a_model_that_masks_by_the_place_in_the_row_is_refused() -> None:
    config = tf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=16, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(Unpackable, match="a mask of its own"):
        packing_of(tf.GPTNeoForCausalLM(config).eval())


@pytest.mark.parametrize(("capability", "dtype", "size", "fits"), [
    ((9, 0), torch.bfloat16, 128, True), ((9, 0), torch.float32, 128, False), ((7, 5), torch.float16, 128, False),
    ((9, 0), torch.bfloat16, 512, False), ((9, 0), torch.bfloat16, 100, False),
])  # fmt: skip
def test_a_gpu_without_the_kernels_takes_masks(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, size: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert shared_prompt.runs_on(torch.device("cuda"), dtype, size) == fits
    assert not shared_prompt.runs_on(torch.device("mps"), dtype, size)
    model = build("llama")
    model.config.head_dim = size
    assert Packing(model, torch.device("cuda"), dtype).mode == ("blocks" if fits else "masks")


def test_installing_leaves_the_model_as_it_was() -> None:
    model = build("qwen2")
    ids = torch.arange(12)[None] + 3
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    saved = copy.deepcopy(model.config).to_dict()
    assert packing_of(model).mode == "blocks"
    assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, before)
    assert model.config.to_dict() == saved, "nothing of it is written to config.json"
    assert packing_of(model).mode == "blocks", "a second time as the first"
