// Layers in 4 bits, in the checkpoint's layout: the product for few tokens, and the matrix for many (sm_80 and later).
// No torch.
//
//   W[n, k] = table[code[n, k]] * absmax[n, block of k]
#pragma once
#include <cuda_runtime_api.h>
#include <cstdint>
#include "common/dtype.h"
#include "common/status.h"
#include "linear/arguments.h"

namespace spense {

// What is stored of a region: two codes per byte, the first in its high half. Of a 2:4 region these are the two that
// are kept of every four columns.
struct FourBitMatrix {
  int rows, columns;     // columns % 32 == 0
  uint8_t const* codes;  // [rows, columns / 2], 16-byte aligned; of a 2:4 region [rows, columns / 4]
  uint8_t const* meta;   // of a 2:4 region [rows, columns / 8], 16-byte aligned
  float const* absmax;   // [rows, absmax_pitch]
  float const* table;    // [16]
  int absmax_pitch;      // blocks of a row
  int block_shift;       // a block has 1 << block_shift codes, at least 16
};

struct FourBitArgs {
  int tokens, out_features, in_features;      // M, N, K
  int output_split, shards;                   // as in LinearArgs, and so is the order of y
  int sparse[kMaxShards], dense[kMaxShards];  // rows (output split) or columns (input split) of each region
  FourBitMatrix sparse_weight, dense_weight;
  void const* x;     // [M, K], bf16 or fp16, 16-byte aligned
  void const* bias;  // [N] in the dtype of y, or null
  void* y;           // [M, N] in the dtype of x; of the matrix [N, K], 16-byte aligned
  int dtype;         // Dtype of y
};

// y = x W^T (+ bias), each weight rounded once to the dtype of x, sums in fp32; a Status. `shuffle`: codes are looked
// up in registers of the warp, else in shared memory.
int linear_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream);

// y = W, rounded once.
int dequantize_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream);

// Loads every instance on the current device, so that a first launch under graph capture has nothing left to do.
int load_four_bit();

}  // namespace spense
