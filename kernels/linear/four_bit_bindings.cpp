// torch operators of the kernels for dense layers in 4 bits; how they are bound: see linear/bindings.cpp.
#include <optional>
#include "common/cuda_calls.h"
#include "linear/four_bit.h"

namespace {

using namespace spense;

void check_floats(Tensor const& t, char const* name, int64_t count, Tensor const& beside) {
  STD_TORCH_CHECK(t.is_cuda() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count,
                  "spense: ", name, " must be fp32 with ", count, " values, contiguous and on a CUDA device");
  STD_TORCH_CHECK(t.get_device_index() == beside.get_device_index(), "spense: ", name, " is on another device");
}

// The weights of a layer; an error says what is wrong with them.
FourBitArgs check_weights(Tensor const& codes, Tensor const& absmax, Tensor const& table, int64_t block) {
  check_matrix(codes, "codes", ScalarType::Byte, 2);
  int64_t const n = codes.size(0), k = 2 * codes.size(1);
  STD_TORCH_CHECK(n < (1 << 24) && k < (1 << 24), "spense: sizes beyond 2^24");
  STD_TORCH_CHECK(k > 0 && k % 32 == 0, "spense: in_features ", k, " must be a multiple of 32");
  STD_TORCH_CHECK(block >= 16 && block <= (1 << 24) && (block & (block - 1)) == 0, "spense: blocks of ", block,
                  " values must be a power of two from 16 on");
  FourBitArgs a{};
  a.out_features = int(n);
  a.in_features = int(k);
  while ((1 << a.block_shift) < block) ++a.block_shift;
  a.absmax_pitch = int((k + block - 1) / block);
  check_floats(absmax, "absmax", n * a.absmax_pitch, codes);
  check_floats(table, "table", 16, codes);
  a.codes = static_cast<uint8_t const*>(codes.data_ptr());
  a.absmax = static_cast<float const*>(absmax.data_ptr());
  a.table = static_cast<float const*>(table.data_ptr());
  return a;
}

void check_beside(Tensor const& t, char const* name, Tensor const& codes) {
  STD_TORCH_CHECK(t.get_device_index() == codes.get_device_index(), "spense: ", name, " is on another device");
}

void linear_four_bit(Tensor x, Tensor codes, Tensor absmax, Tensor table, std::optional<Tensor> bias, int64_t block,
                     bool shuffle, Tensor y) {
  auto args = check_weights(codes, absmax, table, block);
  args.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(args.dtype != kFloat32, "spense: x must be bf16 or fp16");
  check_matrix(x, "x", x.scalar_type(), 2);
  check_matrix(y, "y", x.scalar_type(), 2);
  check_beside(x, "x", codes);
  check_beside(y, "y", codes);
  STD_TORCH_CHECK(x.size(0) < (1 << 24) && x.size(1) == args.in_features, "spense: x must be [M, ", args.in_features,
                  "]");
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.size(1) == args.out_features, "spense: y must be [", x.size(0), ", ",
                  args.out_features, "]");
  if (bias) {
    STD_TORCH_CHECK(bias->is_cuda() && bias->scalar_type() == x.scalar_type() && bias->numel() == args.out_features &&
                        bias->is_contiguous(),
                    "spense: bias must be [", args.out_features, "] in the dtype of x");
    check_beside(*bias, "bias", codes);
    args.bias = bias->data_ptr();
  }
  args.tokens = int(x.size(0));
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  check_status(spense::linear_four_bit(args, shuffle, stream_of(codes)), "linear_four_bit");
}

void dequantize_four_bit(Tensor codes, Tensor absmax, Tensor table, int64_t block, bool shuffle, Tensor y) {
  auto args = check_weights(codes, absmax, table, block);
  args.dtype = dtype_of(y, "y");
  check_matrix(y, "y", y.scalar_type(), 2);
  check_beside(y, "y", codes);
  STD_TORCH_CHECK(y.size(0) == args.out_features && y.size(1) == args.in_features, "spense: y must be [",
                  args.out_features, ", ", args.in_features, "]");
  args.y = y.data_ptr();
  torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  check_status(spense::dequantize_four_bit(args, shuffle, stream_of(codes)), "dequantize_four_bit");
}

void load_four_bit() { check_status(spense::load_four_bit(), "load_four_bit"); }

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def(
      "linear_four_bit(Tensor x, Tensor codes, Tensor absmax, Tensor table, Tensor? bias, int block, bool shuffle, "
      "Tensor(a!) y) -> ()");
  m.def("dequantize_four_bit(Tensor codes, Tensor absmax, Tensor table, int block, bool shuffle, Tensor(a!) y) -> ()");
  m.def("load_four_bit() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("linear_four_bit", TORCH_BOX(&linear_four_bit));
  m.impl("dequantize_four_bit", TORCH_BOX(&dequantize_four_bit));
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) { m.impl("load_four_bit", TORCH_BOX(&load_four_bit)); }

}  // namespace
