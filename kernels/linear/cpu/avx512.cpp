// 16 lanes (AVX-512 F): Skylake-SP, Zen 4 and later.
#include <immintrin.h>
#include "linear/cpu/four_bit_strip.h"
#include "linear/cpu/strip.h"

namespace spense::cpu {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kDecode = 4;       // 16 sums in 32 registers
  static constexpr int kDecodeUpTo = 24;  // tokens; more are faster over widened weights
  static constexpr int kTile = 24;
  static constexpr int kChains = 4;  // sums of a token in a block of 4 bits
  using Ints = __m512i;
  __m512 v;

  static Avx512 zero() { return {_mm512_setzero_ps()}; }
  static Avx512 one(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512 four(float const* x) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(x))}; }
  static Avx512 load(float const* x) { return {_mm512_loadu_ps(x)}; }
  static void store(float* x, Avx512 a) { _mm512_storeu_ps(x, a.v); }
  static Avx512 add(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Avx512 multiply(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Ints bytes(uint8_t const* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)));
  }
  static Ints words(uint8_t const* p) { return _mm512_loadu_si512(p); }
  static Ints shift_left(Ints a, int n) { return _mm512_slli_epi32(a, n); }
  static Ints shift_right(Ints a, int n) { return _mm512_srli_epi32(a, n); }
  static Ints shift_right_signed(Ints a, int n) { return _mm512_srai_epi32(a, n); }
  static Ints masked(Ints a, int32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
  static Avx512 of_bits(Ints a) { return {_mm512_castsi512_ps(a)}; }
  // Of positions, the two low bits count.
  static Avx512 permuted(Avx512 group, Ints positions) { return {_mm512_permutevar_ps(group.v, positions)}; }
  // Per row: w0 where the first position is i, w1 where the second is, else 0.
  static Avx512 where(Ints first, Ints second, int i, Avx512 w0, Avx512 w1) {
    Ints const three = _mm512_set1_epi32(3), wanted = _mm512_set1_epi32(i);
    __m512 const a = _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(_mm512_and_si512(first, three), wanted), w0.v);
    return {_mm512_mask_mov_ps(a, _mm512_cmpeq_epi32_mask(_mm512_and_si512(second, three), wanted), w1.v)};
  }
  using Table = __m512;
  static Table table(float const* p) { return _mm512_loadu_ps(p); }
  // By the four bits of every lane from `place` on.
  static Avx512 looked_up(Table table, Ints codes, int place) {
    return {_mm512_permutexvar_ps(shift_right(codes, place), table)};
  }
};

}  // namespace

constinit Functions const fp8_avx512 = functions<Avx512, Fp8>();
constinit FourBitFunctions const four_bit_avx512 = four_bit_functions<Avx512>();

}  // namespace spense::cpu
