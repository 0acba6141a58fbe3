// Codes to pairs of bf16, for the dot products of AVX-512 BF16 and of AMX: included in files that are compiled for
// these.
#pragma once
#include <immintrin.h>
#include "linear/cpu/bf16_products.h"
#include "linear/cpu/four_bit.h"
#include "linear/cpu/rows_avx512.h"
#include "linear/cpu/widen_bf16.h"

namespace spense::cpu {
namespace {

constexpr int kFewTokens = 8;    // side by side in registers
constexpr int kDecodeUpTo = 32;  // tokens; more are faster over widened weights

// The table in bf16, twice: the bits of an index above the low four do no harm.
inline __m512i bf16_table(float const* table) {
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(table)));
}

// x of some tokens: every third has a pointer of its own, so that all others are a register and a factor away.
// Compilers would keep a distance for each, more than there are registers.
template <int Tokens>
struct Rows {
  static constexpr int kBases = (Tokens + 2) / 3;
  char const* base[kBases];
  int64_t pitch;
  Rows(Bf16 const* x, int64_t values) : pitch(values * int64_t(sizeof(Bf16))) {
    for (int i = 0; i < kBases; ++i) base[i] = reinterpret_cast<char const*>(x) + 3 * i * pitch;
  }
  template <class T>
  T at(int token, int value) const {
    return read<T>(base[token / 3] + token % 3 * pitch + value * int(sizeof(Bf16)));
  }
  void next(int values) {
#pragma GCC unroll 4
    for (char const*& p : base) {
      p += values * int(sizeof(Bf16));
      asm("" : "+r"(p));
    }
  }
};

// Few tokens: entries of the table in bf16, sums of a block in fp32, then its scales. Adds a region to `total`.
template <bool Sparse, int Tokens>
void decode(Blocks const& blocks, __m512i table, Bf16 const* x, int64_t pitch, __m512 total[Tokens]) {
  constexpr int kChains = 2;                 // what is added up apart, as an addition takes its time; for any Tokens
  constexpr int kColumns = Sparse ? 16 : 8;  // of a unit
  __m512i const gather = _mm512_load_si512(widen_tables.gather);
  Rows<Tokens> rows(x, pitch);
  uint8_t const* p = blocks.data;
  int64_t const units = units_of(blocks), meta_bytes = meta_bytes_of(blocks);
  for (int64_t block = 0; block < blocks.count; ++block) {
    __m512 const scales = _mm512_loadu_ps(p);
    __builtin_prefetch(p + kFarAhead);
    uint8_t const* meta = p + 4 * kRows;
    p = meta + meta_bytes;
    __m512 sum[Tokens][kChains];
#pragma GCC unroll 8
    for (auto& sums : sum)
#pragma GCC unroll 4
      for (__m512& v : sums) v = _mm512_setzero_ps();
    for (int64_t unit = 0; unit < units; ++unit, p += kRows * kUnit, rows.next(kColumns)) {
      __m512i const codes = _mm512_loadu_si512(p);
      __builtin_prefetch(p + kFarAhead);
      if constexpr (Sparse) __builtin_prefetch(meta + kFarAhead);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i const pair = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4 * i), table);
        if constexpr (Sparse) {
          __m512i const nibbles = _mm512_srli_epi32(nibbles_of(meta + i / 2 * kRows), i % 2 * 4);
          __m512i const taken = _mm512_permutexvar_epi32(nibbles, gather);
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) {
            __m512i const group = _mm512_set1_epi64(rows.template at<int64_t>(t, 4 * i));
            sum[t][i % kChains] = dot(sum[t][i % kChains], pair, _mm512_shuffle_epi8(group, taken));
          }
        } else {
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) {
            __m512i const two = _mm512_set1_epi32(rows.template at<int32_t>(t, 2 * i));
            sum[t][i % kChains] = dot(sum[t][i % kChains], pair, two);
          }
        }
      }
      if constexpr (Sparse) meta += 2 * kRows;
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      total[t] = _mm512_fmadd_ps(_mm512_add_ps(sum[t][0], sum[t][1]), scales, total[t]);
    }
  }
}

template <int Tokens>
void decodes(Blocks const& blocks, __m512i table, Bf16 const* x, int64_t pitch, int tokens, float* out, bool add) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows) {
    __m512 total[Tokens];
    for (int t = 0; t < Tokens; ++t) total[t] = add ? _mm512_loadu_ps(out + t * kRows) : _mm512_setzero_ps();
    (blocks.sparse ? decode<true, Tokens> : decode<false, Tokens>)(blocks, table, x, pitch, total);
    for (int t = 0; t < Tokens; ++t) _mm512_storeu_ps(out + t * kRows, total[t]);
  }
  if constexpr (Tokens > 1) decodes<Tokens / 2>(blocks, table, x, pitch, tokens, out, add);
}

// Pairs of stored values as bf16, scales included and rounded once.
struct ScaledWidener {
  __m512 table;
  __m512i alternating;
  explicit ScaledWidener(float const* values) : table(_mm512_loadu_ps(values)) {
    alignas(64) static constexpr auto kPlaces = [] {
      std::array<uint16_t, 32> places{};
      for (int i = 0; i < 32; ++i) places[size_t(i)] = uint16_t(i / 2 + i % 2 * 16);
      return places;
    }();
    alternating = _mm512_load_si512(kPlaces.data());
  }
  // Pair i of a unit, [16 rows][2].
  __m512i operator()(__m512i codes, int i, __m512 scales) const {
    __m512 const first = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * i), table);
    __m512 const second = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * i + 16), table);
    auto const both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, scales), _mm512_mul_ps(first, scales));
    return _mm512_permutexvar_epi16(alternating, (__m512i)both);
  }
};

}  // namespace
}  // namespace spense::cpu
