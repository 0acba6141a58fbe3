// The Spense linear layer on x86-64 CPUs: e4m3 weights stay compressed and are widened in registers. Written once over a vector
// type (spense_linear_cpu_avx2.cpp, spense_linear_cpu_avx512.cpp); docs/kernels.md, "On CPUs".
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace spense::cpu {

constexpr int kRows = 16;      // output rows whose weights lie side by side: one strip
constexpr int kStep = 16;      // columns of one step: four groups of four
constexpr int kDecode = 4;     // tokens that share one pass over the compressed weights
constexpr int kDepth = 1024;   // columns that are widened at a time for more tokens
constexpr int kTokens = 96;    // tokens that share one widened strip

// One strip in the interleaved layout of ops/cpu_backend.py. Columns are those of x; the two regions may overlap by one step,
// where the weights of one of them are zeros.
struct Strip {
  uint8_t const* values;  // [sparse / 16][group of 4][first, second][row]
  uint8_t const* meta;    // [sparse / 16][two groups][row]: nibbles of positions, the even group's low
  uint8_t const* dense;   // [(in - dense_from) / 16][column][row]
  int64_t sparse;         // columns, a multiple of 16, from 0
  int64_t dense_from;     // a multiple of 16
  int64_t in;             // columns, a multiple of 16: up to here x is padded with zeros
};

// x [tokens, pitch] fp32 (e4m3 values), out [tokens, 16] fp32: sums without scales. Columns add up in four partial sums, column c
// in sum c / 4 % 4 from left to right, whichever region it is in: a 2:4 region gives bit for bit what its zeros written out give.
using StripFunction = void (*)(Strip const& strip, float const* x, int64_t pitch, int tokens, float* out);
void strip_avx2(Strip const& strip, float const* x, int64_t pitch, int tokens, float* out);
void strip_avx512(Strip const& strip, float const* x, int64_t pitch, int tokens, float* out);

}  // namespace spense::cpu
