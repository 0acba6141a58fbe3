// A tile of bf16 values to TwELL's words, by lanes that hold neighbouring ones: in ascending order, without atomics.
#pragma once
#include <cstdint>
#include "mlp/twell.h"

namespace spense::mlp {

// A lane's values, two in a word, the first in the low half.
template <int kEach>
struct Values {
  uint32_t pairs[kEach / 2];

  __device__ static Values load(uint16_t const* from) {
    Values v;
    if constexpr (kEach == 8) {
      uint4 const four = *reinterpret_cast<uint4 const*>(from);
      v.pairs[0] = four.x, v.pairs[1] = four.y, v.pairs[2] = four.z, v.pairs[3] = four.w;
    } else {
      static_assert(kEach == 4);
      uint2 const two = *reinterpret_cast<uint2 const*>(from);
      v.pairs[0] = two.x, v.pairs[1] = two.y;
    }
    return v;
  }
  // The bits of value i, in the upper half.
  __device__ uint32_t bits(int i) const { return i % 2 ? pairs[i / 2] & 0xFFFF0000 : pairs[i / 2] << 16; }
};

// NaN is let through, so that it is seen in the result.
__device__ __forceinline__ bool opens(uint32_t bits, float threshold, bool absolute) {
  float const value = __uint_as_float(absolute ? bits & 0x7FFFFFFF : bits);
  return !(value <= threshold);
}

// Puts what is open of the tile of `kLanes` neighbouring lanes into `entries`, as far as there is room; how many are
// open, which all of these lanes get. They must all be here.
template <int kEach, int kLanes>
__device__ __forceinline__ int put_open(uint32_t* entries, int room, float threshold, bool absolute,
                                        Values<kEach> const& v, int column) {
  int const lane = threadIdx.x % 32, own = lane % kLanes;
  uint32_t const mask = kLanes == 32 ? ~0u : ((1u << (kLanes % 32)) - 1) << (lane - own);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += opens(v.bits(i), threshold, absolute);
  int end = count;  // of this lane's in the tile
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    int const before = __shfl_up_sync(mask, end, d, kLanes);
    if (own >= d) end += before;
  }
  int place = end - count;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (opens(v.bits(i), threshold, absolute)) {
      if (place < room) entries[place] = v.bits(i) | uint32_t(column + i);
      ++place;
    }
  return __shfl_sync(mask, end, kLanes - 1, kLanes);
}

// The words of a tile; true count, and zeros behind it. Whether it has overflowed.
template <int kEach, int kLanes>
__device__ __forceinline__ bool write_tile(uint32_t* words, Twell const& twell, bool absolute, Values<kEach> const& v,
                                           int column) {
  int const room = twell.words() - 1;
  int const count = put_open<kEach, kLanes>(words + 1, room, twell.threshold, absolute, v, column);
  int const own = threadIdx.x % kLanes;
  if (own == 0) words[0] = uint32_t(count);
#pragma unroll 1
  for (int i = count + own; i < room; i += kLanes) words[1 + i] = 0;
  return count > room;
}

}  // namespace spense::mlp
