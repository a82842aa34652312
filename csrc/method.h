// The rows' inputs and the method of a token, once for the CPU and for CUDA. Names are those of
// mdpgrpo_fast/kernels/schemas.py (Rows, Settings) and of mdpgrpo_fast/reference/ (the equations).
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
constexpr double VESPO_LOG_MIN = -18.420680743952367, VESPO_LOG_MAX = 20.0;  // of 1e-8

enum Loss : int32_t { PPO_CLIP, CISPO, SAPO, GMPO, VESPO };
enum Scale : int32_t { BY_GROUP, BY_BATCH, UNSCALED };

// Not std::isnan: nothing here may be compiled away under any flag of a compiler.
template <class R>
MDPGRPO_INLINE bool is_nan(R x) {
  return !(x == x);
}

// A NaN stays one: both comparisons are false.
template <class R>
MDPGRPO_INLINE R clamped(R x, R low, R high) {
  const R above = x < low ? low : x;
  return above > high ? high : above;
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

// Members of Rows: knobs have one value per completion or per row, or are a number, the one at this place of Settings
// (-1: none); the others have one per row.
#define MDPGRPO_KNOBS(X) \
  X(advantage, -1)       \
  X(kl_beta, -1)         \
  X(temperature, 0) X(epsilon_low, 1) X(epsilon_high, 2) X(delta, 3) X(entropy_coef, 12) X(entropy_floor, 13)
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
  // Whether there is an entropy bonus at all, whose gradient is a term of its own.
  MDPGRPO_INLINE bool has_bonus() const { return entropy_coef.each != nullptr || entropy_coef.number != R(0); }
  MDPGRPO_INLINE bool has_floor() const { return entropy_floor.each != nullptr || entropy_floor.number != R(0); }
  // ℓ of the policy that completions were drawn from, if it is known.
  MDPGRPO_INLINE const float* sampler() const {
    return sampling_logprobs == nullptr ? old_logprobs : sampling_logprobs;
  }
};

// The other members of Settings, with their places among its numbers and among its flags. 0 is "off" for softcap;
// estimator: 1, 2, 3, 4: k1, k2, k3, abs; aggregation: 0 grpo, 1 dapo, 2 dr_grpo, 3 bnpo, 4 seq_mean_token_sum;
// goal_mean: 0 half, 1 max_half_mean, 2 mean; loss and scale: Loss and Scale. A number that is not here,
// top_entropy_quantile, has become an entropy_floor before a kernel is called.
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

  // What the tokens of a completion share beside its length: see Coupled.
  MDPGRPO_INLINE bool couples_slope() const { return sequence || loss == GMPO; }
  MDPGRPO_INLINE bool couples_ratio() const { return couples_slope() || loss == VESPO; }
  MDPGRPO_INLINE bool couples_drift(const Rows<R>& rows) const { return masks_off_policy && rows.sampler() != nullptr; }
  // Whether anything is asked for beyond the clipped objective of ratios, and a KL penalty as it is.
  MDPGRPO_INLINE bool extended(const Rows<R>& rows) const {
    return loss != PPO_CLIP || unbiased_kl || couples_drift(rows) || rows.has_bonus() || rows.has_floor();
  }
  // Whether that needs ℓ of all of them, or their entropy, before the objective of any.
  bool first_pass(const Rows<R>& rows) const {
    const bool floor = rows.has_floor();
    return (couples_ratio() && rows.old_logprobs != nullptr) || couples_drift(rows) ||
           (couples_slope() && loss != CISPO && floor) || (sequence && unbiased_kl && rows.ref_logprobs != nullptr);
  }
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

// ℓ - ℓ_old, 0 on-policy.
template <class R>
MDPGRPO_INLINE R log_ratio_of(const Rows<R>& rows, int64_t row, R logprob) {
  return rows.old_logprobs == nullptr ? R(0) : logprob - R(rows.old_logprobs[row]);
}

// What the tokens of a completion share. ratio: at sequence level its ρ, for gmpo its R, for vespo its log w; slope:
// through ρ or R, and at sequence level ρ of an unbiased KL too, each token's -∂loss/∂ℓ; drift: the mean of its tokens'
// ℓ_sampling - ℓ.
template <class R>
struct Coupled {
  R ratio = R(1), slope = R(0), drift = R(0);
};

// J; dJ/dρ, of gmpo dJ/dR; where J has ℓ itself as a factor, the other one; whether the lower or the upper clip holds.
template <class R>
struct Policy {
  R value, slope, direct;
  bool low, high;
};

// J = min(ρA, clip(ρ)A), ρ capped at delta first (0: no cap).
template <class R>
MDPGRPO_INLINE Policy<R> clipped_objective(R ratio, R advantage, const Rows<R>& rows, int64_t c, int64_t row) {
  const R low = R(1) - rows.epsilon_low.at(c, row), high = R(1) + rows.epsilon_high.at(c, row);
  const R delta = rows.delta.at(c, row);
  if (is_nan(low) || is_nan(high) || is_nan(delta)) return {low + high + delta, advantage, R(0), false, false};
  const R inside = clamped(ratio, low, high);
  const bool capped = delta > R(0) && ratio > delta;
  const R clipped = inside * advantage;
  const R free = (capped ? delta : ratio) * advantage;
  const bool take = clipped < free;  // the unclipped branch where both are equal
  const R free_slope = capped ? R(0) : advantage;
  return {take ? clipped : free, take ? (inside == ratio ? advantage : R(0)) : free_slope, R(0),
          advantage < R(0) && ratio<low, advantage> R(0) && ratio > high};
}

// J = clip(ρ) A ℓ, clip(ρ) a constant.
template <class R>
MDPGRPO_INLINE Policy<R> cispo_objective(R ratio, R advantage, R logprob, const Rows<R>& rows, int64_t c, int64_t row) {
  const R low = R(1) - rows.epsilon_low.at(c, row), high = R(1) + rows.epsilon_high.at(c, row);
  const R weight = is_nan(low) || is_nan(high) ? low + high : clamped(ratio, low, high);
  return {weight * advantage * logprob, R(0), weight * advantage,
          advantage < R(0) && ratio<low, advantage> R(0) && ratio > high};
}

// J = (4 / τ) sigmoid(τ (ρ - 1)) A, τ by the sign of A.
template <class R>
MDPGRPO_INLINE Policy<R> sapo_objective(R ratio, R advantage, const Settings<R>& settings) {
  const R tau = advantage > R(0) ? settings.sapo_temperature_pos : settings.sapo_temperature_neg;
  const R s = R(1) / (R(1) + exp(-tau * (ratio - R(1))));
  return {s * R(4) / tau * advantage, R(4) * s * (R(1) - s) * advantage, R(0), false, false};
}

// log ρ of a token, at most ε_high where A > 0, at least -ε_low where A < 0.
template <class R>
struct Bounded {
  R value;
  bool low, high;
};

template <class R>
MDPGRPO_INLINE Bounded<R> gmpo_log_ratio(R log_ratio, R advantage, const Rows<R>& rows, int64_t c, int64_t row) {
  const R low = -rows.epsilon_low.at(c, row), high = rows.epsilon_high.at(c, row);
  if (is_nan(low) || is_nan(high)) return {low + high, false, false};
  const bool is_low = log_ratio < low && advantage<R(0), is_high = log_ratio> high && advantage > R(0);
  return {is_low ? low : is_high ? high : log_ratio, is_low, is_high};
}

// What a token adds to log w of its completion.
template <class R>
inline R vespo_log_weight(R log_ratio, const Rows<R>& rows, int64_t row) {
  const R bounded = clamped(log_ratio, -R(VESPO_LOG_MAX), R(VESPO_LOG_MAX));
  if (rows.importance_weight == nullptr) return bounded;
  return bounded + clamped(R(log(R(rows.importance_weight[row]))), R(VESPO_LOG_MIN), R(VESPO_LOG_MAX));
}

// J = exp(λ + k log w - λ w) A ℓ, w a constant, k and λ by the sign of A.
template <class R>
MDPGRPO_INLINE Policy<R> vespo_objective(R log_weight, R advantage, R logprob, const Settings<R>& settings) {
  const bool positive = advantage >= R(0);
  const R k = positive ? settings.vespo_k_pos : settings.vespo_k_neg;
  const R rate = positive ? settings.vespo_lambda_pos : settings.vespo_lambda_neg;
  const R weight = exp(rate + k * log_weight - rate * exp(log_weight));
  return {weight * advantage * logprob, R(0), weight * advantage, false, false};
}

// ratio: of the token, or at sequence level of its completion.
template <class R>
MDPGRPO_INLINE Policy<R> policy_objective(const Rows<R>& rows, const Settings<R>& settings, int64_t c, int64_t row,
                                          R logprob, R ratio, R coupled_ratio) {
  const R advantage = rows.advantage.at(c, row);
  if (settings.loss == CISPO) return cispo_objective(ratio, advantage, logprob, rows, c, row);
  if (settings.loss == SAPO) return sapo_objective(ratio, advantage, settings);
  if (settings.loss == GMPO) {
    const Bounded<R> own = gmpo_log_ratio(log_ratio_of(rows, row, logprob), advantage, rows, c, row);
    return {coupled_ratio * advantage, advantage, R(0), own.low, own.high};
  }
  if (settings.loss == VESPO) return vespo_objective(coupled_ratio, advantage, logprob, settings);
  return clipped_objective(ratio, advantage, rows, c, row);
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
  if (estimator == 4) return {d < R(0) ? -d : d, d > R(0) ? R(-1) : d < R(0) ? R(1) : d, false};
  const bool over = d > R(KL_EXPONENT_MAX);
  const R capped = over ? R(KL_EXPONENT_MAX) : d, e = exp(capped);
  return {e - capped - R(1), over ? R(0) : R(1) - e, over};
}

// What one token adds, before the share of an aggregation, with the derivatives for ℓ, for ℓ at the KL's τ, and, with
// the sign of a bonus, for the entropy.
template <class R>
struct Token {
  R loss, c, kl, c_kl, bonus, ratio;
  bool clipped_low, clipped_high, kl_clamped;
};

// Whether the entropy is not under its floor, if it has one: an entropy of 0 may have been rounded to less.
template <class R>
MDPGRPO_INLINE bool entropy_gate(const Rows<R>& rows, int64_t c, int64_t row, R entropy) {
  const R floor = rows.entropy_floor.at(c, row);
  return !(floor > R(0) && entropy < floor);
}

// What multiplies J: the importance weight, which vespo has in its own, τ where the policy term is rescaled, and the
// gates: 0 for a token of too little entropy, and for those of a completion with A < 0 that is too far off-policy.
template <class R>
MDPGRPO_INLINE R policy_weight(const Rows<R>& rows, const Settings<R>& settings, int64_t c, int64_t row, R tau,
                               R entropy, R drift) {
  const R weight = rows.importance_weight == nullptr || settings.loss == VESPO ? R(1) : R(rows.importance_weight[row]);
  const bool left_out =
      settings.couples_drift(rows) && rows.advantage.at(c, row) < R(0) && drift > settings.off_policy_threshold;
  return weight * (settings.rescale ? tau : R(1)) * (left_out || !entropy_gate(rows, c, row, entropy) ? R(0) : R(1));
}

template <class R>
MDPGRPO_INLINE Token<R> token_objective(const Rows<R>& rows, const Settings<R>& settings, int64_t c, int64_t row, R tau,
                                        R logprob, R kl_logprob, R entropy, const Coupled<R>& coupled) {
  Ratio<R> ratio = {R(1), R(1)};
  if (settings.sequence)
    ratio = {coupled.ratio, R(0)};  // its slope is in the coupled one
  else if (rows.old_logprobs != nullptr)
    ratio = importance_ratio(logprob - R(rows.old_logprobs[row]));
  const Policy<R> j = policy_objective(rows, settings, c, row, logprob, ratio.value, coupled.ratio);
  const R weight = policy_weight(rows, settings, c, row, tau, entropy, coupled.drift);
  Token<R> out;
  out.loss = -weight * j.value;
  if (!settings.couples_slope())
    out.c = -weight * j.slope * ratio.slope;
  else
    out.c = settings.loss == GMPO && (j.low || j.high) ? R(0) : -coupled.slope;
  if (settings.loss == CISPO || settings.loss == VESPO) out.c -= weight * j.direct;
  // A token that the policy cannot have drawn, or that a NaN is about: no term of it, however bounded, hides that.
  if (!(logprob > R(-HUGE_VAL))) out.loss = out.c = R(NAN);
  out.ratio = settings.loss == GMPO ? coupled.ratio : ratio.value;
  out.clipped_low = j.low;
  out.clipped_high = j.high;
  out.bonus = rows.entropy_coef.at(c, row) * (entropy_gate(rows, c, row, entropy) ? R(1) : R(0));
  if (out.bonus != R(0)) out.loss -= out.bonus * entropy;
  out.kl = out.c_kl = R(0);
  out.kl_clamped = false;
  if (rows.ref_logprobs != nullptr) {
    const R beta = rows.kl_beta.at(c, row);
    const KL<R> kl = kl_penalty(kl_logprob, R(rows.ref_logprobs[row]), settings.estimator);
    const R factor = settings.unbiased_kl ? ratio.value : R(1);
    out.kl = kl.value * factor;
    out.loss += beta * out.kl;
    out.c_kl = beta * kl.slope * factor;
    if (settings.unbiased_kl) out.c += beta * kl.value * ratio.slope;
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
