// torch operators of the CPU kernels for MLPs of which a token uses few neurons.
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <optional>
#include "linear/cpu/isa.h"
#include "linear/cpu/operator.h"
#include "mlp/cpu/lists.h"

namespace {

using namespace spense;
using namespace spense::cpu;

constexpr int64_t kMost = 1 << 30;  // rows, and columns, so that no product overflows
enum Way : int64_t { kChoose, kActive, kAll, kWays };

// Instruction sets by number, in the order of ISAS of vllm_spense.ops.
struct Isa {
  int64_t number;
  bool (*here)();
  MlpFunctions const* run;
};
constexpr Isa kIsas[] = {
    {1, has_avx2, &mlp_avx2}, {3, has_avx512, &mlp_avx512}, {5, has_avx512_bf16, &mlp_avx512_bf16}};

// Bit i: this CPU can run instruction set i + 1.
int64_t sparse_mlp_isas_cpu() {
  static int64_t const found = [] {
    int64_t bits = 0;
    for (Isa const& isa : kIsas) bits |= int64_t(isa.here()) << (isa.number - 1);
    return bits;
  }();
  return found;
}

// `isa` from 1 on, or the best one for 0.
MlpFunctions const& functions_of(int64_t isa) {
  int64_t const here = sparse_mlp_isas_cpu(), best = std::bit_width(uint64_t(here));
  if (!isa) isa = best;
  for (Isa const& each : kIsas)
    if (each.number == isa && here >> (isa - 1) & 1) return *each.run;
  STD_TORCH_CHECK(false, "spense: instruction set ", isa, " is none that this CPU has kernels in");
}

// Whether it takes less time to compute all neurons than those pairs of token and neuron alone that are active, `share`
// of all. A pair among all takes a fifth of the time that it takes by itself, or less where sums by itself leave the
// cache; of few tokens, reading rows takes most of it, which one at a time do no worse. Measured on an EPYC (Turin);
// with fp32 products all neurons gain half as much.
bool all_are_faster(MlpFunctions const& run, int64_t tokens, double share) {
  double const few = 1 / double(tokens * tokens);
  if (run.hidden_bytes == sizeof(float)) return share > 0.35 + 40 * few;
  return share > (tokens > 128 ? 0.17 : 0.21) + 6 * few;
}

void check_rows(Tensor const& t, char const* name, bool right, char const* wanted) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::BFloat16 && right &&
                      (t.size(1) <= 1 || t.stride(1) == 1) && t.size(0) <= kMost && t.size(1) <= kMost,
                  "spense: ", name, " must be a bf16 CPU tensor ", wanted, " whose rows are contiguous");
}

void check_bias(std::optional<Tensor> const& t, char const* name, int64_t count, char const* wanted) {
  if (t) check(*t, name, t->scalar_type() == ScalarType::BFloat16 && t->dim() == 1 && t->numel() == count, wanted);
}

Rows rows_of(Tensor const& t) { return {static_cast<Bf16Bits const*>(t.data_ptr()), t.stride(0)}; }
Bf16Bits const* data_of(std::optional<Tensor> const& t) {
  return t ? static_cast<Bf16Bits const*>(t->data_ptr()) : nullptr;
}

// Of a threshold that is not negative: the largest bf16 up to it.
int limit_of(double threshold) {
  float const narrow = float(threshold);
  STD_TORCH_CHECK(std::isfinite(narrow) && narrow >= 0, "spense: threshold ", threshold, " must be a number from 0 on");
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return int(bits >> 16);
}

// Runs f on parts of [0, count), each worth a thread of its own if one of them costs so many multiplications.
template <class F>
void in_parallel(int64_t count, int64_t cost, F const& f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)),
                              [&](int64_t from, int64_t to) {
                                PlainArithmetic const plain;
                                f(from, to);
                              });
}

struct Activity {
  int64_t word_count, tokens;
  std::unique_ptr<uint64_t[]> words;
  int64_t pairs = 0;
  double share;

  Activity(MlpFunctions const& run, Rows const& values, int64_t tokens, int64_t width, int limit, bool magnitudes)
      : word_count((width + kWord - 1) / kWord), tokens(tokens), words(new uint64_t[size_t(word_count * tokens)]) {
    std::unique_ptr<int64_t[]> const found(new int64_t[size_t(word_count)]());
    in_parallel(word_count, kWord * tokens, [&](int64_t from, int64_t to) {
      found[size_t(from)] = run.active(values, width, limit, magnitudes, from, to, tokens, words.get());
    });
    for (int64_t w = 0; w < word_count; ++w) pairs += found[size_t(w)];
    share = double(pairs) / double(std::max<int64_t>(1, width * tokens));
  }
  Lists lists(int64_t from, int64_t to) const { return {words.get(), word_count, tokens, from, to}; }
};

// What is computed for all neurons of some tokens: rows of hidden values, padded.
struct Hidden {
  int64_t pitch;
  Buffer values;
  Hidden(MlpFunctions const& run, int64_t tokens, int64_t width)
      : pitch((width + kColumns - 1) / kColumns * kColumns + kColumns),
        values(size_t(std::min(tokens, kAllTokens) * pitch * run.hidden_bytes)) {}
};

void add_all_rows(MlpFunctions const& run, Hidden const& hidden, Tensor const& down_t,
                  std::optional<Tensor> const& bias, int64_t first, int64_t count, Tensor& y) {
  int64_t const width = down_t.size(0), out = down_t.size(1);
  auto* const target = static_cast<Bf16Bits*>(y.data_ptr()) + first * out;
  in_parallel((out + kColumns - 1) / kColumns, kColumns * width * count, [&](int64_t from, int64_t to) {
    OutputPanel const shape(count);
    Buffer const sums(size_t(count * shape.pitch()) * sizeof(float));
    Buffer const packed(shape.packed ? size_t(shape.columns * kTileDepth) * sizeof(Bf16Bits) : 0);
    run.all_outputs(hidden.values.bytes, hidden.pitch, width, rows_of(down_t), data_of(bias), count, from * kColumns,
                    std::min(to * kColumns, out), target, out, reinterpret_cast<float*>(sums.bytes),
                    reinterpret_cast<Bf16Bits*>(packed.bytes));
  });
}

// y for tokens from `first` on, from lists whose values are there.
void add_rows(MlpFunctions const& run, Lists const& lists, Tensor const& down_t, std::optional<Tensor> const& bias,
              int64_t first, int64_t count, Tensor& y) {
  int64_t const out = down_t.size(1);
  auto* const target = static_cast<Bf16Bits*>(y.data_ptr()) + first * out;
  in_parallel((out + kColumns - 1) / kColumns, kColumns * (lists.pairs + count), [&](int64_t from, int64_t to) {
    int64_t const first_column = from * kColumns, end = std::min(to * kColumns, out);
    Buffer const sums(size_t(sums_of(count, end - first_column)) * sizeof(float));
    run.outputs(lists.neurons.data(), int64_t(lists.neurons.size()), lists.tokens.get(), lists.values.get(),
                rows_of(down_t), data_of(bias), count, first_column, end, target, out,
                reinterpret_cast<float*>(sums.bytes));
  });
}

Tensor sparse_mlp_cpu(Tensor x, Tensor gate, Tensor up, Tensor down_t, std::optional<Tensor> up_bias,
                      std::optional<Tensor> bias, int64_t activation, double threshold, int64_t isa, int64_t way) {
  check_rows(x, "x", true, "[M, K]");
  int64_t const tokens = x.size(0), in = x.size(1);
  check_rows(up, "up", up.size(1) == in, "[I, K]");
  int64_t const width = up.size(0);
  check_rows(gate, "gate", gate.size(0) == tokens && gate.size(1) == width, "[M, I]");
  check_rows(down_t, "down_t", down_t.size(0) == width, "[I, N]");
  int64_t const out = down_t.size(1);
  check_bias(up_bias, "up_bias", width, "bf16 [I]");
  check_bias(bias, "bias", out, "bf16 [N]");
  STD_TORCH_CHECK(0 <= activation && activation < kKinds, "spense: there is no activation ", activation);
  STD_TORCH_CHECK(0 <= way && way < kWays, "spense: there is no way ", way);
  Gate const opened{rows_of(gate), Kind(activation), limit_of(threshold)};
  MlpFunctions const& run = functions_of(isa);

  Tensor y = torch::stable::new_empty(x, {tokens, out});
  Activity const activity(run, opened.values, tokens, width, opened.limit, false);
  if (way == kAll || (way == kChoose && all_are_faster(run, tokens, activity.share))) {
    Hidden const hidden(run, tokens, width);
    for (int64_t first = 0; first < tokens; first += kAllTokens) {
      int64_t const count = std::min(kAllTokens, tokens - first);
      Rows const x_here{rows_of(x).row(first), x.stride(0)};
      Gate const gate_here{{opened.values.row(first), opened.values.pitch}, opened.kind, opened.limit};
      in_parallel((width + kPanel - 1) / kPanel, kPanel * in * count, [&](int64_t from, int64_t to) {
        Buffer const products(size_t(count * kPanelPitch) * sizeof(float));
        Buffer const packed(kTileDepth * kPanel * sizeof(Bf16Bits));
        run.all_hidden(x_here, gate_here, rows_of(up), data_of(up_bias), in, count, from * kPanel,
                       std::min(to * kPanel, width), hidden.values.bytes, hidden.pitch,
                       reinterpret_cast<float*>(products.bytes), reinterpret_cast<Bf16Bits*>(packed.bytes));
      });
      add_all_rows(run, hidden, down_t, bias, first, count, y);
    }
    return y;
  }
  for (int64_t first = 0; first < tokens; first += kMlpTokens) {
    int64_t const count = std::min(kMlpTokens, tokens - first);
    Lists lists = activity.lists(first, first + count);
    auto const used = int64_t(lists.neurons.size());
    Rows const x_here{rows_of(x).row(first), x.stride(0)};
    Gate const gate_here{{opened.values.row(first), opened.values.pitch}, opened.kind, opened.limit};
    in_parallel(used, in * (lists.pairs / std::max<int64_t>(1, used)), [&](int64_t from, int64_t to) {
      run.hidden(x_here, gate_here, rows_of(up), data_of(up_bias), in, lists.neurons.data(), from, to,
                 lists.tokens.get(), lists.values.get());
    });
    add_rows(run, lists, down_t, bias, first, count, y);
  }
  return y;
}

Tensor sparse_input_linear_cpu(Tensor x, Tensor weight_t, std::optional<Tensor> bias, double threshold, int64_t isa,
                               int64_t way) {
  check_rows(x, "x", true, "[M, K]");
  int64_t const tokens = x.size(0), in = x.size(1);
  check_rows(weight_t, "weight_t", weight_t.size(0) == in, "[K, N]");
  check_bias(bias, "bias", weight_t.size(1), "bf16 [N]");
  STD_TORCH_CHECK(0 <= way && way < kWays, "spense: there is no way ", way);
  int const limit = limit_of(threshold);
  MlpFunctions const& run = functions_of(isa);

  Rows const values = rows_of(x);
  Tensor y = torch::stable::new_empty(x, {tokens, weight_t.size(1)});
  Activity const activity(run, values, tokens, in, limit, true);
  if (way == kAll || (way == kChoose && all_are_faster(run, tokens, activity.share))) {
    Hidden const hidden(run, tokens, in);
    for (int64_t first = 0; first < tokens; first += kAllTokens) {
      int64_t const count = std::min(kAllTokens, tokens - first);
      in_parallel(count, in, [&](int64_t from, int64_t to) {
        run.spread({values.row(first), values.pitch}, in, limit, from, to, hidden.values.bytes, hidden.pitch);
      });
      add_all_rows(run, hidden, weight_t, bias, first, count, y);
    }
    return y;
  }
  for (int64_t first = 0; first < tokens; first += kMlpTokens) {
    int64_t const count = std::min(kMlpTokens, tokens - first);
    Lists const lists = activity.lists(first, first + count);
    for (Neuron const& neuron : lists.neurons)
      for (int64_t i = neuron.first; i < neuron.first + neuron.tokens; ++i) {
        uint32_t const bits = uint32_t(values.row(first + lists.tokens[size_t(i)])[neuron.row]) << 16;
        std::memcpy(&lists.values[size_t(i)], &bits, sizeof bits);
      }
    add_rows(run, lists, weight_t, bias, first, count, y);
  }
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("sparse_mlp_isas_cpu() -> int");
  m.def(
      "sparse_mlp_cpu(Tensor x, Tensor gate, Tensor up, Tensor down_t, Tensor? up_bias, Tensor? bias, int activation, "
      "float threshold, int isa=0, int way=0) -> Tensor");
  m.def(
      "sparse_input_linear_cpu(Tensor x, Tensor weight_t, Tensor? bias, float threshold, int isa=0, int way=0) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) {
  m.impl("sparse_mlp_isas_cpu", TORCH_BOX(&sparse_mlp_isas_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("sparse_mlp_cpu", TORCH_BOX(&sparse_mlp_cpu));
  m.impl("sparse_input_linear_cpu", TORCH_BOX(&sparse_input_linear_cpu));
}

}  // namespace
