// From the sums of a tile to y: scales, bias and, in a paired tile, silu(gate) * up, in a packed one TwELL's words;
// through shared memory, so that y is written in rows. Where K is split over a cluster, its CTAs share out the tokens,
// and each adds the parts of its own.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "linear/sm90_shape.cuh"
#include "mlp/twell_pack.cuh"

namespace spense::sm90 {

// The first `count` of 8 consecutive elements as fp32, zeros for the others; all loads before the first conversion.
template <class T, class Convert>
__device__ __forceinline__ void load_row(float (&v)[8], T const* src, int count, Convert convert) {
  T raw[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) raw[i] = src[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = convert(raw[i]);
}

// The first `count` of 8 values to consecutive elements.
template <class T, class Convert>
__device__ __forceinline__ void store_row(T* dst, float const (&v)[8], int count, Convert convert) {
  union {
    T out[8];
    uint4 words[sizeof(T) / 2];
  } u;
#pragma unroll
  for (int i = 0; i < 8; ++i) u.out[i] = convert(v[i]);
  if (count >= 8 && (reinterpret_cast<uintptr_t>(dst) & 15) == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(dst)[i] = u.words[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) dst[i] = u.out[i];
  }
}

// The value as a load from y would give it.
__device__ __forceinline__ float rounded(float v, int dtype) {
  if (dtype == kBfloat16) return __bfloat162float(__float2bfloat16(v));
  return dtype == kFloat16 ? __half2float(__float2half(v)) : v;
}

__device__ __forceinline__ void add(float (&v)[8], float4 const& lo, float4 const& hi) {
  v[0] += lo.x;
  v[1] += lo.y;
  v[2] += lo.z;
  v[3] += lo.w;
  v[4] += hi.x;
  v[5] += hi.y;
  v[6] += hi.z;
  v[7] += hi.w;
}

// Where a consumer thread is: in its CTA, its warpgroup (`wg`, `t`), and its CTA in the cluster and in the split of K.
struct Place {
  int tid, lane, warp, wg, t;
  uint32_t ctas, part, parts;
};

// A thread's share in one tile: 8 rows of one token per step.
template <class S>
struct Epilogue {
  static constexpr int kLanes = S::kOutRows / (S::kJoined ? 8 : 8 * S::kWarpgroups);  // that share a token
  int row8, rows, o;  // first row in the tile, rows that exist, first output
  bool there;         // is there any row of the tile?
  float scale[S::kBoxes][8], x_scale[(S::kTokens + 127) / 128];

  // Before the main loop, so that scales are on their way meanwhile.
  __device__ __forceinline__ void load(KernelParams const& p, Place const& place, TileClass const& c, int row_tile,
                                       int token) {
    int const wg = place.wg, t = place.t;
    row8 = (S::kJoined ? 0 : wg * 64) + (t & (kLanes - 1)) * 8;
    int const row = row_tile * S::kOutRows + row8;
    there = row_tile * S::kOutRows < c.rows;
    rows = min(8, c.rows - row);
    o = c.y_row + row;
#pragma unroll
    for (int box = 0; box < S::kBoxes; ++box)
      load_row(scale[box], p.weight_scale + box * p.out_features + o, rows, [](float f) { return f; });
#pragma unroll
    for (int i = 0; i < S::kTokens; i += 128)
      x_scale[i / 128] = i + t < S::kTokens && token + i + t < p.tokens ? p.x_scale[token + i + t] : 0.f;
  }

  // `acc`: as wgmma leaves it. `round` counts the uses of the two barriers.
  __device__ __forceinline__ void run(KernelParams const& p, typename S::Smem& smem, Place const& place,
                                      Barrier* sums_full, Barrier* sums_empty, int first_token,
                                      float const (&acc)[S::kTokens / 2], uint32_t& round) {
    int const tid = place.tid, lane = place.lane, warp = place.warp, wg = place.wg, t = place.t;
    uint32_t const ctas = place.ctas, part = place.part, parts = place.parts;
    float bias[S::kBoxes][8] = {};
    if (p.bias) {
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box) {
        int const at = box * p.out_features + o;
        if (p.out_dtype == kBfloat16)
          load_row(bias[box], static_cast<__nv_bfloat16 const*>(p.bias) + at, rows,
                   [](__nv_bfloat16 f) { return __bfloat162float(f); });
        else if (p.out_dtype == kFloat16)
          load_row(bias[box], static_cast<__half const*>(p.bias) + at, rows, [](__half f) { return __half2float(f); });
        else
          load_row(bias[box], static_cast<float const*>(p.bias) + at, rows, [](float f) { return f; });
      }
    }
#pragma unroll
    for (int i = 0; i < S::kTokens; i += 128)
      if (i + t < S::kTokens) smem.x_scale[wg][i + t] = x_scale[i / 128];
    int const join_thread = S::kJoined ? tid : t;
    constexpr int kStep = (S::kJoined ? 256 : 128) / kLanes;  // tokens at a time
#pragma unroll
    for (int chunk = 0; chunk < S::kTokens; chunk += S::kChunk, ++round) {
      if (parts > 1 && round > 0)
        wait_acquire_cluster(sums_empty, (round - 1) & 1, "sums to be read");  // my last sums were read
      int const r = wg * 64 + (warp & 3) * 16 + (lane >> 2);
#pragma unroll
      for (int j = 0; j < S::kChunk / 8; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          int const i = chunk / 2 + j * 4 + q;
          smem.sums[j * 8 + (lane & 3) * 2 + (q & 1)][r + (q >> 1) * 8] = acc[i];
        }
      auto const join = [&] {  // those who share sums: a warpgroup, or a pair
        cutlass::arch::NamedBarrier::sync(S::kJoined ? 256 : 128, S::kJoined ? 0 : wg);
      };
      join();
      if (parts > 1) {
        if (uint32_t(t) < ctas) arrive_release_cluster(sums_full, t);
        wait_acquire_cluster(sums_full, round & 1, "sums of its peers");
      }
#pragma unroll 1
      for (int n = part + parts * (join_thread / kLanes); n < S::kChunk;
           n += parts * kStep) {  // dealt out to the parts
        int const token = first_token + chunk + n;
        if (token >= p.tokens || (!S::kJoined && rows <= 0)) break;
        float const xs = smem.x_scale[wg][chunk + n];
        float value[S::kBoxes][8] = {};
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {
          float (&v)[8] = value[box];
          float const* const src = &smem.sums[n][row8 + box * S::kOutRows];
          if (parts == 1)
            add(v, *reinterpret_cast<float4 const*>(src), *reinterpret_cast<float4 const*>(src + 4));
          else {
            constexpr int kBatch = S::kTokens <= 64 ? 8 : 2;  // remote loads in flight, by registers
            for (uint32_t c = 0; c < parts; c += kBatch) {
              float4 lo[kBatch] = {}, hi[kBatch] = {};
#pragma unroll
              for (int j = 0; j < kBatch; ++j)
                if (c + j < parts) {
                  lo[j] = load_cluster(src, c + j);
                  hi[j] = load_cluster(src + 4, c + j);
                }
#pragma unroll
              for (int j = 0; j < kBatch; ++j) add(v, lo[j], hi[j]);  // the order of parts is fixed
            }
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = v[i] * xs * scale[box][i] + bias[box][i];
        }
        float (&v)[8] = value[0];
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
        if constexpr (S::kPacked) {  // the 16 lanes of a token have a tile of TwELL
          if (!there) continue;
          mlp::Values<8> packed{};
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (i < rows) packed.pairs[i / 2] |= uint32_t(__bfloat16_as_ushort(__float2bfloat16(v[i]))) << (i % 2 * 16);
          int const tiles = (p.out_features + 127) / 128, tile = (o - row8) / 128;
          uint32_t* const words = p.words + (size_t(token) * tiles + tile) * p.twell.words();
          bool const over = mlp::write_tile<8, kLanes>(words, p.twell, false, packed, o);
          if (over && rows > 0)
            store_row(static_cast<__nv_bfloat16*>(p.y) + at, v, rows, [](float f) { return __float2bfloat16(f); });
          continue;
        }
        if (p.out_dtype == kBfloat16)
          store_row(static_cast<__nv_bfloat16*>(p.y) + at, v, rows, [](float f) { return __float2bfloat16(f); });
        else if (p.out_dtype == kFloat16)
          store_row(static_cast<__half*>(p.y) + at, v, rows, [](float f) { return __float2half(f); });
        else
          store_row(static_cast<float*>(p.y) + at, v, rows, [](float f) { return f; });
      }
      join();
      // Nothing is published here, the sums are only given free: no release at cluster scope, which is slow.
      if (parts > 1 && uint32_t(t) < ctas) sums_empty->arrive(t, 1u);
    }
  }
};

}  // namespace spense::sm90
