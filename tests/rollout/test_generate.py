"""Completions of small random models: one batch, per-row temperatures, recorded log-probs, lengths, caches, ranks."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.inputs import SOFTCAP
from transformers.modeling_outputs import CausalLMOutputWithPast

import mdpgrpo_fast
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig
from mdpgrpo_fast.log import say_once
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import completion_logits
from mdpgrpo_fast.rollout import decoding, loop
from mdpgrpo_fast.rollout.generate import Rollout, decode, eos_ids, generate, left_pad, pad_id

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2")
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51], [60, 61, 62, 63], [70]]
TEMPERATURES = [0.3, 0.8, 1.0, 1.7]
NEVER = 2  # an eos that no test prompt's greedy answer meets


@pytest.fixture(scope="module")
def zoo(model_dirs: dict[str, str]) -> dict[str, Any]:
    return {family: load(path)[0] for family, path in model_dirs.items()}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, zoo: dict[str, Any]) -> Any:
    return zoo[request.param]


@pytest.fixture
def llama(zoo: dict[str, Any]) -> Any:
    return zoo["llama"]


def sample(model: Any, prompts: list[list[int]] = PROMPTS, seed: int = 0, **knobs: Any) -> Rollout:
    torch.manual_seed(seed)
    defaults = {"temperature": TEMPERATURES, "eos": [NEVER], "max_new_tokens": 9}
    return generate(model, prompts, **{**defaults, **knobs})


def teacher_forced(model: Any, r: Rollout) -> torch.Tensor:
    """Logits of every completion token from one forward pass over the padded batch, (N, L, V)."""
    with torch.no_grad():
        return completion_logits(model, r.prompt_ids, r.prompt_mask, r.tokens, r.mask)


def truncate(logp: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    """Log-probs after top-k, top-p and min-p, each renormalised, written from their definitions."""
    p = {t: math.exp(v) for t, v in enumerate(logp)}
    order = sorted(p, key=lambda t: -p[t])
    if top_k:
        order = order[:top_k]
    total, held, kept = math.fsum(p[t] for t in order), 0.0, []
    for t in order:
        if held >= top_p:
            break
        kept.append(t)
        held += p[t] / total
    kept = [t for t in kept if p[t] >= min_p * p[order[0]]]
    log_total = math.log(math.fsum(p[t] for t in kept))
    return [v - log_total if t in kept else -math.inf for t, v in enumerate(logp)]


# ---- one batch, temperatures, records -------------------------------------------------------------------------------


def record_forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the ids of every forward pass from here on."""
    shapes: list[tuple[int, int]] = []
    real = model.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", recorded)
    monkeypatch.setattr(model, "generate", None)
    return shapes


def test_one_forward_pass_per_token(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = record_forwards(llama, monkeypatch)
    r = sample(llama)
    assert shapes == [(4, 7)] + [(4, 1)] * 8 and r.tokens.shape == (4, 9), "log-probs cost no second pass"


@pytest.mark.parametrize("repeated", [False, True])
def test_each_prompt_is_prefilled_once(llama: Any, monkeypatch: pytest.MonkeyPatch, repeated: bool) -> None:
    shapes = record_forwards(llama, monkeypatch)
    rows = [p for p in PROMPTS for _ in range(3)]
    given = {"prompts": rows} if repeated else {"num_generations": 3}
    r = sample(llama, temperature=[0.5, 1.0, 2.0] * 4, **given)
    assert shapes == [(4, 7)] + [(12, 1)] * 8
    assert [ids[m].tolist() for ids, m in zip(r.prompt_ids, r.prompt_mask, strict=True)] == rows


def test_slots_are_in_the_right_rows(llama: Any) -> None:
    config = MDPGRPOConfig(num_generations=4)
    rows = [p for p in PROMPTS[:2] for _ in range(4)]
    r = sample(llama, rows, temperature=config.slot_temperatures * 2)
    assert r.temperature.tolist() == pytest.approx([0.1, 0.4, 0.7, 1.0] * 2)
    for i, prompt in enumerate(rows):
        assert r.prompt_ids[i, r.prompt_mask[i]].tolist() == prompt


def test_sampling_logprobs_are_those_of_the_rows_temperature(model: Any) -> None:
    r = sample(model, PROMPTS * 2, temperature=TEMPERATURES * 2)
    logits = teacher_forced(model, r).double()
    expected = (logits / r.temperature[:, None, None]).log_softmax(-1).gather(-1, r.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(r.sampling_logprobs.double()[r.mask], expected[r.mask], rtol=1e-4, atol=2e-4)


def test_policy_logprobs_are_those_of_the_training_forward(model: Any) -> None:
    """At temperature 1, soft-cap included: exactly what `token_loss` will see on the padded batch."""
    r = sample(model, PROMPTS * 2, temperature=TEMPERATURES * 2)
    expected, _ = mdpgrpo_fast.token_logprobs(teacher_forced(model, r), r.tokens)
    torch.testing.assert_close(r.policy_logprobs[r.mask], expected[r.mask], rtol=1e-4, atol=2e-4)
    assert (r.sampling_logprobs - r.policy_logprobs).abs()[r.temperature == 1].max() < 1e-5


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 8, "top_p": 0.7, "min_p": 0.05},
        {"top_k": 1},
        {"top_k": 10_000, "top_p": 1.0},
    ],
    ids=str,
)
def test_truncated_sampling_logprobs(llama: Any, knobs: dict[str, Any]) -> None:
    r = sample(llama, PROMPTS * 2, temperature=TEMPERATURES * 2, **knobs)
    logits = teacher_forced(llama, r).double()
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **knobs}
    for i, tau in enumerate(r.temperature.tolist()):
        for step in range(int(r.lengths[i])):
            logp = truncate((logits[i, step] / tau).log_softmax(-1).tolist(), **full)
            got, token = r.sampling_logprobs[i, step].item(), int(r.tokens[i, step])
            assert got == pytest.approx(logp[token], abs=5e-4), (i, step)
            whole = (logits[i, step] / tau).log_softmax(-1)[token].item()
            assert r.log_kept[i, step].item() == pytest.approx(whole - logp[token], abs=5e-4), (i, step)
    policy = logits.log_softmax(-1).gather(-1, r.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(r.policy_logprobs.double()[r.mask], policy[r.mask], rtol=1e-4, atol=2e-4)


def test_softcap_is_applied_once(zoo: dict[str, Any]) -> None:
    """gemma2 caps in its forward pass: neither the rollout nor the training log-probs may cap again, or not at all."""
    gemma = zoo["gemma2"]
    r = sample(gemma)
    logits = teacher_forced(gemma, r)
    assert logits.abs().max() <= SOFTCAP
    with torch.no_grad():
        out = gemma.model(
            torch.cat([r.prompt_ids, r.tokens], 1),
            attention_mask=torch.cat([r.prompt_mask, r.mask], 1).long(),
            position_ids=(torch.cat([r.prompt_mask, r.mask], 1).long().cumsum(1) - 1).clamp(min=0),
        )
        raw = gemma.lm_head(out.last_hidden_state)[:, r.prompt_ids.shape[1] - 1 : -1]
    assert raw.abs().max() > 2 * SOFTCAP, "this model's logits do need the cap"

    def at(x: torch.Tensor) -> torch.Tensor:
        return x.log_softmax(-1).gather(-1, r.tokens[..., None]).squeeze(-1)

    once = SOFTCAP * torch.tanh(raw / SOFTCAP)
    torch.testing.assert_close(r.policy_logprobs, at(once), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(
        mdpgrpo_fast.token_logprobs(raw, r.tokens, softcap=SOFTCAP)[0], at(once), rtol=1e-5, atol=1e-5
    )
    twice = SOFTCAP * torch.tanh(once / SOFTCAP)
    for wrong in (raw, twice):
        assert (r.policy_logprobs - at(wrong)).abs().max() > 0.1


def test_frequencies_follow_the_rows_temperature(llama: Any) -> None:
    """Chi-square of 2,000 first tokens per temperature, all of them drawn in one call; bound far beyond chance."""
    taus, n = [0.5, 1.0, 2.0], 2000
    r = sample(llama, [[40, 41, 42]] * (3 * n), temperature=taus * n, max_new_tokens=1, seed=1)
    with torch.no_grad():
        logits = llama(torch.tensor([[40, 41, 42]])).logits[0, -1].double()
    for slot, tau in enumerate(taus):
        p = (logits / tau).softmax(-1)
        common = p.topk(12).indices
        counts = torch.bincount(r.tokens[slot::3, 0], minlength=len(p))[common].double()
        expected = p[common] * n
        keep = expected > 5
        observed = torch.cat([counts[keep], (n - counts[keep].sum())[None]])
        expected = torch.cat([expected[keep], (n - expected[keep].sum())[None]])
        chi2 = ((observed - expected) ** 2 / expected.clamp(min=1)).sum().item()
        assert chi2 < 3 * len(observed) + 20, f"temperature {tau}: chi-square {chi2:.1f} over {len(observed)} bins"


def test_the_seed_decides(llama: Any) -> None:
    a, b, c = sample(llama, seed=3), sample(llama, seed=3), sample(llama, seed=4)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.sampling_logprobs, b.sampling_logprobs)
    assert a.tokens.shape != c.tokens.shape or not torch.equal(a.tokens, c.tokens)


# ---- padding --------------------------------------------------------------------------------------------------------


def test_left_pad() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_padding_changes_nothing(model: Any) -> None:
    """trl#3722: each prompt alone, unpadded, gives the same greedy tokens and the same log-probs. gpt2 has absolute
    positions, so a position id that counts padding shows there."""
    together = sample(model, temperature=None)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], temperature=None)
        n = int(alone.lengths[0])
        assert int(together.lengths[i]) == n
        assert together.tokens[i, :n].tolist() == alone.tokens[0, :n].tolist()
        torch.testing.assert_close(together.policy_logprobs[i, :n], alone.policy_logprobs[0, :n], rtol=1e-4, atol=2e-4)
        with torch.no_grad():
            full = model(torch.tensor([prompt + alone.tokens[0, :n].tolist()])).logits[0, len(prompt) - 1 : -1]
        padded = teacher_forced(model, together)[i, :n]
        torch.testing.assert_close(padded, full, rtol=1e-4, atol=2e-3)
        logp = full.log_softmax(-1).gather(-1, alone.tokens[0, :n, None]).squeeze(-1)
        torch.testing.assert_close(alone.policy_logprobs[0, :n], logp, rtol=1e-4, atol=2e-4)


def test_the_pad_is_the_tokenizers_or_the_models(llama: Any) -> None:
    """An id that the model cannot embed is none of them."""
    model = copy.copy(llama)
    model.config = copy.deepcopy(llama.config)
    for config, of_tokenizer, expected in ((5, 7, 7), (5, None, 5), (5, 10**6, 5), (-1, None, None), (None, -1, None)):
        model.config.pad_token_id = config
        assert pad_id(model, SimpleNamespace(pad_token_id=of_tokenizer)) == expected
    model.config.pad_token_id = 5
    for given, expected in ((None, 5), (7, 7)):
        r = sample(model, pad=given)
        assert set(r.prompt_ids[~r.prompt_mask].tolist()) == {expected}
    model.config.pad_token_id = None
    r = sample(model)
    assert set(r.prompt_ids[~r.prompt_mask].tolist()) == {NEVER}


def recurrent_gemma() -> Any:
    """As real checkpoints are: the pad's embedding is 0, and biases are not."""
    sizes = {**ATTENTION, "num_key_value_heads": 1, "attention_window_size": 64, "lru_width": 32}
    blocks = ["recurrent", "recurrent", "attention"]
    model = small(tf.RecurrentGemmaConfig, block_types=blocks, num_hidden_layers=4, tie_word_embeddings=False, **sizes)
    assert not model.model.embed_tokens.weight[model.config.pad_token_id].any(), "padding_idx"
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(x, std=0.3)
    return model


def test_a_model_that_reads_padding_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecurrentGemma's convolution reaches back into padding, whatever the mask and the pad id are."""
    model = recurrent_gemma()
    prompts = [[40, 51, 12, 103, 44, 205, 46, 77][: n + 1] for n in (3, 0, 6, 1, 7, 5, 2, 4)]
    alone = [sample(model, [p], temperature=None, max_new_tokens=12) for p in prompts]
    found = sample(model, prompts, temperature=None, max_new_tokens=12)
    for i, one in enumerate(alone):
        assert found.rows[i] == one.rows[0]
        assert found.prompt_ids[i, found.prompt_mask[i]].tolist() == prompts[i]
        n = int(one.lengths[0])
        torch.testing.assert_close(found.policy_logprobs[i, :n], one.policy_logprobs[0], rtol=1e-4, atol=1e-4)
    assert set(found.prompt_ids[~found.prompt_mask].tolist()) == {0}
    taus = [0.5, 1.0, 1.5] * 8
    sampled = sample(model, prompts, temperature=taus, num_generations=3, eos=list(range(1, 290, 5)), top_p=0.9)
    assert sampled.temperature.tolist() == taus and len(set(sampled.lengths.tolist())) >= 3
    assert (sampled.tokens[~sampled.mask] == 1).all() and (sampled.log_kept[~sampled.mask] == 0).all()
    for i in range(24):
        assert sampled.prompt_ids[i, sampled.prompt_mask[i]].tolist() == prompts[i // 3]
    assert_logprobs_of_full_passes(model, sample(model, prompts, temperature=taus, num_generations=3))
    monkeypatch.setattr("mdpgrpo_fast.rollout.generate.RUN_THROUGH_PADDING", set())
    padded = sample(model, prompts, temperature=None, max_new_tokens=12)
    assert padded.rows != found.rows, "the pad id alone does not do"


def test_prompts_are_kept_as_given(llama: Any) -> None:
    """trl#5242: token ids go in and stay; nothing is decoded and encoded again."""
    odd = [[9, 9, 200, 3, 250], [2, 0, 1]]
    r = sample(llama, odd, temperature=[1.0, 1.0])
    assert [row[m].tolist() for row, m in zip(r.prompt_ids, r.prompt_mask, strict=True)] == odd


def test_greedy_is_argmax(model: Any) -> None:
    r = sample(model, temperature=None, top_k=3, top_p=0.5)
    best = teacher_forced(model, r).argmax(-1)
    assert torch.equal(r.tokens[r.mask], best[r.mask])
    assert (r.temperature == 0).all()
    assert torch.equal(sample(model, temperature=None, seed=9).tokens, r.tokens)
    logp, _ = mdpgrpo_fast.token_logprobs(teacher_forced(model, r), r.tokens)
    torch.testing.assert_close(r.policy_logprobs[r.mask], logp[r.mask], rtol=1e-4, atol=2e-4)


# ---- caches ---------------------------------------------------------------------------------------------------------


def assert_logprobs_of_full_passes(model: Any, r: Rollout, atol: float = 2e-4) -> None:
    """Each row by itself, unpadded and without a cache."""
    for i, n in enumerate(r.lengths.tolist()):
        prompt = r.prompt_ids[i, r.prompt_mask[i]]
        with torch.no_grad():
            full = model(torch.cat([prompt, r.tokens[i, :n]])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        for found, tau in ((r.policy_logprobs, 1.0), (r.sampling_logprobs, r.temperature[i])):
            logp = (full.float() / tau).log_softmax(-1).gather(-1, r.tokens[i, :n, None]).squeeze(-1)
            torch.testing.assert_close(found[i, :n], logp, rtol=1e-4, atol=atol)


def grouped(model: Any, **knobs: Any) -> Rollout:
    """Groups of three, with a fifth of the vocabulary as ends, so that rows leave at different steps."""
    options = {"eos": list(range(1, 290, 5)), "max_new_tokens": 24, "temperature": [0.7, 1.0, 1.5] * 4}
    r = sample(model, num_generations=3, **{**options, **knobs})
    assert len(set(r.lengths.tolist())) >= 3
    return r


@pytest.mark.parametrize("block", [1, 3, 128])
def test_rows_share_prompts_grow_and_leave(model: Any, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """gemma2's window of 8 is passed, with and without padding, and buffers of every size are filled and replaced."""
    monkeypatch.setattr(decoding, "BLOCK", block)
    assert_logprobs_of_full_passes(model, grouped(model))
    assert_logprobs_of_full_passes(model, grouped(model, prompts=[[40, 41], [50, 51], [60, 61], [70, 71]], seed=1))


def test_the_cache_is_written_in_place(zoo: dict[str, Any]) -> None:
    model = zoo["gemma2"]
    decoder = decoding.Decoder(
        model, torch.tensor([[40, 41, 42]]), torch.ones(1, 3, dtype=torch.bool), torch.zeros(2).long()
    )
    with torch.no_grad():
        decoder.prefill()
        decoder.share()
        decoder.step(torch.tensor([50, 51]))
        layers = decoder.cache.layers
        assert {type(x) for x in layers} == {decoding.InPlaceLayer, decoding.InPlaceSlidingWindowLayer}
        before = [x.buffers[0].data_ptr() for x in layers]
        for t in range(20):
            decoder.step(torch.tensor([60 + t, 80 + t]))
        assert [x.buffers[0].data_ptr() for x in layers] == before
        assert sorted(x.keys.shape[2] for x in layers) == [7, 24], "a window of 8 keeps 7, full attention all"


def small(config: Any, **sizes: Any) -> Any:
    torch.manual_seed(3)
    common = {"vocab_size": 290, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return tf.AutoModelForCausalLM.from_config(config(**{**common, **tokens, **sizes})).eval()


MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("MambaConfig", {"state_size": 4}),
        ("Lfm2Config", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
        ("BambaConfig", {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]}),
        ("BloomConfig", {"n_head": 4}),
        ("OPTConfig", {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    ],
)
def test_caches_of_other_kinds(kind: str, sizes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Recurrent states alone and beside attention; alibi; positions that come from the mask."""
    model = small(getattr(tf, kind), **sizes)
    assert_logprobs_of_full_passes(model, grouped(model))
    # Without padding: Bamba's cache tells no length, so positions have to be told.
    assert_logprobs_of_full_passes(model, grouped(model, prompts=[[40, 41], [50, 51], [60, 61], [70, 71]], seed=1))
    assert not [r for r in caplog.records if "cache" in r.message]


def test_minimax_decodes_unpadded_and_keeps_its_rows() -> None:
    """Its linear layers apply the mask of padding to their state at each step, and their cache knows no other rows."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}
    model = small(tf.MiniMaxConfig, **ATTENTION, **kinds)
    assert_logprobs_of_full_passes(model, grouped(model))


def test_a_model_without_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    """RecurrentGemma keeps its states in its modules, where rows cannot share them."""
    sizes = {**ATTENTION, "num_key_value_heads": 1, "attention_window_size": 64, "lru_width": 32}
    model = small(tf.RecurrentGemmaConfig, block_types=["recurrent", "attention"], **sizes)
    say_once.cache_clear()
    assert_logprobs_of_full_passes(model, grouped(model, prompts=[[40, 41], [50, 51], [60, 61], [70, 71]]))
    assert [r.message for r in caplog.records if "returns no cache" in r.message]


def test_a_cache_that_cannot_be_shared_out(
    llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(tf.Cache, "reorder_cache")
    say_once.cache_clear()
    shapes = record_forwards(llama, monkeypatch)
    r = grouped(llama)
    monkeypatch.undo()
    assert shapes == [(4, 7), (12, 7)] + [(12, 1)] * (r.tokens.shape[1] - 1), "no row leaves"
    assert_logprobs_of_full_passes(llama, r)
    assert [x.message for x in caplog.records if "each row is prefilled by itself" in x.message]


def test_padding_needs_an_attention_mask(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama.forward
    monkeypatch.setattr(llama, "forward", lambda input_ids, past_key_values=None: real(input_ids, past_key_values))
    with pytest.raises(ValueError, match="prompts must be of one length: LlamaForCausalLM takes no attention mask"):
        sample(llama)


def test_peft(model_dirs: dict[str, str], peer: Any) -> None:
    peft = peer("peft")
    adapted = peft.get_peft_model(load(model_dirs["llama"])[0], peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for name, x in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.5)
    r = grouped(adapted.eval())
    assert_logprobs_of_full_passes(adapted, r)
    with adapted.disable_adapter():
        assert not torch.equal(grouped(adapted).tokens, r.tokens), "the adapter was in use"


def test_peft_prompts_are_refused(model_dirs: dict[str, str], peer: Any) -> None:
    peft = peer("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = peft.get_peft_model(load(model_dirs["llama"])[0], config)
    with pytest.raises(ValueError, match="model must not be a PeftModel of a prompt; got"):
        sample(tuned)


def test_bfloat16(model_dirs: dict[str, str]) -> None:
    model = load(model_dirs["llama"], "bfloat16")[0].eval()
    assert_logprobs_of_full_passes(model, grouped(model), atol=0.5)


def test_logits_of_nan_are_refused(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama.model.norm._parameters, "weight", torch.nn.Parameter(torch.full((32,), torch.nan)))
    for taus in (TEMPERATURES, None):
        with pytest.raises(FloatingPointError, match="the model's logits must be finite; those of row 0 are not"):
            sample(llama, temperature=taus)


# ---- lengths and ends -----------------------------------------------------------------------------------------------


class ScriptedCache:
    """Which prompts the rows in the batch are of, and how far they are."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.step = rows, 0

    def reorder_cache(self, index: torch.Tensor) -> None:
        self.rows = self.rows[index]


class Scripted(tf.LlamaForCausalLM):
    """A model whose most likely tokens are planned: plan[prompt][step]."""

    def forward(self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        cache = ScriptedCache(torch.arange(len(input_ids))) if past_key_values is None else past_key_values
        assert len(cache.rows) == len(input_ids)
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        planned = [self.plan[row][min(cache.step, len(self.plan[row]) - 1)] for row in cache.rows.tolist()]
        logits[range(len(planned)), 0, planned] = 200.0
        cache.step += 1
        self.shapes.append(tuple(input_ids.shape))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


@pytest.fixture
def scripted(model_dirs: dict[str, str]) -> Any:
    model = Scripted.from_pretrained(model_dirs["llama"])

    def play(plan: list[list[int]], eos: list[int], limit: int = 5, greedy: bool = False, **knobs: Any) -> Rollout:
        model.plan, model.shapes = plan, []
        taus = None if greedy else [0.5] * len(plan) * knobs.get("num_generations", 1)
        prompts = [[4, 5], [6], [7, 8, 9]][: len(plan)]
        return generate(model, prompts, temperature=taus, eos=eos, max_new_tokens=limit, **knobs)

    play.model = model
    return play


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    ("plan", "eos", "lengths", "finished"),
    [
        # Two eos ids, the second of them drawn first; one row ends by neither.
        ([[10, 21], [20], [10, 11, 12, 13, 14]], [20, 21], [2, 1, 5], [True, True, False]),
        # eos as the last token allowed is finished, not cut.
        ([[10, 11, 12, 13, 20], [10, 11, 12, 13, 14], [20]], [20], [5, 5, 1], [True, False, True]),
        # All finish early: the batch is as wide as the longest.
        ([[20], [10, 20], [10, 11, 20]], [20], [1, 2, 3], [True, True, True]),
        ([[20], [20], [20]], [20], [1, 1, 1], [True, True, True]),
        # None finishes.
        ([[10], [11], [12]], [20], [5, 5, 5], [False, False, False]),
    ],
)
def test_lengths_and_ends(scripted: Any, greedy: bool, plan: Any, eos: Any, lengths: Any, finished: Any) -> None:
    """trl#4970, trl#7039: pad is an eos here, and there are several; lengths are those of the drawing."""
    r = scripted(plan, eos, greedy=greedy)
    assert r.lengths.tolist() == lengths and r.finished.tolist() == finished
    width = max(lengths)
    recorded = (r.sampling_logprobs, r.policy_logprobs, r.log_kept)
    assert {x.shape for x in (r.tokens, r.mask, *recorded)} == {(3, width)}
    assert all(x[~r.mask].eq(0).all() for x in recorded) and not r.log_kept.any()
    assert r.mask.tolist() == [[t < n for t in range(width)] for n in lengths]
    for row, planned, n in zip(r.tokens.tolist(), plan, lengths, strict=True):
        assert row[:n] == [planned[min(t, len(planned) - 1)] for t in range(n)]
        assert all(t == eos[0] for t in row[n:])
    assert r.policy_logprobs[r.mask].abs().max() < 1e-5, "each planned token was certain"


def test_finished_rows_leave(scripted: Any) -> None:
    scripted([[20], [10, 20], [10, 11, 12, 13, 20]], [20], num_generations=2)
    assert scripted.model.shapes == [(3, 3), (4, 1), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("every", [2, 3, 8])
def test_a_late_look_changes_nothing(scripted: Any, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """On a GPU finished rows are looked for now and then; what they draw meanwhile does not count."""
    play = [[10, 20], [10, 11, 12, 20], [10, 11, 12, 13, 14]]
    now = scripted(play, [20], limit=7)
    monkeypatch.setitem(loop.CHECK_EVERY, "cpu", every)
    late = scripted(play, [20], limit=7)
    for name in ("tokens", "lengths", "finished", "mask"):
        assert torch.equal(getattr(late, name), getattr(now, name)), name
    assert (late.policy_logprobs[~late.mask] == 0).all() and late.policy_logprobs.abs().max() < 1e-5


def test_limit_of_one_token(scripted: Any) -> None:
    r = scripted([[20], [10]], [20], limit=1)
    assert r.lengths.tolist() == [1, 1] and r.finished.tolist() == [True, False]


def test_decode_ends_at_the_recorded_length(scripted: Any, tokenizer: Any) -> None:
    sea, wind = (tokenizer(" sea and the wind" if i else " three short").input_ids for i in range(2))
    end = tokenizer.eos_token_id
    r = scripted([[*sea, end], [*wind, end], [end]], [end], limit=40)
    assert decode(r, tokenizer) == [" three short", " sea and the wind", ""]


def test_decode_keeps_what_looks_like_padding(tokenizer: Any) -> None:
    """The mask is from lengths: a token equal to pad inside a completion stays one of its tokens."""
    word = tokenizer(" sea").input_ids
    row = torch.tensor([[*word, *word, *word]])
    zeros, n = torch.zeros(1, row.shape[1]), torch.tensor([2 * len(word)])
    r = Rollout(row, row > 0, row, n, n > 0, n.float(), zeros, zeros, zeros, zeros)
    assert decode(r, tokenizer) == [" sea sea"]
    assert r.mask.sum() == 2 * len(word)


def test_eos_ids_come_from_everywhere(llama: Any, tokenizer: Any) -> None:
    model = copy.copy(llama)
    model.config, model.generation_config = copy.deepcopy(llama.config), copy.deepcopy(llama.generation_config)
    model.config.eos_token_id, model.generation_config.eos_token_id = 0, [2, 9]
    assert eos_ids(model, tokenizer) == [0, 1, 2], "9 is an ordinary token: a class's default id, say"
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        eos_ids(model, bare)


# ---- the model's own settings ---------------------------------------------------------------------------------------

LOUD = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "temperature": 9.0,
    "do_sample": False,
    "min_new_tokens": 8,
    "max_length": 3,
    "suppress_tokens": [10, 11, 12],
    "bad_words_ids": [[13]],
    "num_beams": 1,
    "eos_token_id": [50, 51, 52, 53],
}


def test_generation_settings_do_not_reach_sampling(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, greedy = sample(llama), sample(llama, temperature=None)
    loud = tf.GenerationConfig(**LOUD)
    before = loud.to_dict()
    monkeypatch.setattr(llama, "generation_config", loud)
    again, again_greedy = sample(llama), sample(llama, temperature=None)
    assert llama.generation_config is loud and loud.to_dict() == before
    for a, b in ((plain, again), (greedy, again_greedy)):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
        assert torch.equal(a.sampling_logprobs, b.sampling_logprobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"temperature": [1.0]},
            r"temperature must be None \(greedy\) or one number above 0 for each of the 4 rows",
        ),
        ({"temperature": [1.0, 0.0, 1.0, 1.0]}, r"temperature must be .*; got \[1.0, 0.0, 1.0, 1.0\]"),
        ({"temperature": [1.0, 1.0, math.nan, 1.0]}, r"temperature must be .*; got \[1.0, 1.0, nan, 1.0\]"),
        ({"num_generations": 0}, "num_generations must be at least 1; got 0"),
        ({"num_generations": 2}, r"temperature must be .* for each of the 8 rows"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"prompts": []}, r"prompts must be lists of token ids, at least one and none empty; got no row"),
        ({"prompts": [[1], []], "temperature": [1.0, 1.0]}, r"prompts must be .*; got an empty row 1"),
    ],
)
def test_generate_refuses(llama: Any, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(llama, **knobs)


# ---- on-policy ------------------------------------------------------------------------------------------------------


def test_ratio_is_one_on_policy(model_dirs: dict[str, str]) -> None:
    """per_row has no bias from the temperature."""
    model, _ = load(model_dirs["gpt2"])
    model.eval()
    r = sample(model)
    config = MDPGRPOConfig(num_generations=4, temperature_objective="per_row")
    one, beta = torch.ones(4), torch.zeros(4)
    out = mdpgrpo_fast.token_loss(
        teacher_forced(model, r),
        r.tokens,
        r.mask,
        config,
        advantage=one,
        kl_beta=beta,
        old_logprobs=r.sampling_logprobs,
        temperature=r.temperature,
    )
    torch.testing.assert_close(out.ratio[r.mask], torch.ones(int(r.mask.sum())), rtol=0, atol=1e-3)
    assert out.loss.item() == pytest.approx(-1, abs=1e-3)
