// A row of logits as the ops take it: found in a checked tensor, read once, written once. Rows in parallel.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../torch_abi.h"
#include "rows.h"

namespace mdpgrpo {

constexpr double LOG2E = 1.4426950408889634074;
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t GRAIN = 1 << 15;  // logits that are worth a thread

template <class F>
void parallel(int64_t n, int64_t grain, const F& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  check(torch_parallel_for(0, n, std::max<int64_t>(grain, 1), call, const_cast<F*>(&body)) == 0, "a thread has failed");
}

// (B, L, V), unit stride in V, as rows.
struct Logits {
  char* data;
  int64_t batch, length, vocab, stride_b, stride_l, item;
  Element element;

  Logits(const Tensor& t) {
    check(t.dim() == 3, t.name(), " must have 3 dimensions, not ", std::to_string(t.dim()));
    check(t.size(2) == 1 || t.stride(2) == 1, t.name(), " must have unit stride in the vocabulary");
    check(t.dtype() == DType::float32 || t.dtype() == DType::bfloat16 || t.dtype() == DType::float16, t.name(),
          " must be float32, bfloat16 or float16, not ", name_of(t.dtype()));
    element = t.dtype() == DType::float32 ? F32 : t.dtype() == DType::bfloat16 ? BF16 : F16;
    item = element == F32 ? 4 : 2;
    data = static_cast<char*>(t.data());
    batch = t.size(0), length = t.size(1), vocab = t.size(2);
    stride_b = t.stride(0), stride_l = t.stride(1);
    check(vocab > 0 || rows() == 0, t.name(), " has an empty vocabulary");
  }
  int64_t rows() const { return batch * length; }
  const void* after(int64_t i) const { return row(i + 1 < rows() ? i + 1 : i); }
  void* row(int64_t i) const { return data + (i / length * stride_b + i % length * stride_l) * item; }
};

// A row of the logits: read, and, if asked, kept for being written.
struct Row {
  RowStatistics statistics;
  Logit own;
  int64_t token;  // -1: none in this row
  double k, k_kl;
  float logprob;
};

class Sweep {
 public:
  // logit_floor, of each row: what is under it, and under the token's own z, is in no softmax but the KL's.
  Sweep(const Logits& logits, const int64_t* tokens, const RowOptions& options, double kl_temperature,
        const float* logit_floor = nullptr)
      : logits_(logits), tokens_(tokens), logit_floor_(logit_floor), options_(options), k_kl_(LOG2E / kl_temperature),
        scratch_(new float[static_cast<size_t>(scratch_floats(options)) + 16]) {
    scratch_start_ = scratch_.get();
    while (reinterpret_cast<uintptr_t>(scratch_start_) % 64 != 0) ++scratch_start_;
  }
  Row read(int64_t row, double tau, bool known) const {
    const void* const x = logits_.row(row);
    Row r;
    r.token = tokens_[row] >= 0 && tokens_[row] < logits_.vocab ? tokens_[row] : -1;
    r.own = r.token >= 0 ? at(row, r.token) : Logit{NOT_A_NUMBER, 1};
    if (!known) r.own.z = NOT_A_NUMBER;
    r.k = LOG2E / tau, r.k_kl = k_kl_;
    RowStatistics& s = r.statistics;
    s = kernels_.read[logits_.element](x, options_, r.k, k_kl_, least(row, r.own.z), scratch_start_);
    // As they are returned: whoever computes ℓ from them comes to the same bits.
    s.log_total = static_cast<float>(s.log_total), s.log_total_kl = static_cast<float>(s.log_total_kl);
    // As it is returned: with it as the old one, the ratio is exactly 1.
    r.logprob = static_cast<float>((r.own.z - s.peak) / tau - s.log_total);
    return r;
  }
  // ℓ at the KL's temperature.
  float kl_logprob(const Row& r, double kl_temperature) const {
    const RowStatistics& s = r.statistics;
    return options_.two_temperatures ? static_cast<float>((r.own.z - s.peak) / kl_temperature - s.log_total_kl)
                                     : r.logprob;
  }
  // a (onehot - p) + a_kl (onehot - p_kl) + bonus p (log p + H) of the row that was read last.
  void write(void* out, Element element, const Row& r, double a, double a_kl, double bonus, bool streaming,
             const void* next) const {
    const RowStatistics& s = r.statistics;
    const double d = r.own.z - s.peak;
    double own = -a * std::expm1(d * r.k / LOG2E - s.log_total);
    if (options_.two_temperatures) own -= a_kl * std::expm1(d * r.k_kl / LOG2E - s.log_total_kl);
    if (bonus != 0) {
      const double logprob = d * r.k / LOG2E - s.log_total, p = std::exp(logprob);
      own += p == 0 ? 0 : bonus * p * (logprob + s.entropy);  // -inf has none of it
    }
    kernels_.write[element](out, options_, r.k, r.k_kl, s, {a, a_kl, bonus, own * r.own.slope, r.token}, scratch_start_,
                            streaming, next);
  }

  Logit at(int64_t row, int64_t column) const {
    return kernels_.at[logits_.element](logits_.row(row), column, options_.softcap);
  }

  // Of the row that was read last, if it was kept, in blocks of BLOCK columns: exp2(k (z - the block's peak)), and the
  // peaks.
  const float* exponentials() const { return scratch_start_; }
  const float* peaks() const {
    return scratch_start_ + (1 + options_.two_temperatures + (options_.softcap > 0)) * blocks() * BLOCK;
  }
  int64_t blocks() const { return (options_.vocab + BLOCK - 1) / BLOCK; }
  int64_t width(int64_t block) const { return std::min(BLOCK, options_.vocab - block * BLOCK); }

 private:
  // The smallest z of a row's support; nothing is below a NaN.
  float least(int64_t row, double own) const {
    if (logit_floor_ == nullptr) return -HUGE_VALF;
    const float floor = logit_floor_[row], z = static_cast<float>(own);
    return floor > z ? z : z == z ? floor : z;
  }

  const RowKernels& kernels_ = row_kernels();
  const Logits& logits_;
  const int64_t* tokens_;
  const float* logit_floor_;
  RowOptions options_;
  double k_kl_;
  std::unique_ptr<float[]> scratch_;
  float* scratch_start_;
};

}  // namespace mdpgrpo
