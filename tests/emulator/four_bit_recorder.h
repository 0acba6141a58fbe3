// Included in front of linear/four_bit.cu: its launches are recorded instead of made, as recorder.h does it.
#pragma once
#include <cstring>

#include "linear/four_bit.cuh"

struct Recorded {  // launcher.py has the same fields
  unsigned grid, block, shared_bytes, cluster, launches;
  alignas(128) unsigned char parameters[4096];
};
extern "C" {
Recorded recorded[2];  // a matrix takes a launch for each region
unsigned launches;
}

namespace recorder {
template <class Kernel>
cudaError_t launch(cudaLaunchConfig_t const* config, Kernel, spense::FourBitArgs const& args) {
  static_assert(sizeof args <= sizeof recorded->parameters);
  if (launches == 2) return cudaErrorUnknown;
  Recorded& one = recorded[launches++];
  memset(one.parameters, 0xCD, sizeof one.parameters);
  memcpy(one.parameters, &args, sizeof args);
  one.grid = config->gridDim.x;
  one.block = config->blockDim.x;
  one.shared_bytes = unsigned(config->dynamicSmemBytes);
  return cudaSuccess;
}
}  // namespace recorder

extern "C" int four_bit_arguments_bytes() { return sizeof(spense::FourBitArgs); }
extern "C" int record(spense::FourBitArgs const* args, bool matrix, bool shuffle) {
  return (matrix ? spense::dequantize_four_bit : spense::linear_four_bit)(*args, shuffle, nullptr);
}

#define cudaLaunchKernelEx recorder::launch
