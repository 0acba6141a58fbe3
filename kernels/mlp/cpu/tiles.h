// Tokens that use many of the neurons: all neurons are computed. For few tokens what is read of some rows stays in
// registers while it meets all tokens; for many, tiles of their sums do. Rows are read as they lie in memory: no second
// copy of a weight is kept. Over a vector type V, as neurons.h.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include "mlp/cpu/neurons.h"

namespace spense::cpu {
namespace {

constexpr int64_t kStride = 8;  // steps of a tile without a look ahead

// Rows that will be needed next come into the second-level cache meanwhile, at an even pace.
class Ahead {
 public:
  // `count` parts of rows, `width` values each, over so many steps.
  Ahead(Bf16Bits const* row, int64_t pitch, int64_t width, int64_t count, int64_t steps)
      : row_(row), pitch_(pitch), width_(width), count_(count) {
    rate_ = kOne * count * ((width + kLine - 1) / kLine) / std::max<int64_t>(1, steps) + 1;
  }
  void steps(int64_t count) {
    for (credit_ += rate_ * count; credit_ >= kOne; credit_ -= kOne) {
      if (!count_) return;
      __builtin_prefetch(row_ + column_, 0, 2);
      column_ += kLine;
      if (column_ < width_) continue;
      column_ = 0;
      row_ += pitch_;
      --count_;
    }
  }

 private:
  static constexpr int64_t kOne = 1 << 16;
  Bf16Bits const* row_;
  int64_t pitch_, width_, count_, rate_, credit_ = 0, column_ = 0;
};

// Calls f<block>(first) for blocks of nearly the same size of so many tokens, none larger than Most.
template <int Most, class F>
void in_blocks(int64_t tokens, F const& f) {
  constexpr auto kBySize = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{+[](F const& call, int64_t first) { call.template operator()<I + 1>(first); }...};
  }(std::make_integer_sequence<int, Most>{});
  int64_t first = 0;
  for (int64_t blocks = (tokens + Most - 1) / Most; blocks; --blocks) {
    int64_t const here = (tokens - first + blocks - 1) / blocks;
    kBySize[size_t(here - 1)](f, first);
    first += here;
  }
}

// Products of kTileRows rows and some tokens, added to out [token][row] unless they are the first.
template <class V, int Tokens>
void dot_tile(std::array<Bf16Bits const*, kTileRows> rows, Bf16Bits const* x, int64_t x_pitch, int64_t columns,
              Ahead& ahead, float* out, int64_t pitch, bool first) {
  typename V::Floats sum[Tokens][kTileRows];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) sum[t][r] = V::zero();
  auto const step = [&](auto const& row, auto const& token) {
#pragma GCC unroll 2
    for (int part = 0; part < V::kParts; ++part) {
      typename V::Factor weight[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) weight[r] = V::factor(row(r), part);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        auto const value = V::factor(token(t), part);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[t][r] = V::add_product(sum[t][r], weight[r], value);
      }
    }
  };
  int64_t c = 0;
  for (int64_t const whole = columns - columns % V::kValues; c < whole;) {
    int64_t const end = std::min(c + kStride * V::kValues, whole);
    ahead.steps((end - c) / V::kValues);
#pragma GCC unroll 1
    for (; c < end; c += V::kValues)
      step([&](int r) { return rows[size_t(r)] + c; }, [&](int t) { return x + t * x_pitch + c; });
  }
  if (c < columns) {
    Bf16Bits rest[kTileRows + Tokens][V::kValues] = {};
    for (int r = 0; r < kTileRows; ++r) std::copy(rows[size_t(r)] + c, rows[size_t(r)] + columns, rest[r]);
    for (int t = 0; t < Tokens; ++t) std::copy(x + t * x_pitch + c, x + t * x_pitch + columns, rest[kTileRows + t]);
    step([&](int r) { return rest[r]; }, [&](int t) { return rest[kTileRows + t]; });
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    float* const to = out + t * pitch;
    __m128 const four = V::totals(sum[t]);
    _mm_storeu_ps(to, first ? four : _mm_add_ps(_mm_loadu_ps(to), four));
  }
}

// Products of neurons [panel, end).
template <class V>
void dot_products(Rows const& x, Rows const& up, int64_t in, int64_t count, int64_t panel, int64_t end, int64_t to,
                  float* products) {
  int64_t const blocks = (count + V::kTileTokens - 1) / V::kTileTokens;
  for (int64_t c = 0; c == 0 || c < in; c += kPanelColumns) {
    int64_t const columns = std::min(kPanelColumns, in - c);
    bool const last = c + columns == in;  // then the next panel comes, else the next columns of this one
    int64_t const steps = (end - panel + kTileRows - 1) / kTileRows * blocks * (columns / V::kValues);
    Ahead ahead(last ? up.row(end) : up.row(panel) + c + columns, up.pitch,
                std::min(kPanelColumns, last ? in : in - c - columns), last ? std::min(kPanel, to - end) : end - panel,
                steps);
    in_blocks<V::kTileTokens>(count, [&]<int Tokens>(int64_t t) {
      for (int64_t i = panel; i < end; i += kTileRows) {
        std::array<Bf16Bits const*, kTileRows> rows;
        for (int r = 0; r < kTileRows; ++r) rows[size_t(r)] = up.row(std::min(i + r, end - 1)) + c;
        dot_tile<V, Tokens>(rows, x.row(t) + c, x.pitch, columns, ahead, products + t * kPanelPitch + (i - panel),
                            kPanelPitch, c == 0);
      }
    });
  }
}

// What the activation makes of up's products [count, kPanel]: hidden values of neurons [from, to).
template <class V>
void activate_panel(Gate const& gate, Bf16Bits const* bias, int64_t count, int64_t from, int64_t to, float const* up,
                    void* hidden, int64_t pitch) {
  constexpr int kHalf = V::kValues / 2;
  auto const closed = V::one(to_float(Bf16Bits(gate.limit)));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = from; i < to; i += V::kValues) {
      auto const g = some_bits<V>(gate.values.row(t) + i, std::min<int64_t>(V::kValues, to - i));
      auto const b = bias ? some_bits<V>(bias + i, std::min<int64_t>(V::kValues, to - i)) : V::no_bits();
      auto const value = [&](int half) {
        auto const opened = V::in_order(g, half);
        auto u = V::load(up + t * kPanelPitch + (i - from) + half * kHalf);
        if (bias) u = V::add(u, V::in_order(b, half));
        if (gate.kind == kDrelu) u = V::not_negative(u);
        auto const factor = gate.kind == kRelu2 ? V::multiply(opened, opened) : opened;
        return V::where_above(opened, closed, V::multiply(factor, u));
      };
      V::store_hidden(hidden, t * pitch + i, value(0), value(1));
    }
}

// Adds products of some units of neurons and a vector of columns to sums [token][V::kValues], or begins with them.
// Tokens in threes: more addresses than that do not fit into registers.
template <class V, int Tokens>
void sum_tile(Bf16Bits const* weights, int64_t units, typename V::Unit const* hidden, int64_t pitch, float* sums,
              int64_t sums_pitch, bool first, Ahead& ahead) {
  constexpr int kHalf = V::kValues / 2;
  typename V::Floats sum[Tokens][2];
#pragma GCC unroll 12
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
      sum[t][half] = first ? V::zero() : V::load(sums + t * sums_pitch + half * kHalf);
  for (int64_t u = 0; u < units;) {
    int64_t const end = std::min(u + kStride, units);
    ahead.steps(end - u);
#pragma GCC unroll 1
    for (; u < end; ++u, weights += V::kUnit * V::kValues, ++hidden) {
      typename V::Factor const first_half = V::packed(weights, 0), second_half = V::packed(weights, 1);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        auto const value = V::unit_value(hidden + t * pitch);
        sum[t][0] = V::add_product(sum[t][0], first_half, value);
        sum[t][1] = V::add_product(sum[t][1], second_half, value);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) V::store(sums + t * sums_pitch + half * kHalf, sum[t][half]);
}

// Products of a line of neurons from `first` on: what their rows hold in as many columns is turned over in registers,
// so that a vector has a unit of columns of all of them, and meets those of each token. Rows are read once, and nothing
// is added up across a vector.
template <class V>
void turned_products(Rows x, Rows up, int64_t in, int64_t count, int64_t first, int64_t to, float* products) {
  constexpr int kLanes = V::kLanes;
  typename V::Bits weight[kLanes];
  auto const turn = [&](auto const& row) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) weight[r] = V::bits(row(r));
    V::turn(weight);
  };
  auto const add = [&](Bf16Bits const* values, bool begin, float* to_add) {
    typename V::Floats sum[2] = {begin ? V::zero() : V::load(to_add), V::zero()};
#pragma GCC unroll 16
    for (int u = 0; u < kLanes; ++u) {
      typename V::Unit value;
      std::memcpy(&value, values + u * V::kUnit, sizeof value);
      sum[u % 2] = V::add_product(sum[u % 2], weight[u], V::unit_value(&value));
    }
    V::store(to_add, V::add(sum[0], sum[1]));
  };
  Ahead ahead(up.row(first + kLanes), up.pitch, in, std::clamp<int64_t>(to - first - kLanes, 0, kLanes),
              in / V::kValues);
  int64_t c = 0;
  for (; c + V::kValues <= in; c += V::kValues) {
    ahead.steps(1);
    turn([&](int r) { return up.row(first + r) + c; });
    Bf16Bits const* values = x.data + c;
    float* to_add = products;
#pragma GCC unroll 1
    for (int64_t t = 0; t < count; ++t, values += x.pitch, to_add += kPanelPitch) add(values, c == 0, to_add);
  }
  if (c < in || !in) {
    Bf16Bits rest[kLanes + 1][V::kValues] = {};
    for (int r = 0; r < kLanes; ++r) std::copy(up.row(first + r) + c, up.row(first + r) + in, rest[r]);
    turn([&](int r) { return rest[r]; });
    for (int64_t t = 0; t < count; ++t) {
      std::copy(x.row(t) + c, x.row(t) + in, rest[kLanes]);
      add(rest[kLanes], c == 0, products + t * kPanelPitch);
    }
  }
}

// For more tokens it pays to bring the rows of up into the order that sum_tile takes, neurons as its columns and
// columns of x as its neurons: there is nothing to add up across a vector at the end. Products of neurons [panel, end).
template <class V>
void packed_products(Rows const& x, Rows const& up, int64_t in, int64_t count, int64_t panel, int64_t end, int64_t to,
                     float* products, Bf16Bits* packed) {
  constexpr int64_t kValues = V::kValues;
  int64_t const strips = (end - panel + kValues - 1) / kValues, blocks = (count + V::kSumTokens - 1) / V::kSumTokens;
  for (int64_t c = 0; c < in; c += kTileDepth) {
    int64_t const depth = std::min(kTileDepth, in - c), after = c + depth;
    int64_t const units = (depth + V::kUnit - 1) / V::kUnit,
                  strip = (depth + kValues - 1) / kValues * kValues * kValues;
    for (int64_t s = 0; s < strips; ++s) {
      int64_t const first = panel + s * kValues;
      for (int64_t k = 0; k < depth; k += kValues)
        V::pack_across(up.row(first) + c + k, up.pitch, std::min(kValues, end - first), std::min(kValues, depth - k),
                       packed + s * strip + k * kValues);
    }
    bool const last = after == in;
    int64_t const rows = last ? std::min(end + kPanel, to) - end : end - panel;
    Ahead ahead(last ? up.row(end) : up.row(panel) + after, up.pitch, std::min(kTileDepth, last ? in : in - after),
                rows, strips * blocks * units);
    for (int64_t s = 0; s < strips; ++s)
      in_blocks<V::kSumTokens>(count, [&]<int Tokens>(int64_t t) {
        sum_tile<V, Tokens>(packed + s * strip, units, reinterpret_cast<typename V::Unit const*>(x.row(t) + c),
                            x.pitch / V::kUnit, products + t * kPanelPitch + s * kValues, kPanelPitch, c == 0, ahead);
      });
  }
}

template <class V>
void all_hidden(Rows const& x, Gate const& gate, Rows const& up, Bf16Bits const* bias, int64_t in, int64_t count,
                int64_t from, int64_t to, void* hidden, int64_t pitch, float* products, Bf16Bits* packed) {
  for (int64_t panel = from; panel < to; panel += kPanel) {
    int64_t const end = std::min(panel + kPanel, to);
    int64_t i = panel;
    if constexpr (V::kUnit > 1) {
      if (count >= kPackedTokens && in && in % V::kUnit == 0 && x.pitch % V::kUnit == 0) {
        packed_products<V>(x, up, in, count, panel, end, to, products, packed);
        i = end;
      }
      for (; i + V::kLanes <= end; i += V::kLanes) turned_products<V>(x, up, in, count, i, to, products + (i - panel));
    }
    if (i < end) dot_products<V>(x, up, in, count, i, end, to, products + (i - panel));
    activate_panel<V>(gate, bias, count, panel, end, products, hidden, pitch);
  }
}

// Adds to the sums of all tokens what some neurons make of columns [from, end), whose weights go through registers.
template <class V>
void add_rows(std::array<Bf16Bits const*, V::kUnits * V::kUnit> const& rows, int64_t from, int64_t end,
              typename V::Unit const* hidden, int64_t pitch, int64_t count, float* sums, int64_t sums_pitch,
              Ahead& ahead) {
  constexpr int kHalf = V::kValues / 2;
  auto const step = [&](float* sum, auto const& row) {
    typename V::Factor weight[V::kUnits][2];
#pragma GCC unroll 8
    for (int u = 0; u < V::kUnits; ++u) {
      typename V::Bits unit[V::kUnit];
#pragma GCC unroll 2
      for (int r = 0; r < V::kUnit; ++r) unit[r] = V::bits(row(u * V::kUnit + r));
      V::unit(unit, weight[u]);
    }
    auto const* value = hidden;
    for (int64_t t = 0; t < count; ++t, sum += sums_pitch, value += pitch) {
      auto first = V::load(sum), second = V::load(sum + kHalf);
#pragma GCC unroll 8
      for (int u = 0; u < V::kUnits; ++u) {
        auto const factor = V::unit_value(value + u);
        first = V::add_product(first, weight[u][0], factor);
        second = V::add_product(second, weight[u][1], factor);
      }
      V::store(sum, first);
      V::store(sum + kHalf, second);
    }
  };
  int64_t c = from;
  for (; c + V::kValues <= end; c += V::kValues, sums += V::kValues) {
    ahead.steps(1);
    step(sums, [&](int r) { return rows[size_t(r)] + c; });
  }
  if (c < end) {
    Bf16Bits rest[V::kUnits * V::kUnit][V::kValues] = {};
    for (size_t r = 0; r < rows.size(); ++r) std::copy(rows[r] + c, rows[r] + end, rest[r]);
    step(sums, [&](int r) { return rest[r]; });
  }
}

// Sums of columns [from, end), for few tokens.
template <class V>
void summed_rows(typename V::Unit const* hidden, int64_t pitch, int64_t neurons, Rows const& down, int64_t count,
                 int64_t from, int64_t end, float* sums, int64_t sums_pitch) {
  constexpr int64_t kRows = V::kUnits * V::kUnit;
  std::fill_n(sums, count * sums_pitch, 0.0f);
  for (int64_t i = 0; i < neurons; i += kRows) {
    std::array<Bf16Bits const*, kRows> rows;  // hidden values behind the last neuron are zeros
    for (int64_t r = 0; r < kRows; ++r) rows[size_t(r)] = down.row(std::min(i + r, neurons - 1));
    Ahead ahead(down.row(i + kRows) + from, down.pitch, end - from, std::clamp<int64_t>(neurons - i - kRows, 0, kRows),
                (end - from) / V::kValues);
    add_rows<V>(rows, from, end, hidden + i / V::kUnit, pitch, count, sums, sums_pitch, ahead);
  }
}

// Columns of rows, units of neurons side by side; what is missing becomes zeros.
template <class V>
void pack(Bf16Bits const* rows, int64_t pitch, int64_t depth, int64_t columns, Bf16Bits* packed) {
  for (int64_t r = 0; r < depth; r += V::kUnit, rows += V::kUnit * pitch, packed += V::kUnit * V::kValues) {
    typename V::Bits row[V::kUnit];
    for (int i = 0; i < V::kUnit; ++i) row[i] = r + i < depth ? some_bits<V>(rows + i * pitch, columns) : V::no_bits();
    V::pack(row, packed);
  }
}

// The same for many, of whom more at a time meet rows that are packed beforehand; the next columns end at `to`.
template <class V>
void summed_packed(typename V::Unit const* hidden, int64_t pitch, int64_t neurons, Rows const& down, int64_t count,
                   int64_t from, int64_t end, int64_t to, float* sums, int64_t sums_pitch, Bf16Bits* packed) {
  constexpr int64_t kValues = V::kValues;
  int64_t const strips = (end - from + kValues - 1) / kValues, blocks = (count + V::kSumTokens - 1) / V::kSumTokens;
  for (int64_t i = 0; i == 0 || i < neurons; i += kTileDepth) {
    int64_t const depth = std::min(kTileDepth, neurons - i), after = i + depth;
    int64_t const units = (depth + V::kUnit - 1) / V::kUnit, strip = units * V::kUnit * kValues;
    for (int64_t s = 0; s < strips; ++s)
      pack<V>(down.row(i) + from + s * kValues, down.pitch, depth, std::min(kValues, end - from - s * kValues),
              packed + s * strip);
    Ahead ahead = after < neurons ? Ahead(down.row(after) + from, down.pitch, end - from,
                                          std::min(kTileDepth, neurons - after), strips * blocks * units)
                                  : Ahead(down.data + end, down.pitch, std::min(end - from, to - end),
                                          end < to ? std::min(kTileDepth, neurons) : 0, strips * blocks * units);
    for (int64_t s = 0; s < strips; ++s)
      in_blocks<V::kSumTokens>(count, [&]<int Tokens>(int64_t t) {
        sum_tile<V, Tokens>(packed + s * strip, units, hidden + t * pitch + i / V::kUnit, pitch,
                            sums + t * sums_pitch + s * kValues, sums_pitch, i == 0, ahead);
      });
  }
}

template <class V>
void all_outputs(void const* hidden, int64_t pitch, int64_t neurons, Rows const& down, Bf16Bits const* bias,
                 int64_t count, int64_t from, int64_t to, Bf16Bits* y, int64_t y_pitch, float* sums, Bf16Bits* packed) {
  constexpr int64_t kValues = V::kValues;
  OutputPanel const shape(count);
  auto const* const values = static_cast<typename V::Unit const*>(hidden);
  for (int64_t panel = from; panel < to; panel += shape.columns) {
    int64_t const end = std::min(panel + shape.columns, to);
    if (shape.packed)
      summed_packed<V>(values, pitch / V::kUnit, neurons, down, count, panel, end, to, sums, shape.pitch(), packed);
    else
      summed_rows<V>(values, pitch / V::kUnit, neurons, down, count, panel, end, sums, shape.pitch());
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = panel; c < end; c += kValues) {
        int64_t const here = std::min<int64_t>(kValues, end - c);
        float const* const sum = sums + t * shape.pitch() + (c - panel);
        auto first = V::load(sum), second = V::load(sum + kValues / 2);
        if (bias) {
          typename V::Floats added[2];
          V::columns(some_bits<V>(bias + c, here), added);
          first = V::add(first, added[0]);
          second = V::add(second, added[1]);
        }
        store_some<V>(y + t * y_pitch + c, V::of_columns(first, second), here);
      }
  }
}

// Values as hidden ones, zeros where their magnitude is not above `limit`.
template <class V>
void spread(Rows const& values, int64_t width, int limit, int64_t from, int64_t to, void* hidden, int64_t pitch) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t i = 0; i < width; i += V::kValues) {
      Bf16Bits part[V::kValues] = {};
      int64_t const here = std::min<int64_t>(V::kValues, width - i);
      for (int64_t k = 0; k < here; ++k) {
        Bf16Bits const bits = values.row(t)[i + k];
        part[k] = (bits & kMagnitude) > limit ? bits : Bf16Bits(0);
      }
      auto const bits = V::bits(part);
      V::store_hidden(hidden, t * pitch + i, V::in_order(bits, 0), V::in_order(bits, 1));
    }
}

template <class V>
constexpr MlpFunctions mlp_functions() {
  return {active, hidden<V>, outputs<V>, all_hidden<V>, spread<V>, all_outputs<V>, V::kHiddenBytes};
}

}  // namespace
}  // namespace spense::cpu
