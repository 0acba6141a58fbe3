// Included in front of the launcher's source: its CUDA calls become these, which record what would be launched.
#pragma once
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "linear/sm90_fp8.cuh"
#include "linear/sm90_fp8.h"

struct Recorded {  // cases.py has the same fields
  unsigned grid, block, shared_bytes, cluster, launches;
  alignas(128) unsigned char parameters[4096];  // 128 bytes per tensor map, then KernelParams
};
extern "C" {
Recorded recorded;
int recorded_clusters_fit = 2;
}

namespace recorder {

// Encoded here as it is read by copy_tensor in machine.h.
struct TensorMap {
  unsigned magic, swizzle;
  unsigned long long base, columns, rows, pitch;
  unsigned box_columns, box_rows;
};

// What cuTensorMapEncodeTiled checks, for maps of the kind that the kernel uses.
inline CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, cuuint64_t const* sizes,
                       cuuint64_t const* strides, cuuint32_t const* box, cuuint32_t const* step,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
  bool const wide = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  bool ok = rank == 2 && type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
            fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && (wide || swizzle == CU_TENSOR_MAP_SWIZZLE_64B);
  ok = ok && size_t(base) % 16 == 0 && strides[0] % 16 == 0 && strides[0] < (1ull << 40);
  for (int i = 0; i < 2; ++i)
    ok = ok && sizes[i] > 0 && sizes[i] <= (1ull << 32) && box[i] > 0 && box[i] <= 256 && step[i] == 1;
  ok = ok && box[0] % 16 == 0 && box[0] <= (wide ? 128u : 64u);
  if (!ok) return CUDA_ERROR_INVALID_VALUE;
  TensorMap const made{0x7A9A9A9Au, wide ? 7u : 3u, (unsigned long long)base, sizes[0], sizes[1], strides[0],
                       box[0],      box[1]};
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

// The launcher remembers per device how many clusters fit: each number is a device of its own here.
inline cudaError_t get_device(int* device) {
  *device = recorded_clusters_fit;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t set_attribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t max_active_clusters(int* n, Kernel, cudaLaunchConfig_t const*) {
  *n = recorded_clusters_fit;
  return cudaSuccess;
}
inline cudaError_t entry_point(char const*, void** entry, unsigned, unsigned long long,
                               cudaDriverEntryPointQueryResult*) {
  *entry = reinterpret_cast<void*>(&encode);
  return cudaSuccess;
}
template <class Kernel, class Params>
cudaError_t launch(cudaLaunchConfig_t const* config, Kernel, CUtensorMap const& values, CUtensorMap const& dense,
                   CUtensorMap const& x, Params const& params) {
  static_assert(sizeof(CUtensorMap) == 128 && 384 + sizeof(Params) <= sizeof recorded.parameters);
  memset(recorded.parameters, 0xCD, sizeof recorded.parameters);
  memcpy(recorded.parameters, &values, 128);
  memcpy(recorded.parameters + 128, &dense, 128);
  memcpy(recorded.parameters + 256, &x, 128);
  memcpy(recorded.parameters + 384, &params, sizeof params);
  recorded.grid = config->gridDim.x;
  recorded.block = config->blockDim.x;
  recorded.shared_bytes = unsigned(config->dynamicSmemBytes);
  recorded.cluster = config->attrs[0].val.clusterDim.x;
  recorded.launches++;
  return cudaSuccess;
}

}  // namespace recorder

extern "C" int linear_arguments_bytes() { return sizeof(spense::LinearArgs); }
extern "C" int record(spense::LinearArgs const* args, spense::Sm90Config const* config) {
  return spense::linear_sm90(*args, *config, nullptr);
}

#define cudaGetDevice recorder::get_device
#define cudaFuncSetAttribute recorder::set_attribute
#define cudaOccupancyMaxActiveClusters recorder::max_active_clusters
#define cudaGetDriverEntryPointByVersion recorder::entry_point
#define cudaLaunchKernelEx recorder::launch
