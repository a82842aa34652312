"""What a real vLLM samples, in this process and as a server, against our own sampler and the trainer's forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.vllm_real import answers, reference_logprobs

from mdpgrpo_fast.models.lora import add_adapters, merged
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.sampler import trainer_logprobs, with_policy_logprobs
from mdpgrpo_fast.training.task import Task

TAUS = [0.1, 0.4, 0.7, 1.0, 1.3, 0.05, 1.0, 2.0]
PASSES: dict[str, Any] = {"micro_batch_size": 16, "backend": "auto"}


def draw(engine: Any, task: Task, prompts: int = 8, **knobs: Any) -> Any:
    given = {"num_generations": len(TAUS), "temperature": TAUS * prompts, "max_new_tokens": 48, "seed": 7, **knobs}
    return engine.generate(task.train_ids[:prompts], eos=task.eos, **given)


def greedy(sampler: Any, task: Task, prompts: int = 24) -> list[list[int]]:
    return answers(sampler(task.train_ids[:prompts], temperature=None, eos=task.eos, max_new_tokens=48))


def train_a_little(model: Any, task: Task, steps: int = 3) -> None:
    """Steps of AdamW that make the model say its prompts backwards: another policy, as an update leaves it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for ids in task.train_ids[:steps]:
        row = torch.tensor([ids[::-1]])
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_every_row_is_drawn_and_recorded_at_its_own_temperature(engine: Any, model: Any, task: Task) -> None:
    engine.sync(model.named_parameters(), 1)
    r = draw(engine, task)
    assert r.temperature.tolist() == pytest.approx(TAUS * 8)
    policy = Policy(model)
    with torch.no_grad():
        trainers = trainer_logprobs(r, policy, r.temperature, **PASSES)
        at_one = with_policy_logprobs(r, policy, **PASSES).policy_logprobs
    reference, _ = reference_logprobs(model, r)
    for ours in (trainers, reference):
        assert (ours - r.sampling_logprobs)[r.mask].abs().max() < 1e-3
    ones = r.mask & (r.temperature == 1)[:, None]
    assert (at_one - r.sampling_logprobs)[ones].abs().max() < 1e-3
    assert (at_one - r.sampling_logprobs)[r.mask & ~ones].abs().max() > 0.1, "the other rows had other temperatures"
    # The hotter, the less likely, as the trainer's model has it.
    means = [at_one[i :: len(TAUS)][r.mask[i :: len(TAUS)]].mean().item() for i in (0, 3, 7)]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"min_p": 0.02, "top_k": 40, "top_p": 0.9}], ids=str
)
def test_truncated_rows_are_recorded_over_what_was_kept(engine: Any, model: Any, task: Task, cut: Any) -> None:
    engine.sync(model.named_parameters(), 1)
    r = draw(engine, task, **cut)
    reference, kept = reference_logprobs(model, r, **cut)
    assert (reference - r.sampling_logprobs)[r.mask].abs().max() < 1e-3
    full, every = reference_logprobs(model, r)
    assert (kept < every)[r.mask].any() and (full - r.sampling_logprobs)[r.mask].min() < -0.01
    assert r.log_kept[r.mask].isnan().all(), "vLLM does not tell how much it kept"


def test_a_seed_repeats_its_rows(engine: Any, model: Any, task: Task) -> None:
    engine.sync(model.named_parameters(), 1)
    first, again, other = (answers(draw(engine, task, 2, seed=seed)) for seed in (3, 3, 4))
    assert first == again and first != other


def test_an_update_reaches_the_sampler(engine: Any, model: Any, task: Task) -> None:
    """Greedy answers are the trainer's own before and after, and differ: a sync that did nothing would be seen."""
    found = []
    for version in (1, 2, 3):
        engine.sync(model.named_parameters(), version)
        ours = greedy(lambda *a, **k: generate(model, *a, **k), task)
        assert greedy(engine.generate, task) == ours
        found.append(ours)
        train_a_little(model, task)
    before, after, last = found
    assert before != after != last, "the update must change the answers, or nothing is shown"
    # What was computed of a prompt with old weights is forgotten: each prompt above came a second and a third time.
    r = draw(engine, task)
    assert (reference_logprobs(model, r)[0] - r.sampling_logprobs)[r.mask].abs().max() > 1e-2, "one update behind"


def test_merged_lora_reaches_the_sampler(engine: Any, model: Any, task: Task) -> None:
    """As the trainer gives it: adapters merged into weights that stay as they are."""
    wrapped = add_adapters(model, r=8, alpha=16.0, dropout=0.0, target_modules=["auto"])
    plain = None
    for version in (1, 2):
        named = dict(wrapped.named_parameters(remove_duplicate=False))
        engine.sync(merged(wrapped, named), version)
        ours = greedy(lambda *a, **k: generate(wrapped, *a, **k), task)
        assert greedy(engine.generate, task) == ours
        assert plain != ours, "the adapter must change the answers"
        plain = ours
        train_a_little(wrapped, task)


def test_weights_of_another_model_are_refused_by_name(engine: Any, model: Any, task: Task) -> None:
    named = dict(model.named_parameters())
    with pytest.raises(RolloutError, match=r"model\.norm\.weight"):
        engine.sync(((k, v) for k, v in named.items() if k != "model.norm.weight"), 1)
    engine.sync(named.items(), 2)
    assert greedy(engine.generate, task, 4) == greedy(lambda *a, **k: generate(model, *a, **k), task, 4)
