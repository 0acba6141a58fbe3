// int8 with AVX2: Haswell, Zen and later. vpmaddubsw multiplies magnitudes of weights with x that has their signs, and
// adds two products, at most 2 * 127 * 127: this is in the range of int16.
#include "linear/cpu/int8_ymm.h"

namespace spense::cpu {
namespace {

struct Int8Avx2 : Ymm<Int8Avx2> {
  static constexpr int kOffset = 0;     // x is signed
  static constexpr int kTogether = 4;   // tokens: 8 sums in 16 registers
  static constexpr int kFewBlock = 8;   // of 8 rows
  static constexpr int kFew = 16;       // tokens; more are faster with prepared controls
  static constexpr int kManyBlock = 8;  // of 8 rows
  struct Weights {
    __m256i signs, magnitudes;
  };
  static Weights weights(uint8_t const* p) {
    __m256i const w = load(p).v;
    return {w, _mm256_abs_epi8(w)};
  }
  static Int8Avx2 dot(Int8Avx2 sum, Weights const& w, Int8Avx2 x) {
    __m256i const pairs = _mm256_maddubs_epi16(w.magnitudes, _mm256_sign_epi8(x.v, w.signs));
    return of(_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
};

}  // namespace

constinit Functions const int8_avx2 = int8_functions<Int8Avx2>();

}  // namespace spense::cpu
