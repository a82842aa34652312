// The row kernels for one instruction set: included by rows_<isa>.cpp with ISA (a name) and WIDTH (floats a register,
// 16: AVX-512, 8: AVX2, 4: whatever there is), after rows_isa.h. The vector types are the compiler's own, so that one
// text serves all. Everything is internal to the file, and no function of a header is used that might be compiled
// here with wide registers and be called from elsewhere.

namespace mdpgrpo {
namespace ISA {
namespace {

constexpr int64_t W = WIDTH;
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

constexpr float NEG_INF = -__builtin_inff();
constexpr double LN2 = 0.69314718055994530942;

inline Floats all(float x) { return x - Floats{}; }

template <class V>
inline V load_vector(const void* p) {
  V v;
  ::memcpy(&v, p, sizeof v);
  return v;
}

inline float sum(Floats v) {
  float total = 0;
  for (int64_t i = 0; i < W; ++i) total += v[i];
  return total;
}

// ---- elements -------------------------------------------------------------------------------------------------------

struct Float32 {
  using Storage = float;
  static Floats load(const Storage* p) { return load_vector<Floats>(p); }
  static void store(Storage* p, Floats v) { ::memcpy(p, &v, sizeof v); }
  static void stream(Storage* p, Floats v) {
#if WIDTH == 16
    _mm512_stream_ps(p, (__m512)v);
#elif WIDTH == 8
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static Floats load(const Storage* p) {
    const Words w = __builtin_convertvector(load_vector<Halves>(p), Words) << 16;
    return load_vector<Floats>(&w);
  }
  // To nearest, ties to even; a NaN stays one.
  static Halves rounded(Floats v) {
    const Words w = load_vector<Words>(&v);
    const Words up = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? up : (w >> 16) | 0x40, Halves);
  }
  static void store(Storage* p, Floats v) {
    const Halves h = rounded(v);
    ::memcpy(p, &h, sizeof h);
  }
  static void stream(Storage* p, Floats v) {
    const Halves h = rounded(v);
#if WIDTH == 16
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif WIDTH == 8
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
    ::memcpy(p, &h, sizeof h);
#endif
  }
};

// The masked forms of all lanes: those without a mask start from a register that GCC 12 calls uninitialised.
struct Float16 {
  using Storage = uint16_t;
#if WIDTH == 16
  static Floats load(const Storage* p) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, load_vector<__m256i>(p)); }
  static void store(Storage* p, Floats v) {
    const __m256i h = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    ::memcpy(p, &h, sizeof h);
  }
#elif WIDTH == 8
  static Floats load(const Storage* p) { return (Floats)_mm256_cvtph_ps(load_vector<__m128i>(p)); }
  static void store(Storage* p, Floats v) {
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    ::memcpy(p, &h, sizeof h);
  }
#else
  static float from_half(uint32_t h) {
    const uint32_t sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * ::ldexpf(static_cast<float>(fraction), -24);
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    return load_vector<float>(&bits);
  }
  static uint16_t to_half(float x) {
    const uint32_t bits = load_vector<uint32_t>(&x), sign = (bits >> 16) & 0x8000;
    const float size = ::fabsf(x);
    if (!(size == size)) return static_cast<uint16_t>(sign | 0x7e00);
    if (size == 0.0f) return static_cast<uint16_t>(sign);
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    int exponent = 0;
    ::frexpf(size, &exponent);  // size in [2^(exponent-1), 2^exponent)
    const int unit = (exponent < -13 ? -13 : exponent) - 11;
    // Every unit of the last place below this exponent, in its two fields at once; carries run into the exponent.
    const uint32_t places = static_cast<uint32_t>(::nearbyintf(::ldexpf(size, -unit)));
    return static_cast<uint16_t>(sign | (static_cast<uint32_t>(unit + 24) * 1024 + places));
  }
  static Floats load(const Storage* p) {
    Floats v = {};
    for (int64_t i = 0; i < W; ++i) v[i] = from_half(p[i]);
    return v;
  }
  static void store(Storage* p, Floats v) {
    for (int64_t i = 0; i < W; ++i) p[i] = to_half(v[i]);
  }
#endif
  static void stream(Storage* p, Floats v) { store(p, v); }
};

// The first `count` < W elements; the others are `rest`.
template <class E>
inline Floats load_some(const typename E::Storage* p, int64_t count, float rest) {
  typename E::Storage part[W] = {};
  ::memcpy(part, p, sizeof(part[0]) * static_cast<size_t>(count));
  Floats v = E::load(part);
  for (int64_t i = count; i < W; ++i) v[i] = rest;
  return v;
}

template <class E>
inline void store_some(typename E::Storage* p, Floats v, int64_t count) {
  typename E::Storage part[W];
  E::store(part, v);
  ::memcpy(p, part, sizeof(part[0]) * static_cast<size_t>(count));
}

// ---- functions ------------------------------------------------------------------------------------------------------

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN

// 2^t for t <= 0, exactly 1 at 0 and exactly 0 below -126.5; relative error under 2e-7. t comes back limited to -127.
inline Floats exp2_of(Floats& t) {
  t = larger(all(-127.0f), t);
  const Floats shifted = t + 12582912.0f;  // 1.5 · 2²³: its last bits are t, rounded to an integer
  const Floats f = t - (shifted - 12582912.0f);
  const Floats p =
      ((((all(1.3264727e-3f) * f + 9.6715127e-3f) * f + 5.5507337e-2f) * f + 2.4022242e-1f) * f + 6.9314698e-1f) * f +
      1.0f;
  const Ints power = (load_vector<Ints>(&shifted) - (0x4b400000 - 127)) << 23;
  return p * load_vector<Floats>(&power);
}

// ln x of a positive, normal number; absolute error under 1e-7 around 1, else relative.
inline Floats log_of(Floats x) {
  // x = 2^n m, m in [√½, √2): the exponents that m has not.
  const Ints bits = load_vector<Ints>(&x), n = (bits - 0x3f3504f3) >> 23;
  const Words mantissa = load_vector<Words>(&x) - (load_vector<Words>(&n) << 23);
  const Floats u = load_vector<Floats>(&mantissa) - 1.0f, square = u * u;
  const Floats series =
      (((((((all(7.0376836292e-2f) * u - 1.1514610310e-1f) * u + 1.1676998740e-1f) * u - 1.2420140846e-1f) * u +
          1.4249322787e-1f) *
             u -
         1.6668057665e-1f) *
            u +
        2.0000714765e-1f) *
           u -
       2.4999993993e-1f) *
          u +
      3.3333331174e-1f;
  return __builtin_convertvector(n, Floats) * 0.69314718f + (u + square * (series * u - 0.5f));
}

// cap tanh(x / cap) and its derivative 4e / (1 + e)², e = exp(-2|x| / cap): the latter without cancellation, and so the
// former where 1 - e would cancel, by the first terms of its series.
inline Floats cap_of(Floats x, float softcap, Floats& slope) {
  const Floats u = x / softcap, size = u < 0.0f ? -u : u, square = u * u;
  Floats t = size * (-2.0f * 1.44269504f);
  const Floats e = exp2_of(t), r = 1.0f / (1.0f + e);
  slope = 4.0f * e * r * r;
  const Floats series =
      (((all(2.1869489e-2f) * square - 5.3968254e-2f) * square + 1.3333334e-1f) * square - 3.3333334e-1f) * square * x +
      x;
  const Floats z = softcap * (1.0f - e) * r;
  return size < 0.3f ? series : x < 0.0f ? -z : z;
}

// ---- reading --------------------------------------------------------------------------------------------------------

struct Sums {
  Floats total = {}, moment = {}, total_kl = {};
};

// same: k_kl is k, so that of a part only the sums are two.
template <bool TWO, bool PART>
inline Floats accumulate(Floats z, Floats peak, Floats k, Floats k_kl, bool same, Floats least, Sums& sums,
                         Floats& e_kl) {
  const Floats d = z - peak;
  Floats t = d * k;
  const Floats whole = exp2_of(t);
  Floats e = whole;
  if (PART) e = z < least ? Floats{} : whole;
  sums.total += e;
  sums.moment += t * e;
  if (TWO) {
    if (PART && same) {
      e_kl = whole;
    } else {
      Floats t_kl = d * k_kl;
      e_kl = exp2_of(t_kl);
    }
    sums.total_kl += e_kl;
  }
  return e;
}

// PART: only of the columns that are not below `least`.
template <class E, bool TWO, bool CAP, bool KEEP, bool PART>
RowStatistics read_row(const typename E::Storage* row, const RowOptions& o, double k, double k_kl, float least,
                       float* scratch) {
  const int64_t blocks = (o.vocab + BLOCK - 1) / BLOCK;
  float* const kept_kl = scratch + blocks * BLOCK;
  float* const kept_slope = kept_kl + (TWO ? blocks * BLOCK : 0);
  float* const peaks = kept_slope + (CAP ? blocks * BLOCK : 0);
  const Floats k_all = all(static_cast<float>(k)), k_kl_all = all(static_cast<float>(k_kl));
  alignas(64) float z_of_block[BLOCK];

  // Of the whole row so far, relative to `peak`; moment is Σ t exp2(t).
  double peak = NEG_INF, total = 0, moment = 0, total_kl = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * BLOCK, count = o.vocab - start < BLOCK ? o.vocab - start : BLOCK;
    const int64_t whole = count / W * W;
    const typename E::Storage* x = row + start;
    float* const e_out = scratch + start;

    Floats tops[4] = {all(NEG_INF), all(NEG_INF), all(NEG_INF), all(NEG_INF)};
    const auto meet = [&](Floats v, int64_t i, Floats& top) {
      if (CAP) {
        Floats slope;
        v = cap_of(v, static_cast<float>(o.softcap), slope);
        if (KEEP) Float32::store(kept_slope + start + i, slope);
        Float32::store(z_of_block + i, v);
      }
      top = larger(v, top);
    };
    int64_t i = 0;
    for (; i + 4 * W <= whole; i += 4 * W) {
      meet(E::load(x + i), i, tops[0]);
      meet(E::load(x + i + W), i + W, tops[1]);
      meet(E::load(x + i + 2 * W), i + 2 * W, tops[2]);
      meet(E::load(x + i + 3 * W), i + 3 * W, tops[3]);
    }
    for (; i < whole; i += W) meet(E::load(x + i), i, tops[0]);
    if (whole < count) {
      // With a cap, a lane past the row holds -cap here, which no z is below; as a logit it has probability 0.
      meet(load_some<E>(x + whole, count - whole, NEG_INF), whole, tops[0]);
      for (i = count; i < whole + W; ++i) z_of_block[i] = NEG_INF;
    }
    const Floats top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
    float block_peak = NEG_INF;
    for (i = 0; i < W; ++i) block_peak = top[i] > block_peak ? top[i] : block_peak;
    const float base = block_peak == NEG_INF ? 0.0f : block_peak;
    // -inf only for a block that is wholly of probability 0, which then has a factor of 0.
    peaks[b] = block_peak;

    Sums sums[2];
    const auto z_at = [&](int64_t at) { return CAP ? Float32::load(z_of_block + at) : E::load(x + at); };
    const auto add = [&](Floats z, int64_t at, Sums& own) {
      Floats e_kl = {};
      const Floats e = accumulate<TWO, PART>(z, all(base), k_all, k_kl_all, k == k_kl, all(least), own, e_kl);
      if (KEEP) {
        Float32::store(e_out + at, e);
        if (TWO) Float32::store(kept_kl + start + at, e_kl);
      }
    };
    for (i = 0; i + 2 * W <= whole; i += 2 * W) {
      // The next block comes from memory while this one is computed; past the end of the logits nothing happens.
      __builtin_prefetch(x + BLOCK + i);
      if (sizeof(*x) == 4 && W == 16) __builtin_prefetch(x + BLOCK + i + W);
      add(z_at(i), i, sums[0]);
      add(z_at(i + W), i + W, sums[1]);
    }
    for (; i < whole; i += W) add(z_at(i), i, sums[0]);
    if (whole < count)
      add(CAP ? Float32::load(z_of_block + whole) : load_some<E>(x + whole, count - whole, NEG_INF), whole, sums[0]);

    const double block_total = sum(sums[0].total + sums[1].total), block_moment = sum(sums[0].moment + sums[1].moment);
    const double block_kl = TWO ? sum(sums[0].total_kl + sums[1].total_kl) : 0.0;
    if (block_peak == NEG_INF && block_total == 0) continue;  // nothing but -inf
    const double high = base > peak ? base : peak;
    // How far the row so far and this block lie under the new peak, in powers of two; -inf weighs nothing.
    const double old = peak == high ? 0 : (peak - high) * k, own = base == high ? 0 : (base - high) * k;
    const double old_weight = ::exp2(old), own_weight = ::exp2(own);
    moment = (old_weight > 0 ? old_weight * (moment + old * total) : 0) +
             (own_weight > 0 ? own_weight * (block_moment + own * block_total) : 0);
    total = old_weight * total + own_weight * block_total;
    if (TWO) {
      const double old_kl = peak == high ? 0 : (peak - high) * k_kl, own_kl = base == high ? 0 : (base - high) * k_kl;
      total_kl = ::exp2(old_kl) * total_kl + ::exp2(own_kl) * block_kl;
    }
    peak = high;
  }
  const double log_total = ::log(total);
  return {peak, log_total, log_total - LN2 * moment / total, TWO ? ::log(total_kl) : log_total};
}

// ---- writing --------------------------------------------------------------------------------------------------------

template <class E, bool TWO, bool CAP, bool BONUS>
void write_row(typename E::Storage* out, const RowOptions& o, double k, double k_kl, const RowStatistics& s,
               const RowWeights& w, const float* scratch, bool streaming, const void* next) {
  const int64_t blocks = (o.vocab + BLOCK - 1) / BLOCK;
  const float* const kept_kl = scratch + blocks * BLOCK;
  const float* const kept_slope = kept_kl + (TWO ? blocks * BLOCK : 0);
  const float* const peaks = kept_slope + (CAP ? blocks * BLOCK : 0);
  constexpr int64_t element = sizeof(typename E::Storage), line = W * element, LINES = BLOCK * element / 64;
  const double log2_total = s.log_total / LN2, log2_total_kl = s.log_total_kl / LN2;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * BLOCK, count = o.vocab - start < BLOCK ? o.vocab - start : BLOCK;
    // A row of nothing but -inf, or of NaN, has no peak: its exponentials or its sums say so.
    const double d = s.peak == NEG_INF ? 0 : peaks[b] - s.peak;
    const double factor = ::exp2(d * k - log2_total);  // p of an exponential of 1
    // With a bonus it is multiplied by one more, times log p + H, of which ln of the exponential is a part.
    const double constant = BONUS && factor != 0 ? w.bonus * factor * (LN2 * d * k - s.log_total + s.entropy) : 0.0;
    const Floats c = all(static_cast<float>(-w.a * factor + constant));
    const Floats c_log = all(BONUS ? static_cast<float>(w.bonus * factor) : 0.0f);
    const Floats c_kl = all(TWO ? static_cast<float>(-w.a_kl * ::exp2(d * k_kl - log2_total_kl)) : 0.0f);
    // As many lines per block as bring the first block of the next row.
    for (int64_t line_at = b * LINES / blocks; line_at < (b + 1) * LINES / blocks; ++line_at)
      __builtin_prefetch(static_cast<const char*>(next) + 64 * line_at);
    typename E::Storage* const to = out + start;
    const auto policy = [&](const float* at) {
      const Floats e = Float32::load(at);
      // An exponential of 0 is that, times anything finite.
      return BONUS ? e * (c + c_log * log_of(larger(e, all(1.17549435e-38f)))) : e * c;
    };
    const auto value = [&](int64_t i) {
      Floats g = policy(scratch + start + i);
      if (TWO) g += Float32::load(kept_kl + start + i) * c_kl;
      if (CAP) g *= Float32::load(kept_slope + start + i);
      return g;
    };
    int64_t i = 0;
    if (streaming && count >= 2 * W) {
      // The elements up to the first place where a whole register may go past the caches.
      i = (line - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % line)) % line / element;
      store_some<E>(to, value(0), i);
      for (; i + W <= count; i += W) E::stream(to + i, value(i));
    }
    for (; i + W <= count; i += W) E::store(to + i, value(i));
    if (i < count) {
      float rest[3][W] = {};
      const size_t bytes = sizeof(float) * static_cast<size_t>(count - i);
      ::memcpy(rest[0], scratch + start + i, bytes);
      if (TWO) ::memcpy(rest[1], kept_kl + start + i, bytes);
      if (CAP) ::memcpy(rest[2], kept_slope + start + i, bytes);
      Floats g = policy(rest[0]);
      if (TWO) g += Float32::load(rest[1]) * c_kl;
      if (CAP) g *= Float32::load(rest[2]);
      store_some<E>(to + i, g, count - i);
    }
  }
#if WIDTH > 4
  if (streaming) _mm_sfence();  // before anyone is told that the row is there
#endif
  if (w.token >= 0) store_some<E>(out + w.token, all(static_cast<float>(w.own)), 1);
}

template <class E>
Logit logit_at(const void* row, int64_t column, double softcap) {
  const Floats x = load_some<E>(static_cast<const typename E::Storage*>(row) + column, 1, 0);
  if (!(softcap > 0)) return {x[0], 1};
  Floats slope;
  const Floats z = cap_of(x, static_cast<float>(softcap), slope);
  return {z[0], slope[0]};
}

template <class E>
void scale_row(void* row, int64_t vocab, float factor) {
  typename E::Storage* const x = static_cast<typename E::Storage*>(row);
  int64_t i = 0;
  for (; i + W <= vocab; i += W) E::store(x + i, E::load(x + i) * factor);
  if (i < vocab) store_some<E>(x + i, load_some<E>(x + i, vocab - i, 0) * factor, vocab - i);
}

// ---- the table ------------------------------------------------------------------------------------------------------

template <class E, bool TWO, bool CAP, bool PART>
RowStatistics read_kept(const void* row, const RowOptions& o, double k, double k_kl, float least, float* scratch) {
  const auto* x = static_cast<const typename E::Storage*>(row);
  return o.keep ? read_row<E, TWO, CAP, true, PART>(x, o, k, k_kl, least, scratch)
                : read_row<E, TWO, CAP, false, PART>(x, o, k, k_kl, least, scratch);
}

template <class E, bool PART>
RowStatistics read_part(const void* row, const RowOptions& o, double k, double k_kl, float least, float* scratch) {
  if (o.softcap > 0)
    return o.two_temperatures ? read_kept<E, true, true, PART>(row, o, k, k_kl, least, scratch)
                              : read_kept<E, false, true, PART>(row, o, k, k_kl, least, scratch);
  return o.two_temperatures ? read_kept<E, true, false, PART>(row, o, k, k_kl, least, scratch)
                            : read_kept<E, false, false, PART>(row, o, k, k_kl, least, scratch);
}

// A `least` of NaN is none.
template <class E>
RowStatistics read(const void* row, const RowOptions& o, double k, double k_kl, float least, float* scratch) {
  return least > NEG_INF ? read_part<E, true>(row, o, k, k_kl, least, scratch)
                         : read_part<E, false>(row, o, k, k_kl, least, scratch);
}

template <class E, bool BONUS>
void write_kept(typename E::Storage* to, const RowOptions& o, double k, double k_kl, const RowStatistics& s,
                const RowWeights& w, const float* scratch, bool streaming, const void* next) {
  if (o.softcap > 0)
    o.two_temperatures ? write_row<E, true, true, BONUS>(to, o, k, k_kl, s, w, scratch, streaming, next)
                       : write_row<E, false, true, BONUS>(to, o, k, k_kl, s, w, scratch, streaming, next);
  else
    o.two_temperatures ? write_row<E, true, false, BONUS>(to, o, k, k_kl, s, w, scratch, streaming, next)
                       : write_row<E, false, false, BONUS>(to, o, k, k_kl, s, w, scratch, streaming, next);
}

template <class E>
void write(void* out, const RowOptions& o, double k, double k_kl, const RowStatistics& s, const RowWeights& w,
           const float* scratch, bool streaming, const void* next) {
  auto* to = static_cast<typename E::Storage*>(out);
  w.bonus != 0 ? write_kept<E, true>(to, o, k, k_kl, s, w, scratch, streaming, next)
               : write_kept<E, false>(to, o, k, k_kl, s, w, scratch, streaming, next);
}

}  // namespace
}  // namespace ISA
}  // namespace mdpgrpo

#define MDPGRPO_EACH(function) {function<ISA::Float32>, function<ISA::BFloat16>, function<ISA::Float16>}
#define MDPGRPO_ROWS(isa_name)                                                               \
  {isa_name, MDPGRPO_EACH(ISA::logit_at), MDPGRPO_EACH(ISA::read), MDPGRPO_EACH(ISA::write), \
   MDPGRPO_EACH(ISA::scale_row)}
