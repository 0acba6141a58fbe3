// Kernels behind the gate of an activation-sparse MLP.
//
//   pack     a warp per token and tile: lanes hold neighbouring values, and a scan over the warp says where theirs go
//   neurons  a block per token and tile: its neurons are listed in shared memory, from the words or, where the tile
//            has overflowed, from the dense gate; then a warp reads a row of up for each
//   add      a block per token and 64 columns of y: 32 rows of down at a time, and their sums in a fixed order
//
// No atomics: equal inputs give equal bits.
#pragma once
#include <cuda_bf16.h>
#include "mlp/sparse_mlp.h"
#include "mlp/twell_pack.cuh"

namespace spense::mlp {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAhead = 4;                                                       // loads in flight
constexpr int kColumns = 64, kLanes = kColumns / 8, kRows = kThreads / kLanes;  // of a block's step of `add`

__device__ __forceinline__ float widen(uint32_t bits) { return __uint_as_float(bits << 16); }  // bf16

// Eight products of two vectors of bf16, in a fixed order.
__device__ __forceinline__ float dot(uint4 a, uint4 b, float sum) {
  uint32_t const u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(widen(u[i] & 0xFFFF), widen(v[i] & 0xFFFF), sum);
    sum = fmaf(__uint_as_float(u[i] & 0xFFFF0000), __uint_as_float(v[i] & 0xFFFF0000), sum);
  }
  return sum;
}

// Of a row of up with x, which every lane gets. The next loads are on their way while the last ones are multiplied.
__device__ __forceinline__ float product_of(uint4 const* row, uint4 const* x, int vectors) {
  struct Pair {
    uint4 a, b;
  };
  auto const load = [&](Pair(&to)[kAhead], int at) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      bool const there = at + 32 * j < vectors;
      to[j].a = there ? __ldg(row + at + 32 * j) : uint4{};
      to[j].b = there ? __ldg(x + at + 32 * j) : uint4{};
    }
  };
  Pair next[kAhead];
  int at = threadIdx.x % 32;
  load(next, at);
  float sum = 0.f;
#pragma unroll 1
  for (int first = 0; first < vectors; first += 32 * kAhead) {
    Pair now[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) now[j] = next[j];
    load(next, at += 32 * kAhead);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum = dot(now[j].a, now[j].b, sum);
  }
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// Sum of the counts of tiles before `end`, which every lane gets.
__device__ __forceinline__ int count_before(uint32_t const* words, int stride, int end) {
  int sum = 0;
#pragma unroll 2
  for (int tile = threadIdx.x % 32; tile < end; tile += 32) sum += int(words[int64_t(tile) * stride]);
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// For whole warps.
template <int kEach>
__global__ void __launch_bounds__(kThreads) pack_kernel(SparseMlpArgs const p) {
  int const tiles = (p.neurons + 32 * kEach - 1) / (32 * kEach), lane = threadIdx.x % 32;
  int const which = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (which >= p.tokens * tiles) return;
  int const column = which % tiles * 32 * kEach + lane * kEach;
  Values<kEach> v{};
  if (column < p.neurons)
    v = Values<kEach>::load(static_cast<uint16_t const*>(p.gate) + int64_t(which / tiles) * p.neurons + column);
  write_tile<kEach, 32>(p.words + int64_t(which) * p.twell.words(), p.twell, p.kind == kInput, v, column);
}

// The entries of a tile in shared memory, as the words have them; how many. For a whole block.
template <int kEach>
__device__ __forceinline__ int list_tile(uint32_t* entries, SparseMlpArgs const& p, uint32_t const* words, int token,
                                         int tile) {
  int const count = int(words[0]), lane = threadIdx.x % 32;
  if (count < p.twell.words()) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) entries[i] = words[1 + i];
  } else if (threadIdx.x < 32) {
    int const column = tile * 32 * kEach + lane * kEach;
    Values<kEach> v{};
    if (column < p.neurons)
      v = Values<kEach>::load(static_cast<uint16_t const*>(p.gate) + int64_t(token) * p.neurons + column);
    put_open<kEach, 32>(entries, 32 * kEach, p.twell.threshold, p.kind == kInput, v, column);
  }
  __syncthreads();
  return count;
}

template <int kEach>
__global__ void __launch_bounds__(kThreads) neurons_kernel(SparseMlpArgs const p) {
  extern __shared__ uint32_t raw[];  // entries of the tile
  int const tiles = (p.neurons + 32 * kEach - 1) / (32 * kEach), stride = p.twell.words();
  int const token = int(blockIdx.x) / tiles, tile = int(blockIdx.x) % tiles;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t const* const words = p.words + int64_t(token) * tiles * stride;
  int const before = count_before(words, stride, tile);
  int const count = list_tile<kEach>(raw, p, words + int64_t(tile) * stride, token, tile);
  int64_t const to = int64_t(token) * p.neurons + before;
  if (!p.up) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      p.ids[to + i] = raw[i] & 0xFFFF;
      p.inputs[to + i] = __uint_as_float(raw[i] & 0xFFFF0000);
    }
    return;
  }
  auto const* const x =
      reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(p.x) + int64_t(token) * p.in_features);
#pragma unroll 1
  for (int i = warp; i < count; i += kWarps) {
    uint32_t const neuron = raw[i] & 0xFFFF;
    auto const* const row =
        reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(p.up) + int64_t(neuron) * p.in_features);
    float const product = product_of(row, x, p.in_features / 8);
    if (lane == 0) {
      float upper = product + (p.up_bias ? widen(static_cast<uint16_t const*>(p.up_bias)[neuron]) : 0.f);
      if (p.kind == kDrelu && upper < 0.f) upper = 0.f;  // NaN stays
      float value = __uint_as_float(raw[i] & 0xFFFF0000);
      if (p.kind == kRelu2) value *= value;
      p.ids[to + i] = neuron;
      p.inputs[to + i] = value * upper;
    }
  }
}

__global__ void __launch_bounds__(kThreads) add_kernel(SparseMlpArgs const p) {
  extern __shared__ uint32_t raw[];
  auto* const all_sums = reinterpret_cast<float*>(raw);  // [kRows][kColumns]
  int const blocks = (p.out_features + kColumns - 1) / kColumns, stride = p.twell.words();
  int const tiles = (p.neurons + p.twell.tile - 1) / p.twell.tile;
  int const token = int(blockIdx.x) / blocks;
  int const row = threadIdx.x / kLanes, column = int(blockIdx.x) % blocks * kColumns + threadIdx.x % kLanes * 8;
  int const count = count_before(p.words + int64_t(token) * tiles * stride, stride, tiles);
  int64_t const from = int64_t(token) * p.neurons;
  float sums[8] = {};
  if (column < p.out_features) {
    constexpr int kStep = kRows * kAhead;
    auto const* const down = static_cast<uint16_t const*>(p.down_t) + column;
    uint32_t ids[kAhead];
    float inputs[kAhead];
    auto const load_list = [&](int first) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        int const at = first + j * kRows;
        ids[j] = at < count ? p.ids[from + at] : 0;
        inputs[j] = at < count ? p.inputs[from + at] : 0.f;
      }
    };
    struct Weighted {
      float input;
      uint4 row;
    } next[kAhead];
    auto const load_rows = [&](int first) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        auto const* const row = reinterpret_cast<uint4 const*>(down + int64_t(ids[j]) * p.out_features);
        next[j].row = first + j * kRows < count ? __ldg(row) : uint4{};
        next[j].input = inputs[j];
      }
    };
    load_list(row);  // two steps ahead of the sums, their rows one
    load_rows(row);
    load_list(row + kStep);
#pragma unroll 1
    for (int first = row; first < count; first += kStep) {
      Weighted now[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) now[j] = next[j];
      load_rows(first + kStep);
      load_list(first + 2 * kStep);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        uint32_t const two[4] = {now[j].row.x, now[j].row.y, now[j].row.z, now[j].row.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[2 * i] = fmaf(now[j].input, widen(two[i] & 0xFFFF), sums[2 * i]);
          sums[2 * i + 1] = fmaf(now[j].input, __uint_as_float(two[i] & 0xFFFF0000), sums[2 * i + 1]);
        }
      }
    }
  }
  auto* const own = reinterpret_cast<float4*>(all_sums + row * kColumns + threadIdx.x % kLanes * 8);
  own[0] = {sums[0], sums[1], sums[2], sums[3]};
  own[1] = {sums[4], sums[5], sums[6], sums[7]};
  __syncthreads();
  int const mine = int(blockIdx.x) % blocks * kColumns + int(threadIdx.x);
  if (threadIdx.x >= kColumns || mine >= p.out_features) return;
  float sum = p.bias ? widen(static_cast<uint16_t const*>(p.bias)[mine]) : 0.f;
#pragma unroll 8
  for (int r = 0; r < kRows; ++r) sum += all_sums[r * kColumns + threadIdx.x];
  static_cast<__nv_bfloat16*>(p.y)[int64_t(token) * p.out_features + mine] = __float2bfloat16(sum);
}

}  // namespace spense::mlp
