// Tiles of bf16 pairs (AMX-BF16): Sapphire Rapids and later. Weights are widened into the first-level cache as tiles
// [pair of columns][16 rows][2], zeros written out, and meet tiles of 16 tokens. A token's sums are its own row of a
// tile and columns come in their order, so its bits depend neither on its company nor on where zeros are written out.
#include "linear/cpu/amx.h"
#include <immintrin.h>
#include "linear/cpu/rows.h"
#include "linear/cpu/widen_bf16.h"

namespace spense::cpu {
namespace {

constexpr int kTileColumns = 32;  // of x in one tile
constexpr int kTile = 512;        // its values: 16 tokens or pairs of columns
constexpr int kChunk = 1024;      // columns that are widened at a time, for many tokens
constexpr int kStrips = 16;       // that share a chunk of x in the second-level cache
constexpr int kMany = 512;        // tokens of it

// Tiles 0 to 3: sums of (first, second 16 tokens) x (first, second strip); 4 and 5: tokens; 6 and 7: weights.
constexpr std::array<int, 8> rows_of_tiles(int first, int second) {
  return {first, first, second, second, first, second, 16, 16};
}

// Tiles of columns [from, to) of a strip; the last is filled up with zeros.
template <class W>
void widen_tiles(StepWidener<W> const& widen, Strip const& s, int64_t from, int64_t to, Bf16* out) {
  auto* pairs = reinterpret_cast<__m512i*>(out);
  for (int64_t c = from; c < to; c += kStep, pairs += 8) {
    __m512i step[8];
    widen(s, c, step);
    for (int i = 0; i < 8; ++i) pairs[i] = step[i];
  }
  if ((to - from) % kTileColumns)
    for (int i = 0; i < 8; ++i) pairs[i] = _mm512_setzero_si512();
}

// Adds `tiles` tiles of columns to the sums of 16 or 32 tokens and one or two strips.
template <int Strips, int Blocks>
void multiply(Bf16 const* x, int64_t pitch, Bf16 const* weight, int64_t next_strip, int64_t tiles) {
  for (; tiles; --tiles, x += kTile, weight += kTile) {
    _tile_loadd(6, weight, 64);
    if constexpr (Strips == 2) _tile_loadd(7, weight + next_strip, 64);
    _tile_loadd(4, x, 64);
    if constexpr (Blocks == 2) _tile_loadd(5, x + 16 * pitch, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Strips == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (Blocks == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (Strips == 2 && Blocks == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int Strips, int Blocks>
void load(float const* out, int64_t next_strip, int64_t next_block) {
  _tile_loadd(0, out, 64);
  if constexpr (Strips == 2) _tile_loadd(1, out + next_strip, 64);
  if constexpr (Blocks == 2) _tile_loadd(2, out + next_block, 64);
  if constexpr (Strips == 2 && Blocks == 2) _tile_loadd(3, out + next_block + next_strip, 64);
}

template <int Strips, int Blocks>
void store(float* out, int64_t next_strip, int64_t next_block) {
  _tile_stored(0, out, 64);
  if constexpr (Strips == 2) _tile_stored(1, out + next_strip, 64);
  if constexpr (Blocks == 2) _tile_stored(2, out + next_block, 64);
  if constexpr (Strips == 2 && Blocks == 2) _tile_stored(3, out + next_block + next_strip, 64);
}

// Up to 32 tokens: sums stay in tiles. A tile of weights is multiplied when the next ones are widened: what has just
// been written cannot be loaded as a tile at once.
template <class W, int Strips, int Blocks>
void few(StepWidener<W> const& widen, Strip const* strips, Bf16 const* x, int64_t pitch, float* out, int64_t next) {
  constexpr int kRing = 4, kBehind = 2;
  alignas(64) Bf16 weight[kRing][Strips][kTile];
  int64_t const in = strips[0].in, tiles = (in + kTileColumns - 1) / kTileColumns;
  clear();
  for (int64_t i = 0; i < tiles + kBehind; ++i) {
    int64_t const c = i * kTileColumns;
    for (int s = 0; i < tiles && s < Strips; ++s)
      widen_tiles(widen, strips[s], c, std::min<int64_t>(c + kTileColumns, in), weight[i % kRing][s]);
    written(weight);
    if (i >= kBehind)
      multiply<Strips, Blocks>(x + (i - kBehind) * kTile, pitch, weight[(i - kBehind) % kRing][0], kTile, 1);
  }
  store<Strips, Blocks>(out, next, 16 * kRows);
}

// Many tokens: a chunk of columns of two strips is widened, then all tokens go over it.
template <class W, int Strips>
void many(StepWidener<W> const& widen, Strip const* strips, int64_t c, Bf16 const* x, int64_t pitch, int tokens,
          float* out, float* rest) {
  alignas(64) Bf16 weight[Strips][kChunk / kTileColumns * kTile];
  int64_t const to = std::min<int64_t>(c + kChunk, strips[0].in), tiles = (to - c + kTileColumns - 1) / kTileColumns;
  constexpr int64_t kNext = kChunk / kTileColumns * kTile;
  for (int s = 0; s < Strips; ++s) widen_tiles(widen, strips[s], c, to, weight[s]);
  written(weight);
  int const next = tokens * kRows;
  int t = 0;
  auto const go = [&]<int Blocks>(float* sums, int64_t next_strip) {
    c ? load<Strips, Blocks>(sums, next_strip, 16 * kRows) : clear();
    multiply<Strips, Blocks>(x + t * pitch + c * 16, pitch, weight[0], kNext, tiles);
    store<Strips, Blocks>(sums, next_strip, 16 * kRows);
  };
  for (; t + 32 <= tokens; t += 32) go.template operator()<2>(out + t * kRows, next);
  if (t + 16 <= tokens) {
    go.template operator()<1>(out + t * kRows, next);
    t += 16;
  }
  if (t < tokens) go.template operator()<1>(rest, 16 * kRows);  // a whole tile where the strips have no room for one
}

template <class W>
void strips(Strip const* strips, int count, void const* values, int64_t pitch, int tokens, float* out) {
  auto const* x = static_cast<Bf16 const*>(values);
  int const next = tokens * kRows;
  if (tokens <= 32) {
    Tiles const configured(rows_of_tiles(std::min(tokens, 16), tokens > 16 ? tokens - 16 : 16));
    StepWidener<W> const widen;
    for (int s = 0; s < count; s += 2) {
      auto const run =
          s + 1 < count ? (tokens <= 16 ? few<W, 2, 1> : few<W, 2, 2>) : (tokens <= 16 ? few<W, 1, 1> : few<W, 1, 2>);
      run(widen, strips + s, x, pitch, out + s * next, next);
    }
    return;
  }
  Tiles const configured(rows_of_tiles(16, 16));
  StepWidener<W> const widen;
  alignas(64) float rest[kStrips][16 * kRows];
  for (int64_t c = 0; c < strips[0].in; c += kChunk)
    for (int s = 0; s < count; s += 2)
      (s + 1 < count ? many<W, 2> : many<W, 1>)(widen, strips + s, c, x, pitch, tokens, out + s * next, rest[s]);
  int const whole = tokens / 16 * 16;
  for (int s = 0; s < count; ++s) std::copy_n(rest[s], (tokens - whole) * kRows, out + s * next + whole * kRows);
}

}  // namespace

constinit Functions const fp8_amx = {Fp8::kBits,  sizeof(Bf16),         kStrips, kMany, quantize<Bf16, 16>,
                                     strips<Fp8>, finish<Fp8::kSumUnit>};

}  // namespace spense::cpu
