// The objective over materialised logits for Hopper: one cluster of thread blocks holds one row.
//
// Every block of a cluster brings its slice of the row into its own shared memory by bulk copies, once. The blocks
// reduce their slices, exchange five numbers through distributed shared memory, know the row's statistics, and write
// their slices of the gradient from what they still hold: one read and one write of the logits.
//
// Written against the few primitives of namespace `hw` (hopper.cuh on the device), so that tests can run this text with
// threads of a CPU in their place.
#pragma once

#include <cstdint>

#include "../method.h"

#ifdef __CUDACC__
#define MDPGRPO_DEVICE __device__ __forceinline__
#else
#define MDPGRPO_DEVICE inline
#endif

namespace mdpgrpo {

constexpr float LOG2E_F = 1.44269504088896340736f;
constexpr int MAX_CLUSTER = 8;
constexpr int CHUNKS = 4;  // of a slice: the first is worked on while the others are under way

struct RowArguments {
  const void* logits;
  void* gradient;  // null: only the loss is wanted
  int64_t vocab, stride_b, stride_l, gradient_stride_b, gradient_stride_l;
  int32_t slice;  // columns of a block, a multiple of what 16 bytes hold
  Rows<float> rows;
  Settings<float> settings;
  const float *denominator, *lengths, *ratio, *slope, *statistics;
  float* per_row;
  bool* marks;
};

// What a row, or a part of it, adds up to: Σ exp2(k d), Σ d exp2(k d), Σ exp2(k_kl d), d = z - top.
struct Sums {
  float top, total, moment, total_kl;
};

struct Exchange {
  Sums sums;
  float target;  // z of the row's token, -inf where another block holds it
};

struct alignas(16) BlockMemory {
  uint64_t arrived[CHUNKS];
  Sums warps[32];
  float target;
  float weights[2];               // a, a_kl
  Exchange from[2][MAX_CLUSTER];  // by parity of the row, so that no one overwrites what another still reads
};

// ---- elements -------------------------------------------------------------------------------------------------------

MDPGRPO_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } x = {bits};
  return x.f;
}

struct BFloat16 {
  static constexpr int N = 8;  // in 16 bytes
  using Storage = uint16_t;
  static MDPGRPO_DEVICE float load(Storage x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static MDPGRPO_DEVICE Storage store(float x) { return hw::to_bfloat16(x); }
};
struct Float16 {
  static constexpr int N = 8;
  using Storage = uint16_t;
  static MDPGRPO_DEVICE float load(Storage x) { return hw::from_half(x); }
};
struct Float32 {
  static constexpr int N = 4;
  using Storage = float;
  static MDPGRPO_DEVICE float load(Storage x) { return x; }
  static MDPGRPO_DEVICE Storage store(float x) { return x; }
};

template <class E>
struct alignas(16) Vector {
  typename E::Storage x[E::N];
};

// z = cap tanh(x / cap) and dz/dx = 1 - tanh², the latter without cancellation.
MDPGRPO_DEVICE float capped(float x, float cap, float& slope) {
  const float e = hw::exp2(fabsf(x) * (-2.0f * LOG2E_F / cap)), r = 1.0f / (1.0f + e);
  const float z = cap * (1.0f - e) * r;
  slope = 4.0f * e * r * r;
  return x < 0.0f ? -z : z;
}

// ---- sums -----------------------------------------------------------------------------------------------------------

constexpr float NOTHING = -HUGE_VALF;

// How far a maximum lies under another, finite: 0 where nothing was met yet.
MDPGRPO_DEVICE float gap_of(float top, float base) { return top == NOTHING ? 0.0f : fmaxf(top - base, -3.0e38f); }

MDPGRPO_DEVICE Sums shifted(const Sums& s, float top, float k, float k_kl, bool two_temperatures) {
  const float gap = gap_of(s.top, top == NOTHING ? 0.0f : top), shrink = hw::exp2(gap * k);
  return {top, s.total * shrink, s.moment * shrink + gap * shrink * s.total,
          two_temperatures ? s.total_kl * hw::exp2(gap * k_kl) : 0.0f};
}

MDPGRPO_DEVICE Sums merged(const Sums& a, const Sums& b, float k, float k_kl, bool two_temperatures) {
  const float top = fmaxf(a.top, b.top);
  const Sums x = shifted(a, top, k, k_kl, two_temperatures), y = shifted(b, top, k, k_kl, two_temperatures);
  return {top, x.total + y.total, x.moment + y.moment, x.total_kl + y.total_kl};
}

template <int N, bool TWO>
MDPGRPO_DEVICE void add(Sums& s, const float (&z)[N], float k, float k_kl) {
  float top = s.top;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, z[i]);
  s = shifted(s, top, k, k_kl, TWO);
  const float base = top == NOTHING ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float d = z[i] - base, e = hw::exp2(d * k);
    s.total += e;
    s.moment += e > 0.0f ? d * e : 0.0f;  // 0 also for d = -inf
    if (TWO) s.total_kl += hw::exp2(d * k_kl);
  }
}

// ---- one row --------------------------------------------------------------------------------------------------------

// The part of a row that this block holds, in units of 16 bytes of the memory it comes from.
template <class E>
struct Slice {
  const unsigned char* from;  // 16-byte aligned: up to 15 bytes before the row, whose columns are not the row's
  int32_t lead;               // columns of the row begin here, counted from `from` of the first block
  int64_t first, columns;     // of this block, `lead` counted
  int32_t vectors, chunk;     // chunk: vectors in each of the CHUNKS

  MDPGRPO_DEVICE Slice(const RowArguments& p, const typename E::Storage* row, int rank) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(row);
    lead = static_cast<int32_t>(address % 16 / sizeof(typename E::Storage));
    first = static_cast<int64_t>(rank) * p.slice;
    const int64_t rest = p.vocab + lead - first;
    columns = rest < 0 ? 0 : rest < p.slice ? rest : p.slice;
    from = reinterpret_cast<const unsigned char*>(address - address % 16) + first * sizeof(typename E::Storage);
    vectors = static_cast<int32_t>((columns + E::N - 1) / E::N);
    chunk = (vectors + CHUNKS - 1) / CHUNKS;
  }
  MDPGRPO_DEVICE int32_t begin(int c) const { return c * chunk < vectors ? c * chunk : vectors; }
  // The column of element i of a vector; outside [0, V) where it is not the row's.
  MDPGRPO_DEVICE int64_t column(int32_t vector, int i) const {
    return first + static_cast<int64_t>(vector) * E::N + i - lead;
  }
};

template <class E>
MDPGRPO_DEVICE void request(const Slice<E>& slice, unsigned char* memory, BlockMemory& block) {
  for (int c = 0; c < CHUNKS; ++c) {
    const int32_t begin = slice.begin(c), bytes = (slice.begin(c + 1) - begin) * 16;
    hw::expect(&block.arrived[c], bytes);
    if (bytes > 0) hw::copy_in(memory + begin * 16, slice.from + begin * 16, bytes, &block.arrived[c]);
  }
}

struct RowScalars {
  int64_t completion, token;  // token -1: none
  bool known;
  float tau;

  MDPGRPO_DEVICE RowScalars(const RowArguments& p, int64_t row) {
    known = p.rows.known(row);
    completion = p.rows.completion_of(row);
    token = p.rows.tokens[row];
    if (token < 0 || token >= p.vocab) token = -1;
    tau = p.rows.temperature_of(completion, row);
  }
};

struct RowStatistics {
  float peak, log_total, entropy, log_total_kl, target;
};

// Everything that is said of a row, by one thread; a and a_kl of its gradient come back.
template <bool TWO>
MDPGRPO_DEVICE void conclude(const RowArguments& p, int64_t row, const RowScalars& r, const RowStatistics& s,
                             bool record, float* weights) {
  const int64_t c = r.completion, n = p.rows.n_rows;
  const Settings<float>& settings = p.settings;
  const float logprob = (s.target - s.peak) / r.tau - s.log_total;
  const float kl_logprob = TWO ? (s.target - s.peak) / settings.kl_temperature - s.log_total_kl : logprob;
  const Token<float> t = token_objective(p.rows, settings, c, row, r.tau, logprob, kl_logprob,
                                         settings.sequence ? p.ratio[c] : 1.0f, settings.sequence ? p.slope[c] : 0.0f);
  const float share = token_share(*p.denominator, settings.aggregation == 0 ? p.lengths[c] : 1.0f);
  weights[0] = share * (TWO ? t.c : t.c + t.c_kl) / r.tau;
  weights[1] = TWO ? share * t.c_kl / settings.kl_temperature : 0.0f;
  if (!record) return;
  p.per_row[row] = logprob;
  p.per_row[n + row] = s.entropy;
  p.per_row[2 * n + row] = t.kl;
  p.per_row[3 * n + row] = t.ratio;
  p.per_row[4 * n + row] = share * t.loss;
  p.marks[row] = t.clipped_low;
  p.marks[n + row] = t.clipped_high;
  p.marks[2 * n + row] = t.kl_clamped;
}

// z of a vector's elements, and dz/dx; -inf in columns that are not the row's.
template <class E, bool CAP>
MDPGRPO_DEVICE void open(const RowArguments& p, const Slice<E>& slice, const unsigned char* memory, int32_t vector,
                         float (&z)[E::N], float (&slope)[E::N]) {
  const Vector<E> v = hw::load16<Vector<E>>(memory + vector * 16);
#pragma unroll
  for (int i = 0; i < E::N; ++i) {
    z[i] = E::load(v.x[i]);
    slope[i] = 1.0f;
    if (CAP) z[i] = capped(z[i], p.settings.softcap, slope[i]);
  }
  if (slice.column(vector, 0) >= 0 && slice.column(vector, E::N - 1) < p.vocab) return;
#pragma unroll
  for (int i = 0; i < E::N; ++i)
    if (slice.column(vector, i) < 0 || slice.column(vector, i) >= p.vocab) z[i] = NOTHING;
}

// One vector of the gradient to where it belongs; whole where all of it is the row's and lies on 16 bytes.
template <class E, class Out>
MDPGRPO_DEVICE void put(const RowArguments& p, const Slice<E>& slice, typename Out::Storage* out, int32_t vector,
                        const float (&g)[E::N]) {
  const int64_t column = slice.column(vector, 0);
  typename Out::Storage* const to = out + column;
  if (column >= 0 && column + E::N <= p.vocab && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int part = 0; part < E::N / Out::N; ++part) {
      Vector<Out> v;
#pragma unroll
      for (int i = 0; i < Out::N; ++i) v.x[i] = Out::store(g[part * Out::N + i]);
      hw::store16(to + part * Out::N, v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < E::N; ++i)
      if (column + i >= 0 && column + i < p.vocab) to[i] = Out::store(g[i]);
  }
}

template <class E, class Out>
MDPGRPO_DEVICE void put_zeros(const RowArguments& p, const Slice<E>& slice, typename Out::Storage* out) {
  const float zeros[E::N] = {};
  for (int32_t v = hw::thread(); v < slice.vectors; v += hw::THREADS) put<E, Out>(p, slice, out, v, zeros);
}

// Statistics of the whole row, the same in every thread of the cluster: the order of all sums is fixed.
template <class E, bool TWO, bool CAP>
MDPGRPO_DEVICE RowStatistics read(const RowArguments& p, const Slice<E>& slice, const unsigned char* memory,
                                  BlockMemory& block, const RowScalars& r, uint32_t phase) {
  const float k = LOG2E_F / r.tau, k_kl = LOG2E_F / p.settings.kl_temperature;
  Sums sums = {NOTHING, 0.0f, 0.0f, 0.0f};
  for (int c = 0; c < CHUNKS; ++c) {
    hw::wait(&block.arrived[c], phase);
    for (int32_t v = slice.begin(c) + hw::thread(); v < slice.begin(c + 1); v += hw::THREADS) {
      float z[E::N], slope[E::N];
      open<E, CAP>(p, slice, memory, v, z, slope);
      add<E::N, TWO>(sums, z, k, k_kl);
    }
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const Sums other = {hw::from_lane(sums.top, lane), hw::from_lane(sums.total, lane),
                        hw::from_lane(sums.moment, lane), hw::from_lane(sums.total_kl, lane)};
    // The lower lane first in both, so that both come to the same bits.
    sums = (hw::thread() & lane) == 0 ? merged(sums, other, k, k_kl, TWO) : merged(other, sums, k, k_kl, TWO);
  }
  if (hw::thread() % 32 == 0) block.warps[hw::thread() / 32] = sums;
  if (hw::thread() == 0) {
    const int64_t at = r.token + slice.lead - slice.first;
    block.target = NOTHING;
    if (r.token >= 0 && at >= 0 && at < slice.columns) {
      float slope;
      block.target = E::load(reinterpret_cast<const typename E::Storage*>(memory)[at]);
      if (CAP) block.target = capped(block.target, p.settings.softcap, slope);
    }
  }
  hw::sync_block();
  if (hw::thread() < hw::cluster_size()) {
    Exchange own = {block.warps[0], block.target};
    for (int w = 1; w < hw::THREADS / 32; ++w) own.sums = merged(own.sums, block.warps[w], k, k_kl, TWO);
    hw::store_to(&block.from[phase][hw::rank()], hw::thread(), own);
  }
  hw::sync_cluster();
  Exchange all = block.from[phase][0];
  for (int b = 1; b < hw::cluster_size(); ++b) {
    const Exchange& other = block.from[phase][b];
    all.sums = merged(all.sums, other.sums, k, k_kl, TWO);
    if (!is_nan(all.target) && !(other.target <= all.target)) all.target = other.target;
  }
  RowStatistics s;
  s.peak = all.sums.top;
  s.log_total = logf(all.sums.total);
  s.entropy = s.log_total - all.sums.moment / all.sums.total / r.tau;
  s.log_total_kl = TWO ? logf(all.sums.total_kl) : s.log_total;
  s.target = r.known && r.token >= 0 ? all.target : NAN;
  return s;
}

template <class E, class Out, bool TWO, bool CAP>
MDPGRPO_DEVICE void write(const RowArguments& p, const Slice<E>& slice, const unsigned char* memory,
                          const RowScalars& r, const RowStatistics& s, float a, float a_kl,
                          typename Out::Storage* out) {
  const float k = LOG2E_F / r.tau, k_kl = LOG2E_F / p.settings.kl_temperature;
  const float log2_total = s.log_total * LOG2E_F, log2_total_kl = s.log_total_kl * LOG2E_F;
  for (int32_t v = hw::thread(); v < slice.vectors; v += hw::THREADS) {
    float z[E::N], slope[E::N];
    open<E, CAP>(p, slice, memory, v, z, slope);
    // The place of the token in this vector; outside [0, N) where it is in another.
    const int64_t own = r.token < 0 ? -1 : r.token - slice.column(v, 0);
#pragma unroll
    for (int i = 0; i < E::N; ++i) {
      const float d = z[i] - s.peak, onehot = own == i ? 1.0f : 0.0f;
      float g = a * (onehot - hw::exp2(d * k - log2_total));
      if (TWO) g += a_kl * (onehot - hw::exp2(d * k_kl - log2_total_kl));
      z[i] = CAP ? g * slope[i] : g;
    }
    put<E, Out>(p, slice, out, v, z);
  }
}

// Rows cluster, cluster + clusters, ...
template <class E, class Out, bool TWO, bool CAP>
MDPGRPO_DEVICE void token_loss_rows(const RowArguments& p, unsigned char* memory, BlockMemory& block) {
  if (hw::thread() == 0)
    for (int c = 0; c < CHUNKS; ++c) hw::initialise(&block.arrived[c]);
  // Also: no block writes to another before that one has begun.
  hw::sync_cluster();
  const int64_t n = p.rows.n_rows;
  uint32_t phase = 0;
  for (int64_t row = hw::cluster(); row < n; row += hw::clusters()) {
    const int64_t outer = row / p.rows.row_length, inner = row % p.rows.row_length;
    const auto* logits = static_cast<const typename E::Storage*>(p.logits) + outer * p.stride_b + inner * p.stride_l;
    auto* out =
        static_cast<typename Out::Storage*>(p.gradient) + outer * p.gradient_stride_b + inner * p.gradient_stride_l;
    const Slice<E> slice(p, logits, hw::rank());
    const bool first = hw::rank() == 0 && hw::thread() == 0;
    if (!p.rows.kept(row)) {
      if (first) {
        for (int i = 0; i < 5; ++i) p.per_row[i * n + row] = i == 3 ? 1.0f : 0.0f;
        for (int i = 0; i < 3; ++i) p.marks[i * n + row] = false;
      }
      if (p.gradient != nullptr) put_zeros<E, Out>(p, slice, out);
      continue;
    }
    const bool given = p.statistics != nullptr, needed = !given || p.gradient != nullptr;
    if (needed && hw::thread() == 0) request(slice, memory, block);
    const RowScalars r(p, row);
    RowStatistics s;
    if (given) {
      s = {p.statistics[row], p.statistics[n + row], p.statistics[2 * n + row], p.statistics[3 * n + row],
           p.statistics[4 * n + row]};
      if (needed)
        for (int c = 0; c < CHUNKS; ++c) hw::wait(&block.arrived[c], phase);
    } else {
      s = read<E, TWO, CAP>(p, slice, memory, block, r, phase);
    }
    if (hw::thread() == 0) conclude<TWO>(p, row, r, s, first, block.weights);
    hw::sync_block();
    if (p.gradient != nullptr) {
      const float a = block.weights[0], a_kl = block.weights[1];
      if (a == 0.0f && a_kl == 0.0f)
        put_zeros<E, Out>(p, slice, out);
      else
        write<E, Out, TWO, CAP>(p, slice, memory, r, s, a, a_kl, out);
    }
    if (needed) phase ^= 1;
    hw::sync_block();  // the slice and the weights are free again
  }
  // No block leaves while another may still write to it.
  hw::sync_cluster();
}

}  // namespace mdpgrpo
