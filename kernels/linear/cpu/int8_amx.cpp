// int8 with tiles (AMX-INT8): Sapphire Rapids and later. Dense weights are tiles as they lie in memory, 2:4 becomes
// dense in the cache. Few tokens take AVX-512 VNNI. Needs amx_permitted().
#include "linear/cpu/amx.h"
#include "linear/cpu/int8_avx512.h"

namespace spense::cpu {
namespace {

constexpr int kTileRows = 16, kTileBytes = 1024;
constexpr int kTileColumns = 64;  // of x and of weights, that one instruction multiplies
constexpr int kVnniUpTo = 8;      // tokens; more are faster with tiles
constexpr int kSumsPitch = 4 * kRows;
constexpr int64_t kTileDepth = 1024;  // columns that all tokens pass over, from the cache

// Tiles 0 to 3 are sums of two tiles of tokens by two strips, 4 and 5 weights, 6 and 7 x.
constexpr std::array<int, 8> rows_of_tiles(int tokens) {
  return {tokens, tokens, tokens, tokens, kTileRows, kTileRows, tokens, tokens};
}

// x, and its tiles of up to 16 tokens. The last one overlaps the one before rather than to be smaller.
struct Tokens {
  uint8_t const* x;
  int64_t pitch;
  int count;
  int tiles() const { return (count + kTileRows - 1) / kTileRows; }
  int first(int tile) const { return std::max(std::min(tile * kTileRows, count - kTileRows), 0); }
  uint8_t const* tile(int i, int64_t column) const { return x + first(i) * pitch + column; }
};

struct alignas(64) TileSums {
  int32_t of[2][kTokens / kTileRows][kTileRows * kRows];  // [strip][tile of tokens][token][row]
};

template <int Tiles, int Strips>
void load_sums(TileSums const& sums, int tile) {
  _tile_loadd(0, sums.of[0][tile], kSumsPitch);
  if constexpr (Tiles == 2) _tile_loadd(1, sums.of[0][tile + 1], kSumsPitch);
  if constexpr (Strips == 2) _tile_loadd(2, sums.of[1][tile], kSumsPitch);
  if constexpr (Tiles * Strips == 4) _tile_loadd(3, sums.of[1][tile + 1], kSumsPitch);
}

template <int Tiles, int Strips>
void store_sums(TileSums& sums, int tile) {
  _tile_stored(0, sums.of[0][tile], kSumsPitch);
  if constexpr (Tiles == 2) _tile_stored(1, sums.of[0][tile + 1], kSumsPitch);
  if constexpr (Strips == 2) _tile_stored(2, sums.of[1][tile], kSumsPitch);
  if constexpr (Tiles * Strips == 4) _tile_stored(3, sums.of[1][tile + 1], kSumsPitch);
}

// `steps` times 64 columns from `column` of x on, for some tiles of tokens; weights(strip, step) is where they lie.
template <int Tiles, int Strips, class Weights>
void multiply(Weights const& weights, int64_t steps, Tokens const& x, int64_t column, int tile, TileSums& sums) {
  written(&sums);
  load_sums<Tiles, Strips>(sums, tile);
  uint8_t const *first = x.tile(tile, column), *second = x.tile(tile + Tiles - 1, column);
  for (int64_t step = 0; step < steps; ++step, first += kTileColumns, second += kTileColumns) {
    uint8_t const* const tiles[2] = {weights(0, step), Strips == 2 ? weights(1, step) : nullptr};
    written(tiles[0]);
    _tile_loadd(4, tiles[0], kFour);
    _tile_loadd(6, first, x.pitch);
    _tile_dpbusd(0, 6, 4);
    if constexpr (Tiles == 2) {
      _tile_loadd(7, second, x.pitch);
      _tile_dpbusd(1, 7, 4);
    }
    if constexpr (Strips == 1) continue;
    _tile_loadd(5, tiles[1], kFour);
    _tile_dpbusd(2, 6, 5);
    if constexpr (Tiles == 2) _tile_dpbusd(3, 7, 5);
  }
  store_sums<Tiles, Strips>(sums, tile);
}

// All tokens over some columns. The first tiles take weights from `prepare`, the others where it has left them.
template <int Strips, class Prepare, class Ready>
void multiply_all(Prepare const& prepare, Ready const& ready, int64_t steps, Tokens const& x, int64_t column,
                  TileSums& sums) {
  for (int tile = 0; tile < x.tiles(); tile += 2) {
    auto const run = [&](auto const& weights) {
      tile + 1 < x.tiles() ? multiply<2, Strips>(weights, steps, x, column, tile, sums)
                           : multiply<1, Strips>(weights, steps, x, column, tile, sums);
    };
    tile ? run(ready) : run(prepare);
  }
}

// By metadata nibble: which of (first, second) each of four columns gets; 0x80: zero.
struct ScatterTable {
  alignas(64) uint8_t byte[16][4];
  constexpr ScatterTable() : byte{} {
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (uint8_t& b : byte[nibble]) b = 0x80;
      for (int i = 0; i < 2; ++i) byte[nibble][nibble >> 2 * i & 3] = uint8_t(i);
    }
  }
};
constexpr ScatterTable scatter_table;

// The weights of eight columns as [2 groups of four][row][column].
void write_out(uint8_t const* values, uint8_t const* meta, uint8_t* to) {
  __m512i const table = _mm512_load_si512(&scatter_table), kept = _mm512_loadu_si512(values),
                m = Avx512Vnni::metadata(meta);
  __m512i const row = _mm512_broadcast_i32x4(_mm_set_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
  __m512i const even = _mm512_or_si512(_mm512_permutexvar_epi32(m, table), row);
  __m512i const odd = _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(m, 4), table),
                                      _mm512_or_si512(row, _mm512_set1_epi8(2)));
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(kept, even));
  _mm512_storeu_si512(to + kFour, _mm512_shuffle_epi8(kept, odd));
}

// The weights of 64 columns, or of the last ones with zeros behind them, as a tile; their sums go to the totals.
struct Sparse {
  static uint8_t const* tile(Strip const& s, int64_t column, int64_t columns, uint8_t* to, __m512i& total) {
    uint8_t const *values = s.values + column / 8 * kFour, *meta = s.meta + column / 8 * kRows;
    Totals<Avx512Vnni> totals;
    __builtin_prefetch(meta + kAhead / 4);
    __builtin_prefetch(meta + kAhead / 4 + 64);
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns / 8; ++i, values += kFour, meta += kRows) {
      __builtin_prefetch(values + kAhead);
      totals.add(i, values);
      write_out(values, meta, to + 2 * i * kFour);
    }
    total = _mm512_add_epi32(total, totals.all().v);
    return to;
  }
};
struct Dense {
  static uint8_t const* tile(Strip const& s, int64_t column, int64_t columns, uint8_t* to, __m512i& total) {
    uint8_t const* const dense = s.dense + column / 4 * kFour;
    Totals<Avx512Vnni> totals;
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns / 4; ++i) {
      __builtin_prefetch(dense + i * kFour + kAhead);
      totals.add(i, dense + i * kFour);
    }
    total = _mm512_add_epi32(total, totals.all().v);
    if (columns == kTileColumns) return dense;
    std::memcpy(to, dense, size_t(columns / 4 * kFour));
    return to;
  }
};

// One region of all strips for all tokens.
template <int Strips, class Region>
void multiply_region(Strip const* strips, int64_t columns, Tokens const& x, int64_t at, TileSums& sums,
                     __m512i* totals) {
  alignas(64) uint8_t written[Strips][kTileDepth * kRows];
  for (int64_t c = 0; c + kTileColumns <= columns; c += kTileDepth) {
    auto const prepare = [&](int s, int64_t step) {
      return Region::tile(strips[s], c + step * kTileColumns, kTileColumns, written[s] + step * kTileBytes, totals[s]);
    };
    auto const ready = [&](int s, int64_t step) {
      uint8_t const* const dense = strips[s].dense + c / 4 * kFour;
      return (std::is_same_v<Region, Dense> ? dense : written[s]) + step * kTileBytes;
    };
    multiply_all<Strips>(prepare, ready, std::min(kTileDepth, columns - c) / kTileColumns, x, at + c, sums);
  }
  int64_t const rest = columns % kTileColumns, whole = columns - rest;
  if (!rest) return;
  alignas(64) uint8_t last_x[kTokens * kTileColumns];
  __mmask64 const there = (uint64_t(1) << rest) - 1;
  for (int t = 0; t < x.count; ++t)
    _mm512_store_si512(last_x + t * kTileColumns, _mm512_maskz_loadu_epi8(there, x.x + t * x.pitch + at + whole));
  for (int s = 0; s < Strips; ++s) {
    std::memset(written[s], 0, kTileBytes);
    Region::tile(strips[s], whole, rest, written[s], totals[s]);
  }
  auto const ready = [&](int s, int64_t) { return written[s]; };
  multiply_all<Strips>(ready, ready, 1, {last_x, kTileColumns, x.count}, 0, sums);
}

template <int Strips>
void with_tiles(Strip const* strips, Tokens const& x, float* out) {
  TileSums sums;
  for (int s = 0; s < Strips; ++s) std::memset(sums.of[s], 0, size_t(x.tiles()) * kTileBytes);
  __m512i totals[Strips] = {};
  {
    Tiles const configured(rows_of_tiles(std::min(x.count, kTileRows)));
    multiply_region<Strips, Sparse>(strips, strips[0].sparse, x, 0, sums, totals);
    multiply_region<Strips, Dense>(strips, strips[0].in - strips[0].dense_from, x, strips[0].dense_from, sums, totals);
  }
  for (int s = 0; s < Strips; ++s)
    for (int t = 0; t < x.count; ++t, out += kRows) {
      int const tile = t / kTileRows;
      __m512i const sum = _mm512_load_si512(sums.of[s][tile] + (t - x.first(tile)) * kRows);
      _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, totals[s])));
    }
}

void strips_amx(Strip const* strips, int count, void const* values, int64_t pitch, int tokens, float* out) {
  if (tokens <= kVnniUpTo) return spense::cpu::strips<Avx512Vnni>(strips, count, values, pitch, tokens, out);
  Tokens const x{static_cast<uint8_t const*>(values), pitch, tokens};
  count == 2 ? with_tiles<2>(strips, x, out) : with_tiles<1>(strips, x, out);
}

}  // namespace

constinit Functions const int8_amx = {8, 1, 2, kTokens, quantize_int8<Avx512Vnni::kOffset>, strips_amx, finish};

}  // namespace spense::cpu
