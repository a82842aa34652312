"""The objective on every fused backend against the reference in float64: each option, layout, precision and extreme."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.losses import (
    BACKENDS,
    DEVICE,
    EACH,
    GIVEN,
    MAX_LENGTH,
    OPTIONS,
    REWARDS,
    SIZE,
    assert_matches,
    assert_same,
    call,
    config_for,
    double,
    gpu,
    levels_of,
    make_batch,
    packed,
    packed_order,
    pick_options,
    rows_like,
    run,
    wide_view,
)

import mdpgrpo_fast
from mdpgrpo_fast.kernels.triton import library, tiles
from mdpgrpo_fast.kernels.triton import logprobs as logprobs_kernels
from mdpgrpo_fast.kernels.triton import token_loss as token_loss_kernels
from mdpgrpo_fast.reference import KL_EXPONENT_MAX, RATIO_EXPONENT_MAX

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
LEVELS = ["token", "sequence"]
AGGREGATIONS = ["grpo", "dapo", "dr_grpo", "bnpo"]
# Of one column, of less than a tile, of whole ones and a rest; each dtype has tiles of its own.
VOCABULARIES = [(1, "float32"), (2, "bfloat16"), (1000, "float16"), (4097, "float32"), (4097, "bfloat16"),
                (32001, "bfloat16"), (32001, "float16")]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_at_both_levels(backend: str, option: str) -> None:
    knobs, more = OPTIONS[option]
    batch = make_batch(1)
    batch.mask = more.get("mask", batch.mask)
    batch.tokens = batch.tokens.to(more.get("tokens", torch.int64))
    more = {k: v for k, v in more.items() if k not in ("mask", "tokens")}
    for level in levels_of(option):
        assert_matches(backend, batch, config_for(importance_level=level, **knobs), **more)


def test_a_horizon_takes_the_place_of_the_longest_completion(backend: str) -> None:
    batch = make_batch(2)
    plain, far = (config_for(aggregation="dr_grpo", horizon=h) for h in (None, 10 * MAX_LENGTH))
    own, ten = (assert_matches(backend, batch, c).out.loss.item() for c in (plain, far))
    assert own == pytest.approx(10 * ten, rel=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_and_denominators(backend: str, aggregation: Any) -> None:
    """A denominator below 1 counts as 1; a completion without tokens is in none of the batch's own (trl#6439)."""
    batch, config = make_batch(2), config_for(aggregation=aggregation)
    results = [assert_matches(backend, batch, config, denominator=d) for d in (None, 7.0, torch.tensor(7.0), 0.25)]
    own, seven, tensor, one = (r.out.loss.item() for r in results)
    assert seven == tensor and one == pytest.approx(7 * seven, rel=1e-5)
    count = {"grpo": 3, "dapo": 5, "bnpo": 5, "dr_grpo": 3 * MAX_LENGTH}[aggregation]
    assert own * count == pytest.approx(one, rel=1e-5)
    if aggregation == "dr_grpo":
        by_width = run(backend, batch, config, max_completion_length=None).out.loss.item()
        assert by_width * 3 * SIZE[1] == pytest.approx(one, rel=1e-5)
    vector = run(backend, batch, config, denominator=torch.full((1,), 7.0)).out.loss
    assert vector.shape == () and vector.item() == seven


@pytest.mark.parametrize("seed", range(14))
def test_mixtures_of_options(backend: str, seed: int) -> None:
    """Options are proven one by one above; here they meet each other, both layouts and all dtypes."""
    batch, config, more = pick_options(seed)
    assert_matches(backend, batch, config, **more)


@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_with_the_global_denominator_sum_to_the_batch(backend: str, level: Any) -> None:
    """trl#2647, trl#6024, ms-swift#10116: the mean of micro-batch means is another loss."""
    batch, config = make_batch(3), config_for(aggregation="dapo", importance_level=level)
    whole = run(backend, batch, config)
    parts = [run(backend, batch.rows(slice(i, i + 2)), config, denominator=5.0) for i in (0, 2)]
    torch.testing.assert_close(sum(p.out.loss for p in parts), whole.out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad, rtol=1e-6, atol=1e-9)


def test_importance_weight_multiplies_the_policy_term_only(backend: str) -> None:
    """Liger#1082: a weight of 0 leaves the KL term as it is, to the bit of an advantage of 0."""
    batch, config = make_batch(4), config_for()
    none = run(backend, batch, config, importance_weight=torch.zeros(SIZE))
    kl = run(backend, batch, config, advantage=torch.zeros(4))
    assert torch.equal(none.grad, kl.grad) and none.out.loss == kl.out.loss and kl.grad.abs().sum() > 0


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_rewards_are_the_advantages_of_the_other_operation(backend: str, level: Any) -> None:
    """Members of a group need not be neighbours: ids travel with the rows."""
    batch, config = make_batch(5, lengths=(2, 1, 3, 0, 1, 2)), config_for(importance_level=level, num_generations=3)
    groups = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    rewards, k = torch.tensor([0.5, 1.0, 0.25, math.nan, 0.0, 0.25]), torch.tensor([4, 3])
    valid = ~rewards.isnan()
    adv = mdpgrpo_fast.advantages(rewards, k, config, groups=groups, valid=valid)
    given = run(backend, batch, config, advantage=adv.advantage, kl_beta=adv.kl_beta)
    ours = {"rewards": rewards, "num_constraints": k, "groups": groups, "valid": valid, **GIVEN}
    fused = run(backend, batch, config, **ours)
    torch.testing.assert_close(fused.out.loss, given.out.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(fused.grad, given.grad, rtol=1e-5, atol=1e-7)
    rows = packed(batch, seed=5)
    del rows.kwargs["num_completions"]  # that of the rewards
    torch.testing.assert_close(run(backend, rows, config, **ours).out.loss, given.out.loss, rtol=2e-6, atol=1e-6)


def test_order_within_and_of_groups_does_not_matter(backend: str) -> None:
    batch, config = make_batch(6, lengths=(2, 1, 2, 1)), config_for()
    base = run(backend, batch, config, **GIVEN, **REWARDS)
    order = torch.tensor([3, 2, 1, 0])  # the second group first, each group reversed
    flipped = {k: v.flip(0, 1) if v.ndim == 2 else v.flip(0) for k, v in REWARDS.items()}
    moved = run(backend, batch.rows(order), config, **GIVEN, **flipped)
    torch.testing.assert_close(moved.out.loss, base.out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved.grad, base.grad[order.to(DEVICE)], rtol=1e-5, atol=1e-8)


def test_constant_group_learns_from_the_goal_and_not_from_noise(backend: str) -> None:
    """NeMo-RL#4158: z is exactly 0 where rewards differ by rounding; the goal anchor still moves the policy."""
    one = torch.tensor(0.7)
    rewards = torch.stack([torch.stack([one, torch.nextafter(one, 2 * one)]), torch.zeros(2)])
    batch = make_batch(7, lengths=(1, 1, 1, 1))
    batch.kwargs.clear()
    more = {**GIVEN, "rewards": rewards, "num_constraints": torch.tensor([4, 4])}
    still = run(backend, batch, config_for(dual_anchor=False), **more)
    assert (still.grad == 0).all() and still.out.loss == 0
    moves = run(backend, batch, config_for(), **more).grad
    own = moves.cpu().gather(-1, batch.tokens[..., None]).flatten()
    assert (own[:2] < 0).all() and (own[2:] > 0).all(), "all-pass is pushed up, all-fail down"


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_packed_rows_in_any_order_are_the_padded_ones(backend: str, level: Any) -> None:
    # Rows of 64 bytes, wherever they lie: the order of a row's sums may follow its alignment.
    batch, config = make_batch(8, vocab=16), config_for(importance_level=level)
    more = {"temperature": EACH, "epsilon_high": EACH / 4}
    padded = run(backend, batch, config, **more)
    for seed in (1, 2):
        got, order = run(backend, packed(batch, seed), config, **more), packed_order(batch, seed).to(DEVICE)
        torch.testing.assert_close(got.out.loss, padded.out.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.grad, padded.grad.flatten(0, 1)[order], rtol=2e-6, atol=1e-8)
        assert torch.equal(got.out.logprobs, padded.out.logprobs.flatten()[order])
        torch.testing.assert_close(got.out.completion_kl, padded.out.completion_kl)
        torch.testing.assert_close(got.out.totals, padded.out.totals, rtol=1e-6, atol=1e-7)


def test_a_knob_of_as_many_values_as_completions_and_rows_means_completions(backend: str) -> None:
    batch = make_batch(9, lengths=(1, 1, 1))
    rows = packed(batch, seed=3)
    assert rows.kwargs["completion"].tolist() != [0, 1, 2]
    each, config = torch.tensor([0.5, 1.0, 1.5]), config_for(num_generations=3)
    got = assert_matches(backend, rows, config, temperature=each)
    torch.testing.assert_close(got.out.loss, run(backend, batch, config, temperature=each).out.loss)


@pytest.mark.parametrize(
    ("dtype", "pad", "shift"), [("bfloat16", 0, 0), ("float32", 5, 0), ("float32", 8, 1), ("bfloat16", 8, 1)]
)
def test_strided_views(backend: str, dtype: str, pad: int, shift: int) -> None:
    """Slices like logits[:, :-1], a padded vocabulary that holds NaN, and a base that is not 16-byte aligned."""
    batch, config = make_batch(10, dtype=dtype, vocab=131), config_for()
    plain = run(backend, batch, config)
    base, view = wide_view(batch.logits, pad, shift)
    assert not view.is_contiguous() and (shift == 0 or view.data_ptr() % 16 != 0)
    out = call(backend, replace(batch, logits=view), config)
    (grad,) = torch.autograd.grad(out.loss, base)
    assert_same(out.loss, plain.out.loss)
    assert_same(grad[:, :-1, :131], plain.grad)
    assert (grad[:, -1] == 0).all() and (grad[..., 131:] == 0).all()


def test_a_stride_in_the_vocabulary_and_one_of_zero(backend: str) -> None:
    batch, config = make_batch(11), config_for()
    plain = run(backend, batch, config)
    turned = batch.logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride(-1) != 1 and torch.equal(run(backend, replace(batch, logits=turned), config).grad, plain.grad)
    same = batch.logits[:1].clone()
    repeated = run(backend, replace(batch, logits=same.repeat(4, 1, 1)), config)
    spread = run(backend, replace(batch, logits=same.expand(4, -1, -1)), config)
    assert torch.equal(repeated.grad, spread.grad) and torch.equal(repeated.out.loss, spread.out.loss)


def test_row_offsets_beyond_int32(backend: str) -> None:
    """Row times stride passes 2³¹ long before memory is full. What lies between the rows is never touched."""
    batch, config, stride = make_batch(12, lengths=(3,)), config_for(), 2**30 + 1
    base = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE)
    view = base.as_strided((1, 3, 11), (3 * stride, stride, 1))
    half = replace(batch, logits=batch.logits.half())
    view.copy_(half.logits)
    plain = run(backend, half, config)
    logits = view.detach().requires_grad_()
    out = call(backend, replace(half, logits=logits), config)
    assert torch.equal(torch.autograd.grad(out.loss, logits)[0], plain.grad) and torch.equal(out.loss, plain.out.loss)


def test_non_contiguous_arguments(backend: str) -> None:
    batch, config = make_batch(13), config_for()
    plain = run(backend, batch, config)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], -1)[..., 0]

    kwargs = {k: strided(v) for k, v in batch.kwargs.items()}
    other = LossInputs(batch.logits, *(strided(x) for x in list(batch)[1:]), kwargs=kwargs)
    assert not other.tokens.is_contiguous()
    got = run(backend, other, config)
    assert torch.equal(got.grad, plain.grad) and torch.equal(got.out.loss, plain.out.loss)


# ---- vocabularies, logits, precision --------------------------------------------------------------------------------


def planted(vocab: int, dtype: str) -> LossInputs:
    """Three rows: peaked at the last column, flat at a large negative level, random with the token in the middle."""
    batch = make_batch(14, lengths=(2, 1), vocab=vocab, dtype=dtype)
    batch.tokens = torch.tensor([[vocab - 1, 0], [vocab // 2, 0]])
    batch.logits[0, 0] = -40.0
    batch.logits[0, 0, -1] = -25.0
    batch.logits[0, 1] = -40.0
    at = batch.logits.double().log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1).float()
    batch.kwargs = {"old_logprobs": at + 0.1, "ref_logprobs": at - 0.4}
    return batch


@pytest.mark.parametrize(("vocab", "dtype"), VOCABULARIES)
def test_vocabularies(backend: str, vocab: int, dtype: str) -> None:
    """verl#2656, verl#2899: columns past V have probability 0 whatever the level of the logits, cap and temperature."""
    more = {"softcap": 30.0, "temperature": torch.tensor([0.5, 1.5])} if vocab in (2, 4097) else {}
    got = assert_matches(backend, planted(vocab, dtype), config_for(), **more)
    if not more:
        flat = got.grad[0, 1].float().cpu()
        torch.testing.assert_close(flat[1:], (-flat[0] / max(vocab - 1, 1)).expand(vocab - 1), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_huge_logits(backend: str, level: Any) -> None:
    """±1e4: relative to the row's maximum nothing is lost; torch's own log-sum-exp rounds at that size."""
    batch = make_batch(15)
    batch.logits = 1e4 * batch.logits.sign()
    batch.logits[0, 0, :4] = 1e4 + torch.arange(4)
    batch.tokens = batch.logits.argmax(-1)
    at = double(batch).logits.log_softmax(-1).gather(-1, batch.tokens[..., None]).squeeze(-1)
    batch.kwargs = {"old_logprobs": at.float() + 0.25, "ref_logprobs": at.float() - 0.5}
    got = assert_matches(backend, batch, config_for(importance_level=level))
    assert ((got.out.logprobs.cpu() - at).abs() * batch.mask).max() < 2e-6


def test_banned_tokens(backend: str) -> None:
    """A logit of -inf has probability 0 and gradient 0, and leaves the entropy and the other columns alone."""
    batch = make_batch(16, vocab=300)
    banned = (batch.tokens[..., None] + torch.arange(1, 250)) % 300
    batch.logits.scatter_(2, banned, -math.inf)
    got = assert_matches(backend, batch, config_for(), temperature=EACH)
    assert (got.grad.cpu().gather(2, banned) == 0).all() and got.out.loss.isfinite()
    assert_matches(backend, batch, config_for(), softcap=5.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("low", [None, -1e10, -1e20, -1e30])
def test_tokens_banned_by_the_lowest_number(backend: str, dtype: str, low: float | None) -> None:
    """finfo.min (None) instead of -inf: differences of such logits overflow, and entropy must not be inf * 0."""
    batch = make_batch(1, vocab=600, dtype=dtype)
    batch.logits[..., 300:] = torch.finfo(batch.logits.dtype).min if low is None else low
    batch.tokens %= 300
    assert_matches(backend, batch, config_for())


def test_own_token_gradient_in_half_precision(backend: str) -> None:
    """p - 1 cancels in bfloat16; formed in float32 and rounded once, it keeps its own precision at p = 1 - 3e-4."""
    batch = make_batch(17, lengths=(1,), vocab=64, dtype="bfloat16")
    batch.logits = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    batch.logits[0, 0, 5], batch.tokens[0, 0], batch.kwargs = 12.25, 5, {}
    p = batch.logits.double().softmax(-1)[0, 0, 5].item()
    grad = run(backend, batch, config_for(), advantage=1.0, kl_beta=0.0).grad
    assert grad[0, 0, 5].item() == pytest.approx(p - 1, rel=2**-7) and 1 - p < 2**-10


@pytest.mark.parametrize("tile", [tiles.Tile(256, 1, 3, 2), tiles.Tile(1024, 4, 1, 0), tiles.Tile(8192, 32, 1, 1)])
def test_every_tile_and_persistent_programs(backend: str, tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than rows, many whole tiles and a ragged last one: whatever tuning picks is right."""
    monkeypatch.setattr(library, "tile_for", lambda vocab, *_: tiles.fit(tile, vocab))
    for kernels in (token_loss_kernels, logprobs_kernels):
        if tile.programs:
            monkeypatch.setattr(kernels, "grid_for", lambda *_: (2,))
    batch = make_batch(19, vocab=1001)
    assert_matches(backend, batch, config_for(importance_level="sequence"), temperature=EACH)
    assert_matches(backend, packed(batch), config_for(), softcap=9.0)


# ---- clipping and KL at their edges ---------------------------------------------------------------------------------


def one_token(gap: float, advantage: float) -> tuple[LossInputs, dict[str, Any]]:
    """One completion of one token of two equal logits, whose ratio is exp(gap)."""
    one = torch.tensor([[True]])
    batch = LossInputs(torch.zeros(1, 1, 2), torch.tensor([[1]]), one, torch.tensor([advantage]), torch.zeros(1))
    return batch, {"old_logprobs": torch.full((1, 1), math.log(0.5) - gap)}


@pytest.mark.parametrize("level", LEVELS)
def test_ties_at_the_clip_boundary_take_the_unclipped_branch(backend: str, level: Any) -> None:
    """On-policy with a clip range of 0 the ratio is at both bounds, and with delta at none: the gradient flows."""
    at = run(backend, one_token(0.0, 1.0)[0], config_for()).out.logprobs
    for advantage, old in product((1.0, -1.0), (None, at)):
        batch, more = one_token(0.0, advantage)[0], {"old_logprobs": old}
        got = run(backend, batch, config_for(importance_level=level), epsilon_low=0.0, epsilon_high=0.0, **more)
        assert got.out.ratio.item() == 1 and got.grad[0, 0].tolist() == pytest.approx([advantage / 2, -advantage / 2])
        assert not got.out.clipped_low.any() and not got.out.clipped_high.any()


def test_ratio_above_delta_has_zero_gradient(backend: str) -> None:
    for level, (ratio, moves) in product(LEVELS, ((1.6, False), (1.4, True))):
        batch, old = one_token(math.log(ratio), -1.0)
        got = run(backend, batch, config_for(delta=1.5, importance_level=level), **old)
        assert bool((got.grad != 0).any()) == moves
        assert got.out.loss.item() == pytest.approx(min(ratio, 1.5), rel=3e-6)
        assert got.out.ratio.item() == pytest.approx(ratio, rel=3e-6), "the ratio itself is reported as it is"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("delta", [(1.45, 0.0), ((1.45, 0.0), (0.0, 1.3))], ids=["per_completion", "per_row"])
def test_delta_of_a_completion_or_a_row(backend: str, delta: Any, level: Any) -> None:
    """With A = -1 a token's loss is ρ, at most delta, and from there on its gradient is 0; 0 caps nothing."""
    ratio, delta = torch.tensor([[1.6, 1.4], [1.6, 1.4]]), torch.tensor(delta)
    tokens = torch.ones(2, 2, dtype=torch.int64)
    batch = LossInputs(torch.zeros(2, 2, 2), tokens, tokens.bool(), -torch.ones(2), torch.zeros(2))
    config = config_for(importance_level=level, aggregation="dapo")
    got = run(backend, batch, config, delta=delta, old_logprobs=math.log(0.5) - ratio.log())
    if level == "sequence":
        ratio = ratio.log().mean(1, keepdim=True).exp().expand(2, 2)
    cap = torch.where(delta > 0, delta, math.inf).view(2, -1)
    flows = (ratio <= cap).float()
    if level == "sequence":
        flows = flows.mean(1, keepdim=True)
    assert got.out.loss.item() == pytest.approx(torch.minimum(ratio, cap).mean().item(), rel=3e-6)
    torch.testing.assert_close(got.grad[..., 1].cpu(), ratio * flows / 4 / 2)


@pytest.mark.parametrize("level", LEVELS)
def test_a_ratio_beyond_float_range(backend: str, level: Any) -> None:
    """exp(80) is where it ends, with gradient 0: no 0 * inf, no NaN."""
    cases = ((1.0, None), (-1.0, 4.0), (-1.0, None))
    for gap, (advantage, delta) in product((RATIO_EXPONENT_MAX + 1, 1000.0, math.inf), cases):
        batch, old = one_token(gap, advantage)
        got = assert_matches(backend, batch, config_for(importance_level=level, delta=delta), **old)
        assert (got.grad == 0).all() and got.out.loss.isfinite()


def test_k3_beyond_its_exponent_is_clamped_and_counted(backend: str) -> None:
    """ℓ_ref - ℓ = 100 overflows float32 as exp; clamped, the token has a finite penalty and no gradient."""
    batch = make_batch(20, lengths=(3, 2))
    batch.kwargs = {"ref_logprobs": batch.kwargs["ref_logprobs"]}
    batch.kwargs["ref_logprobs"][0, 1] += 100
    batch.kwargs["ref_logprobs"][1, 2] += 100  # masked: not counted
    got = assert_matches(backend, batch, config_for(), advantage=0.0)
    assert got.out.total("kl_clamped") == 1 and (got.grad[0, 1] == 0).all()
    most = math.exp(KL_EXPONENT_MAX) - KL_EXPONENT_MAX - 1
    assert got.out.kl[0, 1].item() == pytest.approx(most, rel=1e-6)
    for estimator in ("k1", "k2"):
        assert run(backend, batch, config_for(kl_estimator=estimator)).out.total("kl_clamped") == 0


def test_sequence_level_couples_the_tokens_of_a_completion(backend: str) -> None:
    """Per-row advantages, weights, clip ranges and temperatures under one ratio: every token moves every other."""
    batch, config = make_batch(21, lengths=(3, 2)), config_for(importance_level="sequence", delta=1.4)
    more = {n: rows_like(batch, i, low, high) for i, (n, low, high) in enumerate([
        ("advantage", -1.0, 1.0), ("importance_weight", 0.2, 2.0), ("epsilon_low", 0.01, 0.3),
        ("epsilon_high", 0.01, 0.3), ("temperature", 0.5, 1.5),
    ])}  # fmt: skip
    assert_matches(backend, batch, config, **more)
    assert_matches(backend, packed(batch, 4), config_for(importance_level="sequence"))
    one = torch.zeros(2, 3)
    one[0, 0] = 1.0
    grad = run(backend, batch, config, importance_weight=one, ref_logprobs=None, epsilon_low=0.9, epsilon_high=9.0).grad
    assert (grad[0].abs().sum(-1) > 0).all() and (grad[1] == 0).all()


def test_rows_without_effect_have_a_gradient_of_exactly_zero(backend: str) -> None:
    """A = 0 with β = 0, and a clipped token without KL: zeros are written, not small numbers."""
    batch, config = make_batch(23, lengths=(3, 2), dtype="bfloat16"), config_for()
    del batch.kwargs["ref_logprobs"]
    grad = run(backend, batch, config, advantage=torch.tensor([0.0, 1.0])).grad
    assert (grad[0] == 0).all() and (grad[1, :2] != 0).any()
    batch.kwargs["old_logprobs"] -= 5.0
    got = run(backend, batch, config, advantage=1.0)
    assert got.out.clipped_high[batch.mask.to(DEVICE)].all() and (got.grad == 0).all()


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_masked_rows_may_hold_anything(backend: str, level: Any) -> None:
    """NeMo-RL#4120: exp before mask makes inf * 0 in the backward. Select first; masked rows are never even read."""
    batch, config = make_batch(22), config_for(importance_level=level)
    batch.kwargs["importance_weight"] = rows_like(batch, 0, 0.5, 1.5)
    plain, drop = run(backend, batch, config, temperature=EACH), ~batch.mask
    for junk in (math.nan, math.inf, -math.inf):
        dirty = replace(batch, logits=batch.logits.masked_fill(drop[..., None], junk))
        dirty.kwargs = {k: v.masked_fill(drop, junk) for k, v in batch.kwargs.items()}
        got = run(backend, dirty, config, temperature=EACH)
        assert torch.equal(got.out.loss, plain.out.loss) and torch.equal(got.grad, plain.grad)
        assert (got.grad[drop.to(DEVICE)] == 0).all() and torch.equal(got.out.totals, plain.out.totals)


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_without_tokens_has_loss_and_gradient_zero(backend: str, level: Any) -> None:
    junk = {n: torch.full((2, 2), math.nan) for n in ("old_logprobs", "ref_logprobs")}
    zero = torch.zeros(2, 2, dtype=torch.long)
    batch = LossInputs(torch.full((2, 2, 4), -math.inf), zero, zero, torch.ones(2), torch.ones(2), junk)
    for aggregation in AGGREGATIONS:
        got = assert_matches(backend, batch, config_for(aggregation=aggregation, importance_level=level))
        assert got.out.loss.item() == 0 and (got.grad == 0).all() and (got.out.totals == 0).all()
    for shape in ((2, 0), (0, 3)):
        none = torch.zeros(shape, dtype=torch.long)
        empty = LossInputs(torch.zeros(*shape, 4), none, none, torch.ones(shape[0]), torch.ones(shape[0]))
        got = assert_matches(backend, empty, config_for(importance_level=level))
        assert got.out.loss.item() == 0 and got.grad.shape == (*shape, 4)


# ---- values that nobody looked at -----------------------------------------------------------------------------------

NAN_REWARDS = {**GIVEN, **REWARDS, "rewards": torch.tensor([[0.25, math.nan], [0.5, math.inf]])}
BAD_VALUES: dict[str, tuple[bool, Callable[[LossInputs], dict[str, Any]]]] = {  # packed?, change
    "token_too_large": (False, lambda b: {"tokens": b.tokens + 11}),
    "token_negative": (False, lambda b: {"tokens": b.tokens.int() - 12}),
    "token_far_out": (True, lambda b: {"tokens": b.tokens + 2**40}),
    "completion_too_large": (True, lambda b: {"completion": b.kwargs["completion"] + 4}),
    "completion_negative": (True, lambda b: {"completion": b.kwargs["completion"] - 4}),
    "reward_nan": (False, lambda b: NAN_REWARDS),
    "num_constraints_zero": (False, lambda b: {**GIVEN, **REWARDS, "num_constraints": torch.tensor([4, 0])}),
    "temperature_zero": (False, lambda b: {"temperature": torch.zeros(4)}),
    "temperature_negative": (False, lambda b: {"temperature": torch.full((4,), -1.0)}),
    "temperature_nan": (False, lambda b: {"temperature": torch.tensor(math.nan)}),
    "advantage_nan": (False, lambda b: {"advantage": math.nan}),
    "denominator_nan": (False, lambda b: {"denominator": torch.tensor(math.nan)}),
    "logits_nan": (False, lambda b: {"logits": b.logits * math.nan}),
    "old_logprobs_nan": (False, lambda b: {"old_logprobs": torch.full((4, 1), math.nan)}),
    "ref_logprobs_nan": (False, lambda b: {"ref_logprobs": torch.full((4, 1), math.nan)}),
    "epsilon_low_nan": (False, lambda b: {"epsilon_low": torch.tensor([0.2, math.nan, 0.2, math.nan])}),
    "epsilon_high_nan": (False, lambda b: {"epsilon_high": torch.tensor([0.2, math.nan, 0.2, math.nan])}),
    "delta_nan": (False, lambda b: {"delta": torch.tensor([1.5, math.nan, 1.5, math.nan])}),
    "importance_weight_nan": (False, lambda b: {"importance_weight": torch.full((4, 1), math.nan)}),
}
ON, OFF, SEQUENCE = ("old_logprobs", "ref_logprobs"), ("ref_logprobs",), {"importance_level": "sequence"}
POLICIES: list[tuple[tuple[str, ...], dict[str, Any]]] = [  # arguments left out, config
    (ON, {}), (ON, SEQUENCE), (OFF, {}), (OFF, SEQUENCE), (OFF, {"delta": 2.0}), (OFF, {"delta": 2.0, **SEQUENCE}),
]  # fmt: skip


@pytest.mark.parametrize(("absent", "knobs"), POLICIES, ids=str)
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
def test_unseen_bad_values_give_a_nan_loss(backend: str, absent: tuple[str, ...], knobs: dict[str, Any]) -> None:
    """On a GPU nobody looks at values: a clip must not make a plausible loss of them, and no kernel may crash."""
    finite = []
    for case, (is_packed, change) in BAD_VALUES.items():
        batch = make_batch(13, lengths=(1, 0, 0, 1))
        batch = packed(batch) if is_packed else batch
        for name in absent:
            del batch.kwargs[name]
        more = change(batch)
        batch = replace(batch, logits=more.get("logits", batch.logits), tokens=more.get("tokens", batch.tokens))
        more = {k: v for k, v in more.items() if k not in ("logits", "tokens")}
        loss = run(backend, batch, config_for(**knobs), check_values=False, **more).out.loss
        finite += [] if loss.isnan() else [(case, loss.item())]
    assert finite == []


def test_an_unseen_bad_token_spoils_its_gradient_row_too(backend: str) -> None:
    """On-policy the ratio is 1 whatever the log-prob is: the row would lack its own token and look like a gradient."""
    batch = make_batch(7)
    batch.kwargs = {}
    batch.tokens[0, 0] = 10**6
    got = run(backend, batch, config_for(), check_values=False)
    assert got.out.loss.isnan() and got.grad[0, 0].isnan().all() and got.grad[1].isfinite().all()


@gpu
def test_a_scalar_tensor_may_lie_on_the_cpu(backend: str) -> None:
    batch = make_batch(52)
    logits, given = batch.logits.to(DEVICE), {k: v.to(DEVICE) for k, v in batch.given().items()}
    args = (logits, batch.tokens.to(DEVICE), batch.mask.to(DEVICE), config_for())
    for knob in ("temperature", "kl_beta", "advantage", "epsilon_high", "denominator"):
        half = (torch.tensor(0.5, device=device) for device in (DEVICE, "cpu"))
        there, here = (mdpgrpo_fast.token_loss(*args, backend=backend, **{**given, knob: x}).loss for x in half)
        assert torch.equal(here, there), knob
