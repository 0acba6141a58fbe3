// Stored weights to pairs of bf16, for the dot products of AVX-512 BF16 and of AMX: included in files that are compiled
// for AVX-512 with byte and word instructions. A codec W (see weights_fp8.h) has to be exact in bf16.
#pragma once
#include <immintrin.h>
#include "linear/cpu/weights_fp8.h"

namespace spense::cpu {
namespace {

// Orders of bytes by metadata nibble. Constants: code of these files must not run where it cannot.
struct WidenTables {
  alignas(64) uint8_t gather[16][4];      // bytes of x's group of four that meet (first, second)
  alignas(64) uint8_t scatter[2][16][4];  // bytes of (first, second) for columns 0, 1 and for 2, 3; 0x80: zero
  constexpr WidenTables() : gather{}, scatter{} {
    for (int nibble = 0; nibble < 16; ++nibble) {
      int const position[2] = {nibble & 3, nibble >> 2};
      for (int i = 0; i < 4; ++i) gather[nibble][i] = uint8_t(2 * position[i / 2] + i % 2);
      for (int i = 0; i < 8; ++i) scatter[i / 4][nibble][i % 4] = 0x80;
      for (int i = 0; i < 4; ++i) scatter[position[i / 2] / 2][nibble][position[i / 2] % 2 * 2 + i % 2] = uint8_t(i);
    }
  }
};
constexpr WidenTables widen_tables;

// Metadata of 8 columns: the even group's nibble is the low one of each row.
inline __m512i nibbles_of(uint8_t const* meta) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(meta)));
}

// 16 columns of a strip with zeros written out, as pairs of columns in their order, each [16 rows][2].
template <class W>
struct StepWidener {
  typename W::ToBf16 widen;
  __m512i scatter[2] = {_mm512_load_si512(widen_tables.scatter[0]), _mm512_load_si512(widen_tables.scatter[1])};
  __m512i place = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));

  void operator()(Strip const& s, int64_t c, __m512i pairs[8], int64_t ahead = kAhead) const {
    bool const in_sparse = c < s.sparse;
    if (in_sparse) sparse(s.values + bytes_of(c / 2 * kRows, W::kBits), s.meta + c / 8 * kRows, pairs, ahead);
    if (c < s.dense_from) return;
    uint8_t const* const from = s.dense + bytes_of((c - s.dense_from) * kRows, W::kBits);
    if (!in_sparse) return dense(from, pairs, ahead);
    __m512i both[8];  // where both regions have the step, one of them holds zeros
    dense(from, both, ahead);
    for (int i = 0; i < 8; ++i) pairs[i] = _mm512_or_si512(pairs[i], both[i]);
  }

  void sparse(uint8_t const* values, uint8_t const* meta, __m512i pairs[8], int64_t ahead) const {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i w[2];
      widen(values + bytes_of(half * 4 * kRows, W::kBits), w[0], w[1]);
      __builtin_prefetch(values + bytes_of(half * 4 * kRows, W::kBits) + ahead);
      __m512i nibbles = nibbles_of(meta + half * kRows);
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g, nibbles = _mm512_srli_epi32(nibbles, 4))
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m512i const from = _mm512_or_si512(_mm512_permutexvar_epi32(nibbles, scatter[i]), place);
          pairs[4 * half + 2 * g + i] = _mm512_shuffle_epi8(w[g], from);
        }
    }
  }

  void dense(uint8_t const* weights, __m512i pairs[8], int64_t ahead) const {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      uint8_t const* const group = weights + bytes_of(4 * g * kRows, W::kBits);
      __builtin_prefetch(group + ahead);
      widen(group, pairs[2 * g], pairs[2 * g + 1]);
    }
  }
};

}  // namespace
}  // namespace spense::cpu
