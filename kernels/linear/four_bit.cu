// Instances of the kernels for layers in 4 bits, and their launch.
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
Kernel product_of(bool shuffle, bool sparse) {
  using namespace four_bit;
  if (sparse) return shuffle ? linear_kernel<T, kTiles, true, true> : linear_kernel<T, kTiles, false, true>;
  return shuffle ? linear_kernel<T, kTiles, true, false> : linear_kernel<T, kTiles, false, false>;
}

Kernel product(int dtype, bool few, bool shuffle, bool sparse) {
  if (dtype == kBfloat16) return (few ? product_of<__nv_bfloat16, 1> : product_of<__nv_bfloat16, 2>)(shuffle, sparse);
  return (few ? product_of<__half, 1> : product_of<__half, 2>)(shuffle, sparse);
}

template <class T>
Kernel matrix_of(bool shuffle, bool two_of_four) {
  using namespace four_bit;
  if (two_of_four) return shuffle ? dequantize_kernel<T, true, true> : dequantize_kernel<T, false, true>;
  return shuffle ? dequantize_kernel<T, true, false> : dequantize_kernel<T, false, false>;
}

Kernel matrix(int dtype, bool shuffle, bool two_of_four) {
  if (dtype == kBfloat16) return matrix_of<__nv_bfloat16>(shuffle, two_of_four);
  return (dtype == kFloat16 ? matrix_of<__half> : matrix_of<float>)(shuffle, two_of_four);
}

int64_t values(FourBitMatrix const& m) { return int64_t(m.rows) * m.columns; }

bool legal(FourBitArgs const& args) {
  for (FourBitMatrix const* m : {&args.sparse_weight, &args.dense_weight})
    if (values(*m) && (m->columns % four_bit::kChunk || m->block_shift < 4)) return false;
  return args.shards >= 1 && args.shards <= kMaxShards && args.in_features % four_bit::kChunk == 0;
}

}  // namespace

int linear_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  using namespace four_bit;
  if (!legal(args) || args.dtype == kFloat32) return kBadConfig;
  if (args.tokens == 0 || args.out_features == 0) return kOk;
  bool const few = args.tokens <= 8, sparse = values(args.sparse_weight) > 0;
  int const tokens = few ? 8 : 16;
  int64_t row_tiles = tiles(args.out_features);
  if (sparse && args.output_split) {
    row_tiles = 0;
    for (int i = 0; i < args.shards; ++i) row_tiles += tiles(args.sparse[i]) + tiles(args.dense[i]);
  }
  int64_t const token_tiles = (args.tokens + tokens - 1) / tokens;
  return launch(product(args.dtype, few, shuffle, sparse), args, row_tiles * token_tiles,
                2 * kEntries + kWarps * tokens * kPitch, stream);
}

int dequantize_four_bit(FourBitArgs const& args, bool shuffle, cudaStream_t stream) {
  using namespace four_bit;
  if (!legal(args)) return kBadConfig;
  for (bool two_of_four : {true, false}) {
    int64_t const words = values(two_of_four ? args.sparse_weight : args.dense_weight) / 8;
    if (words == 0) continue;
    if (words >= (1ll << 32) - kThreads) return kUnsupported;
    Kernel const kernel = matrix(args.dtype, shuffle, two_of_four);
    if (int const status = launch(kernel, args, (words + kThreads - 1) / kThreads, kEntries, stream)) return status;
  }
  return kOk;
}

int load_four_bit() {
  auto const load = [](Kernel kernel) {
    cudaFuncAttributes found;
    cudaError_t const error = cudaFuncGetAttributes(&found, kernel);
    if (error == cudaSuccess) return int(kOk);
    (void)cudaGetLastError();
    return kCudaError + int(error);
  };
  for (int dtype : {kBfloat16, kFloat16, kFloat32})
    for (bool shuffle : {false, true})
      for (bool sparse : {false, true})
        for (Kernel kernel : {matrix(dtype, shuffle, sparse), product(dtype, true, shuffle, sparse),
                              product(dtype, false, shuffle, sparse)})
          if (int const status = load(kernel)) return status;
  return kOk;
}

}  // namespace spense
