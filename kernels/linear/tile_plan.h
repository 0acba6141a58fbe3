// Which cluster computes which tile of y, in which order: arithmetic on sizes alone, the same on host and device.
//
// Rows of y fall into classes (gate's dense rows, up's dense rows, gate's sparse rows, ...). A tile is `tile_rows` rows of
// one class by `tile_tokens` tokens; with x multicast, a *group* of neighbouring row tiles is the unit of scheduling.
// Groups of dense classes cost more than those of sparse ones, so they go first (longest processing time first):
// cluster c takes heavy units c, c + C, ...; clusters that got one heavy unit fewer take `lead` light units (as many as
// fit into the time of a heavy one) before the others join. Two costs are all there are, so this closed form replaces a schedule in memory.
#pragma once
#include "linear/arguments.h"

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
  int pair;                       // paired tiles: from a row of gate to the row of up in the stored matrix
};

struct Tile {
  int index, row_tile, token_tile;   // class (< 0: no more), row tile in the class, token tile
};

struct TilePlan {
  TileClass classes[kMaxClasses];
  int count, heavy;               // classes; the first `heavy` of them are the expensive ones
  int tile_rows, token_tiles;
  int group;                      // row tiles per unit: the cluster's CTAs under multicast, else 1

  // Filled by schedule(); the kernel divides as little as it can before its first load.
  int clusters, lead;
  int group_end[kMaxClasses];     // groups of the heavy (light) classes up to and with this one
  int heavy_groups, light_groups;
  int turns, late;                // heavy units of every cluster; clusters that have one more

  int64_t units() const {
    int64_t n = 0;
    for (int c = 0; c < count; ++c) n += groups(c);
    return n * token_tiles;
  }

  void schedule(int cluster_count, int light_in_heavy) {
    clusters = cluster_count;
    for (int c = 0; c < count; ++c) group_end[c] = groups(c) + (c && c != heavy ? group_end[c - 1] : 0);
    heavy_groups = heavy ? group_end[heavy - 1] : 0;
    light_groups = count > heavy ? group_end[count - 1] : 0;
    turns = heavy_groups * token_tiles / clusters;
    late = heavy_groups * token_tiles % clusters;
    lead = late ? light_in_heavy : 0;
  }

  // The k-th unit of a cluster; row_tile is the group's first.
  SPENSE_HD Tile at(int k, int cluster) const {
    int const mine = turns + (cluster < late);
    if (k < mine) return unit(cluster + k * clusters, 0, heavy_groups);
    k -= mine;
    int const early = clusters - late;
    int id;
    if (cluster < late) id = lead * early + k * clusters + early + cluster;
    else if (k < lead) id = k * early + cluster - late;
    else id = lead * early + (k - lead) * clusters + cluster - late;
    if (id >= light_groups * token_tiles) return {-1, 0, 0};
    return unit(id, heavy, light_groups);
  }

 private:
  int groups(int c) const { return ((classes[c].rows + tile_rows - 1) / tile_rows + group - 1) / group; }

  SPENSE_HD Tile unit(int id, int first, int row_groups) const {
    int index = id, token_tile = 0;
    if (token_tiles > 1) {
      int const block = id / (row_groups * kTokenBlock), rest = id - block * row_groups * kTokenBlock;
      int const left = token_tiles - block * kTokenBlock, width = left < kTokenBlock ? left : kTokenBlock;
      index = rest / width;
      token_tile = block * kTokenBlock + rest % width;
    }
    int c = first, before = 0;
    SPENSE_ROLLED for (; index >= group_end[c]; ++c) before = group_end[c];
    return {c, (index - before) * group, token_tile};
  }
};

// Tiles of silu(gate) * up: `tile_rows` rows of gate and the same rows of up, which are the second shard.
inline TilePlan make_paired_plan(LinearArgs const& a, int tile_rows, int tile_tokens, int group, int sparse_k) {
  TilePlan p{};
  p.tile_rows = tile_rows;
  p.token_tiles = (a.tokens + tile_tokens - 1) / tile_tokens;
  p.group = group;
  int const sparse_stages = (a.in_features + sparse_k - 1) / sparse_k, dense_stages = (a.in_features + 127) / 128;
  if (a.dense[0]) p.classes[p.count++] = {a.dense[0], a.sparse[0], 0, 0, 0, dense_stages, 0, a.dense[0]};
  p.heavy = p.count;
  if (a.sparse[0]) p.classes[p.count++] = {a.sparse[0], 0, 0, 0, sparse_stages, 0, 0, a.sparse[0]};
  return p;
}

// `sparse_k`: columns of W in one sparse stage (a dense stage has 128); schedule() completes it.
inline TilePlan make_plan(LinearArgs const& a, int tile_rows, int tile_tokens, int group, int sparse_k) {
  TilePlan p{};
  p.tile_rows = tile_rows;
  p.token_tiles = (a.tokens + tile_tokens - 1) / tile_tokens;
  p.group = group;
  int const sparse_stages = (a.sparse_cols() + sparse_k - 1) / sparse_k, dense_stages = (a.dense_cols() + 127) / 128;
  if (!a.output_split) {
    p.classes[p.count++] = {a.out_features, 0, 0, 0, sparse_stages, dense_stages, a.sparse[0], 0};
    p.heavy = 1;
    return p;
  }
  for (int is_sparse = 0; is_sparse < 2; ++is_sparse) {
    int y_row = 0, region_row = 0;
    for (int i = 0; i < a.shards; ++i) {
      int const rows = is_sparse ? a.sparse[i] : a.dense[i], first = y_row + (is_sparse ? 0 : a.sparse[i]);
      if (rows && is_sparse) p.classes[p.count++] = {rows, first, region_row, 0, sparse_stages, 0, 0, 0};
      else if (rows) p.classes[p.count++] = {rows, first, 0, region_row, 0, dense_stages, 0, 0};
      region_row += rows;
      y_row += a.sparse[i] + a.dense[i];
    }
    if (!is_sparse) p.heavy = p.count;
  }
  return p;
}

}  // namespace spense
