// Dot products of bf16 pairs (AVX-512 BF16 and VBMI): Zen 4, Sapphire Rapids and later. A codec's values are exact in
// bf16 and a product of two is exact in fp32, so only the rate differs from the other files: two columns per
// instruction, and weights are widened by table look-ups.
#include <immintrin.h>
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

// Columns [from, to) of a strip as bf16 [sum][group of it][columns 2 and 3, columns 0 and 1][row][2], zeros written
// out.
template <class W>
void widen_columns(Strip const& s, int64_t from, int64_t to, __m512i* out) {
  StepWidener<W> const widen;
  int64_t const next_sum = (to - from) / kSums / 2;
  for (int64_t c = from; c < to; c += kStep, out += 2) {
    __m512i pairs[8];
    widen(s, c, pairs);
    for (int g = 0; g < 4; ++g)
      for (int i = 0; i < 2; ++i) out[g * next_sum + i] = pairs[2 * g + 1 - i];
  }
}

// Adds `steps` groups of four columns, 16 apart in x, to a sum. Every broadcast of x meets the weights of all strips.
template <int Strips, int Tokens>
void multiply(__m512i const* weight, int64_t steps, Bf16 const* x, int64_t pitch, float* out, int64_t next_strip) {
  __m512 sum[Tokens][Strips];
#pragma GCC unroll 24
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < Strips; ++s) sum[t][s] = _mm512_loadu_ps(out + s * next_strip + t * kRows);
  for (int64_t step = 0; step < steps; ++step, x += kStep, weight += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        __m512i const value = _mm512_set1_epi32(read<int32_t>(x + t * pitch + 2 - 2 * i));
#pragma GCC unroll 2
        for (int s = 0; s < Strips; ++s) sum[t][s] = dot(sum[t][s], weight[s * kDepth / 2 + i], value);
      }
#pragma GCC unroll 24
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int s = 0; s < Strips; ++s) _mm512_storeu_ps(out + s * next_strip + t * kRows, sum[t][s]);
}

template <int Strips, int Tokens>
void tiles(__m512i const* weight, int64_t steps, Bf16 const* x, int64_t pitch, int tokens, float* out,
           int64_t next_strip) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows)
    multiply<Strips, Tokens>(weight, steps, x, pitch, out, next_strip);
  if constexpr (Tokens > 1) tiles<Strips, Tokens / 2>(weight, steps, x, pitch, tokens, out, next_strip);
}

// Many tokens: kDepth columns are widened at a time, then all tokens go over them, one partial sum after the other.
template <class W, int Strips>
void prefill(Strip const* strips, Bf16 const* x, int64_t pitch, int tokens, float* out) {
  alignas(64) __m512i weight[Strips * kDepth / 2];
  alignas(64) float sums[kSums][Strips * kTokens * kRows];
  int const values = tokens * kRows;
  for (auto& sum : sums)
    for (int i = 0; i < Strips * values; ++i) sum[i] = 0;
  for (int64_t c = 0; c < strips[0].in; c += kDepth) {
    int64_t const depth = strips[0].in - c < kDepth ? strips[0].in - c : kDepth;
    for (int s = 0; s < Strips; ++s) widen_columns<W>(strips[s], c, c + depth, weight + s * kDepth / 2);
    for (int g = 0; g < kSums; ++g)
      tiles<Strips, kRegisters / Strips>(weight + g * (depth / kSums / 2), depth / kStep, x + c + 4 * g, pitch, tokens,
                                         sums[g], values);
  }
  for (int i = 0; i < Strips * values; ++i) out[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
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
  auto* const out = static_cast<float*>(sums);
  if (tokens > kDecodeUpTo)
    return count == 2 ? prefill<W, 2>(strips, x, pitch, tokens, out) : prefill<W, 1>(strips, x, pitch, tokens, out);
  for (int i = 0; i < count; ++i) decodes<W, 4>(strips[i], x, pitch, tokens, out + i * tokens * kRows);
}

}  // namespace

constinit Functions const fp8_avx512_bf16 = {
    Fp8::kBits, sizeof(Bf16), 2, kTokens, quantize_bf16_avx512<1>, strips<Fp8>, finish_avx512<float, Fp8::kSumUnit>};

}  // namespace spense::cpu
