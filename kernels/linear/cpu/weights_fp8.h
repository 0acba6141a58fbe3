// FP8 weights: e4m3, a byte each.
#pragma once
#include <immintrin.h>
#include "linear/cpu/kernels.h"

namespace spense::cpu {
namespace {

// A byte of e4m3 becomes the fp32 of the same value times 2^-120: sign, exponent and mantissa move to their places, and
// the exponents' biases (7 and 127) differ by 120. The product with 2^120 is exact; e4m3's subnormals are fp32's until
// then, so the caller sees to it that they are not flushed (through fp16, which is never flushed, is half as slow
// again).
constexpr int32_t kSignExponentMantissa = int32_t(0x87F00000u);
constexpr float kRebias = 0x1p120f;

// e4m3 as bf16 times 2^-56: with exponents that are 56 too low, that of a normal number is one more bit above its own.
constexpr int kBf16Bias = 127 - 56;
constexpr float kBf16Unit = 0x1p56f;
static_assert(kBf16Bias - 7 == 64);

// By mantissa: the bf16 of zero and of the subnormals, mantissa * 2^-9.
struct Fp8Subnormals {
  alignas(64) uint16_t bf16[32];
  constexpr Fp8Subnormals() : bf16{} {
    for (int m = 1; m < 8; ++m) {
      int const top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
      bf16[m] = uint16_t((top - 9 + kBf16Bias) << 7 | (m << (7 - top) & 0x7F));
    }
  }
};
constexpr Fp8Subnormals fp8_subnormals;

struct Fp8 {
  static constexpr int64_t kBits = 8;

  // Byte i of every lane as fp32.
  template <class V>
  static V widened(typename V::Ints words, int i) {
    auto const top = V::shift_right_signed(V::shift_left(words, 24 - 8 * i), 4);
    return V::multiply(V::of_bits(V::masked(top, kSignExponentMantissa)), V::one(kRebias));
  }

#ifdef __AVX512BW__
  static constexpr float kSumUnit = kBf16Unit;  // what sums of bf16 products have to be multiplied with

  // 64 weights [16 rows][four] to bf16 over kSumUnit: per row the first two in `a`, the others in `b`.
  struct ToBf16 {
    __m512i first = in_row(0x01800080), second = in_row(0x03800280);
    __m512i kept = _mm512_set1_epi16(int16_t(0x87F0)), bias = _mm512_set1_epi16(64 << 7);

    void operator()(uint8_t const* p, __m512i& a, __m512i& b) const {
      __m512i const codes = _mm512_loadu_si512(p);
      bool const all_normal = _mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x78)) == 0;
      a = normal(codes, first);
      b = normal(codes, second);
      if (__builtin_expect(all_normal, true)) return;  // as most often
      a = with_subnormals(a);
      b = with_subnormals(b);
    }

    // Bytes of a row for its two words; 0x80: zero.
    static __m512i in_row(int32_t which) {
      __m128i const rows = _mm_set_epi32(0x0C000C00, 0x08000800, 0x04000400, 0);
      return _mm512_or_si512(_mm512_set1_epi32(which), _mm512_broadcast_i32x4(rows));
    }
    // A code at the upper end of its word, its sign spread down to its exponent, then one more bit of that.
    __m512i normal(__m512i codes, __m512i which) const {
      __m512i const words = _mm512_srai_epi16(_mm512_shuffle_epi8(codes, which), 4);
      return _mm512_ternarylogic_epi32(words, kept, bias, 0xEA);  // words & kept | bias
    }
    static __m512i with_subnormals(__m512i words) {
      __mmask32 const found = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x0780));
      __m512i const table = _mm512_load_si512(fp8_subnormals.bf16);
      __m512i const small = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
      __m512i const sign = _mm512_and_si512(words, _mm512_set1_epi16(int16_t(0x8000)));
      return _mm512_mask_mov_epi16(words, found, _mm512_or_si512(small, sign));
    }
  };
#endif
};

}  // namespace
}  // namespace spense::cpu
