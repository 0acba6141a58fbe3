// Included in front of linear/four_bit.cu: its launches are recorded instead of made, as recorder.h does it.
#pragma once
#include <cstring>

#include "linear/four_bit.cuh"

struct Recorded {  // launcher.py has the same fields
  unsigned grid, block, shared_bytes, cluster, launches;
  alignas(128) unsigned char parameters[4096];
};
extern "C" {
Recorded recorded;
}

namespace recorder {
template <class Kernel>
cudaError_t launch(cudaLaunchConfig_t const* config, Kernel, spense::FourBitArgs const& args) {
  memset(recorded.parameters, 0xCD, sizeof recorded.parameters);
  memcpy(recorded.parameters, &args, sizeof args);
  recorded.grid = config->gridDim.x;
  recorded.block = config->blockDim.x;
  recorded.shared_bytes = unsigned(config->dynamicSmemBytes);
  recorded.cluster = 1;
  recorded.launches++;
  return cudaSuccess;
}
}  // namespace recorder

extern "C" int four_bit_arguments_bytes() { return sizeof(spense::FourBitArgs); }
extern "C" int record(spense::FourBitArgs const* args, bool matrix, bool shuffle) {
  return (matrix ? spense::dequantize_four_bit : spense::linear_four_bit)(*args, shuffle, nullptr);
}

#define cudaLaunchKernelEx recorder::launch
