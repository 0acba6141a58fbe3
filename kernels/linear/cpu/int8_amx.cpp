// int8 with tiles (AMX-INT8): Sapphire Rapids and later. Dense weights are tiles as they lie in memory. Few tokens take
// AVX-512 VNNI. Needs amx_permitted().
#include "linear/cpu/amx_strips.h"
#include "linear/cpu/int8_avx512.h"
#include "linear/cpu/rows_avx512.h"

namespace spense::cpu {
namespace {

constexpr int kVnniUpTo = 8;  // tokens; more are faster with tiles

// By metadata nibble: which of (first, second) each of four columns gets; 0x80: zero.
struct ScatterTable {
  alignas(64) uint8_t byte[16][4];
  constexpr ScatterTable() : byte{} {
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (uint8_t& b : byte[nibble]) b = 0x80;
      for (int i = 0; i < 2; ++i) byte[nibble][nibble >> 2 * i & 3] = uint8_t(i);
    }
  }
};
constexpr ScatterTable scatter_table;

struct Int8Tiles {
  using Sum = int32_t;
  using Source = Strip;
  static constexpr int kColumns = 64;
  __m512i table = _mm512_load_si512(&scatter_table);
  __m512i row = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  __m512i row_odd = _mm512_or_si512(row, _mm512_set1_epi8(2));

  template <int To>
  static void product() {
    if constexpr (To == 0) _tile_dpbssd(0, 4, 6);
    if constexpr (To == 1) _tile_dpbssd(1, 4, 7);
    if constexpr (To == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (To == 3) _tile_dpbssd(3, 5, 7);
  }

  static int64_t columns(Strip const& s) { return s.in; }

  // 64 columns of one of so many strips as a tile [16 groups of four][row][column]: where it lies, which is `to` if it
  // has to be written. Columns from s.in on are zeros.
  uint8_t const* tile(Strip const& s, int64_t column, uint8_t* to, int strips) const {
    int64_t const ahead = ahead_of(s, column, 8, strips);
    if (column + kColumns <= std::min(s.sparse, s.dense_from)) {
      __builtin_prefetch(s.meta + column / 8 * kRows + kAhead / 4);
      __builtin_prefetch(s.meta + column / 8 * kRows + kAhead / 4 + 64);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __m512i groups[2];
        sparse(s, column + 8 * i, groups, ahead);
        for (int g = 0; g < 2; ++g) _mm512_store_si512(to + (2 * i + g) * kFour, groups[g]);
      }
      return to;
    }
    uint8_t const* const dense = s.dense + (column - s.dense_from) / 4 * kFour;
    if (column >= std::max(s.sparse, s.dense_from) && column + kColumns <= s.in) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) __builtin_prefetch(dense + i * kFour + ahead);
      return dense;
    }
    for (int i = 0; i < 8; ++i) {  // where both regions have columns, one of them holds zeros
      int64_t const c = column + 8 * i;
      __m512i groups[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      if (c < s.sparse) sparse(s, c, groups, ahead);
      for (int g = 0; g < 2; ++g) {
        if (s.dense_from <= c && c < s.in)
          groups[g] = _mm512_or_si512(groups[g], _mm512_loadu_si512(dense + (2 * i + g) * kFour));
        _mm512_store_si512(to + (2 * i + g) * kFour, groups[g]);
      }
    }
    return to;
  }

  // The weights of eight columns.
  void sparse(Strip const& s, int64_t column, __m512i groups[2], int64_t ahead) const {
    uint8_t const* const values = s.values + column / 8 * kFour;
    __m512i const kept = _mm512_loadu_si512(values), m = Avx512Vnni::metadata(s.meta + column / 8 * kRows);
    __builtin_prefetch(values + ahead);
    groups[0] = _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(m, table), row));
    groups[1] =
        _mm512_shuffle_epi8(kept, _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(m, 4), table), row_odd));
  }
};

// Few tokens lie one after the other with kOffset added, many side by side without.
void quantize_tiles(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t tokens, void* values,
                    int64_t pitch, float* scales) {
  (tokens <= kVnniUpTo ? quantize_int8_avx512<Avx512Vnni::kOffset, 1>
                       : quantize_int8_avx512<0, kSide>)(x, dtype, in, from, to, tokens, values, pitch, scales);
}

void strips(Strip const* strips, int count, void const* x, int64_t pitch, int tokens, void* out) {
  if (tokens > kVnniUpTo)
    return strips_amx(Int8Tiles{}, strips, count, static_cast<uint8_t const*>(x), pitch, tokens,
                      static_cast<int32_t*>(out));
  int8_strips<Avx512Vnni>(strips, count, x, pitch, tokens, out);
}

}  // namespace

// kTogether tokens in a call: all that were quantised together, so that both functions choose alike.
constinit Functions const int8_amx = {8, 1, kStrips, kTogether, quantize_tiles, strips, finish_avx512<int32_t>};

}  // namespace spense::cpu
