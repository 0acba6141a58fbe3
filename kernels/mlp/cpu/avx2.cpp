// 8 lanes (AVX2 and FMA): Haswell, Zen and later.
#include <immintrin.h>
#include "mlp/cpu/tiles.h"

namespace spense::cpu {
namespace {

struct Avx2 {
  static constexpr int kValues = 16;  // bf16 of a vector of bits
  static constexpr int kTokens = 4;   // 8 sums in 16 registers
  static constexpr int kTileTokens = 2, kSumTokens = 6;
  static constexpr int kUnits = 4;  // 8 vectors of weights
  static constexpr int kParts = 2, kUnit = 1, kHiddenBytes = sizeof(float);
  using Bits = __m256i;
  using Floats = __m256;
  using Factor = Floats;
  using Unit = float;

  static Bits bits(Bf16Bits const* p) { return _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)); }
  static Bits no_bits() { return _mm256_setzero_si256(); }
  static void store_bits(Bf16Bits* p, Bits a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static Floats even(Bits a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
  static Floats odd(Bits a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(int(0xFFFF0000)))); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats one(float x) { return _mm256_set1_ps(x); }
  static Floats load(float const* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats not_negative(Floats a) { return _mm256_max_ps(zero(), a); }  // NaN stays: the second one is taken then
  // v where a is above b, or NaN; else zero.
  static Floats where_above(Floats a, Floats b, Floats v) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ), v); }
  static void add_products(Floats sum[2], Bits w0, Bits w1, Bits x0, Bits x1) {
    sum[0] = fma(even(w1), even(x1), fma(even(w0), even(x0), sum[0]));
    sum[1] = fma(odd(w1), odd(x1), fma(odd(w0), odd(x0), sum[1]));
  }
  static float total(Floats a) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  // To the nearest bf16, ties to even, in the upper half of its lane.
  static __m256i nearest(Floats a) {
    __m256i const bits = _mm256_castps_si256(a);
    __m256i const odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i const up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
    __m256 const nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan));
  }
  static Bits rounded(Floats of_even, Floats of_odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(nearest(of_even), 16), nearest(of_odd), 0xAA);
  }

  // Tiles: values of 16 columns as two factors, even and odd ones; one neuron at a time.
  static Factor factor(Bf16Bits const* p, int part) { return part ? odd(bits(p)) : even(bits(p)); }
  static Floats add_product(Floats sum, Factor a, Factor b) { return fma(a, b, sum); }
  static __m128 totals(Floats const sum[4]) {
    auto const pairs = [](Floats a, Floats b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
    __m256d const first = _mm256_castps_pd(pairs(sum[0], sum[1])), second = _mm256_castps_pd(pairs(sum[2], sum[3]));
    Floats const four =
        add(_mm256_castpd_ps(_mm256_unpacklo_pd(first, second)), _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
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
    __m128i const part = half ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a);
    return even(_mm256_cvtepu16_epi32(part));
  }
  static void store_hidden(void* hidden, int64_t at, Floats first, Floats second) {
    float* const to = static_cast<float*>(hidden) + at;
    store(to, first);
    store(to + 8, second);
  }
};

}  // namespace

constinit MlpFunctions const mlp_avx2 = mlp_functions<Avx2>();

}  // namespace spense::cpu
