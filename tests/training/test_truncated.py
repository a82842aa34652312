"""Log-probs of training over the tokens that truncated sampling kept, from the sampler to the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import make_trainer, rows, run_small

from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, TrainConfig, preset
from mdpgrpo_fast.models.packing import PackedRow
from mdpgrpo_fast.models.policy import completion_logits
from mdpgrpo_fast.rewards import Score
from mdpgrpo_fast.training.batch import Batch
from mdpgrpo_fast.training.before.checks import check_truncated
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.update.updates import Passes
from mdpgrpo_fast.training.update.weights import log_ratio

CUT = preset(
    "exact", num_generations=4, temperatures=[0.5, 1.0], top_k=40, top_p=0.8, truncated_logprobs=True,
    sampler_correction=True,
)  # fmt: skip


def collected(trainer: TrainingLoop) -> Batch:
    rollout = trainer.collector.sample([0, 1])
    batch = trainer.collector.assemble(rollout, [0, 1], [""] * 8, [Score(i / 8, {}, None) for i in range(8)])
    trainer.collector.weigh(batch)
    return batch


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("packing", ["on", "off"])
def test_training_has_the_log_probs_that_tokens_were_drawn_with(tmp_path: Path, packing: str, backend: str) -> None:
    trainer = make_trainer(tmp_path, CUT, packing=packing, backend=backend)
    torch.manual_seed(0)
    batch = collected(trainer)
    own, floor = batch.mask, batch.rollout.logit_floor
    assert floor[own].isfinite().all() and (batch.rollout.log_kept[own] < 0).all()
    assert batch.weight is not None
    torch.testing.assert_close(batch.weight[own], torch.ones_like(batch.weight[own]), atol=1e-3, rtol=0)
    micro_batches = trainer.updates.micro_batches(batch)
    found, old = torch.zeros_like(floor), torch.zeros_like(floor)
    trainer.updates.old_logprobs([micro_batches], old, Passes())
    for m in micro_batches:
        out = trainer.policy(m.inputs, m.mask, CUT, m.lengths, max_completion_length=8, backend=backend, **m.objective)
        assert (out.ratio == 1).all()
        m.put(out.logprobs, found)
        if not isinstance(m.inputs, PackedRow):
            z, tokens = completion_logits(trainer.lm, *m.inputs).float(), m.inputs[2]
            tau, kept = m.objective["temperature"][:, None], z >= m.objective["logit_floor"][..., None]
            assert (kept.sum(-1)[m.mask] <= 40).all()
            # Of the whole support, by the difference of each token's logit to that of the drawn one.
            total = (z / tau[..., None]).masked_fill(~kept, -torch.inf).logsumexp(-1)
            whole = total - z.gather(-1, tokens[..., None]).squeeze(-1) / tau + out.logprobs
            torch.testing.assert_close(whole[m.mask].exp(), torch.ones_like(whole[m.mask]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[own], batch.rollout.sampling_logprobs[own], atol=1e-4, rtol=0)
    torch.testing.assert_close(old[own], found[own], atol=1e-6, rtol=0)


def test_the_kl_is_of_all_tokens(tmp_path: Path) -> None:
    """So it is 0 where the policy is the reference, and there is an entropy of the tokens that were kept."""
    (cut,) = rows(run_small(tmp_path, CUT, "cut", steps=1, backend="cpu"))
    (whole,) = rows(run_small(tmp_path, replace(CUT, truncated_logprobs=False), "whole", steps=1, backend="cpu"))
    assert abs(cut["kl"]) < 1e-5 and cut["entropy"] < whole["entropy"]


def test_nothing_is_handed_on_where_nothing_is_cut(tmp_path: Path) -> None:
    batch = collected(make_trainer(tmp_path, replace(CUT, top_k=0, top_p=1.0), backend="torch"))
    assert batch.logit_floor is None and (batch.rollout.logit_floor[batch.mask] == -torch.inf).all()


def test_log_probs_over_the_support_are_the_samplers() -> None:
    x = torch.tensor([[-1.0, -2.0]])
    rollout: Any = SimpleNamespace(sampling_logprobs=x, log_kept=torch.tensor([[-0.25, torch.nan]]))
    torch.testing.assert_close(log_ratio(rollout, x + 0.5, truncated=True), torch.full((1, 2), 0.5))


def test_what_does_not_tell_its_support_is_refused() -> None:
    for objective in ("paper", "corrected"):
        with pytest.raises(ConfigError, match="truncated_logprobs needs temperature_objective = per_row"):
            MDPGRPOConfig(truncated_logprobs=True, temperature_objective=objective)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="truncated_logprobs needs rollout = transformers: vLLM does not tell"):
        check_truncated(TrainConfig(rollout="vllm"), CUT)
    for knobs in ({"repetition_penalty": 1.2}, {"generation_kwargs": ["no_repeat_ngram_size=3"]}):
        with pytest.raises(ConfigError, match="truncated_logprobs needs a sampler without repetition_penalty"):
            check_truncated(TrainConfig(**knobs), CUT)  # type: ignore[arg-type]
    check_truncated(TrainConfig(repetition_penalty=1.2), replace(CUT, truncated_logprobs=False))


@pytest.mark.parametrize("cut", [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_vllm_does_not_tell_the_mass_that_a_weight_per_row_needs(cut: dict[str, Any]) -> None:
    method, vllm = preset("exact", sampler_correction=True, **cut), TrainConfig(rollout="vllm")
    with pytest.raises(ConfigError, match="sampler_correction with temperature_objective = per_row needs rollout"):
        check_truncated(vllm, method)
    check_truncated(TrainConfig(), method)
    check_truncated(vllm, replace(method, temperature_objective="corrected"))
    check_truncated(vllm, replace(method, top_k=0, top_p=1.0, min_p=0.0))
    check_truncated(vllm, replace(method, sampler_correction=False))
