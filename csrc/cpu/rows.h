// A row of V logits: read once for its statistics, written once as its gradient. One implementation (rows.inl),
// compiled for several instruction sets; `row_kernels()` picks one at run time.
#pragma once

#include <cstdint>

// GCC alone: the wide variants are chosen by its target pragma. Elsewhere the compiler's own registers serve.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MDPGRPO_X86
#endif

namespace mdpgrpo {

// The columns that are worked on while they are in the first-level cache.
constexpr int64_t BLOCK = 2048;

enum Element { F32 = 0, BF16 = 1, F16 = 2 };

struct RowOptions {
  int64_t vocab;
  double softcap;         // 0: none
  bool two_temperatures;  // a second temperature, the KL's
  bool keep;              // the gradient will be written: keep the exponentials
};

// As in the Triton kernels: log Σ is that of exp((z - peak) / τ), z the logit after the soft-cap.
struct RowStatistics {
  double peak, log_total, entropy, log_total_kl;
};

// a (onehot - p) + a_kl (onehot - p_kl) + bonus p (log p + H) is to be written, with the entropy H of the row; `own` is
// its value at the token, -1: no token in this row.
struct RowWeights {
  double a, a_kl, bonus, own;
  int64_t token;
};

// Floats that a row needs to remember between being read and being written.
inline int64_t scratch_floats(const RowOptions& o) {
  const int64_t blocks = (o.vocab + BLOCK - 1) / BLOCK;
  return (1 + o.two_temperatures + (o.softcap > 0)) * blocks * BLOCK + blocks;
}

// z of one logit and dz/dx.
struct Logit {
  double z, slope;
};

struct RowKernels {
  const char* name;
  // With the arithmetic of the rows: the peak's own z is exactly the peak.
  Logit (*at[3])(const void* row, int64_t column, double softcap);
  // k = log2(e) / τ. Into scratch: exp2(k (z - peak of the block)), and what the soft-cap does to a gradient.
  // least: what is below it is in no sum but the KL's, and its exponential is 0; at most the peak, -inf: all are in.
  RowStatistics (*read[3])(const void* row, const RowOptions&, double k, double k_kl, float least, float* scratch);
  // From scratch alone, so that `out` may be the row. streaming: past the caches, for memory that no one reads soon.
  // next: what will be read after, of which the beginning is fetched meanwhile.
  void (*write[3])(void* out, const RowOptions&, double k, double k_kl, const RowStatistics&, const RowWeights&,
                   const float* scratch, bool streaming, const void* next);
  void (*scale[3])(void* row, int64_t vocab, float factor);
};

// The best that this CPU has, or the one that MDPGRPO_CPU names (avx512, avx2, plain).
const RowKernels& row_kernels();

extern const RowKernels rows_plain;
#ifdef MDPGRPO_X86
extern const RowKernels rows_avx2, rows_avx512;
#endif

}  // namespace mdpgrpo
