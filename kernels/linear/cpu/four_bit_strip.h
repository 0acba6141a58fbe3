// Strips in 4 bits in fp32 arithmetic, over a vector type V (see avx2.cpp): included once per instruction set.
#pragma once
#include "linear/cpu/four_bit.h"
#include "linear/cpu/four_bit_rows.h"
#include "linear/cpu/strip.h"

namespace spense::cpu {
namespace {

// Value i of a unit lies in these bits and the three above.
constexpr int place(int i) { return i / 2 * 4 + i % 2 * 16; }

// Few tokens: sums of a block, then its scales.
template <class V, bool Sparse, int Tokens>
void decode(Blocks const& blocks, typename V::Table const& table, float const* x, int64_t pitch, float* out, bool add) {
  constexpr int kColumns = Sparse ? 16 : 8;
  int64_t const units = units_of(blocks), meta_bytes = meta_bytes_of(blocks);
  for (int row = 0; row < kRows; row += V::kLanes) {
    V total[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) total[t] = add ? V::load(out + t * kRows + row) : V::zero();
    uint8_t const* p = blocks.data;
    float const* from = x;
    for (int64_t block = 0; block < blocks.count; ++block) {
      V const scales = V::load(reinterpret_cast<float const*>(p) + row);
      uint8_t const* meta = p + 4 * kRows + row;
      p += 4 * kRows + meta_bytes;
      V sum[Tokens][V::kChains];
#pragma GCC unroll 4
      for (auto& sums : sum)
#pragma GCC unroll 4
        for (V& v : sums) v = V::zero();
      for (int64_t unit = 0; unit < units; ++unit, p += kRows * kUnit, from += kColumns) {
        auto const codes = V::words(p + row * kUnit);
        __builtin_prefetch(p + row * kUnit + kFarAhead);
        if constexpr (Sparse) {
#pragma GCC unroll 4
          for (int g = 0; g < 4; ++g) {
            auto const positions = V::bytes(meta + g / 2 * kRows);
            auto const first = V::shift_right(positions, g % 2 * 4), second = V::shift_right(positions, g % 2 * 4 + 2);
            V const w0 = V::looked_up(table, codes, place(2 * g)), w1 = V::looked_up(table, codes, place(2 * g + 1));
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) {
              V const group = V::four(from + t * pitch + 4 * g);
              V& to = sum[t][g % V::kChains];
              to = V::fma(w1, V::permuted(group, second), V::fma(w0, V::permuted(group, first), to));
            }
          }
          meta += 2 * kRows;
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kCodes; ++i) {
            V const w = V::looked_up(table, codes, place(i));
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; ++t) {
              V& to = sum[t][i % V::kChains];
              to = V::fma(w, V::one(from[t * pitch + i]), to);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
        for (int chain = 1; chain < V::kChains; ++chain) sum[t][0] = V::add(sum[t][0], sum[t][chain]);
        total[t] = V::fma(sum[t][0], scales, total[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) V::store(out + t * kRows + row, total[t]);
  }
}

template <class V, int Tokens>
void decodes(Blocks const& blocks, typename V::Table const& table, float const* x, int64_t pitch, int tokens,
             float* out, bool add) {
  for (; tokens >= Tokens; tokens -= Tokens, x += Tokens * pitch, out += Tokens * kRows)
    (blocks.sparse ? decode<V, true, Tokens> : decode<V, false, Tokens>)(blocks, table, x, pitch, out, add);
  if constexpr (Tokens > 1) decodes<V, Tokens / 2>(blocks, table, x, pitch, tokens, out, add);
}

// `count` steps from `first` on as fp32 [sum][column of it][row], scales included, zeros written out.
template <class V>
void widen(Blocks const& blocks, typename V::Table const& table, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, out += 4 * kRows) {
    BlockStep const step = step_of(blocks, first + i);
    for (int row = 0; row < kRows; row += V::kLanes) {
      V const scales = V::load(step.scales + row);
      auto const weight = [&](int j) {
        auto const codes = V::words(step.codes + (j / kCodes * kRows + row) * kUnit);
        return V::multiply(V::looked_up(table, codes, place(j % kCodes)), scales);
      };
#pragma GCC unroll 4
      for (int g = 0; g < kSums; ++g) {
        float* const group = out + g * count * 4 * kRows + row;
        if (!blocks.sparse) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) V::store(group + j * kRows, weight(4 * g + j));
          continue;
        }
        auto const positions = V::bytes(step.meta + g / 2 * kRows + row);
        auto const one = V::shift_right(positions, g % 2 * 4), other = V::shift_right(positions, g % 2 * 4 + 2);
        V const w0 = weight(2 * g), w1 = weight(2 * g + 1);
        for (int j = 0; j < 4; ++j) V::store(group + j * kRows, V::where(one, other, j, w0, w1));
      }
    }
  }
}

// Many tokens, as `prefill` of strip.h.
template <class V>
void prefill(Blocks const& blocks, typename V::Table const& table, float const* x, int64_t pitch, int tokens,
             float* out, bool add) {
  alignas(64) float weight[kDepth * kRows], sums[kSums][kTokens * kRows];
  int const values = tokens * kRows;
  for (auto& sum : sums)
    for (int i = 0; i < values; ++i) sum[i] = 0;
  for (int64_t c = 0, in = columns_of(blocks); c < in; c += kDepth) {
    int64_t const steps = (in - c < kDepth ? in - c : kDepth) / kStep;
    widen<V>(blocks, table, c / kStep, steps, weight);
    for (int g = 0; g < kSums; ++g)
      tiles<V, V::kTile>(weight + g * steps * 4 * kRows, steps, x + c + 4 * g, pitch, tokens, sums[g]);
  }
  for (int i = 0; i < values; ++i) {
    float const sum = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    out[i] = add ? out[i] + sum : sum;
  }
}

template <class V>
void four_bit_strips(Blocks const* strips, int count, float const* values, void const* activations, int64_t at,
                     int64_t pitch, int tokens, float* out, bool add) {
  auto const* x = static_cast<float const*>(activations) + at;
  auto const table = V::table(values);
  for (int i = 0; i < count; ++i, out += tokens * kRows)
    tokens <= V::kDecodeUpTo ? decodes<V, 4>(strips[i], table, x, pitch, tokens, out, add)
                             : prefill<V>(strips[i], table, x, pitch, tokens, out, add);
}

template <class V>
void fp8_strips(Strip const* fp8, int count, float const* const* scales, void const* x, int64_t at, int64_t pitch,
                int tokens, float* out) {
  strips<V, Fp8>(fp8, count, static_cast<float const*>(x) + at, pitch, tokens, out);
  scale_sums(out, count, tokens, scales, 1.0f);
}

template <class V>
constexpr FourBitFunctions four_bit_functions() {
  return {false, sizeof(float), kAbreast, kTokens, 1, convert<1, float>, four_bit_strips<V>, fp8_strips<V>, finish};
}

}  // namespace
}  // namespace spense::cpu
