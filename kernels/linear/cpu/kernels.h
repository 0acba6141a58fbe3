// The Spense linear layer on x86-64 CPUs: weights stay compressed and are widened in registers. Written once over a
// vector type (avx2.cpp, avx512.cpp) and a codec of the weights (weights_fp8.h); docs/kernels.md, "On CPUs".
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include "common/dtype.h"

namespace spense::cpu {

constexpr int kRows = 16;     // output rows whose weights lie side by side: one strip
constexpr int kStep = 16;     // columns of one step: four groups of four
constexpr int kSums = 4;      // partial sums of an output: column c adds to sum c / 4 % 4, in one order per file
constexpr int kDepth = 1024;  // columns that are widened at a time, for many tokens
constexpr int kAhead = 6144;  // bytes of weights that are asked for ahead: the CPU by itself does not go far enough
constexpr int kUnit = 4;      // bytes of a row that lie together
constexpr int kTokens = 192;  // tokens that share one widened strip
constexpr int kAbreast = 4;   // strips of one call: so much of a row of y is written at a time, as rows are far apart
constexpr int64_t kTogether = 512;  // tokens whose quantised values are kept at a time

// One strip in the interleaved layout that `interleave` of vllm_spense.ops makes: the rows' bytes in turn, four at a
// time. Columns are those of x; the two regions may overlap by one step, where the weights of one of them are zeros.
struct Strip {
  uint8_t const* values;  // [sparse / 8][row][two groups of 4][first, second]
  uint8_t const* meta;    // [sparse / 8][row]: nibbles of positions, the even group's low
  uint8_t const* dense;   // [(in - dense_from) / 4][row][column]
  int64_t sparse;         // columns, a multiple of 16, from 0
  int64_t dense_from;     // a multiple of 16
  int64_t in;             // columns, a multiple of 16: up to here x is padded with zeros
};

// How weights are stored. Scales of rows are not the codec's business.
enum Codec : int { kFp8, kInt8, kCodecs };

// What is compiled once per instruction set and codec; each function runs on the caller's thread. Those files define
// nothing else with linkage and nothing that runs when the library is loaded: a CPU without their instructions loads
// it, too.
struct Functions {
  int64_t weight_bits;
  int64_t x_bytes;  // of a quantised activation: an e4m3 value as fp32 or as bf16, an integer
  int count;        // strips, and
  int tokens;       // tokens that one call takes at most
  // Tokens [from, to) of x [tokens, in] to e4m3 values and their scales: quantize_per_token. Rows are `pitch` apart, a
  // multiple of 64, with zeros up to there; every 16 of them lie as the kernels read them, which may depend on the
  // number of all `tokens`, at most kTogether.
  void (*quantize)(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t tokens, void* values,
                   int64_t pitch, float* scales);
  // out [count, tokens, 16]: sums (fp32, or int32 of integers) without scales of strips of the same regions for x
  // [tokens, pitch], of which rows up to the next multiple of 16 may be read. The bits depend neither on the number of
  // tokens nor on the region that a zero is in, as additions come in the same order everywhere.
  void (*strips)(Strip const* strips, int count, void const* x, int64_t pitch, int tokens, void* out);
  // y [tokens, `rows` of y_pitch] = out * x_scale * weight_scale + bias, each step in fp32, for the sums of one call of
  // `strips`; `bias` (or null) has the dtype of y.
  void (*finish)(void const* out, int tokens, int rows, float const* x_scale, float const* weight_scale,
                 void const* bias, Dtype dtype, void* y, int64_t y_pitch);
};
extern Functions const fp8_avx2, fp8_avx512, fp8_avx512_bf16, fp8_amx;

namespace {
constexpr int64_t bytes_of(int64_t weights, int64_t bits) { return weights * bits / 8; }

// How far ahead of a column of a strip its weights are asked for. Where strips are read side by side, what lies behind
// the end of one is read already, and what is read next lies behind them all.
inline int64_t ahead_of(Strip const& s, int64_t column, int64_t bits, int strips) {
  bool const sparse = column < s.sparse;
  int64_t const at = bytes_of((sparse ? column / 2 : column - s.dense_from) * kRows, bits) + kAhead;
  int64_t const size = bytes_of((sparse ? s.sparse / 2 : s.in - s.dense_from) * kRows, bits);
  return __builtin_expect(at < size, true) ? kAhead : kAhead + (strips - 1) * size * (at / size);
}
}  // namespace

}  // namespace spense::cpu
