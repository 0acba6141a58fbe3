// Strips of int8 weights for any number of tokens, over a vector type V (see int8_avx2.cpp): included once per
// instruction set, in a file that is compiled for it. Sums are exact in int32 for up to 2^31 / 127^2 = 133,000 columns,
// so their order is free.
#pragma once
#include <array>
#include <utility>
#include "linear/cpu/int8.h"
#include "linear/cpu/int8_rows.h"

namespace spense::cpu {
namespace {

// Bytes of a strip: four columns of dense weights, or the kept values of eight; metadata of eight columns.
constexpr int kFour = kUnit * kRows;

// Some columns of V::kLanes rows of a strip.
struct Piece {
  uint8_t const *values, *meta, *dense;
  int64_t sparse, sparse_at;  // columns, and the first one's place in x
  int64_t dense_columns, dense_at;
  int32_t const* totals;  // V::kOffset times the sum of each row's weights, where it is known
};

// Columns [from, to) of a strip.
inline Piece piece(Strip const& s, int64_t from, int64_t to) {
  int64_t const sparse = std::max<int64_t>(std::min(to, s.sparse) - from, 0);
  int64_t const dense_at = std::min(std::max(from, s.dense_from), to);
  return {s.values + from / 8 * kFour,
          s.meta + from / 8 * kRows,
          s.dense + (dense_at - std::min(s.dense_from, dense_at)) / 4 * kFour,
          sparse,
          from,
          to - dense_at,
          dense_at,
          nullptr};
}

// The registers of one pass over weights. With few sums, an addition would wait for the one before: so there are more.
template <class V, int Units, int Tokens>
struct Sums {
  static constexpr int kChains = Units * Tokens >= 8 ? 1 : Units * Tokens >= 4 ? 2 : 4;
  V sum[kChains][Tokens][Units], total[Units];
  Sums() {
#pragma GCC unroll 4
    for (auto& chain : sum)
#pragma GCC unroll 24
      for (auto& token : chain)
#pragma GCC unroll 2
        for (V& v : token) v = V::zero();
#pragma GCC unroll 2
    for (V& v : total) v = V::zero();
  }
};

// Adds pieces times x [Tokens, pitch] to sums [unit][token] of V::kLanes. Units are pieces of the same columns: rows of
// two strips, or of one that takes two vectors. Ready: metadata is controls and totals are known (see Chunk); else
// units are rows of one strip, whose weights come from memory.
template <class V, int Units, int Tokens, bool Ready>
void add(Piece const* p, uint8_t const* x, int64_t pitch, int32_t* sums, int64_t next_unit) {
  Sums<V, Units, Tokens> s;
  constexpr int kChains = Sums<V, Units, Tokens>::kChains;
  auto const add_total = [&](int u, typename V::Weights w) {
    if constexpr (!Ready && V::kOffset) s.total[u] = V::dot(s.total[u], w, V::repeated(V::kOffset));
  };
  for (int64_t c = 0; c < p[0].sparse; c += kStep) {
    if (!Ready) __builtin_prefetch(p[0].meta + c / 8 * kRows + kAhead / 4);
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g) {
      int64_t const at = c / 8 + g;
      if (!Ready) __builtin_prefetch(p[0].values + at * kFour + kAhead);
      typename V::Weights w[Units];
      V controls[Units];
#pragma GCC unroll 2
      for (int u = 0; u < Units; ++u) {
        add_total(u, w[u] = V::weights(p[u].values + at * kFour));
        controls[u] = Ready ? V::load(p[u].meta + at * kFour) : V::controls(p[u].meta + at * kRows);
      }
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        V const eight = V::eight(x + p[0].sparse_at + t * pitch + c + 8 * g);
#pragma GCC unroll 2
        for (int u = 0; u < Units; ++u) {
          V& sum = s.sum[g % kChains][t][u];
          sum = V::dot(sum, w[u], V::permuted(eight, controls[u]));
        }
      }
    }
  }
  for (int64_t c = 0; c < p[0].dense_columns; c += kStep)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      int64_t const at = c / 4 + g;
      if (!Ready) __builtin_prefetch(p[0].dense + at * kFour + kAhead);
      typename V::Weights w[Units];
#pragma GCC unroll 2
      for (int u = 0; u < Units; ++u) add_total(u, w[u] = V::weights(p[u].dense + at * kFour));
#pragma GCC unroll 24
      for (int t = 0; t < Tokens; ++t) {
        V const four = V::four(x + p[0].dense_at + t * pitch + c + 4 * g);
#pragma GCC unroll 2
        for (int u = 0; u < Units; ++u) {
          V& sum = s.sum[g % kChains][t][u];
          sum = V::dot(sum, w[u], four);
        }
      }
    }
#pragma GCC unroll 24
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int u = 0; u < Units; ++u) {
      int32_t* const to = sums + u * next_unit + t * kRows;
      V sum = s.sum[0][t][u];
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) sum = V::plus(sum, s.sum[i][t][u]);
      if constexpr (V::kOffset != 0) sum = V::minus(sum, Ready ? V::load(p[u].totals) : s.total[u]);
      V::store(to, V::plus(V::load(to), sum));
    }
}

// All tokens in blocks of nearly the same size, at most Most.
template <class V, int Units, int Most, bool Ready>
void add_blocks(Piece const* pieces, uint8_t const* x, int64_t pitch, int tokens, int32_t* sums, int64_t next_unit) {
  constexpr auto kBySize = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array{add<V, Units, I + 1, Ready>...};
  }(std::make_integer_sequence<int, Most>{});
  for (int blocks = (tokens + Most - 1) / Most; blocks; --blocks) {
    int const here = (tokens + blocks - 1) / blocks;
    kBySize[size_t(here - 1)](pieces, x, pitch, sums, next_unit);
    tokens -= here;
    x += here * pitch;
    sums += here * kRows;
  }
}

template <class V>
constexpr int kVectors = kRows / V::kLanes;  // of a strip

// Vector v of a strip's rows.
template <class V>
Piece rows_of(Piece p, int v) {
  int const bytes = v * 4 * V::kLanes;
  p.values += bytes;
  p.dense += bytes;
  p.meta += v * V::kLanes;
  return p;
}

// Few tokens: straight from the compressed weights. Where the sums of a strip's two vectors have no room, metadata
// would be read for fewer tokens at a time: so the second vector follows when the first is done, from the cache.
template <class V>
void few(Strip const& s, uint8_t const* x, int64_t pitch, int tokens, int32_t* sums) {
  Piece pieces[kVectors<V>];
  for (int v = 0; v < kVectors<V>; ++v) pieces[v] = rows_of<V>(piece(s, 0, s.in), v);
  if (tokens <= V::kTogether)
    return add_blocks<V, kVectors<V>, V::kTogether, false>(pieces, x, pitch, tokens, sums, V::kLanes);
  for (int v = 0; v < kVectors<V>; ++v)
    add_blocks<V, 1, V::kFewBlock, false>(pieces + v, x, pitch, tokens, sums + v * V::kLanes, 0);
}

// V::kOffset times the sums of rows' weights, in chains that do not wait for each other.
template <class V>
struct Totals {
  static constexpr int kChains = 4;
  V sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  void add(int64_t i, uint8_t const* weights) {
    if constexpr (V::kOffset != 0)
      sum[i % kChains] = V::dot(sum[i % kChains], V::weights(weights), V::repeated(V::kOffset));
  }
  V all() const { return V::plus(V::plus(sum[0], sum[1]), V::plus(sum[2], sum[3])); }
};

// What many tokens share of some columns of a strip: the controls of its metadata, and the totals.
template <class V>
struct Chunk {
  alignas(64) uint8_t controls[kRows / 2 * V::kDepth];
  alignas(64) int32_t totals[kRows];

  Piece prepared(Piece p) {
    for (int v = 0; v < kVectors<V>; ++v) {
      Piece const rows = rows_of<V>(p, v);
      uint8_t* const to = controls + v * 4 * V::kLanes;
      Totals<V> total;
#pragma GCC unroll 4
      for (int64_t i = 0; i < p.sparse / 8; ++i) {
        __builtin_prefetch(rows.values + i * kFour + kAhead);
        if (i % 4 == 0) __builtin_prefetch(rows.meta + i * kRows + kAhead / 4);
        total.add(i, rows.values + i * kFour);
        V::store(to + i * kFour, V::controls(rows.meta + i * kRows));
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < p.dense_columns / 4; ++i) {
        __builtin_prefetch(rows.dense + i * kFour + kAhead);
        total.add(i, rows.dense + i * kFour);
      }
      V::store(totals + v * V::kLanes, total.all());
    }
    p.meta = controls;
    p.totals = totals;
    return p;
  }
};

// Many tokens: V::kDepth columns are prepared at a time, then all tokens pass over them.
template <class V, int Strips>
void many(Strip const* strips, uint8_t const* x, int64_t pitch, int tokens, int32_t* sums) {
  Chunk<V> chunks[Strips];
  for (int64_t c = 0; c < strips[0].in; c += V::kDepth) {
    int64_t const to = std::min(c + V::kDepth, strips[0].in);
    Piece pieces[Strips];
    for (int s = 0; s < Strips; ++s) pieces[s] = chunks[s].prepared(piece(strips[s], c, to));
    if constexpr (kVectors<V> == 1) {
      add_blocks<V, Strips, V::kManyBlock, true>(pieces, x, pitch, tokens, sums, tokens * kRows);
    } else {
      for (int s = 0; s < Strips; ++s)
        for (int v = 0; v < kVectors<V>; ++v) {
          Piece rows = rows_of<V>(pieces[s], v);
          rows.meta = pieces[s].meta + v * 4 * V::kLanes;  // controls are as large as values
          rows.totals += v * V::kLanes;
          add_blocks<V, 1, V::kManyBlock, true>(&rows, x, pitch, tokens, sums + s * tokens * kRows + v * V::kLanes, 0);
        }
    }
  }
}

template <class V>
void int8_strips(Strip const* strips, int count, void const* values, int64_t pitch, int tokens, void* out) {
  auto const* x = static_cast<uint8_t const*>(values);
  auto* const sums = static_cast<int32_t*>(out);
  int const here = tokens * kRows;
  std::fill(sums, sums + count * here, 0);
  if (tokens <= V::kFew) {
    for (int s = 0; s < count; ++s) few<V>(strips[s], x, pitch, tokens, sums + s * here);
  } else {
    for (int s = 0; s < count; s += 2)
      s + 1 < count ? many<V, 2>(strips + s, x, pitch, tokens, sums + s * here)
                    : many<V, 1>(strips + s, x, pitch, tokens, sums + s * here);
  }
}

template <class V>
constexpr Functions int8_functions() {
  return {8, 1, kAbreast, kTokens, quantize_int8<V::kOffset>, int8_strips<V>, finish<int32_t>};
}

}  // namespace
}  // namespace spense::cpu
