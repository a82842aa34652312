"""Heads of real architectures: found, checked, used without being called; LoRA on them; models that have none."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers.inputs import make_inputs
from helpers.losses import config_for

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.log import say_once
from mdpgrpo_fast.models.heads import UnsupportedHead, effective_weight, find_head
from mdpgrpo_fast.models.policy import Policy

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {  # class prefix, settings
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "phi": ("Phi", {"num_key_value_heads": 4}),  # its head has a bias
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "gpt2": ("GPT2", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(family: str) -> Any:
    import transformers as tf

    prefix, more = ARCHITECTURES[family]
    sizes = {**SIZES, **more}
    if family == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
                 "eos_token_id": 1, "initializer_range": 0.3}  # fmt: skip
    text = "Text" if prefix == "Gemma3" else ""
    config = getattr(tf, f"{prefix}{text}Config")(**sizes)
    torch.manual_seed(1)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    model = getattr(tf, f"{prefix}{head}")(config).eval()
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias, std=0.5)
    return model


def inputs() -> tuple[Any, Any]:
    """Left-padded prompts and right-padded completions, and the batch's knobs."""
    batch = make_inputs(3, lengths=(5, 3, 1, 4), vocab=VOCAB, dtype="float32")
    g = torch.Generator().manual_seed(4)
    prompt_mask = torch.arange(4) >= torch.tensor([0, 2, 1, 3])[:, None]
    prompts = torch.randint(2, VOCAB, (4, 4), generator=g).masked_fill(~prompt_mask, 0)
    batch.kwargs = {"ref_logprobs": torch.full((4, 5), -3.0)}
    return (prompts, prompt_mask, batch.tokens, batch.mask), batch


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_head_path_and_logits_path_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, every statistic and the gradient of every parameter; lm_head is never called."""
    given, batch = inputs()
    found = {}
    for kind in ("logits", "fused"):
        policy = Policy(build(family), kind, workspace_bytes=6 * 4 * VOCAB).eval()
        if kind == "fused":
            monkeypatch.setattr(policy.model.get_output_embeddings(), "forward", None)
        out = policy(given, batch.mask, config_for(), None, **batch.given(), max_completion_length=5, temperature=0.8)
        out.loss.backward()
        found[kind] = out, {n: p.grad for n, p in policy.named_parameters()}
        logprobs = policy.logprobs(given, batch.mask, None, 0.8, "auto")
        torch.testing.assert_close(logprobs, out.logprobs, rtol=1e-5, atol=1e-6)
    (a, grads), (b, fused) = found["logits"], found["fused"]
    assert a.loss != 0 and a.logprobs.std() > 0.1
    for name in ("loss", "logprobs", "entropy", "kl", "ratio", "totals"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-4, atol=2e-5)
    assert grads.keys() == fused.keys()
    for name, g in grads.items():
        assert (g is None) == (fused[name] is None), name
        if g is not None:
            torch.testing.assert_close(fused[name], g, rtol=1e-3, atol=1e-5 * max(1.0, g.abs().max().item()))


def test_settings_of_heads() -> None:
    assert find_head(build("gemma2")).softcap == 5.0 and find_head(build("cohere")).logit_scale == 0.25
    assert find_head(build("granite")).logit_scale == 0.25 and find_head(build("phi")).parameters()[1] is not None
    plain = find_head(build("llama"))
    assert plain.softcap is None and plain.logit_scale == 1.0 and plain.parameters()[1] is None
    half = build("gemma2").bfloat16()
    half.model.train()
    half.model.layers[0].eval()
    modes = [m.training for m in half.modules()]
    assert find_head(half).softcap == 5.0 and modes == [m.training for m in half.modules()], "modes are left alone"


# ---- models without a linear head -----------------------------------------------------------------------------------


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def spoil(kind: str) -> Any:
    model = build("llama")
    if kind == "class":
        model.lm_head = Doubled(32, VOCAB, bias=False)
    elif kind == "after":
        model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    elif kind == "before":
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,), prepend=True)
    return model


SPOILT = {
    "class": "its head is a Doubled, not a linear layer",
    "after": "it does more to its logits than a soft-cap and a scale",
    "before": "its head does not see the last hidden states of its body",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_other_heads_fall_back_to_logits_and_say_so_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    model = spoil(kind)
    with pytest.raises(ConfigError, match=f"lm_head = fused cannot be had for this model: {SPOILT[kind]}"):
        Policy(model, "fused")
    given, batch = inputs()
    with caplog.at_level(logging.WARNING, "mdpgrpo_fast"):
        policies = [Policy(model, "auto") for _ in range(2)]
    assert [r.message for r in caplog.records] == [f"the logits are built as a whole: {SPOILT[kind]}"]
    out = [p(given, batch.mask, config_for(), None, **batch.given()).loss for p in policies]
    expected = Policy(model, "logits")(given, batch.mask, config_for(), None, **batch.given()).loss
    assert out[0] == out[1] == expected and policies[0].head is None


def test_a_bare_body_has_no_head() -> None:
    with pytest.raises(UnsupportedHead, match="it has no head apart from its body"):
        find_head(build("llama").model)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def with_lora(peft: Any, model: Any, **more: Any) -> Any:
    torch.manual_seed(2)
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "lm_head"], **more}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what is missing
            torch.nn.init.normal_(p, std=0.3)
    return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["lora", "frozen", "modules_to_save", "two", "off", "merged"])
def test_a_head_under_lora_is_trained_as_through_logits(case: str, peer: Any) -> None:
    """trl#4612, trl#5977: the fused path read the base weight, and the adapter on lm_head learned nothing."""
    peft = peer("peft")
    model = build("llama")
    targets = {"frozen": ["q_proj"], "modules_to_save": ["q_proj"]}.get(case, ["q_proj", "lm_head"])
    more = {"modules_to_save": ["lm_head"]} if case == "modules_to_save" else {}
    wrapped = with_lora(peft, model, target_modules=targets, **more)
    if case == "modules_to_save":
        torch.nn.init.normal_(wrapped.get_output_embeddings().modules_to_save["default"].weight, std=0.3)
    if case == "two":
        wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]))
        torch.nn.init.normal_(wrapped.get_output_embeddings().lora_B["other"].weight, std=0.3)
        wrapped.base_model.set_adapter(["default", "other"])
    if case == "off":
        wrapped.disable_adapter_layers()
    if case == "merged":
        wrapped.merge_adapter()
    given, batch = inputs()
    grads = {}
    for kind in ("logits", "fused"):
        policy = Policy(wrapped, kind, workspace_bytes=6 * 4 * VOCAB).eval()
        wrapped.zero_grad(set_to_none=True)
        out = policy(given, batch.mask, config_for(), None, **batch.given(), max_completion_length=5)
        if case not in ("off", "merged"):
            out.loss.backward()
        grads[kind] = out.loss.detach(), {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    torch.testing.assert_close(grads["fused"][0], grads["logits"][0], rtol=1e-4, atol=1e-5)
    assert grads["fused"][1].keys() == grads["logits"][1].keys()
    for name, g in grads["logits"][1].items():
        torch.testing.assert_close(grads["fused"][1][name], g, rtol=1e-3, atol=1e-5)
    trained = any("lm_head" in name for name in grads["fused"][1])
    assert trained == (case in ("lora", "two", "modules_to_save"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_on_the_head_are_refused(settings: dict[str, Any], peer: Any) -> None:
    wrapped = with_lora(peer("peft"), build("llama"), **settings)
    with pytest.raises(UnsupportedHead, match="its head is under"):
        find_head(wrapped)
    assert Policy(wrapped, "auto").head is None, "trained through its logits then"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_what_comes_before_the_prompt_is_not_lost(kind: str, peer: Any) -> None:
    """Virtual tokens live in peft's wrapper: around it they would have no part in anything, and no gradient."""
    peft = peer("peft")
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedHead, match=r"its head does not see|more to its logits"):
        find_head(peft.get_peft_model(build("llama"), settings))


@pytest.mark.filterwarnings("ignore")
def test_dropout_on_the_head_is_refused_while_training_only(peer: Any) -> None:
    wrapped = with_lora(peer("peft"), build("llama"), lora_dropout=0.1)
    module = wrapped.get_base_model().get_output_embeddings()
    assert effective_weight(module.eval())[0].requires_grad
    with pytest.raises(UnsupportedHead, match="LoRA with dropout"):
        effective_weight(module.train())


def test_quantised_heads_are_refused() -> None:
    class Linear4bit(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Quantised(torch.nn.Parameter):
        pass

    model = build("llama")
    model.lm_head = Linear4bit(32, VOCAB)
    with pytest.raises(UnsupportedHead, match="its head is a Linear4bit, not a linear layer"):
        find_head(model)
    model = build("llama")
    model.lm_head.weight = model.lm_head.weight.data.as_subclass(Quantised)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedHead, match="the weight of its head is a Quantised"):
        find_head(model)


def test_a_copy_has_its_own_head() -> None:
    """The reference is a deep copy: its head must be its own and not the trained one's."""
    policy = Policy(build("llama"), "fused")
    twin = copy.deepcopy(policy)
    assert twin.head is not None and policy.head is not None
    assert twin.head.module is twin.model.lm_head and twin.head.body is twin.model.model
    assert twin.head.parameters()[0] is not policy.head.parameters()[0]
