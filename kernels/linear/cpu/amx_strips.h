// Strips for any number of tokens with tiles, over a codec K of the weights (see amx.cpp): weights become dense in the
// cache as tiles of 16 rows, zeros written out, and meet tiles of 16 tokens. A token's sums are its own row of a tile
// and columns come in their order, so its bits depend neither on its company nor on where zeros are written out.
#pragma once
#include <algorithm>
#include "linear/cpu/amx.h"
#include "linear/cpu/kernels.h"

namespace spense::cpu {
namespace {

constexpr int kSide = 16;         // tokens side by side: the rows of a tile of x
constexpr int kTileBytes = 1024;  // 16 lines of 64
constexpr int kTileSums = kSide * kRows;
constexpr int kSteps = 9;    // tiles of columns that many tokens pass over: with x more would not fit in the cache
constexpr int kStrips = 16;  // that share these columns of x, from the second-level cache
constexpr int kBehind = 2;   // tiles: what has just been written cannot be loaded as a tile at once

// Tiles 0 to 3: sums of (first, second 16 tokens) x (first, second strip); 4 and 5: tokens; 6 and 7: weights.
constexpr std::array<int, 8> rows_of_tiles(int tokens) {
  return {tokens, tokens, kSide, kSide, tokens, kSide, kRows, kRows};
}

// Where sums of (first, second 16 tokens) lie, and how far behind them those of the next strip.
template <class Sum>
struct TileSums {
  Sum* block[2];
  int64_t next[2];
};

template <int Strips, int Blocks, class Sum>
void load(TileSums<Sum> const& sums) {
  written(sums.block[0]);
  _tile_loadd(0, sums.block[0], 64);
  if constexpr (Strips == 2) _tile_loadd(1, sums.block[0] + sums.next[0], 64);
  if constexpr (Blocks == 2) _tile_loadd(2, sums.block[1], 64);
  if constexpr (Strips * Blocks == 4) _tile_loadd(3, sums.block[1] + sums.next[1], 64);
}

template <int Strips, int Blocks, class Sum>
void store(TileSums<Sum> const& sums) {
  _tile_stored(0, sums.block[0], 64);
  if constexpr (Strips == 2) _tile_stored(1, sums.block[0] + sums.next[0], 64);
  if constexpr (Blocks == 2) _tile_stored(2, sums.block[1], 64);
  if constexpr (Strips * Blocks == 4) _tile_stored(3, sums.block[1] + sums.next[1], 64);
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// x of 16 or 32 tokens times a tile of each strip.
template <class K, int Strips, int Blocks>
void multiply(uint8_t const* x, int64_t next_block, uint8_t const* const* weights) {
  _tile_loadd(6, weights[0], 64);
  _tile_loadd(4, x, 64);
  K::template product<0>();
  if constexpr (Blocks == 2) {
    _tile_loadd(5, x + next_block, 64);
    K::template product<2>();
  }
  if constexpr (Strips == 1) return;
  _tile_loadd(7, weights[1], 64);
  K::template product<1>();
  if constexpr (Blocks == 2) K::template product<3>();
}

// Some tiles of columns of one or two strips: up to kSteps, or any number if there is one pass over them.
// pitch: bytes of a token.
template <class K, int Strips>
class Columns {
  using Sum = typename K::Sum;
  using Source = typename K::Source;

 public:
  // add: to the sums that are there.
  Columns(K const& codec, Source const* strips, int64_t first, int64_t count, bool add)
      : codec_(codec), strips_(strips), first_(first), count_(count), add_(add) {}

  // Adds them times x of all tokens. The last sums go to `rest` where they do not fill tiles.
  void add_all(uint8_t const* x, int64_t pitch, int tokens, Sum* out, Sum* rest) {
    x += first_ * kTileBytes;
    auto const sums_at = [&](int token) {
      bool const whole = token + kSide <= tokens;
      return whole ? std::pair{out + token * kRows, int64_t(tokens) * kRows} : std::pair{rest, int64_t(kTileSums)};
    };
    for (int t = 0; t < tokens; t += 2 * kSide) {
      auto const first = sums_at(t), second = sums_at(t + kSide);
      TileSums<Sum> const sums{{first.first, second.first}, {first.second, second.second}};
      auto const go = [&]<int Blocks> {
        t ? add<Blocks, false>(x + t * pitch, pitch, sums) : add<Blocks, true>(x + t * pitch, pitch, sums);
      };
      t + kSide < tokens ? go.template operator()<2>() : go.template operator()<1>();
    }
  }

 private:
  // For 16 or 32 tokens. First: the weights' tiles are made meanwhile.
  template <int Blocks, bool First>
  void add(uint8_t const* x, int64_t pitch, TileSums<Sum> const& sums) {
    add_ ? load<Strips, Blocks>(sums) : clear();
    for (int64_t i = 0, ready = 0; ready < count_; ++i) {
      if (First && i < count_) make(i);
      if (First && i < kBehind) continue;
      multiply<K, Strips, Blocks>(x, kSide * pitch, tiles_[ready++ % kSteps]);
      x += kTileBytes;
    }
    store<Strips, Blocks>(sums);
  }

  void make(int64_t i) {
    for (int s = 0; s < Strips; ++s)
      tiles_[i % kSteps][s] = codec_.tile(strips_[s], (first_ + i) * K::kColumns, own_[i % kSteps][s], Strips);
    written(own_);
  }

  K const& codec_;
  Source const* strips_;
  int64_t first_, count_;
  bool add_;
  alignas(64) uint8_t own_[kSteps][Strips][kTileBytes];
  uint8_t const* tiles_[kSteps][Strips];
};

// Functions::strips. x: tokens side by side; its rows up to the next multiple of 16 are read. `add`: to the sums in
// `out`.
template <class K>
void strips_amx(K const& codec, typename K::Source const* strips, int count, uint8_t const* x, int64_t pitch,
                int tokens, typename K::Sum* out, bool add = false) {
  alignas(64) typename K::Sum rest[kStrips][kTileSums];
  int64_t const next = tokens * kRows, tiles = (K::columns(strips[0]) + K::kColumns - 1) / K::kColumns;
  int64_t const parts = tokens <= 2 * kSide ? 1 : (tiles + kSteps - 1) / kSteps;
  int const last = tokens % kSide, whole = tokens - last;
  for (int s = 0; add && s < count; ++s) std::copy_n(out + s * next + whole * kRows, last * kRows, rest[s]);
  Tiles const configured(rows_of_tiles(std::min(tokens, kSide)));
  for (int64_t part = 0; part < parts; ++part, add = true) {
    int64_t const first = tiles * part / parts, here = tiles * (part + 1) / parts - first;
    for (int s = 0; s < count; s += 2)
      if (s + 1 < count)
        Columns<K, 2>(codec, strips + s, first, here, add).add_all(x, pitch, tokens, out + s * next, rest[s]);
      else
        Columns<K, 1>(codec, strips + s, first, here, add).add_all(x, pitch, tokens, out + s * next, rest[s]);
  }
  for (int s = 0; s < count; ++s) std::copy_n(rest[s], last * kRows, out + s * next + whole * kRows);
}

}  // namespace
}  // namespace spense::cpu
