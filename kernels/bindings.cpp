// torch operators of the CUDA kernels, on libtorch's stable ABI: host code only, so the library builds against a CPU torch
// and loads under any torch from 2.11 on, with or without CUDA.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <optional>
#include <vector>
#include "spense_linear_sm90.h"
#include "tile_plan.h"
#ifdef SPENSE_WITH_CUTLASS
#include "spense_linear_cutlass.h"
#endif

// Only libtorch_cuda has this symbol; weak, so that a CPU torch can load the library (it is null there).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

cudaStream_t stream_of(Tensor const& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "spense: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_matrix(Tensor const& t, char const* name, ScalarType dtype, int dims) {
  STD_TORCH_CHECK(t.is_cuda(), "spense: ", name, " must be a CUDA tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "spense: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dims && t.is_contiguous(), "spense: ", name, " must be contiguous with ", dims, " dimensions");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "spense: ", name, " must be 16-byte aligned");
}

// Sizes only, no pointers: enough for tile plans.
spense::LinearArgs sizes_of(int64_t tokens, int64_t out_features, int64_t in_features, Ints const& sparse, Ints const& dense, bool output_split) {
  spense::LinearArgs a{};
  a.tokens = int(tokens);
  a.out_features = int(out_features);
  a.in_features = int(in_features);
  a.output_split = output_split;
  a.shards = int(sparse.size());
  STD_TORCH_CHECK(tokens < (1 << 24) && out_features < (1 << 24) && in_features < (1 << 24), "spense: sizes beyond 2^24");
  STD_TORCH_CHECK(sparse.size() == dense.size() && !sparse.empty() && a.shards <= spense::kMaxShards, "spense: 1 to ",
                  spense::kMaxShards, " fused shards are supported, got ", sparse.size(), " and ", dense.size());
  STD_TORCH_CHECK(output_split || a.shards == 1, "spense: an input split has one shard");
  int64_t total = 0;
  for (size_t i = 0; i < sparse.size(); ++i) {
    STD_TORCH_CHECK(sparse[i] >= 0 && dense[i] >= 0, "spense: negative region size");
    a.sparse[i] = int(sparse[i]);
    a.dense[i] = int(dense[i]);
    total += sparse[i] + dense[i];
  }
  STD_TORCH_CHECK(total == (output_split ? out_features : in_features), "spense: region sizes sum to ", total);
  return a;
}

spense::LinearArgs check_args(Tensor const& x, Tensor const& x_scale, Tensor const& values, Tensor const& metadata, Tensor const& dense,
                              Tensor const& weight_scale, std::optional<Tensor> const& bias, Ints const& sparse_sizes,
                              Ints const& dense_sizes, bool output_split, Tensor const& y, int64_t y_shards = 1) {
  check_matrix(x, "x", ScalarType::Float8_e4m3fn, 2);
  check_matrix(y, "y", y.scalar_type(), 2);
  int64_t const tokens = x.size(0), k = x.size(1), n = weight_scale.numel();
  STD_TORCH_CHECK(k % 16 == 0, "spense: in_features ", k, " must be a multiple of 16 (TMA row pitch)");
  STD_TORCH_CHECK(y.size(0) == tokens && y.size(1) * y_shards == n, "spense: y must be [", tokens, ", ", n / y_shards, "]");
  STD_TORCH_CHECK(x_scale.is_cuda() && x_scale.scalar_type() == ScalarType::Float && x_scale.numel() == tokens && x_scale.is_contiguous(),
                  "spense: x_scale must be fp32 [", tokens, ", 1]");
  STD_TORCH_CHECK(weight_scale.is_cuda() && weight_scale.scalar_type() == ScalarType::Float && weight_scale.is_contiguous(),
                  "spense: weight_scale must be fp32 [N]");
  spense::LinearArgs a = sizes_of(tokens, n, k, sparse_sizes, dense_sizes, output_split);
  a.x = static_cast<uint8_t const*>(x.data_ptr());
  a.x_scale = static_cast<float const*>(x_scale.data_ptr());
  a.weight_scale = static_cast<float const*>(weight_scale.data_ptr());
  a.y = y.data_ptr();
  a.out_dtype = y.scalar_type() == ScalarType::BFloat16 ? spense::kBfloat16 : y.scalar_type() == ScalarType::Half ? spense::kFloat16 : spense::kFloat32;
  STD_TORCH_CHECK(a.out_dtype != spense::kFloat32 || y.scalar_type() == ScalarType::Float, "spense: y must be bf16, fp16 or fp32");
  if (bias) {
    STD_TORCH_CHECK(bias->is_cuda() && bias->scalar_type() == y.scalar_type() && bias->numel() == n && bias->is_contiguous(),
                    "spense: bias must be [", n, "] in the dtype of y");
    a.bias = bias->data_ptr();
  }
  if (values.numel()) {
    check_matrix(values, "sparse_values", ScalarType::Float8_e4m3fn, 2);
    check_matrix(metadata, "sparse_meta", ScalarType::Byte, 3);
    a.values = static_cast<uint8_t const*>(values.data_ptr());
    a.values_pitch = values.size(1);
    a.metadata = static_cast<uint8_t const*>(metadata.data_ptr());
    a.metadata_rows = int(metadata.size(1));
    STD_TORCH_CHECK(values.size(0) == a.sparse_rows() && a.sparse_cols() % 8 == 0 && a.values_pitch >= a.sparse_cols() / 2 && a.values_pitch % 16 == 0,
                    "spense: sparse_values must be [", a.sparse_rows(), ", >= ", a.sparse_cols() / 2, "] with a row pitch of 16 bytes");
    STD_TORCH_CHECK(metadata.size(0) == (a.sparse_cols() + 255) / 256 * 2 && metadata.size(2) == 16 && a.metadata_rows % 128 == 0 &&
                        a.metadata_rows >= a.sparse_rows() + 127,
                    "spense: sparse_meta must be in the kernels' block layout (ops/repack.py)");
  }
  if (dense.numel()) {
    check_matrix(dense, "dense_weight", ScalarType::Float8_e4m3fn, 2);
    a.dense_weight = static_cast<uint8_t const*>(dense.data_ptr());
    a.dense_pitch = dense.size(1);
    STD_TORCH_CHECK(dense.size(0) == a.dense_rows() && a.dense_pitch >= a.dense_cols() && a.dense_pitch % 16 == 0,
                    "spense: dense_weight must be [", a.dense_rows(), ", >= ", a.dense_cols(), "] with a row pitch of 16 bytes");
  }
  int64_t in_sparse = 0, in_dense = 0;
  for (int i = 0; i < a.shards; ++i) { in_sparse += a.sparse[i]; in_dense += a.dense[i]; }
  std::vector<Tensor> others{x_scale, weight_scale, y};
  if (values.numel()) others.insert(others.end(), {values, metadata});
  if (dense.numel()) others.push_back(dense);
  if (bias) others.push_back(*bias);
  for (Tensor const& t : others)
    STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), "spense: all tensors must be on the device of x");
  STD_TORCH_CHECK((in_sparse == 0 || a.values) && (in_dense == 0 || a.dense_weight), "spense: a region of non-zero size has no tensor");
  return a;
}

void check_status(int status, char const* kernel) {
  STD_TORCH_CHECK(status < spense::kCudaError, "spense: ", kernel, " failed with CUDA error ", status - spense::kCudaError, ": ",
                  cudaGetErrorString(static_cast<cudaError_t>(status - spense::kCudaError)));
  STD_TORCH_CHECK(status == spense::kOk, "spense: ", kernel, " refused the call with status ", status, " (see spense_linear.h)");
}

void linear_sm90(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale, std::optional<Tensor> bias,
                 Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t tile_rows, int64_t tile_tokens, int64_t cluster,
                 bool multicast, bool overlap, Tensor y) {
  auto const args = check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, output_split, y);
  if (!args.tokens) return;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  spense::Sm90Config const config{int(tile_rows), int(tile_tokens), int(cluster), multicast, overlap};
  check_status(spense::linear_sm90(args, config, stream_of(x)), "linear_sm90");
}

// silu(gate) * up of a layer of two equal shards, and the largest absolute value of each token.
void linear_silu_mul_sm90(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale,
                          std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, int64_t tile_tokens, int64_t cluster,
                          bool multicast, bool overlap, Tensor y, Tensor amax) {
  auto args = check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, true, y, 2);
  STD_TORCH_CHECK(args.shards == 2 && args.sparse[0] == args.sparse[1] && args.dense[0] == args.dense[1],
                  "spense: silu(gate) * up needs two shards of equal regions");
  STD_TORCH_CHECK(amax.is_cuda() && amax.scalar_type() == ScalarType::Float && amax.is_contiguous() && amax.numel() == args.tokens &&
                      amax.get_device_index() == x.get_device_index(),
                  "spense: amax must be fp32 [", args.tokens, ", 1]");
  if (!args.tokens) return;
  args.amax = static_cast<float*>(amax.data_ptr());
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  spense::Sm90Config const config{128, int(tile_tokens), int(cluster), multicast, overlap};
  check_status(spense::linear_sm90(args, config, stream_of(x)), "linear_silu_mul_sm90");
}

// How many clusters of this shape the current device runs at once; `paired`: of the kernel with silu(gate) * up. Loads
// the kernel and raises its limit of shared memory, so that a first launch under graph capture has nothing left to do.
int64_t sm90_clusters(int64_t tile_rows, int64_t tile_tokens, int64_t cluster, bool multicast, bool paired) {
  int n = 0;
  float none = 0;
  spense::LinearArgs args{};
  args.amax = paired ? &none : nullptr;
  check_status(spense::linear_sm90(args, {int(tile_rows), int(tile_tokens), int(cluster), multicast, false}, nullptr, &n), "linear_sm90");
  return n;
}

// The kernel's own schedule, for tests: int32 [units, 7] of cluster, turn, first row and end of the tile group in y,
// first token, sparse and dense stages. Runs anywhere.
Tensor tile_plan(int64_t tokens, int64_t out_features, int64_t in_features, Ints sparse_sizes, Ints dense_sizes, bool output_split,
                 int64_t tile_rows, int64_t tile_tokens, int64_t group, int64_t sparse_k, int64_t lead, int64_t clusters, bool paired) {
  STD_TORCH_CHECK(tile_rows > 0 && tile_tokens > 0 && group > 0 && sparse_k > 0 && clusters > 0, "spense: sizes must be positive");
  auto plan = (paired ? spense::make_paired_plan : spense::make_plan)(sizes_of(tokens, out_features, in_features, sparse_sizes, dense_sizes, output_split), int(tile_rows),
                                int(tile_tokens), int(group), int(sparse_k));
  plan.schedule(int(clusters), int(lead));
  std::vector<int32_t> rows;
  for (int c = 0; c < clusters; ++c)
    for (int k = 0;; ++k) {
      spense::Tile const t = plan.at(k, c);
      if (t.index < 0) break;
      auto const& cls = plan.classes[t.index];
      int const first = t.row_tile * plan.tile_rows, last = first + plan.group * plan.tile_rows;
      for (int32_t v : {c, k, cls.y_row + first, cls.y_row + (last < cls.rows ? last : cls.rows), t.token_tile * int(tile_tokens),
                        cls.sparse_stages, cls.dense_stages})
        rows.push_back(v);
    }
  Tensor out = torch::stable::empty({int64_t(rows.size() / 7), 7}, ScalarType::Int);
  std::copy(rows.begin(), rows.end(), static_cast<int32_t*>(out.data_ptr()));
  return out;
}

#ifdef SPENSE_WITH_CUTLASS
void linear_cutlass(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale, std::optional<Tensor> bias,
                    Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t arch, int64_t tile, bool overlap, Tensor y) {
  auto const args = check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, output_split, y);
  if (!args.tokens) return;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  size_t const bytes = spense_linear_cutlass_workspace(args, int(arch), int(tile));
  Tensor workspace = torch::stable::new_empty(x, {int64_t(bytes)}, ScalarType::Byte);
  check_status(spense_linear_cutlass(args, int(arch), int(tile), workspace.data_ptr(), bytes, overlap, stream_of(x)), "linear_cutlass");
}
#endif

#ifdef SPENSE_WITH_CUTLASS
// Compute capabilities, times ten, that have CUTLASS instances.
Ints cutlass_capabilities() {
  Ints found;
#if SPENSE_WITH_SM90
  found.push_back(90);
#endif
#if SPENSE_WITH_SM100
  found.push_back(100);
#endif
#if SPENSE_WITH_SM100_FAMILY
  found.push_back(103);
#endif
  return found;
}
#endif

#define SPENSE_LAYER \
  "Tensor x, Tensor x_scale, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, Tensor weight_scale, " \
  "Tensor? bias, int[] sparse_sizes, int[] dense_sizes, bool output_split, "

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("linear_sm90(" SPENSE_LAYER "int tile_rows, int tile_tokens, int cluster, bool multicast, bool overlap, Tensor(a!) y) -> ()");
  m.def("linear_silu_mul_sm90(Tensor x, Tensor x_scale, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, "
        "Tensor weight_scale, Tensor? bias, int[] sparse_sizes, int[] dense_sizes, int tile_tokens, int cluster, bool multicast, "
        "bool overlap, Tensor(a!) y, Tensor(b!) amax) -> ()");
  m.def("sm90_clusters(int tile_rows, int tile_tokens, int cluster, bool multicast, bool paired=False) -> int");
  m.def("tile_plan(int tokens, int out_features, int in_features, int[] sparse_sizes, int[] dense_sizes, bool output_split, "
        "int tile_rows, int tile_tokens, int group, int sparse_k, int lead, int clusters, bool paired=False) -> Tensor");
#ifdef SPENSE_WITH_CUTLASS
  m.def("linear_cutlass(" SPENSE_LAYER "int arch, int tile, bool overlap, Tensor(a!) y) -> ()");
  m.def("cutlass_capabilities() -> int[]");
#endif
}
STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("linear_sm90", TORCH_BOX(&linear_sm90));
  m.impl("linear_silu_mul_sm90", TORCH_BOX(&linear_silu_mul_sm90));
#ifdef SPENSE_WITH_CUTLASS
  m.impl("linear_cutlass", TORCH_BOX(&linear_cutlass));
#endif
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) {
  m.impl("sm90_clusters", TORCH_BOX(&sm90_clusters));
  m.impl("tile_plan", TORCH_BOX(&tile_plan));
#ifdef SPENSE_WITH_CUTLASS
  m.impl("cutlass_capabilities", TORCH_BOX(&cutlass_capabilities));
#endif
}

}  // namespace
