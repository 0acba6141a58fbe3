// Composes the layer from the GEMM instances that were compiled into the library.
#include "linear/cutlass_fp8.h"

#include <algorithm>

namespace {

using spense::CutlassGemm;
using spense::CutlassKind;
using spense::LinearArgs;

using Instance = int (*)(CutlassGemm const*, size_t*, cudaStream_t);

// Indexed by CutlassKind; an architecture that was left out of the build is not referenced.
#define SPENSE_CUTLASS_GROUP(a, b, c, d)                                        \
  static constexpr Instance group[] = {spense_cutlass_gemm_##a, spense_cutlass_gemm_##b, \
                                       spense_cutlass_gemm_##c, spense_cutlass_gemm_##d}

Instance const* instances([[maybe_unused]] int arch, [[maybe_unused]] int tile) {
#if SPENSE_WITH_SM90
  if (arch == 90 && tile == 1) {
    SPENSE_CUTLASS_GROUP(0, 1, 2, 3);
    return group;
  }
#endif
#if SPENSE_WITH_SM100
  if (arch == 100 && tile == 0) {
    SPENSE_CUTLASS_GROUP(4, 5, 6, 7);
    return group;
  }
  if (arch == 100 && tile == 1) {
    SPENSE_CUTLASS_GROUP(8, 9, 10, 11);
    return group;
  }
#endif
  return nullptr;
}

constexpr size_t kBf16 = 2, kFp32 = 4;

// The fp32 sums between the two GEMMs of an input split: bounded by taking the tokens in chunks, of whole tiles for
// every instance and large enough that the last wave of tiles does not matter.
constexpr size_t kPartialBytes = size_t(256) << 20;
constexpr int kChunk = 256;

int chunk_tokens(LinearArgs const& args) {
  int64_t const fit = int64_t(kPartialBytes / (kFp32 * size_t(args.out_features))) / kChunk * kChunk;
  return int(std::min<int64_t>(args.tokens, std::max<int64_t>(fit, kChunk)));
}

bool needs_partial(LinearArgs const& args) {
  return !args.output_split && args.values && args.dense_weight && args.sparse[0] > 0 && args.dense[0] > 0;
}

// Whether the regions that are present cover the rows (output split) or columns (input split) exactly.
bool covered(LinearArgs const& args) {
  int const shards = args.output_split ? args.shards : 1;
  if (shards < 1 || shards > spense::kMaxShards) return false;
  int64_t n = 0;
  for (int i = 0; i < shards; ++i) n += (args.values ? args.sparse[i] : 0) + (args.dense_weight ? args.dense[i] : 0);
  return n == (args.output_split ? args.out_features : args.in_features);
}

size_t partial_bytes(LinearArgs const& args) {
  if (!needs_partial(args)) return 0;
  return (size_t(chunk_tokens(args)) * size_t(args.out_features) * kFp32 + 255) / 256 * 256;
}

// Calls run(kind, gemm) for every GEMM of the layer, in order, until one returns an error. The GEMMs of an output
// split write different columns of y and do not depend on each other; on one stream they still follow one another.
template <class Run>
int for_each_gemm(LinearArgs const& args, float* partial, Run run) {
  CutlassGemm gemm{};
  gemm.x_pitch = args.in_features;
  gemm.d_pitch = gemm.addend_pitch = args.out_features;
  gemm.metadata_rows = args.metadata_rows;

  // Weight row `first` of its region, output column `out` and the tokens from `token` on.
  auto place = [&](bool sparse, int rows, int cols, int64_t first, int64_t out, int64_t token, int tokens) {
    gemm.rows = rows;
    gemm.cols = cols;
    gemm.tokens = tokens;
    gemm.weight_pitch = sparse ? args.values_pitch : args.dense_pitch;
    gemm.weight = (sparse ? args.values : args.dense_weight) + first * gemm.weight_pitch;
    gemm.metadata = sparse ? args.metadata + first * 16 : nullptr;
    gemm.x = args.x + token * gemm.x_pitch;
    gemm.x_scale = args.x_scale + token;
    gemm.weight_scale = args.weight_scale + out;
    gemm.bias = args.bias ? static_cast<uint8_t const*>(args.bias) + size_t(out) * kBf16 : nullptr;
    gemm.d = static_cast<uint8_t*>(args.y) + size_t(token * gemm.d_pitch + out) * kBf16;
  };

  if (!needs_partial(args)) {
    int64_t first[2] = {0, 0}, out = 0;
    int const shards = args.output_split ? args.shards : 1;
    for (int shard = 0; shard < shards; ++shard)
      for (bool sparse : {true, false}) {
        int const size = sparse ? args.sparse[shard] : args.dense[shard];
        if (!(sparse ? args.values : args.dense_weight) || size == 0) continue;
        int const rows = args.output_split ? size : args.out_features;
        place(sparse, rows, args.in_features, first[sparse], out, 0, args.tokens);
        if (int const status = run(sparse ? spense::kSparseFinal : spense::kDenseFinal, gemm)) return status;
        first[sparse] += rows;
        out += rows;
      }
    return spense::kOk;
  }

  int const step = chunk_tokens(args);
  for (int token = 0; token < args.tokens; token += step) {
    int const tokens = std::min(step, args.tokens - token);
    place(true, args.out_features, args.sparse_cols(), 0, 0, token, tokens);
    gemm.d = partial;
    if (int const status = run(spense::kSparsePartial, gemm)) return status;
    place(false, args.out_features, args.dense_cols(), 0, 0, token, tokens);
    gemm.x += args.sparse_cols();
    gemm.addend = partial;
    if (int const status = run(spense::kDenseAddend, gemm)) return status;
  }
  return spense::kOk;
}

// What every GEMM of the layer needs at most, next to the partial sums; they share it, one after another.
int query(LinearArgs const& args, Instance const* group, size_t* bytes) {
  *bytes = 0;
  return for_each_gemm(args, nullptr, [&](CutlassKind kind, CutlassGemm const& gemm) {
    size_t one = 0;
    int const status = group[kind](&gemm, &one, nullptr);
    *bytes = std::max(*bytes, one);
    return status;
  });
}

}  // namespace

size_t spense_linear_cutlass_workspace(LinearArgs const& args, int arch, int tile) {
  Instance const* const group = instances(arch, tile);
  size_t bytes = 0;
  if (!group || args.out_dtype != spense::kBfloat16 || !covered(args)) return 0;
  if (query(args, group, &bytes) != spense::kOk) return 0;
  return partial_bytes(args) + bytes;
}

int spense_linear_cutlass(LinearArgs const& args, int arch, int tile, void* workspace, size_t workspace_bytes, bool pdl,
                          cudaStream_t stream) {
  Instance const* const group = instances(arch, tile);
  if (!group || args.out_dtype != spense::kBfloat16) return spense::kUnsupported;
  if (!covered(args)) return spense::kBadConfig;
  if (args.tokens <= 0) return spense::kOk;

  // All GEMMs are checked before the first is launched: a refused layer leaves y untouched.
  size_t bytes = 0;
  if (int const status = query(args, group, &bytes)) return status;
  size_t const partial = partial_bytes(args);
  if (workspace_bytes < partial + bytes) return spense::kWorkspace;

  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return spense::kCudaError + int(error);

  return for_each_gemm(args, static_cast<float*>(workspace), [&](CutlassKind kind, CutlassGemm gemm) {
    gemm.device = device;
    gemm.sms = sms;
    gemm.pdl = pdl;
    gemm.workspace = static_cast<uint8_t*>(workspace) + partial;
    gemm.workspace_bytes = bytes;
    return group[kind](&gemm, nullptr, stream);
  });
}
