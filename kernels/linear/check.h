// From an operator's tensors to LinearArgs: every size, dtype, pitch and device is checked before a kernel gets a pointer.
#pragma once
#include <optional>
#include "common/cuda_calls.h"
#include "linear/arguments.h"

namespace spense {

// Sizes only, no pointers: enough for tile plans.
inline LinearArgs sizes_of(int64_t tokens, int64_t out_features, int64_t in_features, Ints const& sparse, Ints const& dense, bool output_split) {
  LinearArgs a{};
  a.tokens = int(tokens);
  a.out_features = int(out_features);
  a.in_features = int(in_features);
  a.output_split = output_split;
  a.shards = int(sparse.size());
  STD_TORCH_CHECK(tokens < (1 << 24) && out_features < (1 << 24) && in_features < (1 << 24), "spense: sizes beyond 2^24");
  STD_TORCH_CHECK(sparse.size() == dense.size() && !sparse.empty() && a.shards <= kMaxShards, "spense: 1 to ",
                  kMaxShards, " fused shards are supported, got ", sparse.size(), " and ", dense.size());
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

// A layer's tensors as the launchers take them; an error says which is wrong. `y_shards`: 2 where y joins two shards.
inline LinearArgs check_args(Tensor const& x, Tensor const& x_scale, Tensor const& values, Tensor const& metadata, Tensor const& dense,
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
  LinearArgs a = sizes_of(tokens, n, k, sparse_sizes, dense_sizes, output_split);
  a.x = static_cast<uint8_t const*>(x.data_ptr());
  a.x_scale = static_cast<float const*>(x_scale.data_ptr());
  a.weight_scale = static_cast<float const*>(weight_scale.data_ptr());
  a.y = y.data_ptr();
  a.out_dtype = dtype_of(y, "y");
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
                    "spense: sparse_meta must be in the kernels' block layout (repack.py)");
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

}  // namespace spense
