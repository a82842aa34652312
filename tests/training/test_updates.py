"""Updates of a batch: its parts, the reference that moves, the KL in the reward, the entropy's coefficient, horizon."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import PLAIN, make_trainer, parameters, rows, run_small

from mdpgrpo_fast import reference
from mdpgrpo_fast.config import ConfigError, MDPGRPOConfig, preset
from mdpgrpo_fast.demo import DEMO_DIR
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rewards import Score
from mdpgrpo_fast.training import checkpoint
from mdpgrpo_fast.training.batch import Batch, mini_batches
from mdpgrpo_fast.training.loop import TrainingLoop
from mdpgrpo_fast.training.timing import StageClock
from mdpgrpo_fast.training.update.entropy import EntropyControl
from mdpgrpo_fast.training.update.updates import Passes, Updates

STILL = {"learning_rate": 1e-30}  # an update that moves no weight
KL = preset("grpo", num_generations=4)
PROMPTS = str(DEMO_DIR / "train.jsonl")
IN_REWARD = replace(KL, kl_in="reward", kl_beta_pos=0.1)


def clock() -> StageClock:
    return StageClock(torch.device("cpu"))


def collected(trainer: TrainingLoop, seed: int = 0, rewards: list[float] | None = None) -> Batch:
    """A batch of as many prompts as the run has, with rewards of its own where they are given."""
    torch.manual_seed(seed)
    count = trainer.run.prompts_per_step * trainer.method.num_generations
    found = [Score(r, {}, None) for r in rewards or [i % 3 / 2 for i in range(count)]]
    trainer.collector.scorer = lambda *_, **__: found  # type: ignore[assignment]
    return trainer.collector.collect(list(range(trainer.run.prompts_per_step)), 1, clock())


def move(trainer: TrainingLoop, by: float = 0.02) -> None:
    """The policy is another than it was."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.lm.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator))


# ---- parts of a batch -----------------------------------------------------------------------------------------------


def test_parts_are_whole_groups_each_in_one_of_them() -> None:
    for groups, parts in ((4, 2), (7, 3), (5, 5)):
        found = mini_batches(groups, parts, "42 1 0")
        chosen = [part for part in found if part is not None]
        assert sorted(g for part in chosen for g in part) == list(range(groups))
        assert max(map(len, chosen)) - min(map(len, chosen)) <= 1 and all(part == sorted(part) for part in chosen)
        assert found == mini_batches(groups, parts, "42 1 0"), "the same on every rank"
    assert mini_batches(9, 3, "42 1 0") != mini_batches(9, 3, "42 1 1")
    assert mini_batches(9, 1, "42 1 0") == [None]


@pytest.mark.parametrize("packing", ["on", "off"])
def test_one_part_is_the_batch_and_takes_no_other_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """Without KL one part needs no pass but its own; of two the second's old log-probs are the policy's before."""
    looked: list[int] = []
    logprobs = Policy.logprobs
    monkeypatch.setattr(Policy, "logprobs", lambda self, *args: looked.append(len(args[2])) or logprobs(self, *args))
    knobs: dict[str, Any] = {"prompts_per_step": 4, "packing": packing, "micro_batch_size": 16, "backend": "torch"}
    for parts in (1, 2, 4):
        trainer = make_trainer(tmp_path, PLAIN, str(parts), mini_batches=parts, **knobs)
        batch = collected(trainer)
        looked.clear()
        trainer.updates.apply(batch, 1, clock())
        assert looked == [16 // parts] * (parts - 1)
    (whole,) = trainer.updates.micro_batches(batch)
    (same,) = trainer.updates.micro_batches(batch, list(range(4)))
    assert whole.lengths == same.lengths and whole.objective.keys() == same.objective.keys()
    assert all(torch.equal(x, same.objective[n]) for n, x in whole.objective.items() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_updates_that_move_nothing_see_one_batch_however_it_is_cut(tmp_path: Path, packing: str) -> None:
    """Means over completions: the mean of the parts' losses is that of the whole, and the ratio stays 1."""
    knobs: dict[str, Any] = {"prompts_per_step": 4, "packing": packing, "micro_batch_size": 3, "backend": "torch"}
    found = {}
    for parts in (1, 2, 4):
        trainer = make_trainer(tmp_path, KL, str(parts), mini_batches=parts, updates_per_rollout=2, **STILL, **knobs)
        batch = collected(trainer)
        move(trainer)  # or the KL to the reference would be 0
        found[parts] = trainer.updates.apply(batch, 1, clock())
    for parts in (2, 4):
        for name in ("loss", "kl", "entropy", "ratio_mean", "ratio_max", "clip_low", "kl_clamped"):
            assert found[parts][name] == pytest.approx(found[1][name], abs=2e-6), (parts, name)
    assert found[1]["kl"] > 1e-3 and found[1]["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_later_parts_are_weighed_against_the_policy_before_all_updates(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, PLAIN, prompts_per_step=2, mini_batches=2, updates_per_rollout=2, learning_rate=5e-3, steps=3,
        backend="torch",
    )  # fmt: skip
    batch = collected(trainer, rewards=[0.0, 1.0] * 4)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward_backward, before = trainer.updates.forward_backward, batch.rollout.policy_logprobs

    def watched(micro_batch: Any, old: Any, *rest: Any) -> Any:
        out = forward_backward(micro_batch, old, *rest)
        seen.append((micro_batch.of(before), out.logprobs if old is None else old))
        return out

    trainer.updates.forward_backward = watched  # type: ignore[method-assign]
    row = trainer.updates.apply(batch, 1, clock())
    assert len(seen) == 4, "two parts, twice"
    for recorded, old in seen:
        torch.testing.assert_close(old, recorded, atol=2e-4, rtol=1e-3)
    assert row["ratio_max"] > 1.01 and trainer.scheduler.last_epoch == 4
    assert Updates.count(trainer.run, 3) == 12, "the schedule is over all updates"


@pytest.mark.parametrize("aggregation", ["dapo", "dr_grpo", "bnpo"])
def test_a_part_is_divided_by_its_own_tokens(tmp_path: Path, aggregation: str) -> None:
    """On-policy without KL a token's loss is -A."""
    method = replace(PLAIN, aggregation=aggregation, horizon=6 if aggregation == "dr_grpo" else None)
    trainer = make_trainer(
        tmp_path, method, prompts_per_step=3, mini_batches=3, packing="off", **STILL, backend="torch"
    )
    batch = collected(trainer, rewards=[0.0, 1.0, 0.5, 0.1] * 3)
    row = trainer.updates.apply(batch, 1, clock())
    tokens = batch.mask.sum(1).view(3, 4).float()
    sums = (-batch.adv.advantage * tokens).sum(1)
    expected = sums / (4 * 6 if aggregation == "dr_grpo" else tokens.sum(1))
    assert row["loss"] == pytest.approx(expected.mean().item(), abs=1e-6)


# ---- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_follows_the_policy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, KL, sync_reference=2, reference_mix=0.25)
    assert trainer.reference.model is not None
    start = [p.clone() for p in trainer.reference.model.parameters()]
    move(trainer)
    trainer.reference.follow(1)
    assert all(map(torch.equal, trainer.reference.model.parameters(), start)), "every two steps"
    trainer.reference.follow(2)
    for now, own, was in zip(trainer.reference.model.parameters(), trainer.policy.parameters(), start, strict=True):
        torch.testing.assert_close(now, 0.25 * own + 0.75 * was)
        assert not now.requires_grad
    stays = make_trainer(tmp_path, KL, "stays")
    assert not stays.reference.moves and not make_trainer(tmp_path, PLAIN, "none", sync_reference=1).reference.moves


def test_weights_in_bfloat16_take_no_mix(tmp_path: Path) -> None:
    """Also where it is the model's own dtype."""
    with pytest.raises(ConfigError, match="reference_mix must be 1 for weights in bfloat16"):
        make_trainer(
            tmp_path, KL, dtype="auto", model=str(_in_bfloat16(tmp_path)), train_file=PROMPTS, sync_reference=1
        )


def _in_bfloat16(tmp_path: Path) -> Path:
    model, tokenizer = load(None)
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_a_copied_reference_has_no_distance(tmp_path: Path, peer: Any) -> None:
    """To the bit: full weights, and adapters under LoRA, those of a checkpoint too."""
    peer("peft")
    knobs: dict[str, Any] = {"sync_reference": 1, "reference_mix": 1.0, "learning_rate": 1e-2}
    for name, more in (("full", {}), ("lora", {"lora": True, "lora_r": 2})):
        trainer = make_trainer(tmp_path, KL, name, **knobs, **more)
        move(trainer)
        batch = collected(trainer)
        into = torch.zeros_like(batch.rollout.policy_logprobs)
        trainer.updates.reference.logprobs(trainer.updates.micro_batches(batch), into)
        assert (into - batch.rollout.policy_logprobs)[batch.mask].abs().max() > 1e-2
        trainer.reference.follow(1)
        kept = trainer.reference.state_dict()
        again = make_trainer(tmp_path, KL, f"{name}_again", **knobs, **more)
        again.reference.load_state_dict(kept)
        for other in (trainer, again):
            if other is again:
                move(again)
                if more:
                    for p, q in zip(again.lm.parameters(), trainer.lm.parameters(), strict=True):
                        p.data.copy_(q)
            own, theirs = torch.zeros_like(into), torch.zeros_like(into)
            passes = other.updates.micro_batches(batch)
            other.updates.old_logprobs([passes], own, Passes())
            other.reference.logprobs(passes, theirs)
            assert torch.equal(own, theirs), (name, other is again)


def test_a_resumed_run_has_the_reference_and_the_coefficient_of_one_that_went_through(tmp_path: Path) -> None:
    method = preset("exact", num_generations=4, entropy_target=3.0, entropy_coef=0.02, entropy_coef_delta=0.01)
    knobs: dict[str, Any] = {
        "steps": 3, "save_every": 2, "mini_batches": 2, "updates_per_rollout": 2, "sync_reference": 1,
        "reference_mix": 0.5, "backend": "torch", "eval_samples": 1, "max_completion_length": 6,
    }  # fmt: skip
    whole = run_small(tmp_path, method, "whole", **knobs)
    run_small(tmp_path, method, "parts", **{**knobs, "steps": 2})
    assert checkpoint.newest(tmp_path / "parts") is not None
    # The schedule of the first two steps was that of a shorter run: both go on from the longer one's checkpoint.
    for file in ("checkpoints/checkpoint_2", "metrics.jsonl"):
        source, target = tmp_path / "whole" / file, tmp_path / "parts" / file
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            target.write_bytes(source.read_bytes())
    resumed = run_small(tmp_path, method, "parts", resume=True, **knobs)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.reference.model is not None and whole.reference.model is not None
    assert all(map(torch.equal, resumed.reference.model.parameters(), whole.reference.model.parameters()))
    assert vars(resumed.updates.entropy) | {"method": 0} == vars(whole.updates.entropy) | {"method": 0}
    names = ("loss", "kl", "entropy_coef", "grad_norm", "learning_rate")
    last, theirs = rows(resumed)[-1], rows(whole)[-1]
    assert {n: last[n] for n in names} == {n: theirs[n] for n in names} and last["kl"] > 0


# ---- the KL in the reward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_is_taken_off_the_reward_and_is_not_in_the_loss(tmp_path: Path, estimator: Any) -> None:
    method = replace(IN_REWARD, kl_estimator=estimator)
    trainer = make_trainer(tmp_path, method, backend="torch", skip_idle=True, micro_batch_size=3)
    assert trainer.reference.model is not None and method.betas == (0, 0)
    move(trainer)
    batch = collected(trainer, rewards=[0.5] * 8)
    assert (batch.adv.advantage == 0).all() and sum(batch.contributing) == 0, "all rewards are equal so far"
    passes = Passes()
    trainer.updates.take_kl_off(batch, clock(), passes)
    trainer.collector.settle(batch)
    r = batch.rollout
    inputs = (r.prompt_ids, r.prompt_mask, r.tokens, r.mask)
    ref = trainer.reference.model.logprobs(inputs, r.mask, None, 1.0, "torch")
    kl = reference.kl_penalty(r.policy_logprobs, ref, estimator)[0].masked_fill(~r.mask, 0)
    assert batch.kl is not None
    torch.testing.assert_close(batch.kl, kl, atol=1e-4, rtol=1e-3)
    net = 0.5 - 0.1 * batch.kl.sum(1).view(2, 4)
    expected = reference.advantages(net, torch.ones(2), method)
    torch.testing.assert_close(batch.adv.advantage, expected.advantage)
    assert (batch.adv.kl_beta == 0).all() and batch.contributing == batch.counted
    assert trainer.collector.counted(batch) == pytest.approx(net.flatten().tolist())
    row = trainer.updates.apply(batch, 1, clock(), passes)
    assert row["kl"] == pytest.approx((kl.sum() / r.mask.sum()).item(), abs=1e-4) and row["kl"] != 0
    assert row["loss"] == pytest.approx(-batch.adv.advantage.mean().item(), abs=1e-5)


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_policy_that_is_its_reference_has_no_kl_to_take_off(tmp_path: Path, precision: str, packing: str) -> None:
    """To the bit, or the rounding of a KL would be all that a group of equal rewards learns from."""
    knobs: dict[str, Any] = {"mixed_precision": precision, "packing": packing, "backend": "torch", "steps": 1}
    trainer = make_trainer(tmp_path, IN_REWARD, **knobs)
    batch, passes = collected(trainer, rewards=[0.5] * 4 + [0.0, 1.0] * 2), Passes()
    trainer.updates.take_kl_off(batch, clock(), passes)
    trainer.collector.settle(batch)
    assert batch.kl is not None and (batch.kl == 0).all()
    assert batch.adv.std[0] == 0 and batch.adv.std[1] > 0 and (batch.adv.advantage[0] == 0).all()
    assert len(passes.without) == 2 * len(trainer.updates.micro_batches(batch))
    (row,), (plain,) = (
        rows(run_small(tmp_path, method, name, **knobs)) for name, method in (("kl", IN_REWARD), ("none", PLAIN))
    )
    assert row["kl"] == 0 and row["zero_variance_groups"] == plain["zero_variance_groups"]


# ---- the entropy's coefficient --------------------------------------------------------------------------------------


def test_the_entropy_coefficient_follows_its_target() -> None:
    """As TRL's controller: shut above the target, a step up below it and down above, the change from the next update
    on."""
    method = MDPGRPOConfig(
        entropy_target=0.5, entropy_coef=0.02, entropy_coef_delta=0.01, entropy_coef_min=0.01, entropy_coef_max=0.03
    )
    control, applied = EntropyControl(method), []
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.6, 0.6, 0.4):
        applied.append(control.applied)
        control.follow(entropy)
    assert applied == pytest.approx([0.0, 0.03, 0.03, 0.03, 0.0, 0.0, 0.0])
    assert control.coef == pytest.approx(0.02) and control.applied == control.coef
    assert control.objective() == {"entropy_coef": control.applied}
    constant = EntropyControl(MDPGRPOConfig(entropy_coef=0.1))
    assert constant.applied == 0.1 and constant.objective() == {} and not constant.adapts


@pytest.mark.parametrize("target", [None, 50.0])
def test_the_entropy_bonus_is_in_the_loss(tmp_path: Path, target: float | None) -> None:
    """No completion is idle then. With a target it begins with the second update."""
    method = replace(PLAIN, entropy_coef=0.1, entropy_target=target, entropy_coef_delta=0.05)
    trainer = make_trainer(tmp_path, method, backend="torch", **STILL)
    batch = collected(trainer, rewards=[0.5] * 8)
    assert batch.contributing == batch.counted and not trainer.collector.idle(batch.adv).any()
    first, second = (trainer.updates.apply(batch, number, clock()) for number in (1, 2))
    assert first["entropy_coef"] == (0.1 if target is None else 0.0)
    assert second["entropy_coef"] == pytest.approx(0.1 if target is None else 0.15)
    # A mean over completions of their token means: not the mean over tokens, but near it here.
    assert first["loss"] == pytest.approx(0.0 if target else -0.1 * first["entropy"], rel=0.2)
    assert second["loss"] < -0.05 * second["entropy"]
