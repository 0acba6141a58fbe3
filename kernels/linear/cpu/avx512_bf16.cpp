// Dot products of bf16 pairs (AVX-512 BF16 and VBMI): Zen 4, Sapphire Rapids and later. A codec's values are exact in
// bf16 and a product of two is exact in fp32, so only the rate differs from the other files: two columns per
// instruction, and weights are widened by table look-ups.
#include <immintrin.h>
#include <algorithm>
#include <array>
#include <utility>
#include "linear/cpu/rows_avx512.h"
#include "linear/cpu/widen_bf16.h"

namespace spense::cpu {
namespace {

constexpr int kRegisters = 24;   // of 32, for sums
constexpr int kDecodeUpTo = 16;  // tokens; more are faster over widened weights

__m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Up to 4 tokens. An instruction adds the odd column first, so columns 2, 3 of a group come before 0, 1, as in a 2:4
// region.
template <class W, int Tokens>
void decode(Strip const& s, Bf16 const* x, int64_t pitch, float* out) {
  typename W::ToBf16 const widen;
  __m512i const gather = _mm512_load_si512(widen_tables.gather);
  __m512 sum[Tokens][kSums];
#pragma GCC unroll 4
  for (auto& sums : sum)
#pragma GCC unroll 4
    for (__m512& v : sums) v = _mm512_setzero_ps();
  uint8_t const* values = s.values;
  uint8_t const* meta = s.meta;
  for (int64_t c = 0; c < s.sparse; c += kStep)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, values += bytes_of(4 * kRows, W::kBits), meta += kRows) {
      __m512i w[2];
      widen(values, w[0], w[1]);
      __builtin_prefetch(values + kAhead);
      __m512i const nibbles = nibbles_of(meta);
      __m512i const taken[2] = {_mm512_permutexvar_epi32(nibbles, gather),
                                _mm512_permutexvar_epi32(_mm512_srli_epi32(nibbles, 4), gather)};
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g) {
          __m512i const group = _mm512_set1_epi64(read<int64_t>(x + t * pitch + c + 8 * half + 4 * g));
          __m512& total = sum[t][2 * half + g];
          total = dot(total, w[g], _mm512_shuffle_epi8(group, taken[g]));
        }
    }
  uint8_t const* dense = s.dense;
  for (int64_t c = s.dense_from; c < s.in; c += kStep)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g, dense += bytes_of(4 * kRows, W::kBits)) {
      __m512i w[2];
      widen(dense, w[0], w[1]);
      __builtin_prefetch(dense + kAhead);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int pair = 1; pair >= 0; --pair)
          sum[t][g] = dot(sum[t][g], w[pair], _mm512_set1_epi32(read<int32_t>(x + t * pitch + c + 4 * g + 2 * pair)));
    }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
    _mm512_storeu_ps(out + t * kRows,
                     _mm512_add_ps(_mm512_add_ps(sum[t][0], sum[t][1]), _mm512_add_ps(sum[t][2], sum[t][3])));
}

// The steps of some columns of a strip: first those of its 2:4 region, then its dense ones, and where they are in x.
struct Span {
  int64_t sparse, sparse_at, dense, dense_at;
};

Span span(Strip const& s, int64_t from, int64_t to) {
  int64_t const dense_at = std::min(std::max(from, s.dense_from), to);
  return {std::max<int64_t>(std::min(to, s.sparse) - from, 0) / kStep, from, (to - dense_at) / kStep, dense_at};
}

// What many tokens share of a strip's span. A group of four columns has two vectors: in the 2:4 region its kept pair of
// weights and x's bytes that meet them, in the dense one columns 2 and 3, then 0 and 1. By sum.
struct Shared {
  static constexpr int64_t kSteps = kDepth / kStep + 1;  // both regions may have a step
  alignas(64) __m512i group[kSums][kSteps][2];

  template <class W>
  void widen(Strip const& s, Span const& at) {
    typename W::ToBf16 const to_bf16;
    __m512i const gather = _mm512_load_si512(widen_tables.gather);
    uint8_t const* values = s.values + bytes_of(at.sparse_at / 2 * kRows, W::kBits);
    uint8_t const* meta = s.meta + at.sparse_at / 8 * kRows;
    for (int64_t step = 0; step < at.sparse; ++step)
#pragma GCC unroll 2
      for (int g = 0; g < kSums; g += 2, values += bytes_of(4 * kRows, W::kBits), meta += kRows) {
        to_bf16(values, group[g][step][0], group[g + 1][step][0]);
        __m512i const nibbles = nibbles_of(meta);
        group[g][step][1] = _mm512_permutexvar_epi32(nibbles, gather);
        group[g + 1][step][1] = _mm512_permutexvar_epi32(_mm512_srli_epi32(nibbles, 4), gather);
        __builtin_prefetch(values + kAhead);
      }
    uint8_t const* dense = s.dense + bytes_of(std::max<int64_t>(at.dense_at - s.dense_from, 0) * kRows, W::kBits);
    for (int64_t step = at.sparse; step < at.sparse + at.dense; ++step)
#pragma GCC unroll 4
      for (auto& of_sum : group) {
        to_bf16(dense, of_sum[step][1], of_sum[step][0]);
        __builtin_prefetch(dense + kAhead);
        dense += bytes_of(4 * kRows, W::kBits);
      }
  }
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
// last columns' sums become (sum 0 + sum 1) + (sum 2 + sum 3) on the way.
template <class W, int Strips>
void prefill(Strip const* strips, Bf16 const* x, int64_t pitch, int tokens, float* out) {
  Shared shared[Strips];
  alignas(64) float sums[kSums - 1][Strips * kTokens * kRows];
  float* const sum[kSums] = {sums[0], sums[1], sums[2], out};
  for (int64_t c = 0; !c || c < strips[0].in; c += kDepth) {
    bool const last = c + kDepth >= strips[0].in;
    Span const at = span(strips[0], c, last ? strips[0].in : c + kDepth);
    for (int s = 0; s < Strips; ++s) shared[s].template widen<W>(strips[s], at);
    for (int g = 0; g < kSums; ++g) {
      Way const way = {c ? sum[g] : nullptr, sum[g], last && g % 2 ? sum[g - 1] : nullptr,
                       last && g == 3 ? sum[1] : nullptr};
      multiply_all<Strips>(shared, g, at, x, pitch, tokens, way, tokens * kRows);
    }
  }
}

template <class W, int Tokens>
void decodes(Strip const& s, Bf16 const* x, int64_t pitch, int tokens, float* out) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows)
    decode<W, Tokens>(s, x, pitch, out);
  if constexpr (Tokens > 1) decodes<W, Tokens / 2>(s, x, pitch, tokens, out);
}

template <class W>
void strips(Strip const* strips, int count, void const* values, int64_t pitch, int tokens, void* sums) {
  auto const* x = static_cast<Bf16 const*>(values);
  auto* out = static_cast<float*>(sums);
  if (tokens > kDecodeUpTo) {
    for (int i = 0; i < count; i += 2, out += 2 * tokens * kRows)
      i + 1 < count ? prefill<W, 2>(strips + i, x, pitch, tokens, out)
                    : prefill<W, 1>(strips + i, x, pitch, tokens, out);
  } else {
    for (int i = 0; i < count; ++i) decodes<W, 4>(strips[i], x, pitch, tokens, out + i * tokens * kRows);
  }
}

}  // namespace

constinit Functions const fp8_avx512_bf16 = {Fp8::kBits,
                                             sizeof(Bf16),
                                             kAbreast,
                                             kTokens,
                                             quantize_bf16_avx512<1>,
                                             strips<Fp8>,
                                             finish_avx512<float, Fp8::kSumUnit>};

}  // namespace spense::cpu
