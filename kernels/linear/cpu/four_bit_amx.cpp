// 4 bits with tiles of bf16 pairs (AMX-BF16): Sapphire Rapids and later. Few tokens take AVX-512 BF16. Needs
// amx_permitted().
#include "linear/cpu/amx_strips.h"
#include "linear/cpu/four_bit_bf16.h"
#include "linear/cpu/four_bit_rows.h"

namespace spense::cpu {
namespace {

struct FourBitTiles {
  using Sum = float;
  using Source = Blocks;
  static constexpr int kColumns = 32;
  ScaledWidener pair;
  __m512i scatter[2] = {_mm512_load_si512(widen_tables.scatter[0]), _mm512_load_si512(widen_tables.scatter[1])};
  __m512i place = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));

  template <int To>
  static void product() {
    if constexpr (To == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (To == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (To == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (To == 3) _tile_dpbf16ps(3, 5, 7);
  }

  static int64_t columns(Blocks const& s) { return columns_of(s); }

  // 32 columns of one of so many strips as a tile [pair of columns][16 rows][2]; those behind the last are zeros.
  uint8_t const* tile(Blocks const& s, int64_t column, uint8_t* to, int strips) const {
    auto* pairs = reinterpret_cast<__m512i*>(to);
    // what lies behind the end of a strip is read already where two are read side by side
    int64_t const ahead = column / kStep * block_bytes_of(s) < (s.count * block_bytes_of(s)) - kFarAhead
                              ? kFarAhead
                              : kFarAhead + (strips - 1) * (s.count * block_bytes_of(s));
    for (int64_t c = column; c < column + kColumns; c += kStep, pairs += 8) {
      if (c >= columns_of(s)) {
        for (int i = 0; i < 8; ++i) pairs[i] = _mm512_setzero_si512();
        continue;
      }
      BlockStep const step = step_of(s, c / kStep);
      __m512 const scales = _mm512_loadu_ps(step.scales);
      __builtin_prefetch(step.codes + ahead);
      s.sparse ? sparse(step, scales, pairs) : dense(step, scales, pairs);
    }
    return to;
  }

  void sparse(BlockStep const& step, __m512 scales, __m512i pairs[8]) const {
    __m512i const codes = _mm512_loadu_si512(step.codes);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      __m512i const kept = pair(codes, g, scales);
      __m512i const nibbles = _mm512_srli_epi32(nibbles_of(step.meta + g / 2 * kRows), g % 2 * 4);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        pairs[2 * g + i] =
            _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(nibbles, scatter[i]), place));
    }
  }

  void dense(BlockStep const& step, __m512 scales, __m512i pairs[8]) const {
#pragma GCC unroll 2
    for (int unit = 0; unit < 2; ++unit) {
      __m512i const codes = _mm512_loadu_si512(step.codes + unit * kRows * kUnit);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) pairs[4 * unit + i] = pair(codes, i, scales);
    }
  }
};

// Few tokens lie one after the other, many side by side.
void convert_tiles(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t tokens, void* values,
                   int64_t pitch) {
  (tokens <= kFewTokens ? convert<1, Bf16> : convert<kSide, Bf16>)(x, dtype, in, from, to, tokens, values, pitch);
}

void strips(Blocks const* strips, int count, float const* table, void const* values, int64_t at, int64_t pitch,
            int tokens, float* out, bool add) {
  auto const* x = static_cast<Bf16 const*>(values);
  if (tokens <= kFewTokens) return four_bit_avx512_bf16.strips(strips, count, table, x, at, pitch, tokens, out, add);
  auto const* tiles = reinterpret_cast<uint8_t const*>(x + at * kSide);
  strips_amx(FourBitTiles{ScaledWidener(table)}, strips, count, tiles, pitch * int64_t(sizeof(Bf16)), tokens, out, add);
}

void fp8_strips(Strip const* strips, int count, float const* const* scales, void const* values, int64_t at,
                int64_t pitch, int tokens, float* out) {
  if (tokens <= kFewTokens)
    return four_bit_avx512_bf16.fp8_strips(strips, count, scales, values, at, pitch, tokens, out);
  fp8_amx.strips(strips, count, static_cast<Bf16 const*>(values) + at * kSide, pitch, tokens, out);
  scale_sums(out, count, tokens, scales, Fp8::kSumUnit);
}

}  // namespace

// kTogether tokens in a call: all that were converted together, so that all functions choose alike.
constinit FourBitFunctions const four_bit_amx = {
    true,          sizeof(Bf16), kStrips,    kTogether,           FourBitTiles::kColumns,
    convert_tiles, strips,       fp8_strips, finish_avx512<float>};

}  // namespace spense::cpu
