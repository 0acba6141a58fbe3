// The few Hopper instructions that CuTe does not wrap in the form needed here, and CuTe's wgmma structs behind one name.
#pragma once
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cstdint>
#include <cstdio>
#include <utility>

namespace spense::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;

// L2 eviction policies of createpolicy.fractional with fraction 1.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ uint32_t smem_address(void const* p) { return cute::cast_smem_ptr_to_uint(p); }

// Contiguous copy, 16-byte aligned on both sides, completing on `barrier`.
__device__ __forceinline__ void bulk_copy(void* dst, void const* src, uint32_t bytes, TransactionBarrier* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(smem_address(dst)), "l"(src), "r"(bytes), "r"(smem_address(barrier)), "l"(policy) : "memory");
}

#ifdef SPENSE_TRAP
// Polls until `done` or, by the wall clock, until a wait has lasted as long as no launch does: then it says which, and
// stops the kernel, where it would hang the device otherwise. One try_wait may be suspended for as long as the hardware
// likes, so that counting polls would bound nothing.
constexpr uint64_t kLongestWait = 2'000'000'000;   // ns

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
template <class Poll>
__device__ __forceinline__ void wait_or_trap(Poll done, uint32_t phase, char const* what) {
  uint64_t const start = nanoseconds();
  while (!done())
    if (nanoseconds() - start > kLongestWait) {
      printf("spense: block %d thread %d waits for %s, phase %u\n", blockIdx.x, threadIdx.x, what, phase);
      __trap();
    }
}
#endif

// Waits for the phase of this parity to complete; with -DSPENSE_TRAP not for ever.
template <class B>
__device__ __forceinline__ void wait(B* barrier, uint32_t phase, [[maybe_unused]] char const* what) {
#ifdef SPENSE_TRAP
  wait_or_trap([&] { return barrier->try_wait(phase); }, phase, what);
#else
  barrier->wait(phase);
#endif
}

// Partial sums written by ordinary stores are read by other CTAs of the cluster: release and acquire at cluster scope,
// which the CUTLASS barrier's own arrive and wait (cta scope) do not give.
__device__ __forceinline__ void arrive_release_cluster(Barrier* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}"
      :: "r"(smem_address(barrier)), "r"(cta) : "memory");
}
__device__ __forceinline__ void wait_acquire_cluster(Barrier* barrier, uint32_t phase, [[maybe_unused]] char const* what) {
#ifdef SPENSE_TRAP
  auto const poll = [&] {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(smem_address(barrier)), "r"(phase) : "memory");
    return done != 0;
  };
  wait_or_trap(poll, phase, what);
#else
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY;\nbra WAIT;\nREADY:\n}"
      :: "r"(smem_address(barrier)), "r"(phase) : "memory");
#endif
}
__device__ __forceinline__ float4 load_cluster(float const* local, uint32_t cta) {
  uint32_t remote;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem_address(local)), "r"(cta));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote) : "memory");
  return v;
}

// wgmma operand descriptor: K-major tile whose rows are one swizzle span (128 or 64 bytes) long, 8 rows per atom.
template <int kRowBytes>
__device__ __forceinline__ uint64_t tile_descriptor(void const* p) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t layout = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t stride = 8 * kRowBytes / 16;  // between groups of 8 rows, in units of 16 bytes
  return ((smem_address(p) & 0x3FFFF) >> 4) | (1ull << 16) | (stride << 32) | (layout << 62);
}

// m64 nN, e4m3 x e4m3 -> fp32, both operands from shared memory: k32 dense, k64 sparse.
template <int kN> struct Ops;
#define SPENSE_WGMMA(N)                                                          \
  template <> struct Ops<N> {                                                    \
    using Dense = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>;         \
    using Sparse = cute::SM90::GMMA::SPARSE::GMMA_64x##N##x64_F32E4M3E4M3_SS_TN<>; \
  };
SPENSE_WGMMA(8) SPENSE_WGMMA(16) SPENSE_WGMMA(32) SPENSE_WGMMA(64) SPENSE_WGMMA(128) SPENSE_WGMMA(256)
#undef SPENSE_WGMMA

template <int kN, size_t... I>
__device__ __forceinline__ void dense_wgmma(float (&acc)[kN / 2], uint64_t a, uint64_t b, std::index_sequence<I...>) {
  Ops<kN>::Dense::fma(a, b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}
template <int kN, size_t... I>
__device__ __forceinline__ void sparse_wgmma(float (&acc)[kN / 2], uint64_t a, uint64_t b, uint32_t e, std::index_sequence<I...>) {
  Ops<kN>::Sparse::fma(a, b, acc[I]..., e, cute::SM90::GMMA::ScaleOut::One);
}

// Keeps the compiler from moving accumulator reads and writes across the point.
template <int kCount>
__device__ __forceinline__ void fence(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(acc[i]);
}

}  // namespace spense::sm90
