// 4 bits with dot products of bf16 pairs (AVX-512 BF16 and VBMI): Zen 4, Sapphire Rapids and later.
#include "linear/cpu/four_bit_bf16.h"
#include "linear/cpu/four_bit_rows.h"

namespace spense::cpu {
namespace {

// Columns of a strip as `multiply` takes them.
void widen(Blocks const& blocks, ScaledWidener const& pair, Span const& at, Shared& shared) {
  __m512i const gather = _mm512_load_si512(widen_tables.gather);
  int64_t const first = (blocks.sparse ? at.sparse_at : at.dense_at) / kStep;
  for (int64_t i = 0; i < at.sparse + at.dense; ++i) {
    BlockStep const step = step_of(blocks, first + i);
    __m512 const scales = _mm512_loadu_ps(step.scales);
    __m512i const codes = _mm512_loadu_si512(step.codes);
    __builtin_prefetch(step.codes + kAhead);
    if (blocks.sparse) {
#pragma GCC unroll 4
      for (int g = 0; g < kSums; ++g) {
        __m512i const nibbles = _mm512_srli_epi32(nibbles_of(step.meta + g / 2 * kRows), g % 2 * 4);
        shared.group[g][i][0] = pair(codes, g, scales);
        shared.group[g][i][1] = _mm512_permutexvar_epi32(nibbles, gather);
      }
      continue;
    }
    __m512i const more = _mm512_loadu_si512(step.codes + kRows * kUnit);
    __builtin_prefetch(step.codes + kRows * kUnit + kAhead);
#pragma GCC unroll 4
    for (int g = 0; g < kSums; ++g)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        shared.group[g][i][1 - half] = pair(g < 2 ? codes : more, g % 2 * 2 + half, scales);
  }
}

template <int Strips>
void prefill(Blocks const* strips, float const* table, Bf16 const* x, int64_t pitch, int tokens, float* out,
             bool add) {
  ScaledWidener const pair(table);
  auto const span_of = [&](int64_t from, int64_t to) {
    int64_t const steps = (to - from) / kStep;
    return strips[0].sparse ? Span{steps, from, 0, to} : Span{0, from, steps, from};
  };
  auto const widened = [&](int s, Span const& at, Shared& shared) { widen(strips[s], pair, at, shared); };
  prefill<Strips>(columns_of(strips[0]), span_of, widened, x, pitch, tokens, out, add);
}

void strips(Blocks const* strips, int count, float const* table, void const* values, int64_t at, int64_t pitch,
            int tokens, float* out, bool add) {
  auto const* x = static_cast<Bf16 const*>(values) + at;
  int64_t const next = tokens * kRows;
  if (tokens <= kDecodeUpTo) {
    __m512i const entries = bf16_table(table);
    for (int i = 0; i < count; ++i, out += next)
      decodes<kFewTokens>(strips[i], entries, x, pitch, tokens, out, add);
    return;
  }
  for (int i = 0; i < count; i += 2, out += 2 * next)
    i + 1 < count ? prefill<2>(strips + i, table, x, pitch, tokens, out, add)
                  : prefill<1>(strips + i, table, x, pitch, tokens, out, add);
}

void fp8_strips(Strip const* strips, int count, float const* const* scales, void const* x, int64_t at, int64_t pitch,
                int tokens, float* out) {
  fp8_avx512_bf16.strips(strips, count, static_cast<Bf16 const*>(x) + at, pitch, tokens, out);
  scale_sums(out, count, tokens, scales, Fp8::kSumUnit);
}

}  // namespace

constinit FourBitFunctions const four_bit_avx512_bf16 = {
    true, sizeof(Bf16), kAbreast, kTokens, 1, convert<1, Bf16>, strips, fp8_strips, finish_avx512<float>};

}  // namespace spense::cpu
