// One strip of 16 output rows for any number of tokens, over a vector type V (see avx2.cpp) and a codec W (see
// weights_fp8.h): included once per instruction set, in a file that is compiled for it.
#pragma once
#include "linear/cpu/rows.h"
#include "linear/cpu/weights_fp8.h"

namespace spense::cpu {
namespace {

// Up to V::kDecode tokens: weights and positions stay in registers, the x of a position comes from a permutation inside
// of the group.
template <class V, class W, int Tokens>
void decode(Strip const& s, float const* x, int64_t pitch, float* out) {
  for (int row = 0; row < kRows; row += V::kLanes) {
    V sum[Tokens][kSums];
    for (auto& sums : sum)
      for (V& v : sums) v = V::zero();
    uint8_t const* values = s.values + row * kUnit;
    uint8_t const* meta = s.meta + row;
    for (int64_t c = 0; c < s.sparse; c += kStep, values += 2 * kRows * kUnit, meta += 2 * kRows)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        auto const positions = V::bytes(meta + g / 2 * kRows);
        auto const first = V::shift_right(positions, g % 2 * 4), second = V::shift_right(positions, g % 2 * 4 + 2);
        auto const words = V::words(values + g / 2 * kRows * kUnit);
        __builtin_prefetch(values + g / 2 * kRows * kUnit + kAhead);
        V const w0 = W::template widened<V>(words, g % 2 * 2), w1 = W::template widened<V>(words, g % 2 * 2 + 1);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          V const group = V::four(x + t * pitch + c + 4 * g);
          sum[t][g] = V::fma(w0, V::permuted(group, first), sum[t][g]);
          sum[t][g] = V::fma(w1, V::permuted(group, second), sum[t][g]);
        }
      }
    uint8_t const* dense = s.dense + row * kUnit;
    for (int64_t c = s.dense_from; c < s.in; c += kStep, dense += kStep * kRows)
#pragma GCC unroll 16
      for (int i = 0; i < kStep; ++i) {
        uint8_t const* const unit = dense + i / 4 * kRows * kUnit;
        if (i % 4 == 0) __builtin_prefetch(unit + kAhead);
        V const w = W::template widened<V>(V::words(unit), i % 4);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) sum[t][i / 4] = V::fma(w, V::one(x[t * pitch + c + i]), sum[t][i / 4]);
      }
    for (int t = 0; t < Tokens; ++t)
      V::store(out + t * kRows + row, V::add(V::add(sum[t][0], sum[t][1]), V::add(sum[t][2], sum[t][3])));
  }
}

// Columns [from, to) of a strip as fp32 [sum][column of it][row], zeros written out.
template <class V, class W>
void widen(Strip const& s, int64_t from, int64_t to, float* out) {
  int64_t const next_sum = (to - from) / kSums * kRows;
  for (int64_t c = from; c < to; c += kStep, out += 4 * kRows) {
    bool const in_sparse = c < s.sparse;
    for (int g = 0; g < 4; ++g) {
      float* const group = out + g * next_sum;
      for (int row = 0; in_sparse && row < kRows; row += V::kLanes) {
        auto const words = V::words(s.values + (c / 8 + g / 2) * kRows * kUnit + row * kUnit);
        auto const positions = V::bytes(s.meta + (c / 8 + g / 2) * kRows + row);
        auto const first = V::shift_right(positions, g % 2 * 4), second = V::shift_right(positions, g % 2 * 4 + 2);
        V const w0 = W::template widened<V>(words, g % 2 * 2), w1 = W::template widened<V>(words, g % 2 * 2 + 1);
        for (int i = 0; i < 4; ++i) V::store(group + i * kRows + row, V::where(first, second, i, w0, w1));
      }
      if (c < s.dense_from) continue;
      uint8_t const* dense = s.dense + (c - s.dense_from + 4 * g) * kRows;
      for (int row = 0; row < kRows; row += V::kLanes)
        for (int i = 0; i < 4; ++i) {
          V const w = W::template widened<V>(V::words(dense + row * kUnit), i);
          float* const target = group + i * kRows + row;
          V::store(target, in_sparse ? V::add(w, V::load(target)) : w);
        }
    }
  }
}

// Adds `steps` times four columns, 16 apart in x, to a sum.
template <class V, int Tokens>
void multiply(float const* weight, int64_t steps, float const* x, int64_t pitch, float* out) {
  constexpr int kVectors = kRows / V::kLanes;
  V sum[Tokens][kVectors];
#pragma GCC unroll 24
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[t][v] = V::load(out + t * kRows + v * V::kLanes);
  for (int64_t step = 0; step < steps; ++step, x += kStep)
    for (int i = 0; i < 4; ++i, weight += kRows) {
      V w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = V::load(weight + v * V::kLanes);
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        V const value = V::one(x[t * pitch + i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[t][v] = V::fma(w[v], value, sum[t][v]);
      }
    }
#pragma GCC unroll 24
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) V::store(out + t * kRows + v * V::kLanes, sum[t][v]);
}

template <class V, int Tokens>
void tiles(float const* weight, int64_t steps, float const* x, int64_t pitch, int tokens, float* out) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows)
    multiply<V, Tokens>(weight, steps, x, pitch, out);
  if constexpr (Tokens > 1) tiles<V, Tokens / 2>(weight, steps, x, pitch, tokens, out);
}

// Many tokens: kDepth columns are widened at a time, then all tokens go over them, one partial sum after the other.
template <class V, class W>
void prefill(Strip const& s, float const* x, int64_t pitch, int tokens, float* out) {
  alignas(64) float weight[kDepth * kRows], sums[kSums][kTokens * kRows];
  int const values = tokens * kRows;
  for (auto& sum : sums)
    for (int i = 0; i < values; ++i) sum[i] = 0;
  for (int64_t c = 0; c < s.in; c += kDepth) {
    int64_t const depth = s.in - c < kDepth ? s.in - c : kDepth;
    widen<V, W>(s, c, c + depth, weight);
    for (int g = 0; g < kSums; ++g)
      tiles<V, V::kTile>(weight + g * (depth / kSums) * kRows, depth / kStep, x + c + 4 * g, pitch, tokens, sums[g]);
  }
  for (int i = 0; i < values; ++i) out[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
}

// Few tokens: straight from the compressed weights.
template <class V, class W, int Tokens>
void decodes(Strip const& s, float const* x, int64_t pitch, int tokens, float* out) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows)
    decode<V, W, Tokens>(s, x, pitch, out);
  if constexpr (Tokens > 1) decodes<V, W, Tokens / 2>(s, x, pitch, tokens, out);
}

template <class V, class W>
void strips(Strip const* strips, int count, void const* values, int64_t pitch, int tokens, void* sums) {
  auto const* x = static_cast<float const*>(values);
  auto* out = static_cast<float*>(sums);
  for (int i = 0; i < count; ++i, out += tokens * kRows)
    tokens <= V::kDecodeUpTo ? decodes<V, W, V::kDecode>(strips[i], x, pitch, tokens, out)
                             : prefill<V, W>(strips[i], x, pitch, tokens, out);
}

template <class V, class W>
constexpr Functions functions() {
  return {W::kBits, sizeof(float), kAbreast, kTokens, quantize<float>, strips<V, W>, finish};
}

}  // namespace
}  // namespace spense::cpu
