// What is computed per active neuron, over a vector type V (see avx2.cpp): included once per instruction set, in a file
// that is compiled for it. V reads bf16 as bits, of which the even and the odd ones become fp32 without a shuffle.
#pragma once
#include <algorithm>
#include <cstring>
#include "mlp/cpu/active.h"

namespace spense::cpu {
namespace {

constexpr int64_t kBytesAhead = 6144;         // of weights that are asked for ahead of those in use
constexpr int kLine = 64 / sizeof(Bf16Bits);  // values that are asked for together

inline float to_float(Bf16Bits bits) {
  uint32_t const wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline int64_t rows_ahead(int64_t width) {
  return std::max<int64_t>(1, kBytesAhead / (2 * std::max<int64_t>(1, width)));
}

// Dot products of a row with several tokens; `next`: the row to ask for meanwhile. Of a pair of vectors the first goes
// to one sum and the second to the other, or even and odd columns do, whatever the number of tokens: so a token's bits
// do not depend on its company.
template <class V, int Tokens>
void dots(Bf16Bits const* row, Bf16Bits const* next, Rows const& x, uint16_t const* tokens, int64_t in, float* out) {
  constexpr int kStep = 2 * V::kValues;
  typename V::Floats sum[Tokens][2];
  Bf16Bits const* token[Tokens];
  for (int t = 0; t < Tokens; ++t) {
    sum[t][0] = sum[t][1] = V::zero();
    token[t] = x.row(tokens[t]);
  }
  int64_t c = 0;
  for (; c + kStep <= in; c += kStep) {
    for (int i = 0; i < kStep; i += kLine) __builtin_prefetch(next + c + i);
    auto const first = V::bits(row + c), second = V::bits(row + c + V::kValues);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t)
      V::add_products(sum[t], first, second, V::bits(token[t] + c), V::bits(token[t] + c + V::kValues));
  }
  if (c < in) {
    size_t const bytes = size_t(in - c) * sizeof(Bf16Bits);
    Bf16Bits rest[kStep] = {}, of_token[kStep] = {};
    std::memcpy(rest, row + c, bytes);
    for (int t = 0; t < Tokens; ++t) {
      std::memcpy(of_token, token[t] + c, bytes);
      V::add_products(sum[t], V::bits(rest), V::bits(rest + V::kValues), V::bits(of_token),
                      V::bits(of_token + V::kValues));
    }
  }
  for (int t = 0; t < Tokens; ++t) out[t] = V::total(V::add(sum[t][0], sum[t][1]));
}

// All tokens of a row, at most `Tokens` at a time.
template <class V, int Tokens>
void all_dots(Bf16Bits const* row, Bf16Bits const* next, Rows const& x, uint16_t const* tokens, int count, int64_t in,
              float* out) {
  for (; count >= Tokens; count -= Tokens, tokens += Tokens, out += Tokens, next = row)
    dots<V, Tokens>(row, next, x, tokens, in, out);
  if constexpr (Tokens > 1) all_dots<V, Tokens / 2>(row, next, x, tokens, count, in, out);
}

inline float hidden_value(Kind kind, float gate, float up) {
  if (kind == kRelu2) return gate * gate * up;
  return gate * (kind == kDrelu && up < 0 ? 0 : up);
}

template <class V>
void hidden(Rows const& x, Gate const& gate, Rows const& up, Bf16Bits const* bias, int64_t in, Neuron* neurons,
            int64_t from, int64_t to, uint16_t* tokens, float* values) {
  int64_t const ahead = rows_ahead(in);
  float out[kMlpTokens];
  for (int64_t i = from; i < to; ++i) {
    Neuron& neuron = neurons[i];
    uint16_t* const of = tokens + neuron.first;
    float* const target = values + neuron.first;
    all_dots<V, V::kTokens>(up.row(neuron.row), up.row(neurons[std::min(i + ahead, to - 1)].row), x, of, neuron.tokens,
                            in, out);
    float const added = bias ? to_float(bias[neuron.row]) : 0;
    int kept = 0;
    for (int t = 0; t < neuron.tokens; ++t) {
      uint16_t const token = of[t];
      float const value = hidden_value(gate.kind, to_float(gate.values.row(token)[neuron.row]), out[t] + added);
      of[kept] = token;
      target[kept] = value;
      kept += value != 0;
    }
    neuron.tokens = kept;
  }
}

// Adds a part of a row, which stays in registers, to the sums of all tokens of its neuron.
template <class V, int Vectors>
void add_row(Bf16Bits const* row, uint16_t const* tokens, float const* values, int count, float* sums, int64_t pitch) {
  constexpr int kHalf = V::kValues / 2;
  typename V::Floats weight[2 * Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    auto const bits = V::bits(row + v * V::kValues);
    weight[2 * v] = V::even(bits);
    weight[2 * v + 1] = V::odd(bits);
  }
  for (int t = 0; t < count; ++t) {
    float* const sum = sums + tokens[t] * pitch;
    auto const value = V::one(values[t]);
#pragma GCC unroll 8
    for (int v = 0; v < 2 * Vectors; ++v) V::store(sum + v * kHalf, V::fma(weight[v], value, V::load(sum + v * kHalf)));
  }
}

// Columns [from, to) of y for which there is room for sums: per column in the order of neurons, so that the bits depend
// on nothing else.
template <class V>
void some_outputs(Neuron const* neurons, int64_t neuron_count, uint16_t const* tokens, float const* values,
                  Rows const& down, Bf16Bits const* bias, int64_t count, int64_t from, int64_t to, Bf16Bits* y,
                  int64_t y_pitch, float* sums, int64_t pitch) {
  constexpr int kValues = V::kValues;
  int64_t const ahead = rows_ahead(to - from), whole = to - (to - from) % kValues;
  std::fill_n(sums, count * pitch, 0.0f);
  for (int64_t i = 0; i < neuron_count; ++i) {
    Neuron const& neuron = neurons[i];
    Bf16Bits const* const row = down.row(neuron.row);
    Bf16Bits const* const next = down.row(neurons[std::min(i + ahead, neuron_count - 1)].row);
    uint16_t const* const of = tokens + neuron.first;
    float const* const value = values + neuron.first;
    int64_t c = from;
    auto const add = [&]<int Vectors>() {
      for (int v = 0; v < Vectors * kValues; v += kLine) __builtin_prefetch(next + c + v);
      add_row<V, Vectors>(row + c, of, value, neuron.tokens, sums + (c - from), pitch);
      c += Vectors * kValues;
    };
    while (c + 4 * kValues <= whole) add.template operator()<4>();
    while (c < whole) add.template operator()<1>();
    if (whole < to) {
      Bf16Bits rest[kValues] = {};
      std::copy(row + whole, row + to, rest);
      add_row<V, 1>(rest, of, value, neuron.tokens, sums + (whole - from), pitch);
    }
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = from; c < to; c += kValues) {
      int64_t const here = std::min<int64_t>(kValues, to - c);
      float const* const sum = sums + t * pitch + (c - from);
      auto even = V::load(sum), odd = V::load(sum + kValues / 2);
      Bf16Bits part[kValues] = {};
      if (bias) {
        std::copy_n(bias + c, here, part);
        even = V::add(even, V::even(V::bits(part)));
        odd = V::add(odd, V::odd(V::bits(part)));
      }
      V::store_bits(part, V::rounded(even, odd));
      std::copy_n(part, here, y + t * y_pitch + c);
    }
}

template <class V>
void outputs(Neuron const* neurons, int64_t neuron_count, uint16_t const* tokens, float const* values, Rows const& down,
             Bf16Bits const* bias, int64_t count, int64_t from, int64_t to, Bf16Bits* y, int64_t y_pitch, float* sums) {
  int64_t const width = columns_at_once(count, to - from), pitch = sums_pitch(width);
  for (int64_t c = from; c < to; c += width)
    some_outputs<V>(neurons, neuron_count, tokens, values, down, bias, count, c, std::min(c + width, to), y, y_pitch,
                    sums, pitch);
}

template <class V>
typename V::Bits some_bits(Bf16Bits const* p, int64_t here) {
  if (here == V::kValues) return V::bits(p);
  Bf16Bits part[V::kValues] = {};
  std::copy_n(p, here, part);
  return V::bits(part);
}

template <class V>
void store_some(Bf16Bits* to, typename V::Bits bits, int64_t here) {
  if (here == V::kValues) return V::store_bits(to, bits);
  Bf16Bits part[V::kValues];
  V::store_bits(part, bits);
  std::copy_n(part, here, to);
}

}  // namespace
}  // namespace spense::cpu
