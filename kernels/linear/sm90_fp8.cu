// Instances of the Hopper kernel and their launch.
#include <atomic>
#include "linear/sm90_fp8.cuh"
#include "linear/sm90_fp8.h"

namespace spense {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*,
                                 cuuint64_t const*, cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time: linking libcuda would keep the library from loading on machines without a driver.
EncodeTiled encode_tiled() {
  static EncodeTiled const f = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found))
      return EncodeTiled(nullptr);
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return f;
}

// Byte matrix [rows, columns] with a row pitch, read in boxes of [box_rows, box_columns]; reads beyond it give zeros.
bool make_map(CUtensorMap* map, uint8_t const* data, int64_t columns, int64_t rows, int64_t pitch, int box_columns,
              int box_rows) {
  cuuint64_t const sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(pitch)};
  cuuint32_t const box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, step[2] = {1, 1};
  return encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(data), sizes, strides, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        box_columns == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#define SPENSE_CUDA(call)                                       \
  if (cudaError_t const error = (call); error != cudaSuccess) { \
    (void)cudaGetLastError();                                   \
    return kCudaError + int(error);                             \
  }

template <class S>
int launch(LinearArgs const& args, Sm90Config const& config, cudaStream_t stream, int* clusters_out) {
  auto* const kernel = sm90::linear_kernel<S>;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(config.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.blockDim = dim3(S::kThreads);
  launch.dynamicSmemBytes = S::kSmemBytes;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = 1;

  // How many clusters run at once: 132 SMs are not always covered by clusters of 4 or 8. Asked once per device.
  constexpr int kDevices = 64, kClusters = 9;
  static std::atomic<int> fits[kDevices][kClusters];  // threads that ask at once get the same answer
  int device = 0;
  SPENSE_CUDA(cudaGetDevice(&device));
  if (device >= kDevices) return kUnsupported;
  int n = fits[device][config.cluster];
  if (!n) {
    launch.gridDim = dim3(config.cluster);
    SPENSE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmemBytes));
    SPENSE_CUDA(cudaOccupancyMaxActiveClusters(&n, kernel, &launch));
    if (n < 1) return kUnsupported;
    fits[device][config.cluster] = n;
  }
  if (clusters_out) {
    *clusters_out = n;
    return kOk;
  }

  auto* const plan = S::kPaired ? make_paired_plan : make_plan;
  sm90::KernelParams p{plan(args, S::kOutRows, S::kTokens, S::kMulticast ? config.cluster : 1, S::kSparseK),
                       args.metadata,
                       args.x_scale,
                       args.weight_scale,
                       args.bias,
                       args.y,
                       args.amax,
                       args.metadata_rows,
                       args.tokens,
                       args.out_features / S::kBoxes,
                       args.out_dtype,
                       args.words,
                       args.twell};
  int64_t const units = p.plan.units();
  if (units == 0) return kOk;
  if (units > (1 << 30)) return kUnsupported;
  int const clusters = units < n ? int(units) : n;
  p.plan.schedule(clusters, S::kMulticast ? 2 : 1);  // a heavy unit takes 2 light ones by operations, 1.6 by bytes

  if (!encode_tiled()) return kNoDriver;
  CUtensorMap values, dense, x;
  int const share = S::kMulticast ? S::kTokens / config.cluster : S::kTokens;
  if (!make_map(&x, args.x, args.in_features, args.tokens, args.in_features, 128, share)) return kTensorMap;
  values = dense = x;  // an empty region is never read
  if (args.values && !make_map(&values, args.values, args.sparse_cols() / 2, args.sparse_rows(), args.values_pitch,
                               S::kValueBytes, S::kOutRows))
    return kTensorMap;
  if (args.dense_weight &&
      !make_map(&dense, args.dense_weight, args.dense_cols(), args.dense_rows(), args.dense_pitch, 128, S::kOutRows))
    return kTensorMap;
  launch.gridDim = dim3(clusters * config.cluster);
  launch.numAttrs = config.overlap ? 2 : 1;
  SPENSE_CUDA(cudaLaunchKernelEx(&launch, kernel, values, dense, x, p));
  return kOk;
}

}  // namespace

int linear_sm90(LinearArgs const& args, Sm90Config const& config, cudaStream_t stream, int* clusters) {
  bool const power = config.cluster > 0 && (config.cluster & (config.cluster - 1)) == 0;
  if (!power || config.cluster > (config.multicast ? 4 : 8)) return kBadConfig;
  constexpr int kPromote = 4;  // every 512 to 1024 columns of W
#define SPENSE_INSTANCE(ROWS, TOKENS, MULTICAST, PROMOTE, ...)                                                         \
  if (config.tile_rows == ROWS && config.tile_tokens == TOKENS && config.multicast == MULTICAST)                       \
    return launch<sm90::Shape<ROWS / 64, TOKENS, MULTICAST, PROMOTE __VA_OPT__(, ) __VA_ARGS__>>(args, config, stream, \
                                                                                                 clusters);
  if (args.amax) {
    SPENSE_INSTANCE(128, 8, false, kPromote, true)
    SPENSE_INSTANCE(128, 16, false, kPromote, true)
    SPENSE_INSTANCE(128, 32, false, kPromote, true)
    SPENSE_INSTANCE(128, 64, false, kPromote, true)
    SPENSE_INSTANCE(128, 128, true, 2 * kPromote, true)
    return kBadConfig;
  }
  if (args.words) {
    bool const tiled = args.shards == 1 && (!args.output_split || args.sparse[0] % 128 == 0 || args.dense[0] == 0);
    if (!clusters && (!tiled || !args.twell.legal(args.out_features) || args.twell.tile != 128)) return kBadConfig;
    if (args.out_dtype != kBfloat16) return kUnsupported;
    SPENSE_INSTANCE(128, 8, false, kPromote, false, true)
    SPENSE_INSTANCE(128, 16, false, kPromote, false, true)
    SPENSE_INSTANCE(128, 32, false, kPromote, false, true)
    SPENSE_INSTANCE(128, 64, false, kPromote, false, true)
    SPENSE_INSTANCE(128, 128, true, 2 * kPromote, false, true)
    return kBadConfig;
  }
  SPENSE_INSTANCE(64, 8, false, kPromote)
  SPENSE_INSTANCE(64, 16, false, kPromote)
  SPENSE_INSTANCE(64, 32, false, kPromote)
  SPENSE_INSTANCE(64, 64, false, kPromote)
  SPENSE_INSTANCE(64, 128, false, kPromote)
  SPENSE_INSTANCE(128, 8, false, kPromote)
  SPENSE_INSTANCE(128, 16, false, kPromote)
  SPENSE_INSTANCE(128, 32, false, kPromote)
  SPENSE_INSTANCE(128, 64, false, kPromote)
  SPENSE_INSTANCE(128, 128, false, kPromote)
  SPENSE_INSTANCE(128, 128, true, 2 * kPromote)
  SPENSE_INSTANCE(128, 256, true, 0)  // 128 accumulators leave no registers for a second set
#undef SPENSE_INSTANCE
  return kBadConfig;
}

}  // namespace spense
