// AVX-512 BF16: Cooper Lake, Sapphire Rapids, Zen 4 and later. Dot products take pairs of bf16 as they are.
#include "mlp/cpu/avx512.h"

namespace spense::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int kParts = 1, kUnit = 2, kLanes = 16, kHiddenBytes = sizeof(Bf16Bits);
  using Factor = Bits;
  using Unit = int32_t;  // two bf16

  static Floats add_product(Floats sum, Bits a, Bits b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static void add_products(Floats sum[2], Bits w0, Bits w1, Bits x0, Bits x1) {
    sum[0] = add_product(sum[0], w0, x0);
    sum[1] = add_product(sum[1], w1, x1);
  }

  // Tiles: 32 columns at a time, or those of two neurons beside each other, in an order that packing undoes.
  static Factor factor(Bf16Bits const* p, int) { return bits(p); }
  static void unit(Bits const row[2], Factor to[2]) {
    to[0] = _mm512_unpacklo_epi16(row[0], row[1]);
    to[1] = _mm512_unpackhi_epi16(row[0], row[1]);
  }
  static void pack(Bits const row[2], Bf16Bits* to) {
    Bits pairs[2];
    unit(row, pairs);
    store_bits(to, pairs[0]);
    store_bits(to + kValues, pairs[1]);
  }
  static Factor packed(Bf16Bits const* p, int half) { return bits(p + half * kValues); }
  // 16 rows of 16 pairs become 16 pairs of 16 rows: four turns that double the side of what is in its place.
  static void turn(Bits a[16]) {
    Bits b[16];
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
      a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
      a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
      a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      int const at = r / 4 * 8 + r % 4;
      b[at] = _mm512_shuffle_i32x4(a[at], a[at + 4], 0x88);
      b[at + 4] = _mm512_shuffle_i32x4(a[at], a[at + 4], 0xDD);
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      a[r] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0x88);
      a[r + 8] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0xDD);
    }
  }
  // Rows of up to 32 values: pairs of columns, each of 32 rows side by side.
  static void pack_across(Bf16Bits const* rows, int64_t pitch, int64_t count, int64_t columns, Bf16Bits* to) {
    for (int half = 0; half < 2; ++half) {
      Bits a[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        int64_t const row = half * 16 + r;
        a[r] = row < count ? some_bits<Avx512>(rows + row * pitch, columns) : no_bits();
      }
      turn(a);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) store_bits(to + (2 * r + half) * kValues, a[r]);
    }
  }
  static Factor unit_value(Unit const* hidden) { return _mm512_set1_epi32(*hidden); }
  static void columns(Bits a, Floats to[2]) {
    to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(no_bits(), a));
    to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(no_bits(), a));
  }
  static Bits of_columns(Floats first, Floats second) {
    return _mm512_packus_epi32(_mm512_srli_epi32(nearest(first), 16), _mm512_srli_epi32(nearest(second), 16));
  }
  static void store_hidden(void* hidden, int64_t at, Floats first, Floats second) {
    store_bits(static_cast<Bf16Bits*>(hidden) + at, (Bits)_mm512_cvtne2ps_pbh(second, first));
  }
};

}  // namespace

constinit MlpFunctions const mlp_avx512_bf16 = mlp_functions<Avx512Bf16>();

}  // namespace spense::cpu
