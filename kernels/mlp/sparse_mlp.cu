// Instances of the kernels behind the gate, and their launch.
#include "mlp/sparse_mlp.cuh"

namespace spense {
namespace {

using Kernel = void (*)(SparseMlpArgs);

int launch(Kernel kernel, SparseMlpArgs const& args, int64_t blocks, int shared_words, cudaStream_t stream) {
  if (blocks > (1ll << 31) - 1) return kUnsupported;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(mlp::kThreads);
  config.dynamicSmemBytes = size_t(shared_words) * 4;
  config.stream = stream;
  if (cudaError_t const error = cudaLaunchKernelEx(&config, kernel, args); error != cudaSuccess) {
    (void)cudaGetLastError();
    return kCudaError + int(error);
  }
  return kOk;
}

bool legal(SparseMlpArgs const& args) {
  return args.twell.legal(args.neurons) && args.neurons % 8 == 0 && args.out_features % 8 == 0 &&
         (args.kind == kInput ? !args.up
                              : args.up && args.kind >= kRelu && args.kind <= kDrelu && args.in_features % 8 == 0);
}

int64_t tiles(SparseMlpArgs const& args) {
  return int64_t(args.tokens) * ((args.neurons + args.twell.tile - 1) / args.twell.tile);
}

}  // namespace

int pack_twell(SparseMlpArgs const& args, cudaStream_t stream) {
  if (!args.twell.legal(args.neurons) || args.neurons % 8) return kBadConfig;
  if (tiles(args) == 0) return kOk;
  if (tiles(args) >= 1ll << 31) return kUnsupported;
  Kernel const kernel = args.twell.tile == 256 ? mlp::pack_kernel<8> : mlp::pack_kernel<4>;
  return launch(kernel, args, (tiles(args) + mlp::kWarps - 1) / mlp::kWarps, 0, stream);
}

int sparse_mlp(SparseMlpArgs const& args, cudaStream_t stream) {
  if (!legal(args)) return kBadConfig;
  if (args.tokens == 0 || args.out_features == 0) return kOk;
  if (tiles(args)) {
    Kernel const neurons = args.twell.tile == 256 ? mlp::neurons_kernel<8> : mlp::neurons_kernel<4>;
    if (int const status = launch(neurons, args, tiles(args), args.twell.tile, stream)) return status;
  }
  int64_t const blocks = (args.out_features + mlp::kColumns - 1) / mlp::kColumns;
  return launch(mlp::add_kernel, args, args.tokens * blocks, mlp::kRows * mlp::kColumns, stream);
}

int load_sparse_mlp() {
  Kernel const all[] = {mlp::pack_kernel<4>, mlp::pack_kernel<8>, mlp::neurons_kernel<4>, mlp::neurons_kernel<8>,
                        mlp::add_kernel};
  for (Kernel kernel : all) {
    cudaFuncAttributes found;
    if (cudaError_t const error = cudaFuncGetAttributes(&found, kernel); error != cudaSuccess) {
      (void)cudaGetLastError();
      return kCudaError + int(error);
    }
  }
  return kOk;
}

}  // namespace spense
