// csrc/cuda/token_loss.cuh without a GPU: its text compiled for the CPU, with a fiber for every thread of a cluster.
//
// What a GPU leaves open is taken at its worst: a bulk copy arrives at once or only when someone waits for it, threads
// take turns at barriers alone, blocks and warps run far ahead of others, and shared memory begins as garbage.
// Misaligned 16-byte accesses end the process with a word.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace mdpgrpo {
namespace hw {

constexpr int THREADS = 64;

struct Barrier {
  int members = 0, arrived = 0, generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int thread, rank;
  bool done = false;
};
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  std::vector<char> sent;  // in place of `from`
};
struct Arrival {
  uint32_t phase = 0;
  bool armed = false;
  size_t expected = 0;
  std::vector<Copy> copies;
};
struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  int cluster_size = 1;
  int64_t cluster = 0, clusters = 1, taken = 0;
  uint32_t chance = 1;
  std::vector<Barrier> blocks, warps;
  Barrier whole;
  std::map<const void*, Arrival> arrivals;
  std::vector<char*> block_memory;
  std::vector<float> lanes;
  int64_t block_bytes = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_fibers: %s\n", what);
  std::abort();
}
inline void take_turns() { swapcontext(&machine.current->context, &machine.scheduler); }
inline void sync(Barrier& b) {
  const int generation = b.generation;
  if (++b.arrived == b.members) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  while (b.generation == generation) take_turns();
}

inline int thread() { return machine.current->thread; }
inline int rank() { return machine.current->rank; }
inline int cluster_size() { return machine.cluster_size; }
inline int64_t cluster() { return machine.cluster; }
inline int64_t clusters() { return machine.clusters; }
inline void sync_block() { sync(machine.blocks[static_cast<size_t>(rank())]); }
inline void sync_cluster() { sync(machine.whole); }
inline Barrier& warp() { return machine.warps[static_cast<size_t>(rank() * (THREADS / 32) + thread() / 32)]; }

inline void initialise(uint64_t* barrier) { machine.arrivals[barrier] = Arrival(); }
inline void expect(uint64_t* barrier, int32_t bytes) {
  Arrival& a = machine.arrivals.at(barrier);
  if (a.armed) fail("a barrier is used for two phases at once");
  a.armed = true;
  a.expected = static_cast<size_t>(bytes);
}
inline void copy_in(void* to, const void* from, int32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    fail("a bulk copy is not of whole 16 bytes");
  machine.chance = machine.chance * 1664525 + 1013904223;
  if (machine.chance >> 16 & 1) std::memcpy(to, from, static_cast<size_t>(bytes));
  machine.arrivals.at(barrier).copies.push_back({to, from, static_cast<size_t>(bytes), {}});
}
inline void wait(uint64_t* barrier, uint32_t phase) {
  Arrival& a = machine.arrivals.at(barrier);
  while (a.phase == phase) {
    size_t bytes = 0;
    for (const Copy& c : a.copies) bytes += c.bytes;
    if (a.armed && bytes == a.expected) {
      for (const Copy& c : a.copies) std::memcpy(c.to, c.from != nullptr ? c.from : c.sent.data(), c.bytes);
      a = Arrival{phase ^ 1, false, 0, {}};
    } else {
      take_turns();
    }
  }
}
inline char* address_in(int block, const void* p, size_t bytes) {
  const int64_t offset = static_cast<const char*>(p) - machine.block_memory[static_cast<size_t>(rank())];
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > machine.block_bytes) fail("a store leaves shared memory");
  return machine.block_memory[static_cast<size_t>(block)] + offset;
}
inline void wait_for_cluster(uint64_t* barrier, uint32_t phase) { wait(barrier, phase); }
template <class T>
inline void send(T* place, int block, const T& value, uint64_t* barrier) {
  const char* const bytes = reinterpret_cast<const char*>(&value);
  machine.arrivals.at(address_in(block, barrier, sizeof *barrier))
      .copies.push_back({address_in(block, place, sizeof(T)), nullptr, sizeof(T), {bytes, bytes + sizeof(T)}});
}
// Clusters run one after the other here: each gets its share of the numbers.
inline int64_t take(int64_t* counter) {
  if (*counter != 0) fail("the counter of rows does not begin at 0");
  return machine.taken++ * machine.clusters + machine.cluster;
}
inline float from_lane(float x, int distance) {
  const size_t own = static_cast<size_t>(rank() * THREADS + thread());
  machine.lanes[own] = x;
  sync(warp());
  const float found = machine.lanes[own ^ static_cast<size_t>(distance)];
  sync(warp());
  return found;
}
inline float exp2(float x) { return ::exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float saturate(float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, b); }
inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t x, uint32_t y) {
    float f[2];
    std::memcpy(&f[0], &x, 4), std::memcpy(&f[1], &y, 4);
    return f[1] != f[1] || f[0] >= f[1] ? x : y;
  };
  return (larger(a << 16, b << 16) >> 16) | larger(a & 0xffff0000u, b & 0xffff0000u);
}
inline uint32_t to_bfloat16(float x) {
  uint32_t w;
  std::memcpy(&w, &x, 4);
  return x == x ? (w + 0x7fff + ((w >> 16) & 1)) >> 16 : 0x7fc0;
}
inline uint32_t to_bfloat16x2(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline float from_half(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const float fraction = static_cast<float>(h & 0x3ff), sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25));
}
template <class V>
inline V load16(const unsigned char* p) {
  static_assert(sizeof(V) == 16, "one access");
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("a 16-byte load is not aligned");
  V v;
  std::memcpy(&v, p, 16);
  return v;
}
template <class V>
inline void store16(void* p, const V& v) {
  static_assert(sizeof(V) == 16, "one access");
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("a 16-byte store is not aligned");
  std::memcpy(p, &v, 16);
}

}  // namespace hw
}  // namespace mdpgrpo

#include "../../csrc/cuda/token_loss_op.h"

namespace mdpgrpo {
namespace {

int64_t slice_bytes() {
  const char* const given = std::getenv("HOPPER_SLICE_BYTES");
  return given == nullptr ? 72 << 10 : std::atoll(given);
}

struct Task {
  void (*body)(const RowArguments&, unsigned char*, BlockMemory&);
  const RowArguments* p;
  std::vector<unsigned char*> slices;
} task;

void start() {
  hw::Fiber& self = *hw::machine.current;
  const size_t r = static_cast<size_t>(self.rank);
  task.body(*task.p, task.slices[r], *reinterpret_cast<BlockMemory*>(hw::machine.block_memory[r]));
  self.done = true;
  while (true) hw::take_turns();
}

void run_cluster(const RowShape& shape) {
  hw::Machine& m = hw::machine;
  const size_t blocks = static_cast<size_t>(shape.cluster), warps = hw::THREADS / 32;
  m.cluster_size = shape.cluster;
  m.blocks.assign(blocks, {hw::THREADS, 0, 0});
  m.warps.assign(blocks * warps, {32, 0, 0});
  m.whole = {hw::THREADS * shape.cluster, 0, 0};
  m.arrivals.clear(), m.taken = 0;
  m.lanes.assign(blocks * hw::THREADS, 0);
  m.block_bytes = sizeof(BlockMemory);
  std::vector<std::unique_ptr<void, void (*)(void*)>> owned;
  m.block_memory.clear(), task.slices.clear();
  for (size_t b = 0; b < blocks; ++b) {
    for (const size_t bytes : {sizeof(BlockMemory), static_cast<size_t>(shape.slice)}) {
      owned.emplace_back(std::aligned_alloc(128, (bytes + 127) / 128 * 128), std::free);
      std::memset(owned.back().get(), 0xff, bytes);  // NaN in every dtype
    }
    m.block_memory.push_back(static_cast<char*>(owned[2 * b].get()));
    task.slices.push_back(static_cast<unsigned char*>(owned[2 * b + 1].get()));
  }
  m.fibers = std::vector<hw::Fiber>(blocks * hw::THREADS);
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    hw::Fiber& f = m.fibers[i];
    f.thread = static_cast<int>(i % hw::THREADS), f.rank = static_cast<int>(i / hw::THREADS);
    f.stack.resize(64 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, start, 0);
  }
  // A block, or a warp of it, is held back for long, so that the others run as far ahead as barriers let them.
  uint32_t chance = 12345;
  const auto pick = [&](int n) {
    chance = chance * 1664525 + 1013904223;
    return static_cast<int>((chance >> 16) % static_cast<uint32_t>(n));
  };
  int held_rank = -1, held_warp = -1, passes = 0;
  for (bool busy = true; busy; ++passes) {
    if (passes % 150 == 0) held_rank = pick(shape.cluster), held_warp = pick(2) == 0 ? -1 : pick(hw::THREADS / 32);
    busy = false;
    for (hw::Fiber& f : m.fibers) {
      if (f.done) continue;
      if (f.rank == held_rank && (held_warp < 0 || f.thread / 32 == held_warp) && passes % 150 < 149) {
        busy = true;
        continue;
      }
      m.current = &f;
      swapcontext(&m.scheduler, &f.context);
      busy = busy || !f.done;
    }
  }
}

template <class E, class Out, bool TWO, bool CAP, bool EXTENDED>
void launch(RowArguments p) {
  constexpr int64_t item = sizeof(typename E::Storage);
  const RowShape shape = row_shape(p.vocab, item, slice_bytes(), 224 << 10);
  p.slice = static_cast<int32_t>(shape.slice / item);
  task.body = token_loss_rows<E, Out, TWO, CAP, EXTENDED>;
  task.p = &p;
  // Two clusters, so that each takes several rows.
  hw::machine.clusters = p.rows.n_rows < 2 ? 1 : 2;
  for (hw::machine.cluster = 0; hw::machine.cluster < hw::machine.clusters; ++hw::machine.cluster) run_cluster(shape);
}

template <class E, class Out, bool EXTENDED>
void launch_with(const RowArguments& p) {
  const bool two_temperatures = p.settings.two_temperatures;
  if (p.settings.softcap > 0)
    two_temperatures ? launch<E, Out, true, true, EXTENDED>(p) : launch<E, Out, false, true, EXTENDED>(p);
  else
    two_temperatures ? launch<E, Out, true, false, EXTENDED>(p) : launch<E, Out, false, false, EXTENDED>(p);
}

template <class E, class Out>
void launch_for(const RowArguments& p) {
  p.settings.extended(p.rows) ? launch_with<E, Out, true>(p) : launch_with<E, Out, false>(p);
}

void token_loss_rows_op(StableIValue* stack, uint64_t, uint64_t) {
  const RowCall call = row_call(stack, aoti_torch_device_type_cpu());
  if (call.dtype == DType::bfloat16)
    launch_for<BFloat16, BFloat16>(call.p);
  else if (call.dtype == DType::float16)
    launch_for<Float16, Float32>(call.p);
  else
    launch_for<Float32, Float32>(call.p);
}

const bool registered = [] {
  static Library library("CPU", "cuda_on_fibers.cpp");
  library.add("_cuda_token_loss_rows", TOKEN_LOSS_ROWS, token_loss_rows_op);
  return true;
}();

}  // namespace
}  // namespace mdpgrpo
