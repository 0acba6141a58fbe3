// From 4-bit codes to weights in registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "linear/four_bit.h"

namespace spense::four_bit {

constexpr int kEntries = 16, kChunk = 32;

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

// Two values in a register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  union {
    __nv_bfloat162 bf16;
    __half2 fp16;
    uint32_t bits;
  } u;
  if constexpr (__is_same(T, __nv_bfloat16))
    u.bf16 = __floats2bfloat162_rn(first, second);
  else
    u.fp16 = __floats2half2_rn(first, second);
  return u.bits;
}

// 32 columns of a row that lie side by side; zeros from the end of the row on.
template <bool kTwoOfFour>
struct Chunk;

template <>
struct Chunk<false> {
  uint4 codes;
  float absmax[2];  // of each half

  __device__ static Chunk load(FourBitMatrix const& m, int row, int column) {
    Chunk chunk{};
    if (column < m.columns) {
      chunk.codes = __ldcs(reinterpret_cast<uint4 const*>(m.codes + (int64_t(row) * m.columns + column) / 2));
      float const* const absmax = m.absmax + int64_t(row) * m.absmax_pitch;
      chunk.absmax[0] = absmax[column >> m.block_shift];
      chunk.absmax[1] = absmax[(column + kChunk / 2) >> m.block_shift];
    }
    return chunk;
  }

  // Columns 4 i to 4 i + 3, for constant i.
  template <class T, class Look>
  __device__ __forceinline__ void group(uint32_t (&out)[2], int i, Look const& look) const {
    uint32_t const words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t const four = words[i / 2] >> (i % 2 * 16);  // bytes in order, the first of each in its high half
    float const scale = absmax[i / 4];
    out[0] = pack<T>(look(four >> 4) * scale, look(four) * scale);
    out[1] = pack<T>(look(four >> 12) * scale, look(four >> 8) * scale);
  }
};

// `prmt`: __byte_perm without a mask on the selector.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t to;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(low), "r"(high), "r"(selector));
  return to;
}

// Selectors of `prmt` for one column of a 2:4 group, by hash of its metadata: its first value, its second, or zeros.
// The hash (n ^ n >> 1) & 7 separates the six legal nibbles and leaves bit 3, which means "sign" to prmt, clear.
constexpr uint64_t selectors(uint32_t position) {
  uint64_t table = 0;
  for (uint32_t nibble : {0x4u, 0x8u, 0xCu, 0x9u, 0xDu, 0xEu}) {
    uint64_t const selector = position == (nibble & 3) ? 0x10 : position == nibble >> 2 ? 0x32 : 0x44;
    table |= selector << (8 * ((nibble ^ nibble >> 1) & 7));
  }
  return table;
}

template <>
struct Chunk<true> {
  uint2 codes;
  uint32_t meta;
  float absmax;

  __device__ static Chunk load(FourBitMatrix const& m, int row, int column) {
    Chunk chunk{};
    if (column < m.columns) {
      int64_t const at = int64_t(row) * m.columns + column;
      chunk.codes = __ldcs(reinterpret_cast<uint2 const*>(m.codes + at / 4));
      chunk.meta = __ldcs(reinterpret_cast<uint32_t const*>(m.meta + at / 8));
      chunk.absmax = m.absmax[int64_t(row) * m.absmax_pitch + (column / 2 >> m.block_shift)];
    }
    return chunk;
  }

  // What is kept of columns 4 i to 4 i + 3 goes to its places.
  template <class T, class Look>
  __device__ __forceinline__ void group(uint32_t (&out)[2], int i, Look const& look) const {
    uint32_t const two = (i < 4 ? codes.x : codes.y) >> (i % 4 * 8);
    uint32_t const kept = pack<T>(look(two >> 4) * absmax, look(two) * absmax);
    uint32_t const hash = ((meta ^ meta >> 1) & 0x77777777u) >> (i / 4 * 16);
    constexpr uint64_t kTables[4] = {selectors(0), selectors(1), selectors(2), selectors(3)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // of four groups at a time: the compiler keeps them for the other three
      uint32_t const low = permute(uint32_t(kTables[2 * half]), uint32_t(kTables[2 * half] >> 32), hash);
      uint32_t const high = permute(uint32_t(kTables[2 * half + 1]), uint32_t(kTables[2 * half + 1] >> 32), hash);
      out[half] = permute(kept, 0, permute(low, high, i % 4 | (i % 4 + 4) << 4));
    }
  }
};

}  // namespace spense::four_bit
