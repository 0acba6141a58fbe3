// Dot products of bf16 pairs (AVX-512 BF16 and VBMI): Zen 4, Sapphire Rapids and later. A codec's values are exact in
// bf16 and a product of two is exact in fp32, so only the rate differs from the other files: two columns per
// instruction, and weights are widened by table look-ups.
#include <immintrin.h>
#include <algorithm>
#include "linear/cpu/bf16_products.h"
#include "linear/cpu/rows_avx512.h"
#include "linear/cpu/widen_bf16.h"

namespace spense::cpu {
namespace {

constexpr int kDecodeUpTo = 16;  // tokens; more are faster over widened weights

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

// The groups of each sum in some columns.
Span span(Strip const& s, int64_t from, int64_t to) {
  int64_t const dense_at = std::min(std::max(from, s.dense_from), to);
  return {std::max<int64_t>(std::min(to, s.sparse) - from, 0) / kStep, from, (to - dense_at) / kStep, dense_at};
}

// Some columns of a strip, by sum.
struct Shared {
  static constexpr int64_t kSteps = kDepth / kStep + 1;  // both regions may have a step
  alignas(64) Group group[kSums][kSteps];
};

template <class W>
void widen(Strip const& s, Span const& at, Shared& shared) {
  typename W::ToBf16 const to_bf16;
  __m512i const gather = _mm512_load_si512(widen_tables.gather);
  uint8_t const* values = s.values + bytes_of(at.sparse_at / 2 * kRows, W::kBits);
  uint8_t const* meta = s.meta + at.sparse_at / 8 * kRows;
  for (int64_t step = 0; step < at.sparse; ++step)
#pragma GCC unroll 2
    for (int g = 0; g < kSums; g += 2, values += bytes_of(4 * kRows, W::kBits), meta += kRows) {
      to_bf16(values, shared.group[g][step].part[0], shared.group[g + 1][step].part[0]);
      __m512i const nibbles = nibbles_of(meta);
      shared.group[g][step].part[1] = _mm512_permutexvar_epi32(nibbles, gather);
      shared.group[g + 1][step].part[1] = _mm512_permutexvar_epi32(_mm512_srli_epi32(nibbles, 4), gather);
      __builtin_prefetch(values + kAhead);
    }
  uint8_t const* dense = s.dense + bytes_of(std::max<int64_t>(at.dense_at - s.dense_from, 0) * kRows, W::kBits);
  for (int64_t step = at.sparse; step < at.sparse + at.dense; ++step)
#pragma GCC unroll 4
    for (auto& of_sum : shared.group) {
      to_bf16(dense, of_sum[step].part[1], of_sum[step].part[0]);
      __builtin_prefetch(dense + kAhead);
      dense += bytes_of(4 * kRows, W::kBits);
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
    for (int s = 0; s < Strips; ++s) widen<W>(strips[s], at, shared[s]);
    for (int g = 0; g < kSums; ++g) {
      Way const way = {c ? sum[g] : nullptr, sum[g], last && g % 2 ? sum[g - 1] : nullptr,
                       last && g == 3 ? sum[1] : nullptr};
      Group const* const groups[] = {shared[0].group[g], shared[Strips - 1].group[g]};
      multiply_all<kStep, Strips>(groups, at, x + 4 * g, pitch, tokens, way, tokens * kRows);
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
