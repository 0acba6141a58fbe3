// What follows the gate of an activation-sparse MLP, for few tokens (sm_90 and later). No torch.
//
//   y[t] = sum_i act(gate[t, i]) * (up[i] . x[t] + up_bias[i]) * down_t[i]  (+ bias)
//
// The gate comes as TwELL's words (vllm_spense/ops/mlp/twell.py): per token and tile a count, then bf16 values above
// their columns, ascending. A tile whose count is beyond the capacity is read from the dense gate.
#pragma once
#include <cuda_runtime_api.h>
#include <cstdint>
#include "common/status.h"
#include "mlp/twell.h"

namespace spense {

struct SparseMlpArgs {
  int tokens, in_features, neurons, out_features;  // M, K, I, N; the last three are multiples of 8
  Twell twell;
  int kind;             // Gate
  void const* gate;     // bf16 [M, I], 16-byte aligned; behind words only tiles that have overflowed are read
  uint32_t* words;      // [M, tiles, twell.words()]
  void const* x;        // bf16 [M, K], 16-byte aligned, as are the other matrices; null: there is no up
  void const* up;       // bf16 [I, K]
  void const* up_bias;  // bf16 [I], or null
  void const* down_t;   // bf16 [I, N]
  void const* bias;     // bf16 [N], or null
  uint32_t* ids;        // [M, I] scratch: the neurons of a token,
  float* inputs;        // [M, I] and their inputs of down
  void* y;              // bf16 [M, N]
};

// gate to words; a Status.
int pack_twell(SparseMlpArgs const& args, cudaStream_t stream);

// words to y: two launches; a Status.
int sparse_mlp(SparseMlpArgs const& args, cudaStream_t stream);

// Loads every instance on the current device, so that a first launch under graph capture has nothing left to do.
int load_sparse_mlp();

}  // namespace spense
