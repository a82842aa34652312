// The scalars of the method: what METHOD.md says of a group and of a token, once for the CPU and for CUDA.
// Mirrors mdpgrpo_fast/reference.py, whose names it keeps.
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

// ρ = exp(log ρ), and dρ/dlog ρ, which is 0 where the exponent was clamped.
template <class R>
struct Ratio {
  R value, slope;
};

template <class R>
MDPGRPO_INLINE Ratio<R> ratio_of(R log_ratio) {
  const bool over = log_ratio > R(RATIO_EXPONENT_MAX);
  const R ratio = exp(over ? R(RATIO_EXPONENT_MAX) : log_ratio);
  return {ratio, over ? R(0) : ratio};
}

// J = min(ρA, clip(ρ)A), ρ capped at delta first (0: no cap); dJ/dρ; whether the lower or the upper clip holds.
template <class R>
struct Policy {
  R value, slope;
  bool clipped_low, clipped_high;
};

template <class R>
MDPGRPO_INLINE Policy<R> policy_of(R ratio, R advantage, R epsilon_low, R epsilon_high, R delta) {
  const R low = R(1) - epsilon_low, high = R(1) + epsilon_high;
  if (is_nan(low) || is_nan(high)) return {low + high, advantage, false, false};
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
MDPGRPO_INLINE KL<R> kl_of(R logprob, R ref_logprob, int64_t estimator) {
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

template <class R>
struct TokenInputs {
  R logprob, kl_logprob;
  bool has_old, has_ref, sequence;
  R old_logprob, ref_logprob, weight;  // weight: importance weight, times τ where the policy term is rescaled
  R sequence_ratio, sequence_slope;    // at sequence level ρ and -c are the completion's
  R advantage, beta, epsilon_low, epsilon_high, delta;
  int64_t estimator;
};

template <class R>
MDPGRPO_INLINE Token<R> token_of(const TokenInputs<R>& in) {
  Ratio<R> ratio = {R(1), R(1)};
  if (in.sequence)
    ratio.value = in.sequence_ratio;
  else if (in.has_old)
    ratio = ratio_of(in.logprob - in.old_logprob);
  const Policy<R> j = policy_of(ratio.value, in.advantage, in.epsilon_low, in.epsilon_high, in.delta);
  Token<R> out;
  out.loss = -in.weight * j.value;
  out.c = in.sequence ? -in.sequence_slope : -in.weight * j.slope * ratio.slope;
  // On-policy the ratio is 1 whatever ℓ is: a NaN must not get lost on the way.
  if (is_nan(in.logprob)) out.loss = out.c = in.logprob;
  out.ratio = ratio.value;
  out.clipped_low = j.clipped_low;
  out.clipped_high = j.clipped_high;
  out.kl = out.c_kl = R(0);
  out.kl_clamped = false;
  if (in.has_ref) {
    const KL<R> kl = kl_of(in.kl_logprob, in.ref_logprob, in.estimator);
    out.kl = kl.value;
    out.loss += in.beta * kl.value;
    out.c_kl = in.beta * kl.slope;
    out.kl_clamped = kl.clamped;
  }
  return out;
}

// What the aggregation multiplies a token's loss by; length: the tokens of its completion, 1 but for mean of means.
template <class R>
MDPGRPO_INLINE R share_of(R denominator, R length) {
  if (is_nan(denominator)) return denominator;
  return R(1) / ((denominator < R(1) ? R(1) : denominator) * length);
}

}  // namespace mdpgrpo
