// torch operators of the CUDA kernels, on libtorch's stable ABI: host code only, so the library builds against a CPU
// torch and loads under any torch from 2.11 on, with or without CUDA.
#include "common/cuda_calls.h"
#include "linear/check.h"
#include "linear/sm90_fp8.h"
#include "linear/tile_plan.h"
#ifdef SPENSE_WITH_CUTLASS
#include "linear/cutlass_fp8.h"
#endif

namespace {

using namespace spense;

void linear_sm90(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale,
                 std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t tile_rows,
                 int64_t tile_tokens, int64_t cluster, bool multicast, bool overlap, Tensor y) {
  auto const args =
      check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, output_split, y);
  if (!args.tokens) return;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Sm90Config const config{int(tile_rows), int(tile_tokens), int(cluster), multicast, overlap};
  check_status(spense::linear_sm90(args, config, stream_of(x)), "linear_sm90");
}

// silu(gate) * up of a layer of two equal shards, and the largest absolute value of each token.
void linear_silu_mul_sm90(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale,
                          std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, int64_t tile_tokens,
                          int64_t cluster, bool multicast, bool overlap, Tensor y, Tensor amax) {
  auto args =
      check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, true, y, 2);
  STD_TORCH_CHECK(args.shards == 2 && args.sparse[0] == args.sparse[1] && args.dense[0] == args.dense[1],
                  "spense: silu(gate) * up needs two shards of equal regions");
  STD_TORCH_CHECK(amax.is_cuda() && amax.scalar_type() == ScalarType::Float && amax.is_contiguous() &&
                      amax.numel() == args.tokens && amax.get_device_index() == x.get_device_index(),
                  "spense: amax must be fp32 [", args.tokens, ", 1]");
  if (!args.tokens) return;
  args.amax = static_cast<float*>(amax.data_ptr());
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Sm90Config const config{128, int(tile_tokens), int(cluster), multicast, overlap};
  check_status(spense::linear_sm90(args, config, stream_of(x)), "linear_silu_mul_sm90");
}

// The gate of an activation-sparse MLP as TwELL's words; y [M, N] is written where a tile has overflowed.
void linear_twell_sm90(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale,
                       std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, bool output_split,
                       int64_t tile_tokens, int64_t cluster, bool multicast, bool overlap, int64_t share,
                       double threshold, Tensor words, Tensor y) {
  auto args =
      check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, output_split, y);
  args.twell = {128, int(share), float(threshold)};
  int64_t const tiles = (args.out_features + 127) / 128;
  STD_TORCH_CHECK(args.twell.legal(args.out_features) && args.out_dtype == kBfloat16, "spense: no words hold 1/", share,
                  " of a tile of a bf16 gate of ", args.out_features, " neurons above a threshold of ", threshold);
  STD_TORCH_CHECK(words.is_cuda() && words.scalar_type() == ScalarType::Int && words.is_contiguous() &&
                      words.numel() == args.tokens * tiles * args.twell.words() &&
                      words.get_device_index() == x.get_device_index(),
                  "spense: words must be int32 [", args.tokens, ", ", tiles, ", ", args.twell.words(), "]");
  if (!args.tokens) return;
  args.words = static_cast<uint32_t*>(words.data_ptr());
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Sm90Config const config{128, int(tile_tokens), int(cluster), multicast, overlap};
  check_status(spense::linear_sm90(args, config, stream_of(x)), "linear_twell_sm90");
}

// How many clusters of this shape the current device runs at once, 0 if none fits; `paired`: of the kernel with
// silu(gate) * up, `packed`: of the one that writes TwELL's words. Loads the kernel and raises its limit of shared
// memory, so that a first launch under graph capture has nothing left to do.
int64_t sm90_clusters(int64_t tile_rows, int64_t tile_tokens, int64_t cluster, bool multicast, bool paired,
                      bool packed) {
  int n = 0;
  float none = 0;
  uint32_t no_words = 0;
  LinearArgs args{};
  args.amax = paired ? &none : nullptr;
  args.words = packed ? &no_words : nullptr;
  int const status =
      spense::linear_sm90(args, {int(tile_rows), int(tile_tokens), int(cluster), multicast, false}, nullptr, &n);
  if (status == kUnsupported) return 0;
  check_status(status, "linear_sm90");
  return n;
}

// The kernel's own schedule, for tests: int32 [units, 7] of cluster, turn, first row and end of the tile group in y,
// first token, sparse and dense stages. Runs anywhere.
Tensor tile_plan(int64_t tokens, int64_t out_features, int64_t in_features, Ints sparse_sizes, Ints dense_sizes,
                 bool output_split, int64_t tile_rows, int64_t tile_tokens, int64_t group, int64_t sparse_k,
                 int64_t lead, int64_t clusters, bool paired) {
  STD_TORCH_CHECK(tile_rows > 0 && tile_tokens > 0 && group > 0 && sparse_k > 0 && clusters > 0,
                  "spense: sizes must be positive");
  auto plan = (paired ? make_paired_plan : make_plan)(
      sizes_of(tokens, out_features, in_features, sparse_sizes, dense_sizes, output_split), int(tile_rows),
      int(tile_tokens), int(group), int(sparse_k));
  plan.schedule(int(clusters), int(lead));
  std::vector<int32_t> rows;
  for (int c = 0; c < clusters; ++c)
    for (int k = 0;; ++k) {
      Tile const t = plan.at(k, c);
      if (t.index < 0) break;
      auto const& cls = plan.classes[t.index];
      int const first = t.row_tile * plan.tile_rows, last = first + plan.group * plan.tile_rows;
      for (int32_t v : {c, k, cls.y_row + first, cls.y_row + (last < cls.rows ? last : cls.rows),
                        t.token_tile * int(tile_tokens), cls.sparse_stages, cls.dense_stages})
        rows.push_back(v);
    }
  Tensor out = torch::stable::empty({int64_t(rows.size() / 7), 7}, ScalarType::Int);
  std::copy(rows.begin(), rows.end(), static_cast<int32_t*>(out.data_ptr()));
  return out;
}

#ifdef SPENSE_WITH_CUTLASS
void linear_cutlass(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor dense, Tensor weight_scale,
                    std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t arch,
                    int64_t tile, bool overlap, Tensor y) {
  auto const args =
      check_args(x, x_scale, values, metadata, dense, weight_scale, bias, sparse_sizes, dense_sizes, output_split, y);
  if (!args.tokens) return;
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  size_t const bytes = spense_linear_cutlass_workspace(args, int(arch), int(tile));
  Tensor workspace = torch::stable::new_empty(x, {int64_t(bytes)}, ScalarType::Byte);
  check_status(spense_linear_cutlass(args, int(arch), int(tile), workspace.data_ptr(), bytes, overlap, stream_of(x)),
               "linear_cutlass");
}

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

#define SPENSE_LAYER                                                                                               \
  "Tensor x, Tensor x_scale, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, Tensor weight_scale, " \
  "Tensor? bias, int[] sparse_sizes, int[] dense_sizes, bool output_split, "

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("linear_sm90(" SPENSE_LAYER
        "int tile_rows, int tile_tokens, int cluster, bool multicast, bool overlap, Tensor(a!) y) -> ()");
  m.def(
      "linear_silu_mul_sm90(Tensor x, Tensor x_scale, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, "
      "Tensor weight_scale, Tensor? bias, int[] sparse_sizes, int[] dense_sizes, int tile_tokens, int cluster, "
      "bool multicast, bool overlap, Tensor(a!) y, Tensor(b!) amax) -> ()");
  m.def("linear_twell_sm90(" SPENSE_LAYER
        "int tile_tokens, int cluster, bool multicast, bool overlap, int share, float threshold, Tensor(a!) words, "
        "Tensor(b!) y) -> ()");
  m.def(
      "sm90_clusters(int tile_rows, int tile_tokens, int cluster, bool multicast, bool paired=False, "
      "bool packed=False) -> int");
  m.def(
      "tile_plan(int tokens, int out_features, int in_features, int[] sparse_sizes, int[] dense_sizes, "
      "bool output_split, int tile_rows, int tile_tokens, int group, int sparse_k, int lead, "
      "int clusters, bool paired=False) -> Tensor");
#ifdef SPENSE_WITH_CUTLASS
  m.def("linear_cutlass(" SPENSE_LAYER "int arch, int tile, bool overlap, Tensor(a!) y) -> ()");
  m.def("cutlass_capabilities() -> int[]");
#endif
}
STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("linear_sm90", TORCH_BOX(&linear_sm90));
  m.impl("linear_silu_mul_sm90", TORCH_BOX(&linear_silu_mul_sm90));
  m.impl("linear_twell_sm90", TORCH_BOX(&linear_twell_sm90));
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
