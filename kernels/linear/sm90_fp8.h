// Launcher of the Hopper kernel.
#pragma once
#include <cuda_runtime_api.h>
#include "common/status.h"
#include "linear/arguments.h"

namespace spense {

struct Sm90Config {
  int tile_rows;     // 64 or 128
  int tile_tokens;   // 8, 16, 32, 64, 128; with multicast 128 or 256
  int cluster;       // CTAs: parts of K (1, 2, 4, 8), with multicast row tiles that share x (1, 2, 4)
  bool multicast;
  bool overlap;      // programmatic dependent launch: weights are read before the kernel in front has ended
};

// A Status. `clusters`, if given, receives how many clusters fit the device at once; nothing is launched.
int linear_sm90(LinearArgs const& args, Sm90Config const& config, cudaStream_t stream, int* clusters = nullptr);

}  // namespace spense
