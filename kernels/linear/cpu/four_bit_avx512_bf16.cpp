// 4 bits with dot products of bf16 pairs (AVX-512 BF16 and VBMI): Zen 4, Sapphire Rapids and later.
#include "linear/cpu/four_bit_bf16.h"
#include "linear/cpu/four_bit_rows.h"

namespace spense::cpu {
namespace {

constexpr int64_t kColumns = 512;  // that are widened at a time: more need too much of the first-level cache,
                                   // of fewer sums are loaded and stored too often
constexpr int kGroups = kColumns / 4;

// Some steps of a strip.
void widen(Blocks const& blocks, ScaledWidener const& pair, int64_t first, int64_t count, Group* to) {
  __m512i const gather = _mm512_load_si512(widen_tables.gather);
  for (int64_t i = 0; i < count; ++i, to += kSums) {
    BlockStep const step = step_of(blocks, first + i);
    __m512 const scales = _mm512_loadu_ps(step.scales);
    __m512i const codes = _mm512_loadu_si512(step.codes);
    __builtin_prefetch(step.codes + kFarAhead);
    if (blocks.sparse) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        __m512i const nibbles = _mm512_srli_epi32(nibbles_of(step.meta + g / 2 * kRows), g % 2 * 4);
        to[g] = {pair(codes, g, scales), _mm512_permutexvar_epi32(nibbles, gather)};
      }
      continue;
    }
    __m512i const more = _mm512_loadu_si512(step.codes + kRows * kUnit);
    __builtin_prefetch(step.codes + kRows * kUnit + kFarAhead);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      __m512i const here = g < 2 ? codes : more;
      to[g] = {pair(here, g % 2 * 2 + 1, scales), pair(here, g % 2 * 2, scales)};
    }
  }
}

// Many tokens: kColumns are widened at a time, then all tokens go over them.
template <int Strips>
void prefill(Blocks const* strips, float const* table, Bf16 const* x, int64_t pitch, int tokens, float* out, bool add) {
  alignas(64) Group shared[Strips][kGroups];
  Group const* const groups[] = {shared[0], shared[Strips - 1]};
  ScaledWidener const pair(table);
  int64_t const in = columns_of(strips[0]);
  for (int64_t c = 0; c < in; c += kColumns, add = true) {
    int64_t const here = std::min(in - c, kColumns);
    for (int s = 0; s < Strips; ++s) widen(strips[s], pair, c / kStep, here / kStep, shared[s]);
    Span const at = strips[0].sparse ? Span{here / 4, c, 0, c} : Span{0, c, here / 4, c};
    Way const way = {add ? out : nullptr, out, nullptr, nullptr};
    multiply_all<4, Strips>(groups, at, x, pitch, tokens, way, tokens * kRows);
  }
}

void strips(Blocks const* strips, int count, float const* table, void const* values, int64_t at, int64_t pitch,
            int tokens, float* out, bool add) {
  auto const* x = static_cast<Bf16 const*>(values) + at;
  int64_t const next = tokens * kRows;
  if (tokens <= kDecodeUpTo) {
    __m512i const entries = bf16_table(table);
    for (int i = 0; i < count; ++i, out += next) decodes<kFewTokens>(strips[i], entries, x, pitch, tokens, out, add);
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
