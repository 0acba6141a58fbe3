// What every implementation of the Spense linear layer is called with: plain pointers and sizes, no torch, no CUTLASS.
//
//   y[t, o] = x_scale[t] * weight_scale[o] * sum_k W[o, k] * x[t, k]  (+ bias[o])
//
// W is a 2:4 region and a dense region. Output split: whole rows are sparse or dense, per fused shard in the order
// [S0 D0 S1 D1 ...] of y; each region's matrix holds its rows of all shards one after another. Input split: the first
// `sparse[0]` columns are sparse, the other `dense[0]` dense.
#pragma once
#include <cstdint>
#include "common/dtype.h"
#include "mlp/twell.h"

namespace spense {

constexpr int kMaxShards = 4;

struct LinearArgs {
  int tokens, out_features, in_features;      // M, N, K
  int output_split, shards;                   // input split: one shard
  int sparse[kMaxShards], dense[kMaxShards];  // rows (output split) or columns (input split) of each region
  uint8_t const* x;                           // e4m3 [M, K], contiguous, 16-byte aligned, K % 16 == 0
  float const* x_scale;                       // [M]
  uint8_t const* values;                      // e4m3 [sparse rows, pitch >= sparse columns / 2]; null: no sparse region
  int64_t values_pitch;                       // bytes, a multiple of 16; bytes beyond the columns are zero
  uint8_t const* metadata;                    // [2 * ceil(columns / 256)][metadata_rows][16], the blocks of repack.py
  int metadata_rows;                          // a multiple of 128, at least 127 more than the sparse rows
  uint8_t const* dense_weight;                // e4m3 [dense rows, pitch >= dense columns]; null: no dense region
  int64_t dense_pitch;                        // bytes, a multiple of 16; bytes beyond the columns are zero
  float const* weight_scale;                  // [N], output order
  void const* bias;                           // [N] in the output dtype, or null
  void* y;                                    // [M, N] contiguous; with amax [M, N / 2]
  float* amax;    // null, or [M], zeroed: y becomes silu(gate) * up of two equal shards, and
                  // amax the largest |y| of each token
  int out_dtype;  // Dtype
  // Null, or [M, ceil(N / 128), twell.words()]: what twell's threshold lets through of a bf16 y is packed, and y
  // written where a tile has overflowed. One shard, whose 2:4 rows are a multiple of 128 or all.
  uint32_t* words;
  Twell twell;

  // Extents of the two stored matrices.
  int sparse_rows() const { return region_rows(sparse, values != nullptr); }
  int dense_rows() const { return region_rows(dense, dense_weight != nullptr); }
  int sparse_cols() const { return output_split ? in_features : sparse[0]; }
  int dense_cols() const { return output_split ? in_features : dense[0]; }

 private:
  int region_rows(int const* sizes, bool present) const {
    if (!present) return 0;
    if (!output_split) return out_features;
    int n = 0;
    for (int i = 0; i < shards; ++i) n += sizes[i];
    return n;
  }
};

}  // namespace spense
