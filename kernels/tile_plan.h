// Which cluster computes which tile of y, in which order: arithmetic on sizes alone, the same on host and device.
//
// Rows of y fall into classes (gate's dense rows, up's dense rows, gate's sparse rows, ...). A tile is `tile_rows` rows of
// one class by `tile_tokens` tokens; with x multicast, a *group* of neighbouring row tiles is the unit of scheduling.
// Groups of dense classes cost more than those of sparse ones, so they go first (longest processing time first):
// cluster c takes heavy units c, c + C, ...; clusters that got one heavy unit fewer take `lead` light units before the
// others join. Two costs are all there are, so this closed form replaces a schedule in memory.
#pragma once
#include "spense_linear.h"

#ifdef __CUDACC__
#define SPENSE_HD __host__ __device__ __forceinline__
#define SPENSE_ROLLED _Pragma("unroll 1")   // a handful of classes: code size matters more
#else
#define SPENSE_HD inline
#define SPENSE_ROLLED
#endif

namespace spense {

constexpr int kMaxClasses = 2 * kMaxShards;
constexpr int kTokenBlock = 8;   // token tiles that run through all row groups together: both operands stay in L2

struct TileClass {
  int rows, y_row;                // rows of y, the first one
  int sparse_row, dense_row;      // first row in the stored matrices
  int sparse_stages, dense_stages;
  int x_dense;                    // first column of x that dense stages read (sparse ones start at 0)
};

struct Tile {
  int index, row_tile, token_tile;   // class (< 0: no more), row tile in the class, token tile
};

struct TilePlan {
  TileClass classes[kMaxClasses];
  int count, heavy;               // classes; the first `heavy` of them are the expensive ones
  int tile_rows, token_tiles;
  int group;                      // row tiles per unit: the cluster's CTAs under multicast, else 1
  int lead;

  SPENSE_HD int groups(int c) const {
    return ((classes[c].rows + tile_rows - 1) / tile_rows + group - 1) / group;
  }
  SPENSE_HD int groups(int first, int last) const {
    int n = 0;
    SPENSE_ROLLED for (int c = first; c < last; ++c) n += groups(c);
    return n;
  }
  SPENSE_HD int units() const { return groups(0, count) * token_tiles; }

  // The k-th unit of cluster `cluster` of `clusters`; row_tile is the group's first.
  SPENSE_HD Tile at(int k, int cluster, int clusters) const {
    int const heavy_groups = groups(0, heavy), heavy_units = heavy_groups * token_tiles;
    int const mine = heavy_units > cluster ? (heavy_units - cluster + clusters - 1) / clusters : 0;
    if (k < mine) return unit(cluster + k * clusters, 0, heavy_groups);
    k -= mine;
    int const late = heavy_units % clusters, early = clusters - late;  // late clusters have one heavy unit more
    int const ahead = late ? lead : 0;
    int id;
    if (cluster < late) id = ahead * early + k * clusters + early + cluster;
    else if (k < ahead) id = k * early + cluster - late;
    else id = ahead * early + (k - ahead) * clusters + cluster - late;
    int const light_groups = groups(heavy, count);
    if (id >= light_groups * token_tiles) return {-1, 0, 0};
    return unit(id, heavy, light_groups);
  }

 private:
  SPENSE_HD Tile unit(int id, int first, int row_groups) const {
    int const block = id / (row_groups * kTokenBlock), rest = id - block * row_groups * kTokenBlock;
    int const left = token_tiles - block * kTokenBlock, width = left < kTokenBlock ? left : kTokenBlock;
    int group_index = rest / width, c = first;
    SPENSE_ROLLED for (int n; group_index >= (n = groups(c)); ++c) group_index -= n;
    return {c, group_index * group, block * kTokenBlock + rest % width};
  }
};

// `sparse_k`: columns of W in one sparse stage (a dense stage has 128); the caller sets `lead`.
inline TilePlan make_plan(LinearArgs const& a, int tile_rows, int tile_tokens, int group, int sparse_k) {
  TilePlan p{};
  p.tile_rows = tile_rows;
  p.token_tiles = (a.tokens + tile_tokens - 1) / tile_tokens;
  p.group = group;
  int const sparse_stages = (a.sparse_cols() + sparse_k - 1) / sparse_k, dense_stages = (a.dense_cols() + 127) / 128;
  if (!a.output_split) {
    p.classes[p.count++] = {a.out_features, 0, 0, 0, sparse_stages, dense_stages, a.sparse[0]};
    p.heavy = 1;
    return p;
  }
  for (int is_sparse = 0; is_sparse < 2; ++is_sparse) {
    int y_row = 0, region_row = 0;
    for (int i = 0; i < a.shards; ++i) {
      int const rows = is_sparse ? a.sparse[i] : a.dense[i], first = y_row + (is_sparse ? 0 : a.sparse[i]);
      if (rows && is_sparse) p.classes[p.count++] = {rows, first, region_row, 0, sparse_stages, 0, 0};
      else if (rows) p.classes[p.count++] = {rows, first, 0, region_row, 0, dense_stages, 0};
      region_row += rows;
      y_row += a.sparse[i] + a.dense[i];
    }
    if (!is_sparse) p.heavy = p.count;
  }
  return p;
}

}  // namespace spense
