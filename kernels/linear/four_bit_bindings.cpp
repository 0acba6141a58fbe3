// torch operators of the kernels for layers in 4 bits; how operators are bound: see linear/bindings.cpp.
#include <algorithm>
#include "linear/check.h"
#include "linear/four_bit.h"

namespace {

using namespace spense;

void check_beside(Tensor const& t, char const* name, Tensor const& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), "spense: ", name,
                  " must be on the device of the weights");
}

float const* floats(Tensor const& t, char const* name, int64_t count, Tensor const& first) {
  check_beside(t, name, first);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, "spense: ", name,
                  " must be contiguous and fp32 with ", count, " values");
  return static_cast<float const*>(t.data_ptr());
}

// `stored`: columns that have a code.
FourBitMatrix check_region(char const* name, Tensor const& codes, Tensor const& absmax, Tensor const& first,
                           int64_t rows, int64_t columns, int64_t stored, int64_t block) {
  STD_TORCH_CHECK(block >= 16 && block <= (1 << 24) && (block & (block - 1)) == 0, "spense: blocks of ", block,
                  " values must be a power of two from 16 on");
  STD_TORCH_CHECK(columns % 32 == 0, "spense: ", columns, " columns of a region must be a multiple of 32");
  check_matrix(codes, name, ScalarType::Byte, 2);
  check_beside(codes, name, first);
  STD_TORCH_CHECK(codes.size(0) == rows && codes.size(1) == stored / 2, "spense: ", name, " must be [", rows, ", ",
                  stored / 2, "]");
  FourBitMatrix m{};
  m.rows = int(rows);
  m.columns = int(columns);
  m.absmax_pitch = int((stored + block - 1) / block);
  while ((1 << m.block_shift) < block) ++m.block_shift;
  m.codes = static_cast<uint8_t const*>(codes.data_ptr());
  m.absmax = floats(absmax, "absmax", rows * m.absmax_pitch, first);
  return m;
}

// A layer's weights and the dtype of y; an error says what is wrong with them.
FourBitArgs check_layer(int64_t n, int64_t k, Tensor const& values, Tensor const& meta, Tensor const& sparse_absmax,
                        Tensor const& codes, Tensor const& dense_absmax, Tensor const& tables, Ints const& sparse_sizes,
                        Ints const& dense_sizes, bool output_split, Ints const& blocks, Tensor const& y) {
  LinearArgs const sizes = sizes_of(0, n, k, sparse_sizes, dense_sizes, output_split);
  FourBitArgs a{};
  a.out_features = sizes.out_features;
  a.in_features = sizes.in_features;
  a.output_split = sizes.output_split;
  a.shards = sizes.shards;
  std::copy(sizes.sparse, sizes.sparse + kMaxShards, a.sparse);
  std::copy(sizes.dense, sizes.dense + kMaxShards, a.dense);
  STD_TORCH_CHECK(k % 32 == 0, "spense: in_features ", k, " must be a multiple of 32");
  STD_TORCH_CHECK(blocks.size() == 2, "spense: a block of each region");
  int64_t sparse = 0, dense = 0;
  for (int i = 0; i < a.shards; ++i) {
    sparse += a.sparse[i];
    dense += a.dense[i];
  }
  float const* const table = floats(tables, "tables", 32, y);
  if (sparse > 0) {
    int64_t const rows = output_split ? sparse : n, columns = output_split ? k : sparse;
    a.sparse_weight = check_region("sparse_values", values, sparse_absmax, y, rows, columns, columns / 2, blocks[0]);
    check_matrix(meta, "sparse_meta", ScalarType::Byte, 2);
    check_beside(meta, "sparse_meta", y);
    STD_TORCH_CHECK(meta.size(0) == rows && meta.size(1) == columns / 8, "spense: sparse_meta must be [", rows, ", ",
                    columns / 8, "]");
    a.sparse_weight.meta = static_cast<uint8_t const*>(meta.data_ptr());
  }
  if (dense > 0) {
    int64_t const rows = output_split ? dense : n, columns = output_split ? k : dense;
    a.dense_weight = check_region("dense_weight", codes, dense_absmax, y, rows, columns, columns, blocks[1]);
  }
  a.sparse_weight.table = table;
  a.dense_weight.table = table + 16;
  check_matrix(y, "y", y.scalar_type(), 2);
  a.dtype = dtype_of(y, "y");
  a.y = y.data_ptr();
  return a;
}

void linear_four_bit(Tensor x, Tensor values, Tensor meta, Tensor sparse_absmax, Tensor codes, Tensor dense_absmax,
                     Tensor tables, std::optional<Tensor> bias, Ints sparse_sizes, Ints dense_sizes, bool output_split,
                     Ints blocks, bool shuffle, Tensor y) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "spense: x must be bf16 or fp16");
  check_matrix(x, "x", x.scalar_type(), 2);
  check_matrix(y, "y", x.scalar_type(), 2);
  check_beside(x, "x", y);
  int64_t const tokens = x.size(0), n = y.size(1);
  STD_TORCH_CHECK(tokens < (1 << 24) && y.size(0) == tokens, "spense: y must be [", tokens, ", N]");
  auto args = check_layer(n, x.size(1), values, meta, sparse_absmax, codes, dense_absmax, tables, sparse_sizes,
                          dense_sizes, output_split, blocks, y);
  if (bias) {
    check_beside(*bias, "bias", y);
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->numel() == n && bias->is_contiguous(),
                    "spense: bias must be [", n, "] in the dtype of x");
    args.bias = bias->data_ptr();
  }
  args.tokens = int(tokens);
  args.x = x.data_ptr();
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  check_status(spense::linear_four_bit(args, shuffle, stream_of(y)), "linear_four_bit");
}

void dequantize_four_bit(Tensor values, Tensor meta, Tensor sparse_absmax, Tensor codes, Tensor dense_absmax,
                         Tensor tables, Ints sparse_sizes, Ints dense_sizes, bool output_split, Ints blocks,
                         bool shuffle, Tensor y) {
  check_matrix(y, "y", y.scalar_type(), 2);
  auto const args = check_layer(y.size(0), y.size(1), values, meta, sparse_absmax, codes, dense_absmax, tables,
                                sparse_sizes, dense_sizes, output_split, blocks, y);
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  check_status(spense::dequantize_four_bit(args, shuffle, stream_of(y)), "dequantize_four_bit");
}

void load_four_bit() { check_status(spense::load_four_bit(), "load_four_bit"); }

#define SPENSE_LAYER                                                                                           \
  "Tensor sparse_values, Tensor sparse_meta, Tensor sparse_absmax, Tensor dense_weight, Tensor dense_absmax, " \
  "Tensor tables, "
#define SPENSE_SIZES "int[] sparse_sizes, int[] dense_sizes, bool output_split, int[] blocks, bool shuffle, "

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("linear_four_bit(Tensor x, " SPENSE_LAYER "Tensor? bias, " SPENSE_SIZES "Tensor(a!) y) -> ()");
  m.def("dequantize_four_bit(" SPENSE_LAYER SPENSE_SIZES "Tensor(a!) y) -> ()");
  m.def("load_four_bit() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("linear_four_bit", TORCH_BOX(&linear_four_bit));
  m.impl("dequantize_four_bit", TORCH_BOX(&dequantize_four_bit));
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) { m.impl("load_four_bit", TORCH_BOX(&load_four_bit)); }

}  // namespace
