// Weights in 4 bits, of which every block of a row has a scale, times activations as they come: nothing is quantised.
// Regions in FP8 may stand beside them (docs/kernels.md, "On CPUs").
#pragma once
#include "linear/cpu/kernels.h"

namespace spense::cpu {

constexpr int kCodes = 8;         // of a row that lie together: a unit of 4 bytes
constexpr int kFarAhead = 12288;  // bytes that are asked for ahead

// One region of one strip: blocks, each of 16 scales (fp32), in a 2:4 region metadata [values / 4][16 rows], and codes
// [values / 8][16 rows] of 4 bytes. From its low end these hold values 0, 2, 4, 6 and then 1, 3, 5, 7, so that a shift
// by 4 i brings the codes of the pair 2 i, 2 i + 1 to the low ends of both halves.
struct Blocks {
  uint8_t const* data;
  int64_t count;
  int values;  // of a row in a block: 16, 32 or 64
  bool sparse;
};

// What is compiled once per instruction set.
struct FourBitFunctions {
  bool only_bf16;   // takes no other x
  int64_t x_bytes;  // of an activation as the kernels read it
  int count;        // strips, and
  int tokens;       // tokens that one call takes at most
  int granule;      // regions begin at multiples of so many columns of x
  // Tokens [from, to) of x [tokens, in] as the kernels read them, as Functions::quantize lays them.
  void (*convert)(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t tokens, void* values,
                  int64_t pitch);
  // out [count, tokens, 16]: sums of strips of the same region over x [tokens, pitch] from column `at` on, scales
  // included. `add`: to what is there. Reads x up to the region's columns(), which has to be finite there.
  void (*strips)(Blocks const* strips, int count, float const* table, void const* x, int64_t at, int64_t pitch,
                 int tokens, float* out, bool add);
  // The same of a region in FP8, whose rows have a scale each.
  void (*fp8_strips)(Strip const* strips, int count, float const* const* scales, void const* x, int64_t at,
                     int64_t pitch, int tokens, float* out);
  // Functions::finish.
  void (*finish)(void const* out, int tokens, int rows, float const* x_scale, float const* weight_scale,
                 void const* bias, Dtype dtype, void* y, int64_t y_pitch);
};
extern FourBitFunctions const four_bit_avx2, four_bit_avx512, four_bit_avx512_bf16, four_bit_amx;

namespace {

inline int64_t units_of(Blocks const& b) { return b.values / kCodes; }  // of a block
inline int64_t meta_bytes_of(Blocks const& b) { return b.sparse ? b.values / 4 * kRows : 0; }
inline int64_t block_bytes_of(Blocks const& b) {
  return int64_t(sizeof(float)) * kRows + meta_bytes_of(b) + units_of(b) * kRows * kUnit;
}
inline int64_t columns_of(Blocks const& b) { return b.count * b.values * (b.sparse ? 2 : 1); }

// What 16 columns need. Behind `codes` lie those of the second 8, behind `meta` that of the second 8, too.
struct BlockStep {
  float const* scales;
  uint8_t const *meta, *codes;
};
inline BlockStep step_of(Blocks const& b, int64_t i) {
  int64_t const here = b.sparse ? 1 : 2, in_block = units_of(b) / here;  // units of a step, steps of a block
  uint8_t const* const block = b.data + i / in_block * block_bytes_of(b);
  uint8_t const* const meta = block + sizeof(float) * kRows;
  int64_t const unit = i % in_block * here;
  return {reinterpret_cast<float const*>(block), meta + 2 * unit * kRows,
          meta + meta_bytes_of(b) + unit * kRows * kUnit};
}

// Sums [strips, tokens, 16] of FP8 weights times the scales of their rows and a power of two.
inline void scale_sums(float* out, int count, int tokens, float const* const* scales, float unit) {
  for (int s = 0; s < count; ++s)
    for (int t = 0; t < tokens; ++t, out += kRows)
      for (int r = 0; r < kRows; ++r) out[r] *= unit * scales[s][r];
}

}  // namespace
}  // namespace spense::cpu
