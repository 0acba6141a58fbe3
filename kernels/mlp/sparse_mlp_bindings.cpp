// torch operators of the kernels behind the gate of an activation-sparse MLP; how operators are bound: see
// linear/bindings.cpp.
#include <optional>
#include "common/cuda_calls.h"
#include "mlp/sparse_mlp.h"

namespace {

using namespace spense;

void check_beside(Tensor const& t, char const* name, Tensor const& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), "spense: ", name,
                  " must be on the device of the gate");
}

void const* matrix(Tensor const& t, char const* name, int64_t rows, int64_t columns, Tensor const& first) {
  check_matrix(t, name, ScalarType::BFloat16, 2);
  check_beside(t, name, first);
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, "spense: ", name, " must be [", rows, ", ", columns, "]");
  return t.data_ptr();
}

void const* vector(std::optional<Tensor> const& t, char const* name, int64_t count, Tensor const& first) {
  if (!t) return nullptr;
  check_beside(*t, name, first);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::BFloat16 && t->numel() == count && t->is_contiguous(),
                  "spense: ", name, " must be bf16 [", count, "]");
  return t->data_ptr();
}

// The gate, its words and how they are read; an error says what is wrong with them.
SparseMlpArgs check_gate(Tensor const& gate, Tensor const& words, int64_t tile, int64_t share, int64_t kind,
                         double threshold) {
  check_matrix(gate, "gate", ScalarType::BFloat16, 2);
  SparseMlpArgs a{};
  int64_t const tokens = gate.size(0), neurons = gate.size(1);
  STD_TORCH_CHECK(tokens < (1 << 20) && neurons <= 0xFFFF && neurons % 8 == 0, "spense: a gate of [", tokens, ", ",
                  neurons, "] must have fewer than 2^20 tokens and a multiple of 8 neurons up to 65535");
  a.twell = {int(tile), int(share), float(threshold)};
  STD_TORCH_CHECK(a.twell.legal(int(neurons)), "spense: no words hold 1/", share, " of a tile of ", tile,
                  " neurons above a threshold of ", threshold);
  STD_TORCH_CHECK(kind >= kRelu && kind <= kInput, "spense: no activation has the number ", kind);
  a.tokens = int(tokens);
  a.neurons = int(neurons);
  a.kind = int(kind);
  a.gate = gate.data_ptr();
  int64_t const tiles = (neurons + tile - 1) / tile;
  check_beside(words, "words", gate);
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.is_contiguous() && words.dim() == 3 &&
                      words.size(0) == tokens && words.size(1) == tiles && words.size(2) == tile / share,
                  "spense: words must be contiguous and int32 [", tokens, ", ", tiles, ", ", tile / share, "]");
  a.words = static_cast<uint32_t*>(words.data_ptr());
  return a;
}

void pack_twell(Tensor gate, int64_t tile, int64_t share, int64_t kind, double threshold, Tensor words) {
  auto const args = check_gate(gate, words, tile, share, kind, threshold);
  torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  check_status(spense::pack_twell(args, stream_of(gate)), "pack_twell");
}

void sparse_mlp(Tensor gate, Tensor words, std::optional<Tensor> x, std::optional<Tensor> up,
                std::optional<Tensor> up_bias, Tensor down_t, std::optional<Tensor> bias, int64_t tile, int64_t share,
                int64_t kind, double threshold, Tensor y) {
  auto args = check_gate(gate, words, tile, share, kind, threshold);
  STD_TORCH_CHECK(x.has_value() == (kind != kInput) && up.has_value() == (kind != kInput),
                  "spense: x and up belong to a gated MLP, and to nothing else");
  if (x) {
    int64_t const k = x->dim() == 2 ? x->size(1) : 0;
    STD_TORCH_CHECK(k % 8 == 0 && k < (1 << 24), "spense: in_features ", k, " must be a multiple of 8");
    args.in_features = int(k);
    args.x = matrix(*x, "x", args.tokens, k, gate);
    args.up = matrix(*up, "up", args.neurons, k, gate);
  }
  int64_t const n = y.dim() == 2 ? y.size(1) : 0;
  STD_TORCH_CHECK(n % 8 == 0 && n < (1 << 24), "spense: out_features ", n, " must be a multiple of 8");
  args.out_features = int(n);
  args.up_bias = vector(up_bias, "up_bias", args.neurons, gate);
  args.down_t = matrix(down_t, "down_t", args.neurons, n, gate);
  args.bias = vector(bias, "bias", n, gate);
  args.y = const_cast<void*>(matrix(y, "y", args.tokens, n, gate));
  torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  Tensor ids = torch::stable::new_empty(gate, {args.tokens, args.neurons}, ScalarType::Int);
  Tensor inputs = torch::stable::new_empty(gate, {args.tokens, args.neurons}, ScalarType::Float);
  args.ids = static_cast<uint32_t*>(ids.data_ptr());
  args.inputs = static_cast<float*>(inputs.data_ptr());
  check_status(spense::sparse_mlp(args, stream_of(gate)), "sparse_mlp");
}

void load_sparse_mlp() { check_status(spense::load_sparse_mlp(), "load_sparse_mlp"); }

#define SPENSE_WORDS "int tile, int share, int kind, float threshold, "

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("pack_twell(Tensor gate, " SPENSE_WORDS "Tensor(a!) words) -> ()");
  m.def(
      "sparse_mlp_packed(Tensor gate, Tensor words, Tensor? x, Tensor? up, Tensor? up_bias, Tensor down_t, "
      "Tensor? bias, " SPENSE_WORDS "Tensor(a!) y) -> ()");
  m.def("load_sparse_mlp() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CUDA, m) {
  m.impl("pack_twell", TORCH_BOX(&pack_twell));
  m.impl("sparse_mlp_packed", TORCH_BOX(&sparse_mlp));
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) {
  m.impl("load_sparse_mlp", TORCH_BOX(&load_sparse_mlp));
}

}  // namespace
