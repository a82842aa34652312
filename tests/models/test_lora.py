"""LoRA: what is trained, what the reference is, what is exported. Checkpointing: same gradients from less memory."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import make_inputs, make_model
from helpers.losses import config_for
from helpers.ranks import spawn

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.models import lora
from mdpgrpo_fast.models.adapters import adapter_values, with_adapter_values
from mdpgrpo_fast.models.blocks import enable_checkpointing
from mdpgrpo_fast.models.heads import UnsupportedHead, find_head
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rollout.generate import generate

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
]

VOCAB = 300
PAPER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2")  # the last two tie their heads; gpt2 transposes its weights


@pytest.fixture(autouse=True)
def _peft(peer: Callable[[str], Any]) -> None:
    peer("peft")


def adapted(model: Any, targets: list[str] | None = None, *, std: float = 0.3, r: int = 4, dropout: float = 0.0) -> Any:
    """With adapters as they may be after training: B is 0 at first, which would hide what is missing."""
    torch.manual_seed(2)
    wrapped = lora.add_adapters(model, r=r, alpha=2 * r, dropout=dropout, target_modules=targets or ["auto"])
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)
    return wrapped


def inputs() -> tuple[Any, Any]:
    """Left-padded prompts and right-padded completions, and the rest of a batch."""
    batch = make_inputs(3, lengths=(5, 3, 1, 4), vocab=VOCAB, dtype="float32")
    g = torch.Generator().manual_seed(4)
    prompt_mask = torch.arange(4) >= torch.tensor([0, 2, 1, 3])[:, None]
    prompts = torch.randint(2, VOCAB, (4, 4), generator=g).masked_fill(~prompt_mask, 0)
    batch.kwargs = {"ref_logprobs": torch.full((4, 5), -3.0)}
    return (prompts, prompt_mask, batch.tokens, batch.mask), batch


def loss(policy: Policy) -> torch.Tensor:
    given, batch = inputs()
    return policy(given, batch.mask, config_for(), None, **batch.given(), max_completion_length=5).loss


def logprobs(model: Any, lm_head: str = "fused") -> torch.Tensor:
    given, batch = inputs()
    return Policy(model, lm_head).eval().logprobs(given, batch.mask, None, 1.0, "auto")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same_state(model: Any, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in found.items())


def adapters(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_model_and_reaches_every_adapter_and_nothing_else(family: str) -> None:
    model = make_model(family, VOCAB)
    before = logprobs(model)
    wrapped = lora.add_adapters(model, r=32, alpha=64, dropout=0.5, target_modules=["auto"])
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else PAPER
    assert {name.rpartition(".")[2] for name in adapters(wrapped)} == set(targets)
    assert len(adapters(wrapped)) == 2 * (4 if family == "gpt2" else 7) and not wrapped.training
    assert all(m.scaling == {"default": 2.0} for m in adapters(wrapped).values())
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in wrapped.named_parameters() if ".lora_" in name}
    # No dropout either: the mode is the model's.
    assert torch.equal(logprobs(wrapped), before)
    wrapped = adapted(make_model(family, VOCAB))
    loss(Policy(wrapped, "fused").eval()).backward()
    reached = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == trained


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_without_adapters(family: str) -> None:
    model = make_model(family, VOCAB)
    before = logprobs(model)
    wrapped = adapted(model, None if family == "gpt2" else [*PAPER, "lm_head"])
    policy = Policy(wrapped, "fused").eval()
    given, batch = inputs()
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]

    def now() -> torch.Tensor:
        return policy.logprobs(given, batch.mask, None, 1.0, "auto")

    with_adapters = now()
    assert (with_adapters - before).abs().max() > 0.1
    with lora.without_adapters(wrapped):
        assert torch.equal(now(), before)
    assert torch.equal(now(), with_adapters)
    with pytest.raises(KeyboardInterrupt), lora.without_adapters(wrapped):
        raise KeyboardInterrupt
    assert torch.equal(now(), with_adapters)
    assert trained == [name for name, p in wrapped.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_merged_weights(family: str, head: bool, tokenizer: Any, tmp_path: Path) -> None:
    """dL/dB = s · dL/dW Aᵀ and dL/dA = s · Bᵀ dL/dW, with dL/dW of the exported model."""
    from transformers import AutoModelForCausalLM

    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else PAPER
    wrapped = adapted(make_model(family, VOCAB), targets + ["lm_head"] * head)
    loss(Policy(wrapped, "fused").eval()).backward()
    lora.save_merged(wrapped, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loss(Policy(plain, "fused").eval()).backward()
    assert ("lm_head" in adapters(wrapped)) == head
    for name, m in adapters(wrapped).items():
        dw = plain.get_submodule(name).weight.grad
        dw = dw.T if m.fan_in_fan_out else dw
        a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
        for got, expected in ((b.grad, 2 * dw @ a.T), (a.grad, 2 * b.T @ dw)):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_adapters_are_float32_over_bfloat16() -> None:
    model = make_model("llama", VOCAB).bfloat16()
    before = logprobs(model)
    wrapped = adapted(model)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {torch.bfloat16}
    loss(Policy(wrapped, "fused").eval()).backward()
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    with lora.without_adapters(wrapped):
        assert torch.equal(logprobs(wrapped), before)


def test_an_adapted_head_of_16_bits_goes_through_its_logits() -> None:
    """The sum W + s · B A in bfloat16 would be W again: in the policy, but not in generation, which never forms it."""
    wrapped = adapted(make_model("llama", VOCAB).bfloat16(), ["lm_head"], std=1e-4)
    head = wrapped.get_base_model().lm_head
    delta = head.get_delta_weight("default").detach()
    kept = (head.base_layer.weight + delta.bfloat16()).float() - head.base_layer.weight.float()
    assert (kept - delta).norm() > 0.5 * delta.norm()
    with pytest.raises(UnsupportedHead, match=r"LoRA over torch\.bfloat16 weights, in which the sum rounds it away"):
        find_head(wrapped)
    policy = Policy(wrapped, "auto").eval()
    assert policy.head is None
    loss(policy).backward()
    assert head.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "query"],
            "'query' is no linear layer of this model; it has down_proj, gate_proj, .*lm_head, o_proj",
        ),
        (["embed_tokens"], "'embed_tokens' is no linear layer of this model"),
        (["proj"], "'proj' is no linear layer"),
        (["auto", "q_proj"], "'auto' is no linear layer"),
        ([], r"\[\] is no linear layer of this model"),
    ],
)
def test_a_target_that_is_not_there_is_named(targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"lora_target_modules.*({message})"):
        lora.add_adapters(make_model("llama", VOCAB), r=4, alpha=8, dropout=0.0, target_modules=targets)


def test_adapters_come_once() -> None:
    wrapped = adapted(make_model("llama", VOCAB))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ConfigError, match="lora needs a model without adapters"):
            lora.add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=["auto"])


@pytest.mark.parametrize("problem", ["missing", "unfit"])
def test_without_a_peft_that_fits_one_line_says_so(
    problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if problem == "missing":
        monkeypatch.setitem(sys.modules, "peft", None)
    else:
        (tmp_path / "peft.py").write_text("from transformers import HybridCacheOfOldTimes")
        monkeypatch.delitem(sys.modules, "peft")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"lora needs the package peft: pip install .* \(in a version that fits transfo"
    ) as e:
        lora.add_adapters(make_model("llama", VOCAB), r=4, alpha=8, dropout=0.0, target_modules=["auto"])
    assert "\n" not in str(e.value) and ("HybridCache" in str(e.value) or problem == "missing")


def test_a_model_without_adapters_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama", VOCAB)
    with pytest.raises(TypeError, match=r"without_adapters: model must be the PeftModel .*; got LlamaForCausalLM"):
        lora.without_adapters(model).__enter__()
    with pytest.raises(TypeError, match="save_merged: model must be the PeftModel"):
        lora.save_merged(model, tokenizer, tmp_path)
    with pytest.raises(TypeError, match="save_adapters: model must be the PeftModel"):
        lora.save_adapters(Policy(adapted(model)), tmp_path)


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_policy_without_peft(
    family: str, head: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    wrapped = adapted(make_model(family, VOCAB), targets + ["lm_head"] * head)
    config = wrapped.get_base_model().config
    before, tied, expected = state_of(wrapped), config.tie_word_embeddings, logprobs(wrapped)
    lora.save_merged(wrapped, tokenizer, tmp_path)
    assert same_state(wrapped, before) and torch.equal(logprobs(wrapped), expected)
    assert config.tie_word_embeddings == tied == (family in ("gemma2", "gpt2"))
    monkeypatch.setitem(sys.modules, "peft", None)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(plain) is type(wrapped.get_base_model())
    assert plain.config.tie_word_embeddings == (tied and not head)
    torch.testing.assert_close(logprobs(plain.eval()), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "adapter_config.json").exists()


def test_merged_bfloat16_is_rounded_once(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wrapped = adapted(make_model("llama", VOCAB).bfloat16(), ["q_proj"], std=1e-3)
    before = state_of(wrapped)
    lora.save_merged(wrapped, tokenizer, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.bfloat16} and same_state(wrapped, before)
    for name, m in adapters(wrapped).items():
        w, a, b = (x.weight.double() for x in (m.base_layer, m.lora_A["default"], m.lora_B["default"]))
        exact = w + 2 * b @ a
        half_a_unit = 2.0 ** (exact.abs().log2().floor() - 8)
        merged = found[f"{name}.weight"].double()
        assert bool(((merged - exact).abs() <= half_a_unit * 1.001).all()) and not torch.equal(merged, w)
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], wrapped.get_base_model().model.layers[0].mlp.up_proj.weight
    )


def test_a_gathered_state_dict_is_what_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wrapped = adapted(make_model("gemma2", VOCAB))
    expected, state = logprobs(wrapped), state_of(wrapped)
    with torch.no_grad():
        for p in wrapped.parameters():
            p.fill_(torch.nan)
    lora.save_merged(wrapped, tokenizer, tmp_path / "merged", state)
    lora.save_adapters(wrapped, tmp_path / "adapters", state)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logprobs(plain), expected, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(make_model("gemma2", VOCAB), tmp_path / "adapters").eval()
    assert torch.equal(logprobs(again), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_read_back_by_peft(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    targets = ["c_attn", "lm_head"] if family == "gpt2" else [*PAPER, "lm_head"]
    wrapped = adapted(make_model(family, VOCAB), targets)
    lora.save_adapters(wrapped, tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8) and set(settings["target_modules"]) == set(targets)
    again = PeftModel.from_pretrained(make_model(family, VOCAB), tmp_path).eval()
    assert torch.equal(logprobs(again), logprobs(wrapped))


@pytest.mark.parametrize("case", ["dora", "bias", "modules_to_save", "two", "merged"])
def test_adapters_of_another_kind_are_not_merged_wrongly(case: str, tokenizer: Any, tmp_path: Path) -> None:
    import peft

    more: dict[str, Any] = {
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
    }.get(case, {})
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], **more)
    wrapped = peft.get_peft_model(make_model("llama", VOCAB), settings)
    if case == "two":
        wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    if case == "merged":
        wrapped.merge_adapter()
    with pytest.raises(ConfigError, match="save_merged takes one plain LoRA that is not merged yet"):
        lora.save_merged(wrapped, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- ranks ----------------------------------------------------------------------------------------------------------


def on_a_rank(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    """Three steps' gradients of a checkpointed model over its reference, against those of one process."""
    model = make_model("llama", VOCAB)
    # With an adapted head: under FSDP the root keeps its own parameters whole after a pass.
    base, wrapped = logprobs(model), adapted(model, [*PAPER, "lm_head"])
    loss(Policy(wrapped, "fused").eval()).backward()
    expected = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    policy_logprobs, merged = logprobs(wrapped), state_of(wrapped)
    wrapped.zero_grad(set_to_none=True)
    enable_checkpointing(wrapped)
    policy: Any = Policy(wrapped, "fused").eval()
    if kind == "ddp":
        policy = torch.nn.parallel.DistributedDataParallel(policy)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers:
            fully_shard(block)
        policy = fully_shard(policy)
    given, batch = inputs()
    nothing = {name: torch.zeros_like(x) for name, x in adapter_values(policy).items()}

    def run() -> Any:
        return policy(given, batch.mask, config_for(), None, **batch.given(), max_completion_length=5)

    same = []
    for _ in range(3):
        with torch.no_grad(), with_adapter_values(policy, nothing):
            same.append(torch.equal(run().logprobs, base))
        with torch.no_grad(), lora.without_adapters(wrapped):
            same.append(torch.equal(run().logprobs, base))
        out = run()
        out.loss.backward()
        same.append(torch.equal(out.logprobs, policy_logprobs))
        grads = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
        same.append(whole.keys() == expected.keys())
        same += [torch.allclose(whole[name], g, rtol=1e-5, atol=1e-6) for name, g in expected.items()]
        wrapped.zero_grad(set_to_none=True)
    state = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in wrapped.state_dict().items()}
    same.append(state.keys() == merged.keys() and all(torch.equal(x, merged[name]) for name, x in state.items()))
    return {"same": same}


def both_kinds(rank: int, ranks: int) -> list[list[bool]]:
    return [on_a_rank(rank, ranks, kind)["same"] for kind in ("ddp", "fsdp2")]


def test_adapters_reference_and_checkpointing_over_two_ranks(tmp_path: Path) -> None:
    for same in itertools.chain(*spawn(both_kinds, 2, tmp_path)):
        assert len(same) > 80 and all(same)


# ---- checkpointing --------------------------------------------------------------------------------------------------


def watched(model: Any) -> tuple[float, dict[str, torch.Tensor], int, list[int]]:
    """Loss, gradients, bytes of the distinct tensors kept for the backward pass, and how often each MLP ran."""
    calls: Counter[str] = Counter()
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = [
        m.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, m in model.named_modules()
        if name.endswith(".mlp")
    ]
    policy = Policy(model, "fused").eval()
    calls.clear()  # the head's check ran them too
    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = loss(policy)
    out.backward()
    for hook in hooks:
        hook.remove()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(n for address, n in kept.items() if address not in weights)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.item(), grads, size, [calls[name] for name in sorted(calls)]


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_computes_again_and_changes_no_gradient(family: str, with_lora: bool) -> None:
    model = make_model(family, VOCAB)  # gpt2 drops out a tenth while training: none of it may come back
    if with_lora:
        model = adapted(model)
    before, grads, size, ran = watched(model)
    enable_checkpointing(model)
    forwards = [m.forward for m in model.modules()]
    enable_checkpointing(model)
    assert forwards == [m.forward for m in model.modules()]
    model.eval()
    after, again, smaller, ran_again = watched(model)
    assert before == after and grads.keys() == again.keys() and len(grads) > 0
    for name, g in grads.items():
        assert torch.equal(g, again[name]), name
    assert ran == [1, 1] and ran_again == [2, 2]
    assert smaller < size / 3
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_keeps_its_cache(family: str) -> None:
    """transformers' own switch drops the cache of a layer in training mode, and what was generated with it."""
    model = make_model(family, VOCAB)
    widths: list[int] = []
    blocks = getattr(model.base_model, "layers", None) or model.base_model.h
    blocks[0].register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))

    def sample() -> Any:
        torch.manual_seed(0)
        return generate(model, [[5, 6, 7], [8]], temperature=[1.0, 0.5], eos=[1], max_new_tokens=6)

    before = sample()
    enable_checkpointing(model)
    widths.clear()
    after = sample()
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.policy_logprobs, after.policy_logprobs)
    assert widths[0] == 3 and set(widths[1:]) == {1}


def test_a_cache_is_filled_once_under_gradients() -> None:
    model = make_model("llama", VOCAB)
    enable_checkpointing(model)
    ids = torch.arange(2, 12).view(2, 5)
    out = model(input_ids=ids, use_cache=True)
    out.logits.logsumexp(-1).sum().backward()
    assert out.past_key_values.get_seq_length() == 5 and model.lm_head.weight.grad.abs().max() > 0


def test_a_copy_computes_its_own_blocks_again() -> None:
    model = make_model("llama", VOCAB)
    enable_checkpointing(model)
    twin = copy.deepcopy(model)
    expected = logprobs(twin)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logprobs(twin), expected) and not torch.equal(logprobs(model), expected)
    _, grads, _, ran = watched(twin)
    assert ran == [2, 2] and grads["model.layers.0.mlp.up_proj.weight"].abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_under_compile() -> None:
    model = adapted(make_model("llama", VOCAB))
    ids = torch.arange(2, 12).view(2, 5)
    grads = []
    for step in range(2):
        if step:
            enable_checkpointing(model)
            torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if step else model
        model.zero_grad(set_to_none=True)
        run(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 28
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=1e-4, atol=1e-5 * g.abs().max().item())


def test_a_model_without_such_layers_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="gradient_checkpointing cannot be had for this model: a Sequential has no"):
        enable_checkpointing(model)
