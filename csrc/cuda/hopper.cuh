// The primitives of token_loss.cuh on sm_90 and newer: bulk copies with mbarriers, clusters, 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mdpgrpo {
namespace hw {

constexpr int THREADS = 256;

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return static_cast<int>(n);
}
__device__ __forceinline__ int64_t cluster() { return blockIdx.x / static_cast<uint32_t>(cluster_size()); }
__device__ __forceinline__ int64_t clusters() { return gridDim.x / static_cast<uint32_t>(cluster_size()); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void initialise(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(uint64_t* barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// As `wait`, for what other blocks of the cluster have sent.
__device__ __forceinline__ void wait_for_cluster(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// 16 bytes are the unit: both addresses and the size are multiples of it.
__device__ __forceinline__ void copy_in(void* to, const void* from, int32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ uint32_t address_in(int block, const void* p) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(p)), "r"(block));
  return remote;
}
// To the same place in the shared memory of a block of the cluster, and counted by its barrier: a barrier of the whole
// cluster would wait for every store to memory too.
template <class T>
__device__ __forceinline__ void send(T* place, int block, const T& value, uint64_t* barrier) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  const uint32_t remote = address_in(block, place), counted = address_in(block, barrier);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(&value);
#pragma unroll
  for (uint32_t i = 0; i < sizeof(T) / 4; ++i)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote + 4 * i),
                 "r"(words[i]), "r"(counted)
                 : "memory");
}

__device__ __forceinline__ int64_t take(int64_t* counter) {
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull));
}

__device__ __forceinline__ float from_lane(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Into [0, 1], NaN to 0.
__device__ __forceinline__ float saturate(float x) { return __saturatef(x); }
// NaN where either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
// Of both halves.
__device__ __forceinline__ uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// low to the lower half.
__device__ __forceinline__ uint32_t to_bfloat16x2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }

template <class V>
__device__ __forceinline__ V load16(const unsigned char* p) {
  static_assert(sizeof(V) == 16, "one access");
  union {
    uint4 words;
    V v;
  } u;
  u.words = *reinterpret_cast<const uint4*>(p);
  return u.v;
}
// Evicted first: no one reads the gradient before all of it is there.
template <class V>
__device__ __forceinline__ void store16(void* p, const V& v) {
  static_assert(sizeof(V) == 16, "one access");
  union U {
    V v;
    uint4 words;
    __device__ U(const V& x) : v(x) {}
  } u(v);
  __stcs(reinterpret_cast<uint4*>(p), u.words);
}

}  // namespace hw
}  // namespace mdpgrpo
