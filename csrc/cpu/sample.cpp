// A token a row from the row's distribution, truncated or not, or the most likely one: one read of the logits.
#include "sample.h"

#include <vector>

#include "sweep.h"

namespace mdpgrpo {
namespace {

// What is left of a distribution, in this order: 0, 1 and 0 for all of it.
struct Truncation {
  int64_t top_k;
  double top_p, min_p;
  bool any(int64_t vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1 || min_p > 0; }
};

// The first of `count` with which the running sum of weight(i) exceeds the target, or the last above 0; -1: none is.
// before: the sum so far, and then the sum before the one that is returned.
template <class F>
int64_t first_over(double target, double& before, int64_t count, const F& weight) {
  int64_t found = -1;
  double running = before;
  for (int64_t i = 0; i < count && running <= target; ++i) {
    const double w = weight(i);
    if (w > 0) found = i, before = running;
    running += w;
  }
  return found;
}

// u in [0, 1) of a sum: below it also after rounding.
double share(double u, double total) { return std::min(u, 1 - 0x1p-53) * total; }

// What the exponentials of a block are multiplied by, to be exp((z - peak) / τ).
double factor(const Sweep& sweep, const Row& r, int64_t block) {
  return std::exp2(r.k * (sweep.peaks()[block] - r.statistics.peak));
}

// Of a row that was read and kept: the first column where the running sum of exp(z / τ) exceeds u of the whole. One of
// probability 0 never does; 0 of a row without a number.
int64_t draw(const Sweep& sweep, const Row& r, double u) {
  std::vector<double> sums(static_cast<size_t>(sweep.blocks()));
  double total = 0;
  for (int64_t b = 0; b < sweep.blocks(); ++b) {
    double parts[8] = {}, sum = 0;
    for (int64_t i = 0; i < sweep.width(b); ++i) parts[i % 8] += sweep.exponentials()[b * BLOCK + i];
    for (const double part : parts) sum += part;
    total += sums[static_cast<size_t>(b)] = sum * factor(sweep, r, b);
  }
  const double target = share(u, total);
  double before = 0;
  const int64_t own =
      first_over(target, before, sweep.blocks(), [&](int64_t b) { return sums[static_cast<size_t>(b)]; });
  if (own < 0) return 0;
  const double weight = factor(sweep, r, own);
  const float* const e = sweep.exponentials() + own * BLOCK;
  const int64_t place = first_over(target, before, sweep.width(own), [&](int64_t i) { return e[i] * weight; });
  return own * BLOCK + std::max<int64_t>(place, 0);
}

// What truncation leaves of a row: Σ exp((z - peak) / τ), which share of all columns' it is, the last column that is
// left, in the order of their likelihood, and the first that is not, -1: all are.
struct Support {
  double total = NOT_A_NUMBER, share = NOT_A_NUMBER;
  int64_t last = 0, next = -1;
};

// As `draw`, of the columns that truncation leaves, the most likely first; of a row without a number nothing is.
int64_t draw_truncated(const Sweep& sweep, const Row& r, double u, const Truncation& truncation, Support& support) {
  std::vector<double> weights;
  std::vector<int64_t> ids;
  double all = 0;
  for (int64_t b = 0; b < sweep.blocks(); ++b) {
    const double weight = factor(sweep, r, b);
    for (int64_t i = b * BLOCK; i < b * BLOCK + sweep.width(b); ++i) {
      weights.push_back(sweep.exponentials()[i] * weight);
      ids.push_back(i);
      all += weights.back();
    }
  }
  if (!(all > 0)) return 0;
  const double whole = all;
  const auto weight_of = [&](int64_t id) { return weights[static_cast<size_t>(id)]; };
  const auto at = [&](int64_t place) { return weight_of(ids[static_cast<size_t>(place)]); };
  const auto likelier = [&](int64_t a, int64_t b) {
    const double x = weight_of(a), y = weight_of(b);
    return x > y || (x == y && a < b);
  };
  const auto first = ids.begin();
  int64_t size = static_cast<int64_t>(ids.size());  // columns that are left
  int64_t sorted = 0;                               // and how many of them are in order, at the beginning
  const auto sort_to = [&](int64_t end) {
    end = std::min(end, size);
    if (end <= sorted) return;
    if (end < size) std::nth_element(first + sorted, first + end, first + size, likelier);
    std::sort(first + sorted, first + end, likelier);
    sorted = end;
  };
  if (truncation.top_k > 0 && truncation.top_k < size) {
    sort_to(truncation.top_k);
    size = truncation.top_k;
    all = 0;
    for (int64_t i = 0; i < size; ++i) all += at(i);
  }
  sort_to(64);
  const double least = truncation.min_p * at(0);
  // One goes, with all after it, where those before it hold top_p, or it is less likely than min_p of the first.
  int64_t left = 0;
  double total = 0;
  for (; left < size; ++left) {
    if (left == sorted) sort_to(4 * sorted);
    if (left > 0 && (total >= truncation.top_p * all || at(left) < least || at(left) == 0)) break;
    total += at(left);
  }
  support.total = total, support.share = std::min(total / whole, 1.0);  // sums in another order are rounded otherwise
  support.last = ids[static_cast<size_t>(left - 1)];
  // Behind those that top-k left there is no order.
  if (left < size)
    support.next = ids[static_cast<size_t>(left)];
  else if (first + size != ids.end())
    support.next = *std::min_element(first + size, ids.end(), likelier);
  double before = 0;
  return ids[static_cast<size_t>(first_over(share(u, total), before, left, at))];
}

// The first column of the largest logit of a row that was read and kept; 0 of a row without a number.
int64_t first_of_peak(const Sweep& sweep, int64_t row, const Row& r) {
  for (int64_t b = 0; b < sweep.blocks(); ++b) {
    if (sweep.peaks()[b] != r.statistics.peak) continue;
    for (int64_t i = b * BLOCK; i < b * BLOCK + sweep.width(b); ++i)
      if (sweep.exponentials()[i] == 1.0f && sweep.at(row, i).z == r.statistics.peak) return i;
  }
  return 0;
}

}  // namespace

const char* const SAMPLE =
    "(Tensor logits, Tensor temperature, Tensor noise, Tensor truncation, Tensor(a!) tokens, Tensor(b!) logprobs) -> "
    "()";

// One token a row, its log-probs under what it was drawn from and at temperature 1, the log of the share of its row's
// probability that truncation left, and a logit between those that it left and the others; without temperatures the
// most likely one. truncation: top_k, top_p, min_p; noise: uniform in [0, 2⁵³).
void sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack, aoti_torch_device_type_cpu());
  const Tensor logits_ = args.tensor("logits"), temperature_ = args.tensor("temperature"),
               noise_ = args.tensor("noise"), truncation_ = args.tensor("truncation"), tokens_ = args.tensor("tokens"),
               logprobs_ = args.tensor("logprobs");
  const Logits logits(logits_);
  const int64_t n = logits.rows();
  const float* const temperature = elements<float>(temperature_, n, true);
  const double* const given = elements<double>(truncation_, 3);
  const Truncation truncation{static_cast<int64_t>(given[0]), given[1], given[2]};
  const int64_t* const noise = elements<int64_t>(noise_, n, temperature == nullptr);
  int64_t* const tokens = elements<int64_t>(tokens_, n);
  float* const out = elements<float>(logprobs_, 4 * n);
  const RowOptions options{logits.vocab, 0, temperature != nullptr, true};
  parallel(n, GRAIN / std::max<int64_t>(logits.vocab, 1), [&](int64_t begin, int64_t end) {
    const Sweep sweep(logits, tokens, options, 1);
    for (int64_t row = begin; row < end; ++row) {
      tokens[row] = 0;
      const double tau = temperature == nullptr ? 1 : temperature[row] > 0 ? temperature[row] : NOT_A_NUMBER;
      const Row r = sweep.read(row, tau, true);
      const RowStatistics& s = r.statistics;
      const double u = temperature == nullptr ? 0 : static_cast<double>(noise[row]) * 0x1p-53;
      double log_total = s.log_total, kept = 1, floor = -HUGE_VAL;
      if (temperature == nullptr) {
        tokens[row] = first_of_peak(sweep, row, r);
      } else if (truncation.any(logits.vocab)) {
        Support support;
        tokens[row] = draw_truncated(sweep, r, u, truncation, support);
        log_total = std::log(support.total), kept = support.share;
        // Halfway, so that logits that are rounded otherwise elsewhere stay on their side.
        if (support.next >= 0) floor = (sweep.at(row, support.last).z + sweep.at(row, support.next).z) / 2;
      } else {
        tokens[row] = draw(sweep, r, u);
      }
      const double gap = sweep.at(row, tokens[row]).z - s.peak;
      out[row] = static_cast<float>(gap / tau - log_total);
      out[n + row] = temperature == nullptr ? out[row] : static_cast<float>(gap - s.log_total_kl);
      out[2 * n + row] = static_cast<float>(std::log(kept));
      out[3 * n + row] = static_cast<float>(floor);
    }
  });
}

}  // namespace mdpgrpo
