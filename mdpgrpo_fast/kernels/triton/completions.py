"""The small kernels around the rows: what couples the tokens of a completion, and the sums over rows.

Both walk the rows of a completion in order, so that every sum has one fixed order and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .method import _group, _pick, _policy, _ratio
from .rows import _value

# Pointers to vectors that may begin anywhere (see token_loss).
SMALL = """mask_ptr completion_ptr logprobs_ptr old_ptr weight_ptr temperature_ptr low_ptr high_ptr advantage_ptr
beta_ptr rewards_ptr constraints_ptr valid_ptr slots_ptr lengths_ptr ratio_ptr slope_ptr""".split()


@triton.jit
def _advantage_of(
    advantage_ptr, beta_ptr, rewards_ptr, constraints_ptr, valid_ptr, slots_ptr, completion, rows, mask,
    advantage_per_row, beta_per_row, G, alpha, prospect_beta, prospect_gain, prospect_loss, beta_pos, beta_neg,
    HAS_REWARDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SLOTS: tl.constexpr, SAMPLE_STD: tl.constexpr,
    GOAL_MEAN: tl.constexpr, BINOMIAL: tl.constexpr, PROSPECT: tl.constexpr, PROSPECT_ON_GOAL: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A and KL coefficient of rows of one completion: given, or from its group's rewards."""
    if HAS_REWARDS:
        place = completion
        if HAS_SLOTS:
            place = tl.load(slots_ptr + completion).to(tl.int64)
        _, _, _, _, advantages, betas = _group(
            rewards_ptr, constraints_ptr, valid_ptr, place // G, G, alpha, prospect_beta, prospect_gain,
            prospect_loss, beta_pos, beta_neg, HAS_VALID, SAMPLE_STD, GOAL_MEAN, BINOMIAL, PROSPECT, PROSPECT_ON_GOAL,
            BLOCK_G,
        )  # fmt: skip
        return _pick(advantages, place % G, BLOCK_G), _pick(betas, place % G, BLOCK_G)
    else:
        return (
            _value(advantage_ptr, 0.0, completion, rows, advantage_per_row, mask, True),
            _value(beta_ptr, 0.0, completion, rows, beta_per_row, mask, True),
        )


@triton.jit
def _rows_of(i, completion, n_rows, row_length, mask_ptr, completion_ptr, HAS_MASK: tl.constexpr,
             PACKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Block i of the rows that may be a completion's, and which of them are its kept tokens."""
    if PACKED:
        rows = i * BLOCK + tl.arange(0, BLOCK)
        mine = rows < n_rows
        mine = mine & (tl.load(completion_ptr + rows, mask=mine, other=-1) == completion)
    else:
        place = i * BLOCK + tl.arange(0, BLOCK)
        rows = completion * row_length + place
        mine = place < row_length
    if HAS_MASK:
        mine = mine & (tl.load(mask_ptr + rows, mask=mine, other=0) != 0)
    return rows, mine


@triton.jit(do_not_specialize=["n_rows", "row_length", "G"], do_not_specialize_on_alignment=SMALL)
def _completions_kernel(
    mask_ptr, completion_ptr, logprobs_ptr, old_ptr, weight_ptr, temperature_ptr, low_ptr, high_ptr, advantage_ptr,
    beta_ptr, rewards_ptr, constraints_ptr, valid_ptr, slots_ptr, lengths_ptr, ratio_ptr, slope_ptr, n_rows,
    row_length, G, temperature_per_row, low_per_row, high_per_row, advantage_per_row, beta_per_row, temperature,
    epsilon_low, epsilon_high, delta, alpha, prospect_beta, prospect_gain, prospect_loss, beta_pos, beta_neg,
    SEQUENCE: tl.constexpr, RESCALE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_REWARDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_SLOTS: tl.constexpr,
    SAMPLE_STD: tl.constexpr, GOAL_MEAN: tl.constexpr, BINOMIAL: tl.constexpr, PROSPECT: tl.constexpr,
    PROSPECT_ON_GOAL: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per completion: its tokens; at sequence level its ρ, and Σ over its tokens of w dJ/dρ ρ / tokens, which every
    token of it shares as derivative with respect to ℓ."""
    completion = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_rows if PACKED else row_length, BLOCK)
    count = 0.0
    log_ratio = 0.0
    for i in range(0, blocks):
        rows, mine = _rows_of(i, completion, n_rows, row_length, mask_ptr, completion_ptr, HAS_MASK, PACKED, BLOCK)
        count += tl.sum(mine.to(tl.float32), axis=0)
        if HAS_OLD:
            new = tl.load(logprobs_ptr + rows, mask=mine, other=0.0)
            old = tl.load(old_ptr + rows, mask=mine, other=0.0).to(tl.float32)
            log_ratio += tl.sum(tl.where(mine, new - old, 0.0), axis=0)
    tl.store(lengths_ptr + completion, count)
    if SEQUENCE:
        ratio, slope = _ratio(log_ratio / tl.maximum(count, 1.0))
        total = 0.0
        for i in range(0, blocks):
            rows, mine = _rows_of(i, completion, n_rows, row_length, mask_ptr, completion_ptr, HAS_MASK, PACKED, BLOCK)
            advantage, _ = _advantage_of(
                advantage_ptr, beta_ptr, rewards_ptr, constraints_ptr, valid_ptr, slots_ptr, completion, rows, mine,
                advantage_per_row, beta_per_row, G, alpha, prospect_beta, prospect_gain, prospect_loss, beta_pos,
                beta_neg, HAS_REWARDS, HAS_VALID, HAS_SLOTS, SAMPLE_STD, GOAL_MEAN, BINOMIAL, PROSPECT,
                PROSPECT_ON_GOAL, BLOCK_G,
            )  # fmt: skip
            low = _value(low_ptr, epsilon_low, completion, rows, low_per_row, mine, HAS_LOW)
            high = _value(high_ptr, epsilon_high, completion, rows, high_per_row, mine, HAS_HIGH)
            _, part, _, _ = _policy(ratio, advantage, low, high, delta, HAS_DELTA)
            if HAS_WEIGHT:
                part *= tl.load(weight_ptr + rows, mask=mine, other=0.0).to(tl.float32)
            if RESCALE:
                part *= _value(temperature_ptr, temperature, completion, rows, temperature_per_row, mine,
                               HAS_TEMPERATURE)  # fmt: skip
            total += tl.sum(tl.where(mine, part, 0.0), axis=0)
        tl.store(ratio_ptr + completion, ratio)
        tl.store(slope_ptr + completion, total * slope / tl.maximum(count, 1.0))


@triton.jit(do_not_specialize=["n_rows", "row_length", "n_completions"])
def _totals_kernel(
    rows_ptr, marks_ptr, mask_ptr, completion_ptr, completion_kl_ptr, totals_ptr, loss_ptr, n_rows, row_length,
    n_completions, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b < B: mean KL of completion b. Program B: loss, means, shares and maximum over all rows."""
    completion = tl.program_id(0).to(tl.int64)
    n = tl.cast(n_rows, tl.int64)
    if completion < n_completions:
        length = 0.0
        own_kl = 0.0
        for i in range(0, tl.cdiv(n_rows if PACKED else row_length, BLOCK)):
            own, inside = _rows_of(i, completion, n_rows, row_length, mask_ptr, completion_ptr, HAS_MASK, PACKED, BLOCK)
            length += tl.sum(inside.to(tl.float32), axis=0)
            own_kl += tl.sum(tl.load(rows_ptr + 2 * n + own, mask=inside, other=0.0), axis=0)
        tl.store(completion_kl_ptr + completion, own_kl / tl.maximum(length, 1.0))
    else:
        count = tl.zeros((BLOCK,), tl.float32)
        loss = tl.zeros((BLOCK,), tl.float32)
        kl = tl.zeros((BLOCK,), tl.float32)
        entropy = tl.zeros((BLOCK,), tl.float32)
        ratio = tl.zeros((BLOCK,), tl.float32)
        ratio_max = tl.zeros((BLOCK,), tl.float32)
        low = tl.zeros((BLOCK,), tl.float32)
        high = tl.zeros((BLOCK,), tl.float32)
        clamped = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            mine = rows < n_rows
            if HAS_MASK:
                mine = mine & (tl.load(mask_ptr + rows, mask=mine, other=0) != 0)
            count += mine.to(tl.float32)
            entropy += tl.load(rows_ptr + n + rows, mask=mine, other=0.0)
            kl += tl.load(rows_ptr + 2 * n + rows, mask=mine, other=0.0)
            r = tl.load(rows_ptr + 3 * n + rows, mask=mine, other=0.0)
            ratio += r
            ratio_max = tl.maximum(ratio_max, r)
            loss += tl.load(rows_ptr + 4 * n + rows, mask=mine, other=0.0)
            low += tl.load(marks_ptr + rows, mask=mine, other=0).to(tl.float32)
            high += tl.load(marks_ptr + n + rows, mask=mine, other=0).to(tl.float32)
            clamped += tl.load(marks_ptr + 2 * n + rows, mask=mine, other=0).to(tl.float32)
        tokens = tl.sum(count, axis=0)
        share = 1.0 / tl.maximum(tokens, 1.0)
        tl.store(loss_ptr, tl.sum(loss, axis=0))
        tl.store(totals_ptr, tokens)
        tl.store(totals_ptr + 1, tl.sum(kl, axis=0) * share)
        tl.store(totals_ptr + 2, tl.sum(entropy, axis=0) * share)
        tl.store(totals_ptr + 3, tl.sum(low, axis=0) * share)
        tl.store(totals_ptr + 4, tl.sum(high, axis=0) * share)
        tl.store(totals_ptr + 5, tl.sum(ratio, axis=0) * share)
        tl.store(totals_ptr + 6, tl.max(ratio_max, axis=0))
        tl.store(totals_ptr + 7, tl.sum(clamped, axis=0))
