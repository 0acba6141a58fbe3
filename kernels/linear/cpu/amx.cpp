// e4m3 with tiles of bf16 pairs (AMX-BF16): Sapphire Rapids and later. Needs amx_permitted().
#include "linear/cpu/amx_strips.h"
#include "linear/cpu/rows_avx512.h"
#include "linear/cpu/widen_bf16.h"

namespace spense::cpu {
namespace {

template <class W>
struct Bf16Tiles {
  using Sum = float;
  using Source = Strip;
  static constexpr int kColumns = 32;
  StepWidener<W> widen;

  template <int To>
  static void product() {
    if constexpr (To == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (To == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (To == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (To == 3) _tile_dpbf16ps(3, 5, 7);
  }

  static int64_t columns(Strip const& s) { return s.in; }

  // 32 columns of one of so many strips as a tile [pair of columns][16 rows][2]; columns from s.in on are zeros.
  uint8_t const* tile(Strip const& s, int64_t column, uint8_t* to, int strips) const {
    int64_t const ahead = ahead_of(s, column, W::kBits, strips);
    auto* pairs = reinterpret_cast<__m512i*>(to);
    for (int64_t c = column; c < column + kColumns; c += kStep, pairs += 8) {
      __m512i step[8] = {};
      if (c < s.in) widen(s, c, step, ahead);
      for (int i = 0; i < 8; ++i) pairs[i] = step[i];
    }
    return to;
  }
};

template <class W>
void strips(Strip const* strips, int count, void const* x, int64_t pitch, int tokens, void* out) {
  strips_amx(Bf16Tiles<W>{}, strips, count, static_cast<uint8_t const*>(x), pitch * int64_t(sizeof(Bf16)), tokens,
             static_cast<float*>(out));
}

}  // namespace

constinit Functions const fp8_amx = {Fp8::kBits,
                                     sizeof(Bf16),
                                     kStrips,
                                     kTogether,
                                     quantize_bf16_avx512<kSide>,
                                     strips<Fp8>,
                                     finish_avx512<float, Fp8::kSumUnit>};

}  // namespace spense::cpu
