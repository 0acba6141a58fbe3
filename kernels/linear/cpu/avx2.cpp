// 8 lanes (AVX2 and FMA): Haswell, Zen and later.
#include <immintrin.h>
#include "linear/cpu/four_bit_strip.h"
#include "linear/cpu/strip.h"

namespace spense::cpu {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kDecode = 2;       // 8 sums in 16 registers
  static constexpr int kDecodeUpTo = 16;  // tokens; more are faster over widened weights
  static constexpr int kTile = 6;         // 12 sums
  static constexpr int kChains = 1;       // sums of a token in a block of 4 bits
  using Ints = __m256i;
  __m256 v;

  static Avx2 zero() { return {_mm256_setzero_ps()}; }
  static Avx2 one(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2 four(float const* x) { return {_mm256_broadcast_ps(reinterpret_cast<__m128 const*>(x))}; }
  static Avx2 load(float const* x) { return {_mm256_loadu_ps(x)}; }
  static void store(float* x, Avx2 a) { _mm256_storeu_ps(x, a.v); }
  static Avx2 add(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Avx2 multiply(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Ints bytes(uint8_t const* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(p)));
  }
  static Ints words(uint8_t const* p) { return _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)); }
  static Ints shift_left(Ints a, int n) { return _mm256_slli_epi32(a, n); }
  static Ints shift_right(Ints a, int n) { return _mm256_srli_epi32(a, n); }
  static Ints shift_right_signed(Ints a, int n) { return _mm256_srai_epi32(a, n); }
  static Ints masked(Ints a, int32_t mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
  static Avx2 of_bits(Ints a) { return {_mm256_castsi256_ps(a)}; }
  // Of positions, the two low bits count.
  static Avx2 permuted(Avx2 group, Ints positions) { return {_mm256_permutevar_ps(group.v, positions)}; }
  // Per row: w0 where the first position is i, w1 where the second is, else 0.
  static Avx2 where(Ints first, Ints second, int i, Avx2 w0, Avx2 w1) {
    Ints const three = _mm256_set1_epi32(3), wanted = _mm256_set1_epi32(i);
    __m256 const in_first = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(first, three), wanted));
    __m256 const in_second = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(second, three), wanted));
    return {_mm256_blendv_ps(_mm256_and_ps(in_first, w0.v), w1.v, in_second)};
  }
  struct Table {
    __m256 low, high;
  };
  static Table table(float const* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  // By the four bits of every lane from `place` on.
  static Avx2 looked_up(Table const& table, Ints codes, int place) {
    Ints const index = shift_right(codes, place);
    __m256 const low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
    return {_mm256_blendv_ps(low, high, of_bits(shift_left(codes, 28 - place)).v)};
  }
};

}  // namespace

constinit Functions const fp8_avx2 = functions<Avx2, Fp8>();
constinit FourBitFunctions const four_bit_avx2 = four_bit_functions<Avx2>();

}  // namespace spense::cpu
