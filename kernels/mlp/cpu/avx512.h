// 16 lanes (AVX-512 F): included once per instruction set.
#pragma once
#include <immintrin.h>
#include "mlp/cpu/tiles.h"

namespace spense::cpu {
namespace {

struct Avx512 {
  static constexpr int kValues = 32;                      // bf16 of a vector of bits
  static constexpr int kTokens = 8;                       // 16 sums in 32 registers
  static constexpr int kTileTokens = 6, kSumTokens = 12;  // 24 sums
  static constexpr int kUnits = 8;                        // 16 vectors of weights
  static constexpr int kParts = 2, kUnit = 1, kHiddenBytes = sizeof(float);
  using Bits = __m512i;
  using Floats = __m512;
  using Factor = Floats;
  using Unit = float;

  static Bits bits(Bf16Bits const* p) { return _mm512_loadu_si512(p); }
  static Bits no_bits() { return _mm512_setzero_si512(); }
  static void store_bits(Bf16Bits* p, Bits a) { _mm512_storeu_si512(p, a); }
  static Floats even(Bits a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
  static Floats odd(Bits a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xFFFF0000)))); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats one(float x) { return _mm512_set1_ps(x); }
  static Floats load(float const* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats not_negative(Floats a) { return _mm512_max_ps(zero(), a); }  // NaN stays: the second one is taken then
  // v where a is above b, or NaN; else zero.
  static Floats where_above(Floats a, Floats b, Floats v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), v);
  }
  static void add_products(Floats sum[2], Bits w0, Bits w1, Bits x0, Bits x1) {
    sum[0] = fma(even(w1), even(x1), fma(even(w0), even(x0), sum[0]));
    sum[1] = fma(odd(w1), odd(x1), fma(odd(w0), odd(x0), sum[1]));
  }
  static float total(Floats a) { return _mm512_reduce_add_ps(a); }
  // To the nearest bf16, ties to even, in the upper half of its lane.
  static __m512i nearest(Floats a) {
    __m512i const bits = _mm512_castps_si512(a);
    __m512i const odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i const up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  }
  static Bits rounded(Floats of_even, Floats of_odd) {
    __m512i const upper = _mm512_set1_epi32(int(0xFFFF0000));
    return _mm512_ternarylogic_epi32(upper, nearest(of_odd), _mm512_srli_epi32(nearest(of_even), 16), 0xCA);
  }

  // Tiles: values of 32 columns as two factors, even and odd ones; one neuron at a time.
  static Factor factor(Bf16Bits const* p, int part) { return part ? odd(bits(p)) : even(bits(p)); }
  static Floats add_product(Floats sum, Factor a, Factor b) { return fma(a, b, sum); }
  static __m128 totals(Floats const sum[4]) {
    auto const pairs = [](Floats a, Floats b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    __m512d const first = _mm512_castps_pd(pairs(sum[0], sum[1])), second = _mm512_castps_pd(pairs(sum[2], sum[3]));
    __m512d const low = _mm512_unpacklo_pd(first, second), high = _mm512_unpackhi_pd(first, second);
    __m512 const four = add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 const upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(four), 1));
    __m256 const two = _mm256_add_ps(_mm512_castps512_ps256(four), upper);
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  }
  static void pack(Bits const row[1], Bf16Bits* to) { store_bits(to, row[0]); }
  static Factor packed(Bf16Bits const* p, int half) { return factor(p, half); }
  static void unit(Bits const row[1], Factor to[2]) {
    to[0] = even(row[0]);
    to[1] = odd(row[0]);
  }
  static Factor unit_value(Unit const* hidden) { return one(*hidden); }
  static void columns(Bits a, Floats to[2]) {
    to[0] = even(a);
    to[1] = odd(a);
  }
  static Bits of_columns(Floats first, Floats second) { return rounded(first, second); }
  // The first or the second half of all values, in their order.
  static Floats in_order(Bits a, int half) {
    __m256i const part = half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a);
    return even(_mm512_cvtepu16_epi32(part));
  }
  static void store_hidden(void* hidden, int64_t at, Floats first, Floats second) {
    float* const to = static_cast<float*>(hidden) + at;
    store(to, first);
    store(to + 16, second);
  }
};

}  // namespace
}  // namespace spense::cpu
