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

// The steps of some columns of a strip: first those of its 2:4 region, then its dense ones, and where they are in x.
struct Span {
  int64_t sparse, sparse_at, dense, dense_at;
};

// What many tokens share of a strip's span. A group of four columns has two vectors: in the 2:4 region its kept pair of
// weights and x's bytes that meet them, in the dense one columns 2 and 3, then 0 and 1. By sum.
struct Shared {
  static constexpr int64_t kSteps = kDepth / kStep + 1;  // both regions may have a step
  alignas(64) __m512i group[kSums][kSteps][2];
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

// Adds group g of each step to a sum. What is read of x meets the weights of all strips. Inlined: what is the same for
// all blocks of tokens is computed once.
template <int Strips, int Tokens>
[[gnu::always_inline]] inline void multiply(Shared const* shared, int g, Span const& at, Bf16 const* x, int64_t pitch,
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
  Bf16 const* from = x + at.sparse_at + 4 * g;
  for (int64_t step = 0; step < at.sparse; ++step, from += kStep)
#pragma GCC unroll 24
    for (int t = 0; t < Tokens; ++t) {
      __m512i const four = _mm512_set1_epi64(read<int64_t>(from + t * pitch));
#pragma GCC unroll 2
      for (int s = 0; s < Strips; ++s) {
        __m512i const* const group = shared[s].group[g][step];
        sum[t][s] = dot(sum[t][s], group[0], _mm512_shuffle_epi8(four, group[1]));
      }
    }
  from = x + at.dense_at + 4 * g;
  for (int64_t step = at.sparse; step < at.sparse + at.dense; ++step, from += kStep)
#pragma GCC unroll 1
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        __m512i const two = _mm512_set1_epi32(read<int32_t>(from + t * pitch + 2 - 2 * i));
#pragma GCC unroll 2
        for (int s = 0; s < Strips; ++s) sum[t][s] = dot(sum[t][s], shared[s].group[g][step][i], two);
      }
  if (way.first) each([&](__m512& v, int64_t i) { v = _mm512_add_ps(_mm512_loadu_ps(way.first + i), v); });
  if (way.second) each([&](__m512& v, int64_t i) { v = _mm512_add_ps(_mm512_loadu_ps(way.second + i), v); });
  each([&](__m512& v, int64_t i) { _mm512_storeu_ps(way.to + i, v); });
}

// All tokens in blocks of nearly the same size, as many as registers have room for.
template <int Strips>
void multiply_all(Shared const* shared, int g, Span const& at, Bf16 const* x, int64_t pitch, int tokens, Way way,
                  int64_t next_strip) {
  constexpr int kMost = kRegisters / 2;
  constexpr auto kBySize = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{multiply<Strips, I + 1>...};
  }(std::make_integer_sequence<int, kMost>{});
  auto const go_on = [&](int done) {
    tokens -= done;
    x += done * pitch;
    way.next(done);
  };
  for (; tokens >= 2 * kMost; go_on(kMost)) multiply<Strips, kMost>(shared, g, at, x, pitch, way, next_strip);
  for (int blocks = (tokens + kMost - 1) / kMost; blocks; --blocks) {
    int const here = (tokens + blocks - 1) / blocks;
    kBySize[size_t(here - 1)](shared, g, at, x, pitch, way, next_strip);
    go_on(here);
  }
}

// Many tokens: kDepth columns are widened at a time, then all tokens go over them, one partial sum after the other. The
// last columns' sums become (sum 0 + sum 1) + (sum 2 + sum 3) on the way. span_of(from, to) of columns is the same for
// all strips; widen(strip, span, shared). `add`: to what is in `out`.
template <int Strips, class SpanOf, class Widen>
void prefill(int64_t in, SpanOf const& span_of, Widen const& widen, Bf16 const* x, int64_t pitch, int tokens,
             float* out, bool add = false) {
  Shared shared[Strips];
  alignas(64) float sums[kSums - 1][Strips * kTokens * kRows];
  float* const sum[kSums] = {sums[0], sums[1], sums[2], out};
  for (int64_t c = 0; !c || c < in; c += kDepth) {
    bool const last = c + kDepth >= in;
    Span const at = span_of(c, last ? in : c + kDepth);
    for (int s = 0; s < Strips; ++s) widen(s, at, shared[s]);
    for (int g = 0; g < kSums; ++g) {
      float const* const before = c ? sum[g] : add && !g ? out : nullptr;
      Way const way = {before, sum[g], last && g % 2 ? sum[g - 1] : nullptr, last && g == 3 ? sum[1] : nullptr};
      multiply_all<Strips>(shared, g, at, x, pitch, tokens, way, tokens * kRows);
    }
  }
}

}  // namespace
}  // namespace spense::cpu
