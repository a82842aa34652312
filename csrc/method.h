// The rows' inputs and the method of a token, once for the CPU and for CUDA. Names are those of
// mdpgrpo_fast/kernels/schemas.py (Rows, Settings) and of mdpgrpo_fast/reference.py (the equations).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MDPGRPO_INLINE __host__ __device__ __forceinline__
#else
#define MDPGRPO_INLINE inline
#endif

namespace mdpgrpo {

constexpr double KL_EXPONENT_MAX = 20.0;
constexpr double RATIO_EXPONENT_MAX = 80.0;

// Not std::isnan: nothing here may be compiled away under any flag of a compiler.
template <class R>
MDPGRPO_INLINE bool is_nan(R x) {
  return !(x == x);
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

// Members of Rows: knobs have one value per completion or per row, or are a number, the one at this place of Settings
// (-1: none); the others have one per row.
#define MDPGRPO_KNOBS(X) \
  X(advantage, -1) X(kl_beta, -1) X(temperature, 0) X(epsilon_low, 1) X(epsilon_high, 2) X(delta, 3) \
  X(entropy_coef, 12) X(entropy_floor, 13)
#define MDPGRPO_PER_ROW(X) X(old_logprobs) X(ref_logprobs) X(importance_weight) X(sampling_logprobs) X(logit_floor)

template <class R>
struct Knob {
  const float* each = nullptr;
  bool per_row = false;
  R number = R(0);

  MDPGRPO_INLINE R at(int64_t completion, int64_t row) const {
    return each == nullptr ? number : R(each[per_row ? row : completion]);
  }
};

template <class R>
struct Rows {
  int64_t n_rows, row_length, num_completions;
  const int64_t* tokens;
  const uint8_t* mask;        // null: all rows count
  const int64_t* completion;  // null: rows lie in order, row_length of each completion
#define X(name, place) Knob<R> name;
  MDPGRPO_KNOBS(X)
#undef X
#define X(name) const float* name;  // null: not given
  MDPGRPO_PER_ROW(X)
#undef X

  MDPGRPO_INLINE bool kept(int64_t row) const { return mask == nullptr || mask[row] != 0; }
  MDPGRPO_INLINE bool known(int64_t row) const {
    const int64_t c = completion == nullptr ? row / row_length : completion[row];
    return c >= 0 && c < num_completions;
  }
  // The completion of a row; an unknown one becomes 0, and the caller makes its row NaN.
  MDPGRPO_INLINE int64_t completion_of(int64_t row) const {
    return !known(row) ? 0 : completion == nullptr ? row / row_length : completion[row];
  }
  // NaN where it is not above 0, which would give plausible numbers.
  MDPGRPO_INLINE R temperature_of(int64_t c, int64_t row) const {
    const R tau = temperature.at(c, row);
    return tau > R(0) ? tau : R(NAN);
  }
};

// The other members of Settings, with their places among its numbers and among its flags. 0 is "off" for softcap;
// estimator: 1, 2, 3, 4: k1, k2, k3, abs; aggregation: 0 grpo, 1 dapo, 2 dr_grpo, 3 bnpo, 4 seq_mean_token_sum;
// goal_mean: 0 half, 1 max_half_mean, 2 mean; loss: 0 ppo_clip, 1 cispo, 2 sapo, 3 gmpo, 4 vespo; scale: 0 group,
// 1 batch, 2 none.
// clang-format off
#define MDPGRPO_NUMBERS(X) \
  X(softcap, 4) X(kl_temperature, 5) \
  X(alpha, 6) X(prospect_beta, 7) X(prospect_gain, 8) X(prospect_loss, 9) X(kl_beta_pos, 10) X(kl_beta_neg, 11) \
  X(sapo_temperature_pos, 14) X(sapo_temperature_neg, 15) X(vespo_k_pos, 16) X(vespo_lambda_pos, 17) \
  X(vespo_k_neg, 18) X(vespo_lambda_neg, 19) X(off_policy_threshold, 20) X(advantage_clip, 21)
#define MDPGRPO_FLAGS(X) \
  X(bool, sequence, 0) X(int32_t, estimator, 1) X(int32_t, aggregation, 2) X(bool, rescale, 3) \
  X(bool, two_temperatures, 4) X(int64_t, group_size, 5) X(bool, sample_std, 6) X(int32_t, goal_mean, 7) \
  X(bool, binomial, 8) X(bool, prospect, 9) X(bool, prospect_on_goal, 10) X(int32_t, loss, 11) \
  X(bool, unbiased_kl, 12) X(bool, masks_off_policy, 13) X(int32_t, scale, 14) X(bool, leave_one_out, 15)
// clang-format on
constexpr int NUM_NUMBERS = 23, NUM_FLAGS = 16;  // of Settings

template <class R>
struct Settings {
#define X(name, place) R name;
  MDPGRPO_NUMBERS(X)
#undef X
#define X(type, name, place) type name;
  MDPGRPO_FLAGS(X)
#undef X
};

// ---- the objective of a token ---------------------------------------------------------------------------------------

// ρ = exp(log ρ), and dρ/dlog ρ, which is 0 where the exponent was clamped.
template <class R>
struct Ratio {
  R value, slope;
};

template <class R>
MDPGRPO_INLINE Ratio<R> importance_ratio(R log_ratio) {
  const bool over = log_ratio > R(RATIO_EXPONENT_MAX);
  const R ratio = exp(over ? R(RATIO_EXPONENT_MAX) : log_ratio);
  return {ratio, over ? R(0) : ratio};
}

// J = min(ρA, clip(ρ)A), ρ capped at delta first (0: no cap); dJ/dρ; whether the lower or the upper clip holds.
template <class R>
struct Clipped {
  R value, slope;
  bool low, high;
};

template <class R>
MDPGRPO_INLINE Clipped<R> clipped_objective(R ratio, R advantage, const Rows<R>& rows, int64_t c, int64_t row) {
  const R low = R(1) - rows.epsilon_low.at(c, row), high = R(1) + rows.epsilon_high.at(c, row);
  const R delta = rows.delta.at(c, row);
  if (is_nan(low) || is_nan(high) || is_nan(delta)) return {low + high + delta, advantage, false, false};
  // A NaN of the ratio stays one: both comparisons are false.
  R inside = ratio < low ? low : ratio;
  inside = inside > high ? high : inside;
  const bool capped = delta > R(0) && ratio > delta;
  const R clipped = inside * advantage;
  const R free = (capped ? delta : ratio) * advantage;
  const bool take = clipped < free;  // the unclipped branch where both are equal
  const R free_slope = capped ? R(0) : advantage;
  return {take ? clipped : free, take ? (inside == ratio ? advantage : R(0)) : free_slope,
          advantage < R(0) && ratio<low, advantage> R(0) && ratio > high};
}

// The KL estimate, its derivative with respect to ℓ, and whether k3's exponent was clamped (derivative 0).
template <class R>
struct KL {
  R value, slope;
  bool clamped;
};

template <class R>
MDPGRPO_INLINE KL<R> kl_penalty(R logprob, R ref_logprob, int32_t estimator) {
  const R d = ref_logprob - logprob;
  if (estimator == 1) return {-d, d * R(0) + R(1), false};
  if (estimator == 2) return {d * d / R(2), -d, false};
  const bool over = d > R(KL_EXPONENT_MAX);
  const R capped = over ? R(KL_EXPONENT_MAX) : d, e = exp(capped);
  return {e - capped - R(1), over ? R(0) : R(1) - e, over};
}

// What one token adds, before the share of an aggregation, with the derivatives for ℓ and for ℓ at the KL's τ.
template <class R>
struct Token {
  R loss, c, kl, c_kl, ratio;
  bool clipped_low, clipped_high, kl_clamped;
};

// What multiplies J: the importance weight, and τ where the policy term is rescaled.
template <class R>
MDPGRPO_INLINE R policy_weight(const Rows<R>& rows, const Settings<R>& settings, int64_t row, R tau) {
  return (rows.importance_weight == nullptr ? R(1) : R(rows.importance_weight[row])) * (settings.rescale ? tau : R(1));
}

// coupled_ratio, coupled_slope: at sequence level ρ and -c are the completion's.
template <class R>
MDPGRPO_INLINE Token<R> token_objective(const Rows<R>& rows, const Settings<R>& settings, int64_t c, int64_t row, R tau,
                                        R logprob, R kl_logprob, R coupled_ratio, R coupled_slope) {
  Ratio<R> ratio = {R(1), R(1)};
  if (settings.sequence)
    ratio.value = coupled_ratio;
  else if (rows.old_logprobs != nullptr)
    ratio = importance_ratio(logprob - R(rows.old_logprobs[row]));
  const Clipped<R> j = clipped_objective(ratio.value, rows.advantage.at(c, row), rows, c, row);
  const R weight = policy_weight(rows, settings, row, tau);
  Token<R> out;
  out.loss = -weight * j.value;
  out.c = settings.sequence ? -coupled_slope : -weight * j.slope * ratio.slope;
  // On-policy the ratio is 1 whatever ℓ is: a NaN must not get lost on the way.
  if (is_nan(logprob)) out.loss = out.c = logprob;
  out.ratio = ratio.value;
  out.clipped_low = j.low;
  out.clipped_high = j.high;
  out.kl = out.c_kl = R(0);
  out.kl_clamped = false;
  if (rows.ref_logprobs != nullptr) {
    const R beta = rows.kl_beta.at(c, row);
    const KL<R> kl = kl_penalty(kl_logprob, R(rows.ref_logprobs[row]), settings.estimator);
    out.kl = kl.value;
    out.loss += beta * kl.value;
    out.c_kl = beta * kl.slope;
    out.kl_clamped = kl.clamped;
  }
  return out;
}

// What the aggregation multiplies a token's loss by; length: the tokens of its completion, 1 but for mean of means.
template <class R>
MDPGRPO_INLINE R token_share(R denominator, R length) {
  if (is_nan(denominator)) return denominator;
  return R(1) / ((denominator < R(1) ? R(1) : denominator) * length);
}

}  // namespace mdpgrpo
