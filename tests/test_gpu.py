"""What only a GPU can show beyond the tests of the ops, which run there too: sampling, rollout, packing, real steps."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import ROOT, make_model
from helpers.losses import GPU, config_for, error, make_batch, run

import mdpgrpo_fast
from mdpgrpo_fast.config import preset
from mdpgrpo_fast.kernels.triton import tiles
from mdpgrpo_fast.models.packing import pack
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.sampling import sample

pytestmark = GPU


# ---- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", tiles.CANDIDATES, ids=lambda t: "-".join(map(str, t)))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_tile_computes_the_same(tile: tiles.Tile, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles long, more rows than programs: loads ahead of their use, its tail, and rows off 16 bytes."""
    from mdpgrpo_fast.kernels.triton import library

    monkeypatch.setattr(library, "tile_for", lambda vocab, dtype, device: tiles.fit(tile, vocab))
    for vocab in (32768, 32776, 32789):
        batch = make_batch(3, lengths=(300, 257, 300, 9), vocab=vocab, dtype=dtype)
        (got, grad), (want, expected) = (run(name, batch, config_for()) for name in ("triton", "torch"))
        assert error(got.logprobs, want.logprobs.double().cpu(), 1.0) < 1e-3
        assert (got.loss - want.loss).abs() < 1e-3 * want.loss.abs() + 1e-4
        gap = (grad.double() - expected.double()).norm() / expected.double().norm()
        assert gap < (5e-3 if dtype == "bfloat16" else 1e-5), f"V = {vocab}: {gap:.1e}"


def test_loss_compiled_from_hidden_states() -> None:
    hidden = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(500, 64, device="cuda") / 8).bfloat16().requires_grad_()
    tokens = torch.randint(0, 500, (2, 8), device="cuda")
    given = {"advantage": torch.tensor([1.0, -1.0], device="cuda"), "kl_beta": 0.1, "max_completion_length": 8}
    given["ref_logprobs"] = torch.full((2, 8), -6.0, device="cuda")

    config = config_for()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return mdpgrpo_fast.linear_token_loss(h, w, tokens, None, config, **given).loss

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(hidden, weight)
        found.append([value, *torch.autograd.grad(value, (hidden, weight))])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)
    torch._dynamo.reset()


def test_the_linear_loss_with_float32_logits() -> None:
    """Matmuls of bfloat16 into float32 are calls of their own on a GPU."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(3000, 128, device="cuda") / 8).bfloat16().requires_grad_()
    tokens = torch.randint(0, 3000, (2, 300), device="cuda")
    given = {"advantage": torch.tensor([1.0, -1.0], device="cuda"), "kl_beta": 0.1, "max_completion_length": 300}
    given["ref_logprobs"] = torch.full((2, 300), -8.0, device="cuda")
    wanted = mdpgrpo_fast.token_loss(
        hidden.double() @ weight.double().t(), tokens, None, config_for(), backend="torch", **given
    )  # fmt: skip
    expected = torch.autograd.grad(wanted.loss, (hidden, weight))
    for fp32_logits, bytes_ in ((True, 256 << 20), (False, 256 << 20), (True, 3000 * 6 * 128), (False, 3000 * 2 * 256)):
        out = mdpgrpo_fast.linear_token_loss(
            hidden, weight, tokens, None, config_for(), fp32_logits=fp32_logits, workspace_bytes=bytes_, **given
        )  # fmt: skip
        got = torch.autograd.grad(out.loss, (hidden, weight))
        assert (out.logprobs - wanted.logprobs).abs().max() < (1e-4 if fp32_logits else 0.1)
        for a, b in zip(got, expected, strict=True):
            assert (a.double() - b.double()).norm() < 1e-2 * b.double().norm()


# ---- rollout --------------------------------------------------------------------------------------------------------


def exact(logits: torch.Tensor, tau: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Log-probs (V,) in float64."""
    values, order = (logits.double() / tau).log_softmax(0).sort(descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    p = values.masked_fill(~keep, -math.inf).softmax(0)
    keep &= (p.cumsum(0) - p < top_p) & (p >= min_p * p[0])
    return torch.empty_like(values).scatter(0, order, values.masked_fill(~keep, -math.inf)).log_softmax(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}], ids=str
)
def test_what_is_drawn_is_what_the_logprobs_say(knobs: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    draws, tau = 20000, 1.3
    logits = (3 * torch.randn(1, 3001, device="cuda")).to(dtype)
    tokens, got, policy, *_ = sample(logits.expand(draws, -1), torch.full((draws,), tau, device="cuda"), **knobs)
    wanted = exact(logits[0], tau, **knobs)
    at = wanted[tokens]
    # bfloat16 has equals at the borders, of which any may stay.
    assert at.isfinite().double().mean() > (0.95 if dtype == torch.bfloat16 else 0.9999)
    same = at.isfinite()
    assert (got[same].double() - at[same]).abs().max() < (0.1 if dtype == torch.bfloat16 and knobs else 1e-4)
    assert (policy.double() - exact(logits[0], 1.0)[tokens]).abs().max() < 1e-4
    counts, expected = torch.bincount(tokens, minlength=3001).double(), wanted.exp() * draws
    often = expected > 50
    gap = (counts - expected)[often].abs() / expected[often].sqrt()
    assert often.sum() > 5 and gap.max() < 6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_completions_are_those_of_the_model(family: str) -> None:
    model = make_model(family, 300).cuda().eval()
    prompts = [[5, 9, 11, 40], [7, 8], [100, 3, 250, 17, 60, 9]]
    found = generate(model, prompts, temperature=None, eos=[299], max_new_tokens=24)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for t in range(int(found.lengths[row])):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids], device="cuda")).logits[0, -1]
            token = int(found.tokens[row, t])
            assert logits[token] >= logits.max() - 1e-4, f"row {row}, token {t}"
            ids.append(token)


def test_sampled_completions_record_the_logprobs_of_the_model() -> None:
    model = make_model("llama", 300).cuda().eval()
    prompts, taus = [[5, 9, 11, 40], [7, 8]], [0.5, 1.0, 1.5, 2.0] * 2
    torch.manual_seed(0)
    found = generate(model, prompts, temperature=taus, eos=[299], max_new_tokens=40, num_generations=4)
    ids = torch.cat([found.prompt_ids, found.tokens], 1)
    mask = torch.cat([found.prompt_mask, torch.ones_like(found.tokens, dtype=torch.bool)], 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    logits = out.logits[:, found.prompt_ids.shape[1] - 1 : -1].float()
    at = found.tokens[..., None]
    policy = logits.log_softmax(-1).gather(-1, at)[..., 0]
    sampling = (logits / found.temperature[:, None, None]).log_softmax(-1).gather(-1, at)[..., 0]
    assert (found.policy_logprobs - policy)[found.mask].abs().max() < 1e-3
    assert (found.sampling_logprobs - sampling)[found.mask].abs().max() < 1e-3
    torch.manual_seed(0)
    again = generate(model, prompts, temperature=taus, eos=[299], max_new_tokens=40, num_generations=4)
    assert torch.equal(again.tokens, found.tokens), "the same seed draws the same"


# ---- packing --------------------------------------------------------------------------------------------------------


def test_packing_waits_for_nothing() -> None:
    ids, tokens = torch.full((4, 6), 5, device="cuda"), torch.full((4, 3), 7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = pack(ids, [6, 6, 4, 4], tokens, [3, 1, 2, 3], [[0, 1], [2, 3]])
        bounds = packed.layout.bounds(ids.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert packed.ids.tolist()[0] == [5] * 6 + [7] * 4 + [5] * 4 + [7] * 5
    assert bounds[0].tolist() == [0, 6, 9, 10, 14, 16, 19]


# ---- training -------------------------------------------------------------------------------------------------------


def test_packed_bfloat16_is_as_good_as_padded() -> None:
    """Both against float32: the packed gradient is no further off than the padded one."""
    torch.manual_seed(0)
    model = make_model("llama", 300).cuda().eval()
    group, prompt, completion = 4, 40, 24
    ids = torch.randint(3, 300, (1, prompt), device="cuda").expand(group, -1)
    tokens = torch.randint(3, 300, (group, completion), device="cuda")
    prompt_mask, mask = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    packed = pack(ids, [prompt] * group, tokens, [completion] * group, [list(range(group))])
    given = {"advantage": torch.linspace(-1, 1, group, device="cuda"), "kl_beta": 0.0}

    def gradient(dtype: torch.dtype, inputs: Any, mask: Any) -> torch.Tensor:
        policy = Policy(copy.deepcopy(model).to(dtype), packing="on").eval()
        assert policy.packing is not None
        out = policy(inputs, mask, preset("exact", num_generations=group), [completion] * group, **given)
        found = torch.autograd.grad(out.loss, list(policy.model.parameters()))
        return torch.cat([g.flatten().double() for g in found])

    padded = ids, prompt_mask, tokens, mask
    truth = gradient(torch.float32, padded, mask)
    own, got = (gradient(torch.bfloat16, *x) for x in ((padded, mask), (packed, None)))
    gap, allowed = ((x - truth).norm() / truth.norm() for x in (got, own))
    assert gap < 1.5 * allowed + 1e-3, f"{gap:.1e}, padded {allowed:.1e}"


@pytest.mark.parametrize("more", ["", "--dtype bfloat16 --lora", "--lm-head logits"])
def test_the_embedded_default_trains(tmp_path: Path, more: str) -> None:
    command = [sys.executable, "-m", "mdpgrpo_fast.train", "--steps", "3", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, *more.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
