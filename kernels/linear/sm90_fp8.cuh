// One persistent, warp-specialised Hopper kernel for the whole Spense linear layer.
//
// A tile of y is a list of pipeline stages that accumulate into the same registers: `sparse_stages` of wgmma.sp on the
// 2:4 region, then `dense_stages` of wgmma on the dense one. An output split has tiles of one kind or the other, an
// input split has both kinds of stages in every tile; the code is the same.
//
// A cluster of CTAs serves one of two purposes:
//   split K   (decode) its CTAs share one tile; each sums a part of the stages, and the parts are added through
//             distributed shared memory in a fixed order, so that results do not depend on timing;
//   multicast (prefill) its CTAs own neighbouring row tiles and each loads a part of the x tile for all of them.
//             A sparse wgmma reads two bytes of x per byte of weights, so x from L2 is what limits large M.
//
// With programmatic dependent launch the first stages of weights are fetched before the kernel that makes x has ended.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "linear/sm90_primitives.cuh"
#include "linear/tile_plan.h"

namespace spense::sm90 {

struct KernelParams {
  TilePlan plan;
  uint8_t const* metadata;
  float const* x_scale;
  float const* weight_scale;
  void const* bias;
  void* y;
  float* amax;
  int metadata_rows, tokens, out_features, out_dtype;
};

constexpr int kSmemLimit = 227 * 1024;

// kPromote > 0: every so many stages the accumulators are added to a second set in full fp32, because FP8 wgmma sums
// with fewer mantissa bits than fp32 and the error grows with K.
//
// kPaired: y = silu(gate) * up. One warpgroup has 64 rows of gate, the other the same rows of up, and the epilogue joins
// them. The largest |y| of each token comes along, so that quantising y for the next layer needs one pass, not two.
template <int kWarpgroups_, int kTokens_, bool kMulticast_, int kPromote_, bool kPaired_ = false>
struct Shape {
  static constexpr bool kPaired = kPaired_;
  static_assert(!kPaired || kWarpgroups_ == 2);
  static constexpr int kWarpgroups = kWarpgroups_, kTokens = kTokens_, kPromote = kPromote_;
  static constexpr bool kMulticast = kMulticast_;
  static constexpr int kRows = 64 * kWarpgroups;             // of weights
  static constexpr int kBoxes = kPaired ? 2 : 1, kOutRows = kRows / kBoxes;
  // Consumers, then the producer warp. Registers are handed out by warpgroup: where the accumulators need more than an
  // even share, the producer is a warpgroup that gives its own away.
  static constexpr bool kShiftRegisters = kTokens > 128 || (kMulticast && kPaired);
  static constexpr int kThreads = 128 * kWarpgroups + (kShiftRegisters ? 128 : 32);
  // Columns of W per sparse stage. 256 give decode the same 128-byte rows for both regions (one TMA shape, fewer
  // barriers); 128 give prefill twice as many stages in flight, each of which is mostly x.
  static constexpr int kSparseK = kMulticast ? 128 : 256;
  static constexpr int kBlocks = kSparseK / 128;             // x tiles and metadata blocks per sparse stage
  static constexpr int kValueBytes = kSparseK / 2;           // per row
  static constexpr int kChunk = kMulticast ? 32 : kTokens;   // tokens per pass of the epilogue
  static constexpr int kStageBytes = kRows * 128 + kBlocks * (kTokens * 128 + kRows * 16);
  static constexpr int kSumBytes = kChunk * (kRows + 4) * 4;
  static constexpr int kFit = (kSmemLimit - 1024 - 512 - kSumBytes - kWarpgroups * kTokens * 4) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static_assert(kStages >= 3);

  struct __align__(1024) Smem {
    uint8_t weights[kStages][kRows * 128];
    uint8_t x[kStages][kBlocks][kTokens * 128];
    uint8_t metadata[kStages][kBlocks][kRows * 16];
    float sums[kChunk][kRows + 4];          // a stride of 4 banks: the accumulator layout stores without conflicts
    float x_scale[kWarpgroups][kTokens];
    uint64_t full[kStages], empty[kStages], sums_full, sums_empty;
  };
  static constexpr int kSmemBytes = sizeof(Smem) + 1024;     // room to align
  static_assert(kSmemBytes <= kSmemLimit);
};

// The first `count` of 8 consecutive elements as fp32, zeros for the others; all loads before the first conversion.
template <class T, class Convert>
__device__ __forceinline__ void load_row(float (&v)[8], T const* src, int count, Convert convert) {
  T raw[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) if (i < count) raw[i] = src[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = convert(raw[i]);
}

// The first `count` of 8 values to consecutive elements.
template <class T, class Convert>
__device__ __forceinline__ void store_row(T* dst, float const (&v)[8], int count, Convert convert) {
  union { T out[8]; uint4 words[sizeof(T) / 2]; } u;
#pragma unroll
  for (int i = 0; i < 8; ++i) u.out[i] = convert(v[i]);
  if (count >= 8 && (reinterpret_cast<uintptr_t>(dst) & 15) == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(dst)[i] = u.words[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) if (i < count) dst[i] = u.out[i];
  }
}

// The value as a load from y would give it.
__device__ __forceinline__ float rounded(float v, int dtype) {
  if (dtype == kBfloat16) return __bfloat162float(__float2bfloat16(v));
  return dtype == kFloat16 ? __half2float(__float2half(v)) : v;
}

__device__ __forceinline__ void add(float (&v)[8], float4 const& lo, float4 const& hi) {
  v[0] += lo.x; v[1] += lo.y; v[2] += lo.z; v[3] += lo.w;
  v[4] += hi.x; v[5] += hi.y; v[6] += hi.z; v[7] += hi.w;
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
linear_kernel(const __grid_constant__ CUtensorMap values_map, const __grid_constant__ CUtensorMap dense_map,
              const __grid_constant__ CUtensorMap x_map, const __grid_constant__ KernelParams p) {
  extern __shared__ uint8_t raw[];
  auto& smem = *reinterpret_cast<typename S::Smem*>(raw + (-smem_address(raw) & 1023));
  auto full = [&](int slot) { return reinterpret_cast<TransactionBarrier*>(&smem.full[slot]); };
  auto empty = [&](int slot) { return reinterpret_cast<Barrier*>(&smem.empty[slot]); };
  auto* const sums_full = reinterpret_cast<Barrier*>(&smem.sums_full);
  auto* const sums_empty = reinterpret_cast<Barrier*>(&smem.sums_empty);

  int const tid = threadIdx.x, lane = tid & 31;
  int const warp = __shfl_sync(0xffffffffu, tid >> 5, 0);     // uniform for the compiler: wgmma may not diverge
  uint32_t const rank = cute::block_rank_in_cluster();
  uint32_t const ctas = cute::cluster_shape().x;
  int const cluster = blockIdx.x / ctas;
  uint32_t const parts = S::kMulticast ? 1 : ctas, part = S::kMulticast ? 0 : rank;   // of the K split

  if (tid == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      full(i)->init(1);
      empty(i)->init(S::kWarpgroups * (S::kMulticast ? ctas : 1));   // multicast: every CTA that a slot is loaded for
    }
    sums_full->init(S::kWarpgroups * ctas);
    sums_empty->init(S::kWarpgroups * ctas);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();

  struct Work { TileClass c; int row_tile, token, begin, end; };
  auto work_at = [&](int k, Work& w) {
    Tile const t = p.plan.at(k, cluster);
    if (t.index < 0) return false;
    w.c = p.plan.classes[t.index];
    w.row_tile = t.row_tile + (S::kMulticast ? rank : 0);
    w.token = t.token_tile * S::kTokens;
    auto cut = [&](uint32_t r) {           // K split by bytes: a sparse stage of 256 columns moves 5/4 of a dense stage
      int const u = int((5u * w.c.sparse_stages + 4u * w.c.dense_stages) * r / parts), sparse = 5 * w.c.sparse_stages;
      return u <= sparse ? u / 5 : w.c.sparse_stages + (u - sparse) / 4;
    };
    w.begin = cut(part);
    w.end = cut(part + 1);
    return true;
  };

  if (warp >= 4 * S::kWarpgroups) {                            // ---- producer ----
    if constexpr (S::kShiftRegisters) cutlass::arch::warpgroup_reg_dealloc<56>();
    if (warp == 4 * S::kWarpgroups && cute::elect_one_sync()) {
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&values_map));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&dense_map));
      cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&x_map));
      // One token tile: weights are read once, x by every tile. More: both are read again and share L2.
      uint64_t const weight_policy = p.plan.token_tiles > 1 ? kEvictNormal : kEvictFirst;
      uint64_t const x_policy = p.plan.token_tiles > 1 ? kEvictNormal : kEvictLast;
      auto load_weights = [&](Work const& w, int stage, int slot) {
        bool const sparse = stage < w.c.sparse_stages;
        int const blocks = sparse ? S::kBlocks : 1;
        // A group may reach past its class: such a CTA computes the last tile once more and stores nothing.
        int const row = min(w.row_tile, (w.c.rows - 1) / S::kOutRows) * S::kOutRows;
        full(slot)->arrive_and_expect_tx(S::kRows * (sparse ? S::kValueBytes + S::kBlocks * 16 : 128) + blocks * S::kTokens * 128);
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {            // gate, up
          int const first = row + box * w.c.pair, place = box * S::kOutRows;
          if (!sparse) {
            cute::SM90_TMA_LOAD_2D::copy(&dense_map, &smem.full[slot], weight_policy, smem.weights[slot] + place * 128,
                                         (stage - w.c.sparse_stages) * 128, w.c.dense_row + first);
            continue;
          }
          cute::SM90_TMA_LOAD_2D::copy(&values_map, &smem.full[slot], weight_policy, smem.weights[slot] + place * S::kValueBytes,
                                       stage * S::kValueBytes, w.c.sparse_row + first);
#pragma unroll
          for (int b = 0; b < S::kBlocks; ++b)
            bulk_copy(smem.metadata[slot][b] + place * 16,
                      p.metadata + (size_t(stage * S::kBlocks + b) * p.metadata_rows + w.c.sparse_row + first) * 16,
                      S::kOutRows * 16, full(slot), weight_policy);
        }
      };
      auto load_x = [&](Work const& w, int stage, int slot) {
        bool const sparse = stage < w.c.sparse_stages;
        int const column = sparse ? stage * S::kSparseK : w.c.x_dense + (stage - w.c.sparse_stages) * 128;
        for (int b = 0; b < (sparse ? S::kBlocks : 1); ++b) {
          if (S::kMulticast && ctas > 1) {
            int const share = S::kTokens / ctas;
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&x_map, &smem.full[slot], uint16_t((1 << ctas) - 1), x_policy,
                                                   smem.x[slot][b] + rank * share * 128, column, w.token + rank * share);
          } else {
            cute::SM90_TMA_LOAD_2D::copy(&x_map, &smem.full[slot], x_policy, smem.x[slot][b], column + b * 128, w.token);
          }
        }
      };
      int slot = 0;
      uint32_t phase = 0;
      Work w;
  #pragma unroll 1
    for (int k = 0; work_at(k, w); ++k) {
        int stage = w.begin;
        if (k == 0) {                                          // all slots are free: weights now, x once it is there
          int const n = min(w.end - w.begin, S::kStages);
#pragma unroll 1
          for (int i = 0; i < n; ++i) load_weights(w, stage + i, i);
          cutlass::arch::wait_on_dependent_grids();
#pragma unroll 1
          for (int i = 0; i < n; ++i) load_x(w, stage + i, i);
          stage += n;
          slot = n % S::kStages;
          phase = n == S::kStages;
        }
#pragma unroll 1
        for (; stage < w.end; ++stage) {
          wait(empty(slot), phase ^ 1, "a free slot");         // a fresh barrier lets the first round through
          load_weights(w, stage, slot);
          load_x(w, stage, slot);
          if (++slot == S::kStages) { slot = 0; phase ^= 1; }
        }
      }
    }
    __syncwarp();
  } else {                                                     // ---- consumers: one warpgroup per 64 rows ----
    if constexpr (S::kShiftRegisters) cutlass::arch::warpgroup_reg_alloc<224>();
    using Regs = std::make_index_sequence<S::kTokens / 2>;
    int const wg = warp >> 2, t = tid & 127;
    // wgmma.sp m64k64 e4m3: thread t holds 32 bits of row 16 (t/32) + 8 (t%2) + (t/4)%8, columns 32 ((t/2)%2) ... + 31.
    int const metadata_offset = (wg * 64 + (warp & 3) * 16 + 8 * (lane & 1) + ((lane >> 2) & 7)) * 16 + ((lane >> 1) & 1) * 4;
    int slot = 0, previous = -1;
    uint32_t phase = 0, round = 0;
    float acc[S::kTokens / 2], total[S::kPromote ? S::kTokens / 2 : 1];

    auto release = [&](int s) {
      if constexpr (S::kMulticast) empty(s)->arrive(uint32_t(t), uint32_t(t) < ctas);
      else if (t == 0) empty(s)->arrive();
    };
    auto retire = [&] {                                        // commit this stage; the one before is finished now
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (previous >= 0) release(previous);
      previous = slot;
      if (++slot == S::kStages) { slot = 0; phase ^= 1; }
    };
    auto drain = [&] {
      cute::warpgroup_wait<0>();
      fence(acc);
      if (previous >= 0) release(previous);
      previous = -1;
      if constexpr (S::kPromote > 0) {
#pragma unroll
        for (int i = 0; i < S::kTokens / 2; ++i) { total[i] += acc[i]; acc[i] = 0.f; }
        fence(acc);
      }
    };
    // A stage leaves its wgmmas in flight, and with them its metadata registers: two sets take turns, and `busy` (the
    // other set) stays alive until its wgmmas are done.
    constexpr int kWords = S::kSparseK / 64;
    auto sparse_stage = [&](uint32_t (&e)[kWords], uint32_t (&busy)[kWords]) {
      wait(full(slot), phase, "a stage");
      uint64_t const a = tile_descriptor<S::kValueBytes>(smem.weights[slot] + wg * 64 * S::kValueBytes);
      uint64_t const b = tile_descriptor<128>(smem.x[slot][0]);
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        e[j] = *reinterpret_cast<uint32_t const*>(&smem.metadata[slot][j >> 1][metadata_offset + (j & 1) * 8]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        sparse_wgmma<S::kTokens>(acc, a + 2 * j, b + (j >> 1) * (S::kTokens * 128 / 16) + (j & 1) * 4, e[j], Regs{});
      retire();
#pragma unroll
      for (int j = 0; j < kWords; ++j) asm volatile("" :: "r"(busy[j]));
    };
    auto dense_stage = [&] {
      wait(full(slot), phase, "a stage");
      uint64_t const a = tile_descriptor<128>(smem.weights[slot] + wg * 64 * 128);
      uint64_t const b = tile_descriptor<128>(smem.x[slot][0]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int j = 0; j < 4; ++j) dense_wgmma<S::kTokens>(acc, a + 2 * j, b + 2 * j, Regs{});
      retire();
    };
    constexpr int kRun = S::kPromote ? S::kPromote : 1 << 28;   // stages between drains

    // x_scale and y may belong to the kernel before. Only now may the one after start: what it reads before its own
    // wait can then come from anything but this kernel.
    cutlass::arch::wait_on_dependent_grids();
    cutlass::arch::launch_dependent_grids();
    Work w;
#pragma unroll 1
    for (int k = 0; work_at(k, w); ++k) {
      // The epilogue's thread takes 8 rows of one token per step. Its scales are asked for before the main loop.
      int const row8 = (S::kPaired ? 0 : wg * 64) + (t & 7) * 8, row = w.row_tile * S::kOutRows + row8;
      int const rows = min(8, w.c.rows - row), o = w.c.y_row + row;
      float scale[S::kBoxes][8], x_scale[(S::kTokens + 127) / 128];
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box)
        load_row(scale[box], p.weight_scale + box * p.out_features + o, rows, [](float f) { return f; });
#pragma unroll
      for (int i = 0; i < S::kTokens; i += 128)
        x_scale[i / 128] = i + t < S::kTokens && w.token + i + t < p.tokens ? p.x_scale[w.token + i + t] : 0.f;
#pragma unroll
      for (int i = 0; i < S::kTokens / 2; ++i) {
        acc[i] = 0.f;
        if constexpr (S::kPromote > 0) total[i] = 0.f;
      }
      fence(acc);
      // Two loops, never one with a branch: ptxas serialises wgmmas of different kinds that share a loop.
      uint32_t e0[kWords] = {}, e1[kWords] = {};
      int const middle = min(w.end, w.c.sparse_stages);
#pragma unroll 1
      for (int stage = w.begin; stage < middle;) {
#pragma unroll 1
        for (int const to = min(middle, stage + kRun); stage < to; stage += 2) {
          sparse_stage(e0, e1);
          if (stage + 1 < to) sparse_stage(e1, e0);
          else { stage = to; break; }
        }
        drain();
      }
#pragma unroll 1
      for (int stage = max(w.begin, w.c.sparse_stages); stage < w.end;) {
#pragma unroll 1
        for (int const to = min(w.end, stage + kRun); stage < to; ++stage) dense_stage();
        drain();
      }

      // ---- epilogue: through shared memory, so that y is written in rows ----
      float bias[S::kBoxes][8] = {};
      if (p.bias) {
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {
          int const at = box * p.out_features + o;
          if (p.out_dtype == kBfloat16) load_row(bias[box], static_cast<__nv_bfloat16 const*>(p.bias) + at, rows, [](__nv_bfloat16 f) { return __bfloat162float(f); });
          else if (p.out_dtype == kFloat16) load_row(bias[box], static_cast<__half const*>(p.bias) + at, rows, [](__half f) { return __half2float(f); });
          else load_row(bias[box], static_cast<float const*>(p.bias) + at, rows, [](float f) { return f; });
        }
      }
#pragma unroll
      for (int i = 0; i < S::kTokens; i += 128)
        if (i + t < S::kTokens) smem.x_scale[wg][i + t] = x_scale[i / 128];
      int const join_thread = S::kPaired ? tid : t;
      constexpr int kStep = S::kPaired ? 32 : 16;              // tokens at a time
#pragma unroll
      for (int chunk = 0; chunk < S::kTokens; chunk += S::kChunk, ++round) {
        if (parts > 1 && round > 0) wait_acquire_cluster(sums_empty, (round - 1) & 1, "sums to be read");   // my last sums were read
        int const r = wg * 64 + (warp & 3) * 16 + (lane >> 2);
#pragma unroll
        for (int j = 0; j < S::kChunk / 8; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            int const i = chunk / 2 + j * 4 + q;
            smem.sums[j * 8 + (lane & 3) * 2 + (q & 1)][r + (q >> 1) * 8] = S::kPromote ? total[S::kPromote ? i : 0] : acc[i];
          }
        auto const join = [&] {                                // those who share sums: a warpgroup, or a pair
          cutlass::arch::NamedBarrier::sync(S::kPaired ? 256 : 128, S::kPaired ? 0 : wg);
        };
        join();
        if (parts > 1) {
          if (uint32_t(t) < ctas) arrive_release_cluster(sums_full, t);
          wait_acquire_cluster(sums_full, round & 1, "sums of its peers");
        }
#pragma unroll 1
        for (int n = part + parts * (join_thread >> 3); n < S::kChunk; n += parts * kStep) {   // dealt out to the parts
          int const token = w.token + chunk + n;
          if (token >= p.tokens || (!S::kPaired && rows <= 0)) break;
          float const xs = smem.x_scale[wg][chunk + n];
          float value[S::kBoxes][8] = {};
#pragma unroll
          for (int box = 0; box < S::kBoxes; ++box) {
            float(&v)[8] = value[box];
            float const* const src = &smem.sums[n][row8 + box * S::kOutRows];
            if (parts == 1) add(v, *reinterpret_cast<float4 const*>(src), *reinterpret_cast<float4 const*>(src + 4));
            else {
              constexpr int kBatch = S::kTokens <= 64 ? 8 : 2;                   // remote loads in flight, by registers
              for (uint32_t c = 0; c < parts; c += kBatch) {
                float4 lo[kBatch] = {}, hi[kBatch] = {};
#pragma unroll
                for (int j = 0; j < kBatch; ++j)
                  if (c + j < parts) { lo[j] = load_cluster(src, c + j); hi[j] = load_cluster(src + 4, c + j); }
#pragma unroll
                for (int j = 0; j < kBatch; ++j) add(v, lo[j], hi[j]);           // the order of parts is fixed
              }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = v[i] * xs * scale[box][i] + bias[box][i];
          }
          float(&v)[8] = value[0];
          if constexpr (S::kPaired) {
            float largest = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              v[i] = rounded(v[i] / (1.f + __expf(-v[i])) * value[S::kBoxes - 1][i], p.out_dtype);
              if (i < rows) largest = fmaxf(largest, fabsf(v[i]));
            }
#pragma unroll
            for (int d = 1; d < 8; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffu << (lane & 24), largest, d));
            // Not negative, so ordered like the integers of its bits; a maximum does not depend on the order.
            if ((t & 7) == 0) atomicMax(reinterpret_cast<int*>(p.amax) + token, __float_as_int(largest));
            if (rows <= 0) continue;
          }
          size_t const at = size_t(token) * p.out_features + o;
          if (p.out_dtype == kBfloat16) store_row(static_cast<__nv_bfloat16*>(p.y) + at, v, rows, [](float f) { return __float2bfloat16(f); });
          else if (p.out_dtype == kFloat16) store_row(static_cast<__half*>(p.y) + at, v, rows, [](float f) { return __float2half(f); });
          else store_row(static_cast<float*>(p.y) + at, v, rows, [](float f) { return f; });
        }
        join();
        // Nothing is published here, the sums are only given free: no release at cluster scope, which is slow.
        if (parts > 1 && uint32_t(t) < ctas) sums_empty->arrive(t, 1u);
      }
    }
  }
  // No CTA leaves while another may still read its sums, multicast into it or arrive on its barriers.
  cute::cluster_arrive();
  cute::cluster_wait();
}

}  // namespace spense::sm90
