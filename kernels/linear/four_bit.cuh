// Kernels for dense layers in 4 bits.
//
// A warp multiplies 16 rows of W with 8 or 16 tokens: tensor cores add up 16 columns at a time, and which columns these
// are does not matter as long as W and x agree. So a lane takes 32 neighbouring codes of two rows, 16 bytes of each,
// and the activations that belong to them, and what it has decoded are its operands. The warps of a block share out the
// columns and add their sums up in shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "linear/four_bit.h"

namespace spense::four_bit {

constexpr int kEntries = 16, kRows = 16, kChunk = 32, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStep = 4 * kChunk;  // columns of a warp's step: four lanes share a row
constexpr int kPitch = kRows + 4;  // floats between tokens of a warp's sums: no bank conflicts

// What a code stands for. Both ways take one instruction per code that 32 lanes have a result of every clock.
template <bool kShuffle>
struct Table;

template <>
struct Table<true> {  // lane i holds entry i mod 16
  float entry;
  __device__ Table(float const* table, float*) : entry(table[threadIdx.x % kEntries]) {}
  // Only the low four bits of `code` count. The whole warp must be here.
  __device__ float operator()(uint32_t code) const { return __shfl_sync(~0u, entry, int(code), kEntries); }
};

template <>
struct Table<false> {  // 64 bytes of shared memory
  float const* shared;
  __device__ Table(float const* table, float* own) : shared(own) {
    if (threadIdx.x < kEntries) own[threadIdx.x] = table[threadIdx.x];
    __syncthreads();
  }
  __device__ float operator()(uint32_t code) const { return shared[code % kEntries]; }
};

// The eight codes of four bytes in order, times their absmax.
template <class Look>
__device__ __forceinline__ void decode(float (&weights)[8], uint32_t codes, float absmax, Look const& look) {
#pragma unroll
  for (int i = 0; i < 8; ++i) weights[i] = look(codes >> (4 * (i ^ 1))) * absmax;
}

// Two values in a register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  union {
    __nv_bfloat162 bf16;
    __half2 fp16;
    uint32_t bits;
  } u;
  if constexpr (sizeof(T) == 2 && __is_same(T, __nv_bfloat16))
    u.bf16 = __floats2bfloat162_rn(first, second);
  else
    u.fp16 = __floats2half2_rn(first, second);
  return u.bits;
}

// sums [16 x 8] += a [16 x 16] b [16 x 8]
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#define SPENSE_MMA(TYPE)                                           \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "        \
      "{%0, %1, %2, %3};"                                          \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (__is_same(T, __nv_bfloat16))
    SPENSE_MMA("bf16");
  else
    SPENSE_MMA("f16");
#undef SPENSE_MMA
}

__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float v) { to = __float2bfloat16(v); }
__device__ __forceinline__ void narrow(__half& to, float v) { to = __float2half(v); }

// 32 codes of a row, and the absmax of each half of them.
struct Chunk {
  uint4 codes;
  float absmax[2];

  // Zeros from the end of the row on. Both rows of a lane exist: they are clamped.
  __device__ static Chunk load(FourBitArgs const& p, int row, int column) {
    Chunk chunk{};
    if (column < p.in_features) {
      chunk.codes = __ldcs(reinterpret_cast<uint4 const*>(p.codes + (int64_t(row) * p.in_features + column) / 2));
      float const* const absmax = p.absmax + int64_t(row) * p.absmax_pitch;
      chunk.absmax[0] = absmax[column >> p.block_shift];
      chunk.absmax[1] = absmax[(column + kChunk / 2) >> p.block_shift];
    }
    return chunk;
  }
};

// 8 * kTiles tokens times 16 rows.
template <class T, int kTiles, bool kShuffle>
__global__ void __launch_bounds__(kThreads) linear_kernel(FourBitArgs const p) {
  extern __shared__ float raw[];
  Table<kShuffle> const look(p.table, raw);
  float* const all_sums = raw + kEntries;  // [warp][token][kPitch]

  int const token_tiles = (p.tokens + 8 * kTiles - 1) / (8 * kTiles);
  int const first_row = int(blockIdx.x) / token_tiles * kRows, first_token = int(blockIdx.x) % token_tiles * 8 * kTiles;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  int const rows[2] = {min(first_row + group, p.out_features - 1), min(first_row + group + 8, p.out_features - 1)};

  float sums[kTiles][4] = {};
  int column = warp * kStep + part * kChunk;
  Chunk next[2] = {Chunk::load(p, rows[0], column), Chunk::load(p, rows[1], column)};
#pragma unroll 1
  for (int begin = warp * kStep; begin < p.in_features; begin += kWarps * kStep, column += kWarps * kStep) {
    Chunk const now[2] = {next[0], next[1]};
    uint4 x[kTiles][4] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int const token = first_token + 8 * tile + group;
      if (token < p.tokens && column < p.in_features) {
        auto const* const from = static_cast<T const*>(p.x) + int64_t(token) * p.in_features + column;
#pragma unroll
        for (int i = 0; i < 4; ++i) x[tile][i] = reinterpret_cast<uint4 const*>(from)[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = Chunk::load(p, rows[i], column + kWarps * kStep);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // eight codes of each row
      float weights[2][8];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t const words[4] = {now[r].codes.x, now[r].codes.y, now[r].codes.z, now[r].codes.w};
        decode(weights[r], words[i], now[r].absmax[i / 2], look);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 4) {  // four of each: an operand of a lane
        uint32_t const a[4] = {pack<T>(weights[0][j], weights[0][j + 1]), pack<T>(weights[1][j], weights[1][j + 1]),
                               pack<T>(weights[0][j + 2], weights[0][j + 3]),
                               pack<T>(weights[1][j + 2], weights[1][j + 3])};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint4 const& b = x[tile][i];
          multiply<T>(sums[tile], a, j ? b.z : b.x, j ? b.w : b.y);
        }
      }
    }
  }

  float* const own = all_sums + warp * 8 * kTiles * kPitch;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(8 * tile + 2 * part + i % 2) * kPitch + group + i / 2 * 8] = sums[tile][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * 8 * kTiles; i += kThreads) {
    int const row = first_row + i % kRows, token = first_token + i / kRows;
    if (row >= p.out_features || token >= p.tokens) continue;
    float sum = p.bias ? widen(static_cast<T const*>(p.bias)[row]) : 0.f;
    for (int w = 0; w < kWarps; ++w) sum += all_sums[(w * 8 * kTiles + i / kRows) * kPitch + i % kRows];
    narrow(static_cast<T*>(p.y)[int64_t(token) * p.out_features + row], sum);
  }
}

// A thread writes the eight weights of four bytes.
template <class T, bool kShuffle>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(FourBitArgs const p) {
  extern __shared__ float raw[];
  Table<kShuffle> const look(p.table, raw);
  uint32_t const words = uint32_t(p.in_features) / 8, all = words * uint32_t(p.out_features);
  uint32_t const mine = blockIdx.x * kThreads + threadIdx.x, at = mine < all ? mine : all - 1;
  uint32_t const row = at / words, column = at % words * 8;
  float const absmax = p.absmax[int64_t(row) * p.absmax_pitch + (column >> p.block_shift)];
  float weights[8];
  decode(weights, reinterpret_cast<uint32_t const*>(p.codes)[at], absmax, look);
  if (mine >= all) return;
  auto* const to = reinterpret_cast<uint4*>(static_cast<T*>(p.y) + int64_t(at) * 8);
  if constexpr (sizeof(T) == 4) {
    to[0] = {__float_as_uint(weights[0]), __float_as_uint(weights[1]), __float_as_uint(weights[2]),
             __float_as_uint(weights[3])};
    to[1] = {__float_as_uint(weights[4]), __float_as_uint(weights[5]), __float_as_uint(weights[6]),
             __float_as_uint(weights[7])};
  } else {
    to[0] = {pack<T>(weights[0], weights[1]), pack<T>(weights[2], weights[3]), pack<T>(weights[4], weights[5]),
             pack<T>(weights[6], weights[7])};
  }
}

}  // namespace spense::four_bit
