// int8 with AVX-VNNI, for CPUs without AVX-512: Alder Lake, Zen 5 and later.
#include "linear/cpu/int8_ymm.h"

namespace spense::cpu {
namespace {

struct AvxVnni : Ymm<AvxVnni> {
  static constexpr int kOffset = 128;    // of bytes of x: they are unsigned in vpdpbusd
  static constexpr int kTogether = 5;    // tokens: 10 sums and 2 totals in 16 registers
  static constexpr int kFewBlock = 10;   // of 8 rows
  static constexpr int kFew = 20;        // tokens; more are faster with prepared controls
  static constexpr int kManyBlock = 10;  // of 8 rows
  using Weights = __m256i;
  static Weights weights(uint8_t const* p) { return load(p).v; }
  static AvxVnni dot(AvxVnni sum, Weights w, AvxVnni x) { return of(_mm256_dpbusd_avx_epi32(sum.v, x.v, w)); }
};

}  // namespace

constinit Functions const int8_avx_vnni = int8_functions<AvxVnni>();

}  // namespace spense::cpu
