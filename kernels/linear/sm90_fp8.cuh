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
#include "linear/sm90_epilogue.cuh"
#include "linear/sm90_primitives.cuh"
#include "linear/sm90_shape.cuh"

namespace spense::sm90 {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    linear_kernel(__grid_constant__ const CUtensorMap values_map, __grid_constant__ const CUtensorMap dense_map,
                  __grid_constant__ const CUtensorMap x_map, __grid_constant__ const KernelParams p) {
  extern __shared__ uint8_t raw[];
  auto& smem = *reinterpret_cast<typename S::Smem*>(raw + (-smem_address(raw) & 1023));
  auto full = [&](int slot) { return reinterpret_cast<TransactionBarrier*>(&smem.full[slot]); };
  auto empty = [&](int slot) { return reinterpret_cast<Barrier*>(&smem.empty[slot]); };
  auto* const sums_full = reinterpret_cast<Barrier*>(&smem.sums_full);
  auto* const sums_empty = reinterpret_cast<Barrier*>(&smem.sums_empty);

  int const tid = threadIdx.x, lane = tid & 31;
  int const warp = __shfl_sync(0xffffffffu, tid >> 5, 0);  // uniform for the compiler: wgmma may not diverge
  uint32_t const rank = cute::block_rank_in_cluster();
  uint32_t const ctas = cute::cluster_shape().x;
  int const cluster = blockIdx.x / ctas;
  uint32_t const parts = S::kMulticast ? 1 : ctas, part = S::kMulticast ? 0 : rank;  // of the K split

  if (tid == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      full(i)->init(1);
      empty(i)->init(S::kWarpgroups * (S::kMulticast ? ctas : 1));  // multicast: every CTA that a slot is loaded for
    }
    sums_full->init(S::kWarpgroups * ctas);
    sums_empty->init(S::kWarpgroups * ctas);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();

  struct Work {
    TileClass c;
    int row_tile, token, begin, end;
  };
  auto work_at = [&](int k, Work& w) {
    Tile const t = p.plan.at(k, cluster);
    if (t.index < 0) return false;
    w.c = p.plan.classes[t.index];
    w.row_tile = t.row_tile + (S::kMulticast ? rank : 0);
    w.token = t.token_tile * S::kTokens;
    auto cut = [&](uint32_t r) {  // K split by bytes: a sparse stage of 256 columns moves 5/4 of a dense stage
      int const u = int((5u * w.c.sparse_stages + 4u * w.c.dense_stages) * r / parts), sparse = 5 * w.c.sparse_stages;
      return u <= sparse ? u / 5 : w.c.sparse_stages + (u - sparse) / 4;
    };
    w.begin = cut(part);
    w.end = cut(part + 1);
    return true;
  };

  if (warp >= 4 * S::kWarpgroups) {  // ---- producer ----
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
        full(slot)->arrive_and_expect_tx(S::kRows * (sparse ? S::kValueBytes + S::kBlocks * 16 : 128) +
                                         blocks * S::kTokens * 128);
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {  // gate, up
          int const first = row + box * w.c.pair, place = box * S::kOutRows;
          if (!sparse) {
            cute::SM90_TMA_LOAD_2D::copy(&dense_map, &smem.full[slot], weight_policy, smem.weights[slot] + place * 128,
                                         (stage - w.c.sparse_stages) * 128, w.c.dense_row + first);
            continue;
          }
          cute::SM90_TMA_LOAD_2D::copy(&values_map, &smem.full[slot], weight_policy,
                                       smem.weights[slot] + place * S::kValueBytes, stage * S::kValueBytes,
                                       w.c.sparse_row + first);
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
                                                   smem.x[slot][b] + rank * share * 128, column,
                                                   w.token + rank * share);
          } else {
            cute::SM90_TMA_LOAD_2D::copy(&x_map, &smem.full[slot], x_policy, smem.x[slot][b], column + b * 128,
                                         w.token);
          }
        }
      };
      int slot = 0;
      uint32_t phase = 0;
      Work w;
#pragma unroll 1
      for (int k = 0; work_at(k, w); ++k) {
        int stage = w.begin;
        if (k == 0) {  // all slots are free: weights now, x once it is there
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
          wait(empty(slot), phase ^ 1, "a free slot");  // a fresh barrier lets the first round through
          load_weights(w, stage, slot);
          load_x(w, stage, slot);
          if (++slot == S::kStages) {
            slot = 0;
            phase ^= 1;
          }
        }
      }
    }
    __syncwarp();
  } else {  // ---- consumers: one warpgroup per 64 rows ----
    if constexpr (S::kShiftRegisters) cutlass::arch::warpgroup_reg_alloc<224>();
    using Regs = std::make_index_sequence<S::kTokens / 2>;
    int const wg = warp >> 2, t = tid & 127;
    Place const place{tid, lane, warp, wg, t, ctas, part, parts};
    // wgmma.sp m64k64 e4m3: thread t holds 32 bits of row 16 (t/32) + 8 (t%2) + (t/4)%8, columns 32 ((t/2)%2) ... + 31.
    int const metadata_offset =
        (wg * 64 + (warp & 3) * 16 + 8 * (lane & 1) + ((lane >> 2) & 7)) * 16 + ((lane >> 1) & 1) * 4;
    int slot = 0, previous = -1;
    uint32_t phase = 0, round = 0;
    float acc[S::kTokens / 2], total[S::kPromote ? S::kTokens / 2 : 1];

    auto release = [&](int s) {
      if constexpr (S::kMulticast)
        empty(s)->arrive(uint32_t(t), uint32_t(t) < ctas);
      else if (t == 0)
        empty(s)->arrive();
    };
    auto retire = [&] {  // commit this stage; the one before is finished now
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (previous >= 0) release(previous);
      previous = slot;
      if (++slot == S::kStages) {
        slot = 0;
        phase ^= 1;
      }
    };
    auto drain = [&] {
      cute::warpgroup_wait<0>();
      fence(acc);
      if (previous >= 0) release(previous);
      previous = -1;
      if constexpr (S::kPromote > 0) {
#pragma unroll
        for (int i = 0; i < S::kTokens / 2; ++i) {
          total[i] += acc[i];
          acc[i] = 0.f;
        }
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
      for (int j = 0; j < kWords; ++j) asm volatile("" ::"r"(busy[j]));
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
    constexpr int kRun = S::kPromote ? S::kPromote : 1 << 28;  // stages between drains

    // x_scale and y may belong to the kernel before. Only now may the one after start: what it reads before its own
    // wait can then come from anything but this kernel.
    cutlass::arch::wait_on_dependent_grids();
    cutlass::arch::launch_dependent_grids();
    Work w;
#pragma unroll 1
    for (int k = 0; work_at(k, w); ++k) {
      Epilogue<S> epilogue;
      epilogue.load(p, place, w.c, w.row_tile, w.token);
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
          if (stage + 1 < to)
            sparse_stage(e1, e0);
          else {
            stage = to;
            break;
          }
        }
        drain();
      }
#pragma unroll 1
      for (int stage = max(w.begin, w.c.sparse_stages); stage < w.end;) {
#pragma unroll 1
        for (int const to = min(w.end, stage + kRun); stage < to; ++stage) dense_stage();
        drain();
      }

      if constexpr (S::kPromote > 0)
        epilogue.run(p, smem, place, sums_full, sums_empty, w.token, total, round);
      else
        epilogue.run(p, smem, place, sums_full, sums_empty, w.token, acc, round);
    }
  }
  // No CTA leaves while another may still read its sums, multicast into it or arrive on its barriers.
  cute::cluster_arrive();
  cute::cluster_wait();
}

}  // namespace spense::sm90
