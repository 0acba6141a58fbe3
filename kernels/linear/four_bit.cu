// Instances of the kernels for dense layers in 4 bits, and their launch.
#include "linear/four_bit.cuh"

namespace spense {
namespace {

using Kernel = void (*)(FourBitArgs);

int launch(Kernel kernel, FourBitArgs const& args, int64_t blocks, int shared_floats, cudaStream_t stream) {
  if (blocks > (1ll << 31) - 1) return kUnsupported;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(four_bit::kThreads);
  config.dynamicSmemBytes = size_t(shared_floats) * sizeof(float);
  config.stream = stream;
  if (cudaError_t const error = cudaLaunchKernelEx(&config, kernel, args); error != cudaSuccess) {
    (void)cudaGetLastError();
    return kCudaError + int(error);
  }
  return kOk;
}

template <class T>
Kernel product(bool few, bool shuffle) {
  using namespace four_bit;
  if (few) return shuffle ? linear_kernel<T, 1, true> : linear_kernel<T, 1, false>;
  return shuffle ? linear_kernel<T, 2, true> : linear_kernel<T, 2, false>;
}

template <class T>
Kernel matrix(bool shuffle) {
  return shuffle ? four_bit::dequantize_kernel<T, true> : four_bit::dequantize_kernel<T, false>;
}

Kernel product(int dtype, bool few, bool shuffle) {
  return dtype == kBfloat16 ? product<__nv_bfloat16>(few, shuffle) : product<__half>(few, shuffle);
}

Kernel matrix(int dtype, bool shuffle) {
  return dtype == kBfloat16  ? matrix<__nv_bfloat16>(shuffle)
         : dtype == kFloat16 ? matrix<__half>(shuffle)
                             : matrix<float>(shuffle);
}

bool legal(FourBitArgs const& args) {
  return args.in_features > 0 && args.in_features % four_bit::kChunk == 0 && args.block_shift >= 4;
}

}  // namespace

int linear_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  using namespace four_bit;
  if (!legal(args) || args.dtype == kFloat32) return kBadConfig;
  if (args.tokens == 0 || args.out_features == 0) return kOk;
  bool const few = args.tokens <= 8;
  int const tokens = few ? 8 : 16;
  int64_t const row_tiles = (args.out_features + kRows - 1) / kRows;
  int64_t const token_tiles = (args.tokens + tokens - 1) / tokens;
  return launch(product(args.dtype, few, shuffle), args, row_tiles * token_tiles, kEntries + kWarps * tokens * kPitch,
                stream);
}

int dequantize_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  using namespace four_bit;
  if (!legal(args)) return kBadConfig;
  int64_t const words = int64_t(args.in_features) / 8 * args.out_features;
  if (words == 0) return kOk;
  if (words >= (1ll << 32) - kThreads) return kUnsupported;
  return launch(matrix(args.dtype, shuffle), args, (words + kThreads - 1) / kThreads, kEntries, stream);
}

int load_four_bit() {
  for (int dtype : {kBfloat16, kFloat16, kFloat32})
    for (bool shuffle : {false, true})
      for (Kernel kernel : {matrix(dtype, shuffle), product(dtype, true, shuffle), product(dtype, false, shuffle)}) {
        cudaFuncAttributes found;
        if (cudaError_t const error = cudaFuncGetAttributes(&found, kernel); error != cudaSuccess) {
          (void)cudaGetLastError();
          return kCudaError + int(error);
        }
      }
  return kOk;
}

}  // namespace spense
