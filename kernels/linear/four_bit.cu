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

template <class T, int kTiles>
int multiply(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  using namespace four_bit;
  int64_t const row_tiles = (args.out_features + kRows - 1) / kRows;
  int64_t const token_tiles = (args.tokens + 8 * kTiles - 1) / (8 * kTiles);
  Kernel const kernel = shuffle ? linear_kernel<T, kTiles, true> : linear_kernel<T, kTiles, false>;
  return launch(kernel, args, row_tiles * token_tiles, kEntries + kWarps * 8 * kTiles * kPitch, stream);
}

template <class T>
Kernel dequantize(bool shuffle) {
  return shuffle ? four_bit::dequantize_kernel<T, true> : four_bit::dequantize_kernel<T, false>;
}

bool legal(FourBitArgs const& args) {
  return args.in_features > 0 && args.in_features % four_bit::kChunk == 0 && args.block_shift >= 4;
}

}  // namespace

int linear_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  if (!legal(args)) return kBadConfig;
  if (args.tokens == 0 || args.out_features == 0) return kOk;
  bool const few = args.tokens <= 8;
  if (args.dtype == kBfloat16)
    return (few ? multiply<__nv_bfloat16, 1> : multiply<__nv_bfloat16, 2>)(args, shuffle, stream);
  if (args.dtype == kFloat16) return (few ? multiply<__half, 1> : multiply<__half, 2>)(args, shuffle, stream);
  return kBadConfig;
}

int dequantize_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  if (!legal(args)) return kBadConfig;
  int64_t const words = int64_t(args.in_features) / 8 * args.out_features;
  if (words == 0) return kOk;
  if (words >= (1ll << 32) - four_bit::kThreads) return kUnsupported;
  Kernel const kernel = args.dtype == kBfloat16  ? dequantize<__nv_bfloat16>(shuffle)
                        : args.dtype == kFloat16 ? dequantize<__half>(shuffle)
                                                 : dequantize<float>(shuffle);
  return launch(kernel, args, (words + four_bit::kThreads - 1) / four_bit::kThreads, four_bit::kEntries, stream);
}

}  // namespace spense
