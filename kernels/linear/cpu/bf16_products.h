// Products of bf16 pairs for many tokens (AVX-512 BF16): weights that were widened into the cache, two strips of them,
// meet blocks of tokens.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <array>
#include <utility>
#include "linear/cpu/kernels.h"
#include "linear/cpu/rows.h"

namespace spense::cpu {
namespace {

constexpr int kRegisters = 24;  // of 32, for sums

inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// What many tokens share of four columns. In a 2:4 region: its kept pair of weights and x's bytes that meet them, in a
// dense one columns 2 and 3, then 0 and 1.
struct Group {
  __m512i part[2];
};

// Groups of some columns of a strip: first those of its 2:4 region, then its dense ones, and where they begin in x.
struct Span {
  int64_t sparse, sparse_at, dense, dense_at;
};

// Where the sums of some groups go. Not one of the addends, which are sums [strip][token][16] as well, has to be there.
struct Way {
  float const* before;  // of the columns in front; none: zeros
  float* to;
  float const *first, *second;  // what is added at the end: before + products, then first + that, then second + that

  void next(int tokens) {
    for (float const** addend : {&before, &first, &second})
      if (*addend) *addend += tokens * kRows;
    to += tokens * kRows;
  }
};

// Adds groups that are so many columns apart to a sum. What is read of x meets the weights of all strips. Inlined: what
// is the same for all blocks of tokens is computed once.
template <int Apart, int Strips, int Tokens>
[[gnu::always_inline]] inline void multiply(Group const* const* strips, Span const& at, Bf16 const* x, int64_t pitch,
                                            Way const& way, int64_t next_strip) {
  __m512 sum[Tokens][Strips];
  auto const each = [&](auto&& run) {
#pragma GCC unroll 24
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int s = 0; s < Strips; ++s) run(sum[t][s], s * next_strip + t * kRows);
  };
  if (way.before)
    each([&](__m512& v, int64_t i) { v = _mm512_loadu_ps(way.before + i); });
  else
    each([&](__m512& v, int64_t) { v = _mm512_setzero_ps(); });
  Bf16 const* from = x + at.sparse_at;
  for (int64_t i = 0; i < at.sparse; ++i, from += Apart)
#pragma GCC unroll 24
    for (int t = 0; t < Tokens; ++t) {
      __m512i const four = _mm512_set1_epi64(read<int64_t>(from + t * pitch));
#pragma GCC unroll 2
      for (int s = 0; s < Strips; ++s) {
        Group const& group = strips[s][i];
        sum[t][s] = dot(sum[t][s], group.part[0], _mm512_shuffle_epi8(four, group.part[1]));
      }
    }
  from = x + at.dense_at;
  for (int64_t i = at.sparse; i < at.sparse + at.dense; ++i, from += Apart)
#pragma GCC unroll 1
    for (int part = 0; part < 2; ++part)
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        __m512i const two = _mm512_set1_epi32(read<int32_t>(from + t * pitch + 2 - 2 * part));
#pragma GCC unroll 2
        for (int s = 0; s < Strips; ++s) sum[t][s] = dot(sum[t][s], strips[s][i].part[part], two);
      }
  if (way.first) each([&](__m512& v, int64_t i) { v = _mm512_add_ps(_mm512_loadu_ps(way.first + i), v); });
  if (way.second) each([&](__m512& v, int64_t i) { v = _mm512_add_ps(_mm512_loadu_ps(way.second + i), v); });
  each([&](__m512& v, int64_t i) { _mm512_storeu_ps(way.to + i, v); });
}

// All tokens in blocks of nearly the same size, as many as registers have room for.
template <int Apart, int Strips>
void multiply_all(Group const* const* strips, Span const& at, Bf16 const* x, int64_t pitch, int tokens, Way way,
                  int64_t next_strip) {
  constexpr int kMost = kRegisters / 2;
  constexpr auto kBySize = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{multiply<Apart, Strips, I + 1>...};
  }(std::make_integer_sequence<int, kMost>{});
  auto const go_on = [&](int done) {
    tokens -= done;
    x += done * pitch;
    way.next(done);
  };
  for (; tokens >= 2 * kMost; go_on(kMost)) multiply<Apart, Strips, kMost>(strips, at, x, pitch, way, next_strip);
  for (int blocks = (tokens + kMost - 1) / kMost; blocks; --blocks) {
    int const here = (tokens + blocks - 1) / blocks;
    kBySize[size_t(here - 1)](strips, at, x, pitch, way, next_strip);
    go_on(here);
  }
}

}  // namespace
}  // namespace spense::cpu
