// FP8 weights: e4m3, a byte each.
#pragma once
#include <immintrin.h>
#include "linear/cpu/kernels.h"

namespace spense::cpu {
namespace {

// A byte of e4m3 becomes the fp32 of the same value times 2^-120: sign, exponent and mantissa move to their places, and the
// exponents' biases (7 and 127) differ by 120. The product with 2^120 is exact; e4m3's subnormals are fp32's until then, so the caller
// sees to it that they are not flushed (through fp16, which is never flushed, is half as slow again).
constexpr int32_t kSignExponentMantissa = int32_t(0x87F00000u);
constexpr float kRebias = 0x1p120f;

// The bf16 of an e4m3 magnitude.
constexpr uint16_t bf16_of(int magnitude) {
  int const exponent = magnitude >> 3, mantissa = magnitude & 7;
  if (magnitude == 127) return 0x7FC0;
  if (exponent) return uint16_t((exponent - 7 + 127) << 7 | mantissa << 4);
  if (!mantissa) return 0;
  int const top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // a subnormal, mantissa * 2^-9
  return uint16_t((top - 9 + 127) << 7 | (mantissa << (7 - top) & 0x7F));
}

// By magnitude, 7 bits: the two bytes of its bf16.
struct Fp8Tables {
  alignas(64) uint8_t high[128], low[128];
  constexpr Fp8Tables() : high{}, low{} {
    for (int m = 0; m < 128; ++m) {
      high[m] = uint8_t(bf16_of(m) >> 8);
      low[m] = uint8_t(bf16_of(m));
    }
  }
};
constexpr Fp8Tables fp8_tables;

struct Fp8 {
  static constexpr Codec kCodec = kFp8;
  static constexpr int64_t kBits = 8;

  // V::kLanes weights as fp32.
  template <class V>
  static V widened(uint8_t const* p) {
    return V::multiply(V::of_bits(V::masked(V::shift_left(V::signed_bytes(p), 20), kSignExponentMantissa)), V::one(kRebias));
  }

#ifdef __AVX512VBMI__
  // 64 weights, each in a byte of its own.
  static __m512i codes(uint8_t const* p) { return _mm512_loadu_si512(p); }

  // The bf16 of 64 codes: their low and their high bytes.
  struct LookUp {
    __m512i high0 = _mm512_load_si512(fp8_tables.high), high1 = _mm512_load_si512(fp8_tables.high + 64);
    __m512i low0 = _mm512_load_si512(fp8_tables.low), low1 = _mm512_load_si512(fp8_tables.low + 64);
    __m512i sign = _mm512_set1_epi8(char(0x80));
    void operator()(__m512i codes, __m512i& low, __m512i& high) const {
      low = _mm512_permutex2var_epi8(low0, codes, low1);
      __m512i const magnitude = _mm512_permutex2var_epi8(high0, codes, high1);
      high = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xF8);  // magnitude | (codes & sign)
    }
  };
#endif
};

}  // namespace
}  // namespace spense::cpu
