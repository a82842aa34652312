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
  const float *denominator, *lengths, *ratio, *slope, *drift, *statistics;
  float* per_row;
  bool* marks;
  int64_t* taken;  // rows that clusters have taken beyond the first of each, 0 before the launch
};

// What a row, or a part of it, adds up to: Σ exp2(t), Σ t exp2(t), Σ exp2(t_kl), where t = k (y - top) for logits y.
struct Sums {
  float top, total, moment, total_kl;
};

struct Exchange {
  Sums sums;
  float target;  // y of the row's token, -inf where another block holds it
  int64_t next;  // of the first block: the row that comes after this one
};

// What the objective needs of a row but its logits.
struct RowInputs {
#define X(name, ...) float name;
  MDPGRPO_KNOBS(X)
  MDPGRPO_PER_ROW(X)
#undef X
  float denominator, length;
  Coupled<float> coupled;
};

struct alignas(16) BlockMemory {
  uint64_t arrived[CHUNKS];
  uint64_t exchanged[2];
  Sums warps[32];
  float target;
  int64_t next;
  float weights[3];  // a, a_kl, bonus
  RowInputs inputs;
  // By parity of the visit: a block may be one row ahead of another, and two ahead of none.
  Exchange from[2][MAX_CLUSTER];
};

// ---- elements -------------------------------------------------------------------------------------------------------

MDPGRPO_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } x = {bits};
  return x.f;
}
MDPGRPO_DEVICE uint32_t as_bits(float value) {
  union {
    float f;
    uint32_t u;
  } x = {value};
  return x.u;
}

struct alignas(16) Words {
  uint32_t x[4];
};

// What 16 bytes hold, opened and packed a word at a time.
struct BFloat16 {
  static constexpr int N = 8;
  using Storage = uint16_t;
  static MDPGRPO_DEVICE float load(Storage x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static MDPGRPO_DEVICE void load(const Words& w, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = as_float(w.x[i] << 16), x[2 * i + 1] = as_float(w.x[i] & 0xffff0000u);
  }
  static MDPGRPO_DEVICE float largest(const Words& w, const float (&)[N]) {
    const uint32_t pair = hw::max_bfloat16x2(hw::max_bfloat16x2(w.x[0], w.x[1]), hw::max_bfloat16x2(w.x[2], w.x[3]));
    return fmaxf(as_float(pair << 16), as_float(pair & 0xffff0000u));
  }
  static MDPGRPO_DEVICE Storage store(float x) { return static_cast<Storage>(hw::to_bfloat16x2(x, x)); }
  static MDPGRPO_DEVICE Words pack(const float* x) {
    return {{hw::to_bfloat16x2(x[0], x[1]), hw::to_bfloat16x2(x[2], x[3]), hw::to_bfloat16x2(x[4], x[5]),
             hw::to_bfloat16x2(x[6], x[7])}};
  }
};

template <int N>
MDPGRPO_DEVICE float largest_of(const float (&x)[N]) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmaxf(top, x[i]);
  return top;
}

struct Float16 {
  static constexpr int N = 8;
  using Storage = uint16_t;
  static MDPGRPO_DEVICE float load(Storage x) { return hw::from_half(x); }
  static MDPGRPO_DEVICE void load(const Words& w, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = load(static_cast<Storage>(w.x[i / 2] >> 16 * (i % 2)));
  }
  static MDPGRPO_DEVICE float largest(const Words&, const float (&x)[N]) { return largest_of(x); }
};
struct Float32 {
  static constexpr int N = 4;
  using Storage = float;
  static MDPGRPO_DEVICE float load(Storage x) { return x; }
  static MDPGRPO_DEVICE void load(const Words& w, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = as_float(w.x[i]);
  }
  static MDPGRPO_DEVICE float largest(const Words&, const float (&x)[N]) { return largest_of(x); }
  static MDPGRPO_DEVICE Storage store(float x) { return x; }
  static MDPGRPO_DEVICE Words pack(const float* x) {
    return {{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}};
  }
};

// ---- exponents ------------------------------------------------------------------------------------------------------

constexpr float NOTHING = -HUGE_VALF;
constexpr float LN2_F = 0.69314718055994530942f;
constexpr float LOWEST = -3.0e38f;  // for exponents: finite, so that 0 times it is 0

// Logits x enter exponents as y: z = scale y, but for a constant of the row. y = x without a soft-cap; with it
// z = cap tanh(x / cap) = cap - 2 cap r, r = 1 / (1 + e), e = exp(2x / cap), and y = -r.
template <bool CAP>
struct Opening {
  static constexpr float LEAST = CAP ? -1.0f : NOTHING;  // y of x = -inf
  static constexpr float STEEPNESS = CAP ? 4.0f : 1.0f;
  float scale, doubled;

  explicit MDPGRPO_DEVICE Opening(float cap) : scale(CAP ? 2.0f * cap : 1.0f), doubled(2.0f * LOG2E_F / cap) {}
  // slope: e r², without cancellation; dz/dx is STEEPNESS times it.
  MDPGRPO_DEVICE float y(float x, float& slope) const {
    if (!CAP) return slope = 1.0f, x;
    const float e = hw::exp2(x * doubled), r = hw::reciprocal(1.0f + e);
    slope = r * hw::saturate(e * r);  // 0 also where e is infinite
    return -r;
  }
  MDPGRPO_DEVICE float y(float x) const {
    float slope;
    return y(x, slope);
  }
  MDPGRPO_DEVICE float y_of_z(float z) const { return CAP ? z / scale - 0.5f : z; }
};

// One multiply-add gives the exponent of y, relative to the one of `base`: y factor - offset, `rest` at base itself.
struct Line {
  float factor, offset, rest;

  MDPGRPO_DEVICE Line(float base, float k) : factor(k), offset(base * k) {
    // Here an offset is rounded by so much that whatever differs from base has probability 0: any factor that is a
    // power of two tells them apart, and rounds nothing.
    if (fabsf(offset) > 0x1p30f && fabsf(base) < HUGE_VALF) {
      factor = as_float((294u << 23) - (as_bits(fmaxf(fabsf(base), 0x1p-80f)) & 0x7f800000u));
      offset = base * factor;
    }
    rest = fmaf(base, factor, -offset);
  }
  MDPGRPO_DEVICE float at(float y) const { return fmaf(y, factor, -offset); }
};

// ---- sums -----------------------------------------------------------------------------------------------------------

// How far the exponent of a reference lies under that of another; 0 where nothing was met yet.
MDPGRPO_DEVICE float gap_of(float top, float base, float k) {
  return top == NOTHING ? 0.0f : hw::max_nan((top - base) * k, LOWEST);
}

// Relative to another reference, whose exponents are lower by -gap.
MDPGRPO_DEVICE Sums shifted(const Sums& s, float top, float gap, float gap_kl, bool two_temperatures) {
  const float shrink = hw::exp2(gap);
  return {top, s.total * shrink, s.moment * shrink + gap * shrink * s.total,
          two_temperatures ? s.total_kl * hw::exp2(gap_kl) : 0.0f};
}

MDPGRPO_DEVICE Sums merged(const Sums& a, const Sums& b, float k, float k_kl, bool two_temperatures) {
  const float top = fmaxf(a.top, b.top);
  const Sums x = shifted(a, top, gap_of(a.top, top, k), gap_of(a.top, top, k_kl), two_temperatures);
  const Sums y = shifted(b, top, gap_of(b.top, top, k), gap_of(b.top, top, k_kl), two_temperatures);
  return {top, x.total + y.total, x.moment + y.moment, x.total_kl + y.total_kl};
}

// The sums of one thread. Their reference moves only when a logit is more than ROOM powers of two above it: seldom.
template <bool TWO, bool CAP>
struct Running {
  static constexpr float ROOM = 8.0f;
  float k, k_kl;
  Line line, line_kl;
  float room, limit = NOTHING;  // the largest x that the reference serves
  float largest = NOTHING;      // x
  Sums sums = {Opening<CAP>::LEAST, 0.0f, 0.0f, 0.0f};

  MDPGRPO_DEVICE Running(float k, float k_kl, float scale)
      : k(k), k_kl(k_kl), line(CAP ? Opening<CAP>::LEAST : 0.0f, k), line_kl(CAP ? Opening<CAP>::LEAST : 0.0f, k_kl),
        room(ROOM * scale / (TWO ? fmaxf(k, k_kl) : k)) {}

  // Before x, with its y, is added, or what is not above it.
  MDPGRPO_DEVICE void meet(float x, float y) {
    largest = fmaxf(largest, x);
    if (!(x > limit)) return;
    const Line next(y, k), next_kl(y, k_kl);
    sums = shifted(sums, y, gap_of(sums.top, y, k) + (next.rest - line.rest),
                   gap_of(sums.top, y, k_kl) + (next_kl.rest - line_kl.rest), TWO);
    line = next, line_kl = next_kl;
    limit = fminf(x + room, -LOWEST);
  }
  MDPGRPO_DEVICE void add(float y) {
    // -inf, which no cap leaves, must not make 0 times itself.
    const float t = CAP ? line.at(y) : hw::max_nan(line.at(y), LOWEST), e = hw::exp2(t);
    sums.total += e;
    sums.moment += t * e;
    if (TWO) sums.total_kl += hw::exp2(line_kl.at(y));
  }
  // Relative to y of `largest`, which then weighs 1 to the bit: a row of one token has a log-probability of 0.
  MDPGRPO_DEVICE Sums relative_to(float y) const {
    if (y == NOTHING) return sums;
    const float t = line.at(y), e = hw::exp2(t);
    return {y, sums.total / e, fmaf(-t, sums.total, sums.moment) / e,
            TWO ? sums.total_kl / hw::exp2(line_kl.at(y)) : 0.0f};
  }
};

// ---- one row --------------------------------------------------------------------------------------------------------

// The part of a row that this block holds, in units of 16 bytes of the memory it comes from.
template <class E>
struct Slice {
  const unsigned char* from;  // 16-byte aligned: up to 15 bytes before the row, whose columns are not the row's
  int32_t lead;               // columns of the row begin here, counted from `from` of the first block
  int64_t first;              // of this block, `lead` counted
  int32_t columns;
  int32_t vectors, chunk;  // chunk: vectors in each of the CHUNKS
  int32_t low, high;       // vectors whose columns are all the row's; at most one before them and one after is not

  MDPGRPO_DEVICE Slice(const RowArguments& p, const typename E::Storage* row, int rank) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(row);
    lead = static_cast<int32_t>(address % 16 / sizeof(typename E::Storage));
    first = static_cast<int64_t>(rank) * p.slice;
    const int64_t rest = p.vocab + lead - first;
    columns = static_cast<int32_t>(rest < 0 ? 0 : rest < p.slice ? rest : p.slice);
    from = reinterpret_cast<const unsigned char*>(address - address % 16) + first * sizeof(typename E::Storage);
    vectors = (columns + E::N - 1) / E::N;
    // The same for every row, so that a chunk of the next takes the place of one of this.
    chunk = (p.slice / E::N + CHUNKS - 1) / CHUNKS;
    low = rank == 0 && lead > 0 ? 1 : 0;
    high = columns / E::N > low ? columns / E::N : low;
  }
  MDPGRPO_DEVICE int32_t begin(int c) const { return c * chunk < vectors ? c * chunk : vectors; }
  // The vector at an edge of the row that this thread works on; -1: none.
  MDPGRPO_DEVICE int32_t edge() const {
    return hw::thread() == 0 && low > 0 ? 0 : hw::thread() == 32 && high < vectors ? high : -1;
  }
  // Of a chunk, the vectors whose columns are all the row's: a sweep gives them to the threads in turn.
  MDPGRPO_DEVICE int32_t first_whole(int c) const { return begin(c) > low ? begin(c) : low; }
  MDPGRPO_DEVICE int32_t last_whole(int c) const { return begin(c + 1) < high ? begin(c + 1) : high; }
  // Which thread works on a vector in a sweep over all of them.
  MDPGRPO_DEVICE bool mine(int32_t vector) const {
    if (vector < low || vector >= high) return vector == edge();
    return (vector - first_whole(vector / chunk)) % hw::THREADS == hw::thread();
  }
  // The column of element i of a vector; outside [0, V) where it is not the row's.
  MDPGRPO_DEVICE int64_t column(int32_t vector, int i) const {
    return first + static_cast<int64_t>(vector) * E::N + i - lead;
  }
};

template <class E>
MDPGRPO_DEVICE void request(const Slice<E>& slice, int c, unsigned char* memory, BlockMemory& block) {
  const int32_t begin = slice.begin(c), bytes = (slice.begin(c + 1) - begin) * 16;
  hw::expect(&block.arrived[c], bytes);
  if (bytes > 0) hw::copy_in(memory + begin * 16, slice.from + begin * 16, bytes, &block.arrived[c]);
}

// The logits of the next row, chunk by chunk into what this row no longer needs.
template <class E>
struct Ahead {
  Slice<E> slice;
  bool wanted;
  unsigned char* memory;
  BlockMemory& block;

  MDPGRPO_DEVICE void free(int c) const {
    if (!wanted) return;
    hw::sync_block();
    if (hw::thread() == 0) request(slice, c, memory, block);
  }
};

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

MDPGRPO_DEVICE RowInputs inputs_of(const RowArguments& p, int64_t c, int64_t row) {
  RowInputs in;
#define X(name, place) in.name = p.rows.name.at(c, row);
  MDPGRPO_KNOBS(X)
#undef X
#define X(name) in.name = p.rows.name == nullptr ? 0.0f : p.rows.name[row];
  MDPGRPO_PER_ROW(X)
#undef X
  in.denominator = *p.denominator;
  in.length = p.settings.aggregation == 0 ? p.lengths[c] : 1.0f;
  in.coupled = Coupled<float>{};
  if (p.ratio != nullptr) in.coupled.ratio = p.ratio[c];
  if (p.slope != nullptr) in.coupled.slope = p.slope[c];
  if (p.drift != nullptr) in.coupled.drift = p.drift[c];
  return in;
}

// That row as the only one of its kind.
MDPGRPO_DEVICE Rows<float> alone(Rows<float> rows, const RowInputs& in) {
#define X(name, place) rows.name = {nullptr, false, in.name};
  MDPGRPO_KNOBS(X)
#undef X
#define X(name) \
  if (rows.name != nullptr) rows.name = &in.name;
  MDPGRPO_PER_ROW(X)
#undef X
  return rows;
}

struct RowStatistics {
  float peak, log_total, entropy, log_total_kl, target;  // peak and target as y
};

// Everything that is said of a row, by one thread; a, a_kl and bonus of its gradient come back.
template <bool TWO, bool CAP, bool EXTENDED>
MDPGRPO_DEVICE void conclude(const RowArguments& p, int64_t row, const RowScalars& r, const RowStatistics& s,
                             const RowInputs& in, bool record, float* weights) {
  const int64_t n = p.rows.n_rows;
  Settings<float> settings = p.settings;
  Rows<float> rows = alone(p.rows, in);
  if (!EXTENDED) {  // what is known of these rows when this is compiled
    settings.loss = PPO_CLIP, settings.unbiased_kl = settings.masks_off_policy = false;
    rows.entropy_coef = rows.entropy_floor = {};
  }
  const float z = (s.target - s.peak) * Opening<CAP>(settings.softcap).scale;
  const float logprob = z / r.tau - s.log_total;
  const float kl_logprob = TWO ? z / settings.kl_temperature - s.log_total_kl : logprob;
  const Token<float> t = token_objective(rows, settings, 0, 0, r.tau, logprob, kl_logprob, s.entropy, in.coupled);
  const float share = token_share(in.denominator, in.length);
  weights[0] = share * (TWO ? t.c : t.c + t.c_kl) / r.tau;
  weights[1] = TWO ? share * t.c_kl / settings.kl_temperature : 0.0f;
  weights[2] = EXTENDED ? share * t.bonus / r.tau : 0.0f;
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

template <class E, class Out>
MDPGRPO_DEVICE void put_whole(typename Out::Storage* to, const float (&g)[E::N]) {
#pragma unroll
  for (int i = 0; i < E::N; i += Out::N) hw::store16(to + i, Out::pack(g + i));
}

template <class E, class Out>
MDPGRPO_DEVICE void put_each(const RowArguments& p, const Slice<E>& slice, typename Out::Storage* out, int32_t vector,
                             const float (&g)[E::N]) {
#pragma unroll
  for (int i = 0; i < E::N; ++i) {
    const int64_t column = slice.column(vector, i);
    if (column >= 0 && column < p.vocab) out[column] = Out::store(g[i]);
  }
}

// The gradient of every vector, value(vector, g), to where it belongs: whole where it lies on 16 bytes.
// done(c) follows chunk c.
template <class E, class Out, class Value, class Done>
MDPGRPO_DEVICE void put_all(const RowArguments& p, const Slice<E>& slice, typename Out::Storage* out, Value value,
                            Done done) {
  typename Out::Storage* const to = out + slice.column(0, 0);
  const bool whole = reinterpret_cast<uintptr_t>(to) % 16 == 0;
  float g[E::N];
  if (const int32_t v = slice.edge(); v >= 0) {
    value(v, g);
    put_each<E, Out>(p, slice, out, v, g);
  }
#pragma unroll 1
  for (int c = 0; c < CHUNKS; ++c) {
    const int32_t begin = slice.first_whole(c), end = slice.last_whole(c);
    if (whole) {
#pragma unroll 1
      for (int32_t v = begin + hw::thread(); v < end; v += hw::THREADS) {
        value(v, g);
        put_whole<E, Out>(to + v * E::N, g);
      }
    } else {
#pragma unroll 1
      for (int32_t v = begin + hw::thread(); v < end; v += hw::THREADS) {
        value(v, g);
        put_each<E, Out>(p, slice, out, v, g);
      }
    }
    done(c);
  }
}

template <class E, class Out>
MDPGRPO_DEVICE void put_zeros(const RowArguments& p, const Slice<E>& slice, typename Out::Storage* out) {
  put_all<E, Out>(
      p, slice, out,
      [](int32_t, float (&g)[E::N]) {
#pragma unroll
        for (int i = 0; i < E::N; ++i) g[i] = 0.0f;
      },
      [](int) {});
}

// Statistics of the whole row, the same in every thread of the cluster: the order of all sums is fixed.
template <class E, bool TWO, bool CAP>
MDPGRPO_DEVICE RowStatistics read(const RowArguments& p, const Slice<E>& slice, const unsigned char* memory,
                                  BlockMemory& block, const RowScalars& r, uint32_t phase, uint32_t visit,
                                  int64_t taken) {
  const Opening<CAP> open(p.settings.softcap);
  const float k = open.scale * (LOG2E_F / r.tau), k_kl = open.scale * (LOG2E_F / p.settings.kl_temperature);
  const auto* const logits = reinterpret_cast<const typename E::Storage*>(memory);
  Running<TWO, CAP> running(k, k_kl, open.scale);
  for (int c = 0; c < CHUNKS; ++c) {
    hw::wait(&block.arrived[c], phase);
    const int32_t begin = slice.first_whole(c), end = slice.last_whole(c);
#pragma unroll 1
    for (int32_t v = begin + hw::thread(); v < end; v += hw::THREADS) {
      const Words words = hw::load16<Words>(memory + v * 16);
      float x[E::N];
      E::load(words, x);
      const float top = E::largest(words, x);
      running.meet(top, open.y(top));
#pragma unroll
      for (int i = 0; i < E::N; ++i) running.add(open.y(x[i]));
    }
  }
  if (const int32_t v = slice.edge(); v >= 0) {
#pragma unroll 1
    for (int i = 0; i < E::N; ++i) {
      if (slice.column(v, i) < 0 || slice.column(v, i) >= p.vocab) continue;
      const float own = E::load(logits[v * E::N + i]), y = open.y(own);
      running.meet(own, y);
      running.add(y);
    }
  }
  Sums sums = running.relative_to(open.y(running.largest));
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
    block.next = taken;
    block.target = NOTHING;
    if (r.token >= 0 && at >= 0 && at < slice.columns) block.target = open.y(E::load(logits[at]));
  }
  hw::sync_block();
  const uint32_t slot = visit % 2;
  if (hw::thread() < hw::cluster_size()) {
    Exchange own = {block.warps[0], block.target, block.next};
    for (int w = 1; w < hw::THREADS / 32; ++w) own.sums = merged(own.sums, block.warps[w], k, k_kl, TWO);
    hw::send(&block.from[slot][hw::rank()], hw::thread(), own, &block.exchanged[slot]);
  }
  hw::wait_for_cluster(&block.exchanged[slot], visit / 2 % 2);
  Exchange all = block.from[slot][0];
  for (int b = 1; b < hw::cluster_size(); ++b) {
    const Exchange& other = block.from[slot][b];
    all.sums = merged(all.sums, other.sums, k, k_kl, TWO);
    if (!is_nan(all.target) && !(other.target <= all.target)) all.target = other.target;
  }
  RowStatistics s;
  s.peak = all.sums.top;
  s.log_total = logf(all.sums.total);
  s.entropy = s.log_total - LN2_F * (all.sums.moment / all.sums.total);
  s.log_total_kl = TWO ? logf(all.sums.total_kl) : s.log_total;
  s.target = r.known && r.token >= 0 ? all.target : NAN;
  return s;
}

// a (onehot - p) + a_kl (onehot - p_kl) + bonus p (log p + H).
template <class E, class Out, bool TWO, bool CAP, bool BONUS>
MDPGRPO_DEVICE void write(const RowArguments& p, const Slice<E>& slice, const unsigned char* memory,
                          const RowScalars& r, const RowStatistics& s, float a, float a_kl, float bonus,
                          typename Out::Storage* out, const Ahead<E>& ahead) {
  const Opening<CAP> open(p.settings.softcap);
  const float k = open.scale * (LOG2E_F / r.tau), k_kl = open.scale * (LOG2E_F / p.settings.kl_temperature);
  const float log2_total = s.log_total * LOG2E_F, log2_total_kl = s.log_total_kl * LOG2E_F;
  const Line line(s.peak, k), line_kl(s.peak, k_kl);
  a *= open.STEEPNESS, a_kl *= open.STEEPNESS, bonus *= open.STEEPNESS;
  const float scale = hw::exp2(-log2_total - line.rest);
  // log p = ln 2 (t - rest) - log Σ of an exponent t.
  const float weight = BONUS ? scale * (bonus * (s.entropy - s.log_total - LN2_F * line.rest) - a) : -a * scale;
  const float weight_log = BONUS ? scale * bonus * LN2_F : 0.0f;
  const float weight_kl = -a_kl * hw::exp2(-log2_total_kl - line_kl.rest);
  const int64_t at = r.token + slice.lead - slice.first;
  const bool mine = r.token >= 0 && at >= 0 && at < slice.columns && slice.mine(static_cast<int32_t>(at) / E::N);
  const float own = mine ? E::load(reinterpret_cast<const typename E::Storage*>(memory)[at]) : 0.0f;
  put_all<E, Out>(
      p, slice, out,
      [&](int32_t v, float (&g)[E::N]) {
        E::load(hw::load16<Words>(memory + v * 16), g);
#pragma unroll
        for (int i = 0; i < E::N; ++i) {
          float slope;
          const float y = open.y(g[i], slope);
          if (BONUS) {
            // A probability of 0, times anything finite.
            const float t = CAP ? line.at(y) : hw::max_nan(line.at(y), -1024.0f);
            g[i] = fmaf(weight_log, t, weight) * hw::exp2(t);
          } else {
            g[i] = weight * hw::exp2(line.at(y));
          }
          if (TWO) g[i] += weight_kl * hw::exp2(line_kl.at(y));
          g[i] *= slope;
        }
      },
      [&](int c) { ahead.free(c); });
  // The token's own gradient is a (1 - p): whoever wrote -a p there writes again.
  if (!mine) return;
  float slope;
  const float d = open.y(own, slope) - s.peak;
  float g = a * (1.0f - hw::exp2(d * k - log2_total));
  if (TWO) g += a_kl * (1.0f - hw::exp2(d * k_kl - log2_total_kl));
  if (BONUS) {
    const float log2_p = CAP ? d * k - log2_total : hw::max_nan(d * k - log2_total, -1024.0f);
    g += bonus * hw::exp2(log2_p) * fmaf(LN2_F, log2_p, s.entropy);
  }
  out[r.token] = Out::store(g * slope);
}

// The row with the number of the cluster, then whichever no cluster has taken yet: some run faster than others.
template <class E, class Out, bool TWO, bool CAP, bool EXTENDED>
MDPGRPO_DEVICE void token_loss_rows(const RowArguments& p, unsigned char* memory, BlockMemory& block) {
  if (hw::thread() == 0) {
    for (uint64_t& barrier : block.arrived) hw::initialise(&barrier);
    for (uint64_t& barrier : block.exchanged) hw::initialise(&barrier);
  }
  // Also: no block writes to another before that one has begun.
  hw::sync_cluster();
  const int64_t n = p.rows.n_rows;
  const bool given = p.statistics != nullptr, needed = !given || p.gradient != nullptr;
  const auto slice_of = [&](int64_t row) {
    const int64_t outer = row / p.rows.row_length, inner = row % p.rows.row_length;
    return Slice<E>(p, static_cast<const typename E::Storage*>(p.logits) + outer * p.stride_b + inner * p.stride_l,
                    hw::rank());
  };
  uint32_t turn = 0;       // rows whose logits were read
  bool under_way = false;  // the logits of this row are
  int64_t row = hw::cluster();
  bool kept = row < n && p.rows.kept(row);
  for (uint32_t visit = 0; row < n; ++visit) {
    const uint32_t slot = visit % 2;
    const Slice<E> slice = slice_of(row);
    const int64_t outer = row / p.rows.row_length, inner = row % p.rows.row_length;
    auto* out =
        static_cast<typename Out::Storage*>(p.gradient) + outer * p.gradient_stride_b + inner * p.gradient_stride_l;
    if (hw::thread() == 0) {
      hw::expect(&block.exchanged[slot], hw::cluster_size() * static_cast<int32_t>(sizeof(Exchange)));
      if (kept && needed && !under_way)
        for (int c = 0; c < CHUNKS; ++c) request(slice, c, memory, block);
    }
    // Not stored yet: a store would wait for it.
    const int64_t taken = hw::thread() == 0 && hw::rank() == 0 ? hw::clusters() + hw::take(p.taken) : 0;
    const RowScalars r(p, row);
    RowStatistics s;
    if (kept) {
      // Long before they are needed: while the logits are under way.
      if (hw::thread() == 0) block.inputs = inputs_of(p, r.completion, row);
      if (!given) {
        s = read<E, TWO, CAP>(p, slice, memory, block, r, turn % 2, visit, taken);
      } else {
        s = {p.statistics[row], p.statistics[n + row], p.statistics[2 * n + row], p.statistics[3 * n + row],
             p.statistics[4 * n + row]};
        const Opening<CAP> open(p.settings.softcap);
        s.peak = open.y_of_z(s.peak), s.target = open.y_of_z(s.target);
        if (needed)
          for (int c = 0; c < CHUNKS; ++c) hw::wait(&block.arrived[c], turn % 2);
      }
    }
    if (!kept || given) {
      if (hw::thread() == 0)
        for (int b = 0; b < hw::cluster_size(); ++b)
          hw::send(&block.from[slot][hw::rank()], b, Exchange{{}, 0.0f, taken}, &block.exchanged[slot]);
      hw::wait_for_cluster(&block.exchanged[slot], visit / 2 % 2);
    }
    const int64_t next = block.from[slot][0].next;
    const bool next_kept = next < n && p.rows.kept(next);
    const bool first = hw::rank() == 0 && hw::thread() == 0;
    if (kept && hw::thread() == 0) conclude<TWO, CAP, EXTENDED>(p, row, r, s, block.inputs, first, block.weights);
    hw::sync_block();
    under_way = false;
    if (!kept) {
      if (first) {
        for (int i = 0; i < 5; ++i) p.per_row[i * n + row] = i == 3 ? 1.0f : 0.0f;
        for (int i = 0; i < 3; ++i) p.marks[i * n + row] = false;
      }
      if (p.gradient != nullptr) put_zeros<E, Out>(p, slice, out);
    } else if (p.gradient != nullptr) {
      const float a = block.weights[0], a_kl = block.weights[1], bonus = EXTENDED ? block.weights[2] : 0.0f;
      if (a == 0.0f && a_kl == 0.0f && bonus == 0.0f) {
        put_zeros<E, Out>(p, slice, out);
      } else {
        under_way = next_kept;
        const Ahead<E> ahead{next_kept ? slice_of(next) : slice, next_kept, memory, block};
        if (EXTENDED && bonus != 0.0f)
          write<E, Out, TWO, CAP, true>(p, slice, memory, r, s, a, a_kl, bonus, out, ahead);
        else
          write<E, Out, TWO, CAP, false>(p, slice, memory, r, s, a, a_kl, 0.0f, out, ahead);
      }
    }
    if (kept && needed) ++turn;
    row = next, kept = next_kept;
    hw::sync_block();  // the slice and the weights are free again
  }
  // No block leaves while another may still write to it.
  hw::sync_cluster();
}

}  // namespace mdpgrpo
