// The method over the rows of a call: advantages of groups, what couples the tokens of a completion, what is said of
// each row, and the sums. Of one token it is method.h's.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../inputs.h"

namespace mdpgrpo {

// ---- advantages -----------------------------------------------------------------------------------------------------

struct Completion {
  float z = 0, delta = 0, advantage = 0, beta = 0;
};

// Statistics, anchors, A and KL coefficient of one prompt's G completions. In float32 on purpose, as the reference has
// float32 rewards: the mean of 1/6, 1/2, 5/6 is then 1/2, and the sign of A is not decided by the rounding of the
// rewards. batch_std: null but where z has the deviation of the batch.
inline void group_advantages(const float* rewards, const uint8_t* valid, float constraints, const float* batch_std,
                             const Settings<float>& s, float& mean, float& std_, Completion* out) {
  const int64_t size = s.group_size;
  const auto counts = [&](int64_t i) { return valid == nullptr || valid[i] != 0; };
  float n = 0, total = 0, top = -HUGE_VALF, bottom = HUGE_VALF;
  for (int64_t i = 0; i < size; ++i) {
    if (!counts(i)) continue;
    n += 1, total += rewards[i];
    top = std::max(top, rewards[i]), bottom = std::min(bottom, rewards[i]);
  }
  // Four units in the last place: equal rewards, summed in another order.
  const float unit = std::numeric_limits<float>::epsilon() * std::max(std::fabs(top), std::fabs(bottom));
  const bool constant = n == 0 || top - bottom <= 4 * unit;
  mean = constant && n > 0 ? top : total / std::max(n, 1.0f);
  mean += total - total;  // NaN where a reward is not finite
  float square = 0;
  for (int64_t i = 0; i < size; ++i)
    if (counts(i)) square += (rewards[i] - mean) * (rewards[i] - mean);
  std_ = constant ? 0 : std::sqrt(square / std::max(s.sample_std ? n - 1 : n, 1.0f));
  const float deviation = batch_std == nullptr ? std_ : *batch_std;
  const float scale = s.scale == UNSCALED ? 1.0f : s.sample_std ? deviation + 1e-4f : std::max(deviation, 1e-8f);
  // r less the mean of the others is r less that of all, times this.
  const float others = s.leave_one_out ? n / std::max(n - 1, 1.0f) : 1.0f;
  const float goal = s.goal_mean == 0 ? 0.5f : s.goal_mean == 1 ? (mean < 0.5f ? 0.5f : mean) : mean;
  const float k = constraints >= 1 ? constraints : std::numeric_limits<float>::quiet_NaN();
  const float goal_scale = std::sqrt((s.binomial ? 1.0f : static_cast<float>(size)) / (4 * k));
  const auto prospect_shape = [&](float v) {
    return (v < 0 ? s.prospect_loss : s.prospect_gain) * std::tanh(s.prospect_beta * v);
  };
  // Where no more than rounding is between r and a mean, the sign would be that of the rounding.
  const float noise = std::max(n, 4.0f) * unit;
  const float cancelled = 4 * std::numeric_limits<float>::epsilon() * std::max(n, 4.0f);
  const auto distance = [&](float r, float centre) { return std::fabs(r - centre) <= noise ? 0.0f : r - centre; };
  for (int64_t i = 0; i < size; ++i) {
    Completion c;
    if (counts(i)) {
      const float r = constant ? mean : rewards[i];
      c.z = constant ? 0 : distance(r, mean) / scale * others;
      c.delta = distance(r, goal) / goal_scale;
    }
    const float relative = s.prospect ? prospect_shape(c.z) : c.z;
    const float absolute = s.prospect && s.prospect_on_goal ? prospect_shape(c.delta) : c.delta;
    const float terms[2] = {(1 - s.alpha) * relative, s.alpha * absolute};
    c.advantage = terms[0] + terms[1];
    if (std::fabs(c.advantage) <= cancelled * (std::fabs(terms[0]) + std::fabs(terms[1]))) c.advantage = 0;
    if (s.advantage_clip != 0) c.advantage = clamped(c.advantage, -s.advantage_clip, s.advantage_clip);
    c.beta = c.advantage < 0 ? s.kl_beta_neg : s.kl_beta_pos;
    out[i] = c;
  }
}

// ---- the objective --------------------------------------------------------------------------------------------------

// What a first pass finds of a row, as it is returned.
struct Seen {
  float logprob = 0, entropy = 0, kl_logprob = 0;
};

struct Objective {
  Rows<double> rows;
  Settings<double> settings;
  std::vector<double> lengths;           // per completion
  std::vector<Coupled<double>> coupled;  // per completion

  Objective(const RowTensors& given, int64_t n, int64_t row_length, int64_t num_completions, bool knobs_per_row = false)
      : rows(given.rows<double>(n, row_length, num_completions, knobs_per_row)), settings(given.settings<double>()) {}

  // What couples the tokens of a completion: how many they are, and the rest. seen(row): what the first pass found.
  template <class F>
  void couple(const F& seen) {
    const size_t b = static_cast<size_t>(rows.num_completions);
    lengths.assign(b, 0), coupled.assign(b, {});
    const auto each_row = [&](const auto& body) {
      for (int64_t row = 0; row < rows.n_rows; ++row)
        if (rows.kept(row) && rows.known(row)) body(row, static_cast<size_t>(rows.completion_of(row)));
    };
    const bool drifts = settings.couples_drift(rows);
    if (!settings.couples_ratio() && !drifts) {
      each_row([&](int64_t, size_t c) { lengths[c] += 1; });
      return;
    }
    std::vector<double> exponent(b, 0.0);
    each_row([&](int64_t row, size_t c) {
      lengths[c] += 1;
      const double logprob = seen(row).logprob, own = log_ratio_of(rows, row, logprob);
      const int64_t i = static_cast<int64_t>(c);
      if (settings.loss == GMPO)
        exponent[c] += gmpo_log_ratio(own, rows.advantage.at(i, row), rows, i, row).value;
      else
        exponent[c] += settings.loss == VESPO ? vespo_log_weight(own, rows, row) : own;
      if (drifts) coupled[c].drift += rows.sampler()[row] - logprob;
    });
    std::vector<double> slope(b, 0.0);  // of ρ or R over tokens
    for (size_t c = 0; c < b; ++c) {
      const double n = std::max(lengths[c], 1.0);
      coupled[c].drift /= n;
      if (settings.couples_slope()) {
        const Ratio<double> whole = importance_ratio(exponent[c] / n);
        coupled[c].ratio = whole.value, slope[c] = whole.slope / n;
      } else if (settings.loss == VESPO) {
        coupled[c].ratio = clamped(exponent[c], VESPO_LOG_MIN, VESPO_LOG_MAX);
      }
    }
    if (!settings.couples_slope()) return;
    each_row([&](int64_t row, size_t c) {
      const int64_t i = static_cast<int64_t>(c);
      const Seen found = seen(row);
      const double logprob = found.logprob, tau = rows.temperature_of(i, row), ratio = coupled[c].ratio;
      if (settings.loss != CISPO)
        coupled[c].slope += policy_weight<double>(rows, settings, i, row, tau, found.entropy, coupled[c].drift) *
                            policy_objective(rows, settings, i, row, logprob, ratio, ratio).slope;
      if (settings.sequence && settings.unbiased_kl && rows.ref_logprobs != nullptr)
        coupled[c].slope -= rows.kl_beta.at(i, row) *
                            kl_penalty<double>(found.kl_logprob, rows.ref_logprobs[row], settings.estimator).value;
    });
    for (size_t c = 0; c < b; ++c) coupled[c].slope *= slope[c];
  }

  Token<double> at(int64_t row, int64_t c, double tau, const Seen& s) const {
    return token_objective<double>(rows, settings, c, row, tau, s.logprob, s.kl_logprob, s.entropy,
                                   coupled[static_cast<size_t>(c)]);
  }
  double share(double denominator, double length) const {
    return token_share(denominator, settings.aggregation == 0 ? length : 1.0);
  }
};

// The (5, N) rows and (3, N) marks that every caller returns.
struct Record {
  int64_t n;
  float* per_row;
  bool* marks;

  void masked(int64_t row) const {
    for (int64_t i = 0; i < 5; ++i) per_row[i * n + row] = i == 3 ? 1.0f : 0.0f;
    for (int64_t i = 0; i < 3; ++i) marks[i * n + row] = false;
  }
  void token(int64_t row, double logprob, double entropy, const Token<double>& t, double share) const {
    const double values[5] = {logprob, entropy, t.kl, t.ratio, share * t.loss};
    for (int64_t i = 0; i < 5; ++i) per_row[i * n + row] = static_cast<float>(values[i]);
    marks[row] = t.clipped_low, marks[n + row] = t.clipped_high, marks[2 * n + row] = t.kl_clamped;
  }
};

// Loss, mean KL of each completion, and the eight totals, in the order of the rows.
inline void sum_up(const Rows<float>& rows, const Record& record, float* loss, float* completion_kl, float* totals) {
  const int64_t n = record.n;
  std::vector<double> kl(static_cast<size_t>(rows.num_completions), 0.0), length = kl;
  double sums[8] = {}, total = 0, top = 0;
  for (int64_t row = 0; row < n; ++row) {
    if (!rows.kept(row)) continue;
    const float* const r = record.per_row + row;
    sums[0] += 1;
    sums[1] += r[2 * n], sums[2] += r[n], sums[5] += r[3 * n];
    sums[3] += record.marks[row], sums[4] += record.marks[n + row], sums[7] += record.marks[2 * n + row];
    top = std::max<double>(top, r[3 * n]);
    total += r[4 * n];
    if (!rows.known(row)) continue;
    kl[static_cast<size_t>(rows.completion_of(row))] += r[2 * n];
    length[static_cast<size_t>(rows.completion_of(row))] += 1;
  }
  for (size_t c = 0; c < kl.size(); ++c) completion_kl[c] = static_cast<float>(kl[c] / std::max(length[c], 1.0));
  const double tokens = std::max(sums[0], 1.0);
  const double out[8] = {
      sums[0], sums[1] / tokens, sums[2] / tokens, sums[3] / tokens, sums[4] / tokens, sums[5] / tokens, top, sums[7]};
  for (int i = 0; i < 8; ++i) totals[i] = static_cast<float>(out[i]);
  *loss = static_cast<float>(total);
}

}  // namespace mdpgrpo
