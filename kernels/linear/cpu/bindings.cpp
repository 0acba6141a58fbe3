// torch operators of the CPU kernels, on libtorch's stable ABI (torch 2.11 and later).
#include <cpuid.h>
#include <emmintrin.h>
#include <memory>
#include <optional>
#include "common/stable_abi.h"
#include "linear/cpu/kernels.h"

namespace {

using namespace spense;
using namespace spense::cpu;

constexpr int64_t kQuantized = 4 * kTokens;  // tokens whose fp32 values are kept at a time
constexpr int64_t kGrain = 1 << 15;          // values that are worth a second thread

int64_t up(int64_t n) { return (n + kStep - 1) / kStep * kStep; }
int64_t down(int64_t n) { return n / kStep * kStep; }

// Instruction sets by number, in the order of ISAS of vllm_spense.ops; a CPU that has one has those before it.
constexpr Table const* kTables[] = {nullptr, &avx2, &avx512, &avx512_bf16};

// The best of this CPU, 0 for none.
int64_t cpu_isa() {
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !(c & bit_F16C)) return 0;
  if (!__builtin_cpu_supports("avx512f")) return 1;
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

void check(Tensor const& t, char const* name, bool right, char const* wanted) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && right, "spense: ", name, " must be a contiguous CPU tensor, ", wanted);
}

// 16 rows of 16 bytes, `pitch` apart, to 16 columns: four perfect shuffles of the rows.
void transpose(uint8_t const* from, int64_t pitch, uint8_t* to) {
  __m128i rows[kRows], next[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from + r * pitch));
  for (int turn = 0; turn < 4; ++turn) {
    for (int r = 0; r < kRows / 2; ++r) {
      next[2 * r] = _mm_unpacklo_epi8(rows[r], rows[r + kRows / 2]);
      next[2 * r + 1] = _mm_unpackhi_epi8(rows[r], rows[r + kRows / 2]);
    }
    std::copy(next, next + kRows, rows);
  }
  for (int r = 0; r < kRows; ++r) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + r * kRows), rows[r]);
}

// While it lives, this thread rounds to nearest and flushes no subnormal, whatever somebody has set.
struct PlainArithmetic {
  unsigned const before = _mm_getcsr();
  PlainArithmetic() { _mm_setcsr(0x1F80); }
  ~PlainArithmetic() { _mm_setcsr(before); }
};

// Every 16 rows [16, pitch] become [pitch, 16], in place.
void interleave_rows_cpu(Tensor bytes) {
  check(bytes, "the tensor to interleave", bytes.scalar_type() == ScalarType::Byte && bytes.dim() == 2 && bytes.size(0) % kRows == 0,
        "uint8 [a multiple of 16, bytes of a row]");
  int64_t const pitch = bytes.size(1), strips = bytes.size(0) / kRows;
  if (!bytes.numel()) return;
  auto* const data = static_cast<uint8_t*>(bytes.data_ptr());
  torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (kRows * pitch)), [&](int64_t from, int64_t to) {
    std::unique_ptr<uint8_t[]> rows(new uint8_t[kRows * pitch]);
    for (int64_t s = from; s < to; ++s) {
      uint8_t* const strip = data + s * kRows * pitch;
      std::memcpy(rows.get(), strip, kRows * pitch);
      int64_t c = 0;
      for (; c + 16 <= pitch; c += 16) transpose(rows.get() + c, pitch, strip + c * kRows);
      for (; c < pitch; ++c)
        for (int r = 0; r < kRows; ++r) strip[c * kRows + r] = rows[r * pitch + c];
    }
  });
}

// Consecutive rows of y that lie in the same regions.
struct Rows {
  int64_t y, count, bits;
  Strip first;  // its first strip
  int64_t strips() const { return (count + kRows - 1) / kRows; }
  Strip strip(int64_t i) const {
    Strip s = first;
    s.values += bytes_of(i * kRows * (s.sparse / 2), bits);
    s.meta += i * kRows * (s.sparse / 8);
    s.dense += bytes_of(i * kRows * (s.in - s.dense_from), bits);
    return s;
  }
};

std::vector<Rows> rows_of(uint8_t const* values, uint8_t const* meta, uint8_t const* dense, int64_t bits, int64_t n, int64_t k,
                          Ints const& sparse, Ints const& dense_sizes, bool output_split) {
  int64_t const in = up(k);
  if (!output_split) {
    int64_t const from = dense_sizes[0] ? down(sparse[0]) : in;
    return {{0, n, bits, {values, meta, dense, up(sparse[0]), from, in}}};
  }
  std::vector<Rows> found;
  int64_t y = 0;
  for (size_t i = 0; i < sparse.size(); ++i) {
    if (sparse[i]) found.push_back({y, sparse[i], bits, {values, meta, dense, in, in, in}});
    y += sparse[i];
    values += bytes_of(up(sparse[i]) * in / 2, bits);
    meta += up(sparse[i]) * in / 8;
    if (dense_sizes[i]) found.push_back({y, dense_sizes[i], bits, {values, meta, dense, 0, 0, in}});
    y += dense_sizes[i];
    dense += bytes_of(up(dense_sizes[i]) * in, bits);
  }
  return found;
}

Tensor linear_cpu(Tensor x, Tensor values, Tensor meta, Tensor dense, Tensor weight_scale, std::optional<Tensor> bias, Ints sparse_sizes,
                  Ints dense_sizes, bool output_split, int64_t isa) {
  static int64_t const best = cpu_isa();
  STD_TORCH_CHECK(0 <= isa && isa <= best && best, "spense: instruction set ", isa, " is none of this CPU's 1 to ", best, " (0: the best)");
  Functions const& run = kTables[isa ? isa : best]->codec[kFp8];  // all that the operator's arguments can say
  int64_t const bits = run.weight_bits;
  Dtype const dtype = dtype_of(x, "x");
  check(x, "x", x.dim() == 2, "[M, K]");
  check(weight_scale, "weight_scale", weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1, "fp32 [N]");
  int64_t const tokens = x.size(0), k = x.size(1), n = weight_scale.numel(), in = up(k);
  if (bias) check(*bias, "bias", bias->scalar_type() == x.scalar_type() && bias->numel() == n, "[N] in the dtype of x");
  STD_TORCH_CHECK(!sparse_sizes.empty() && sparse_sizes.size() == dense_sizes.size() && (output_split || sparse_sizes.size() == 1),
                  "spense: one size of each region per fused shard is needed, and an input split has one shard");
  int64_t total = 0, sparse_area = 0, dense_area = 0;
  for (size_t i = 0; i < sparse_sizes.size(); ++i) {
    int64_t const s = sparse_sizes[i], d = dense_sizes[i];
    int64_t const limit = output_split ? n : k;
    STD_TORCH_CHECK(0 <= s && s <= limit && 0 <= d && d <= limit, "spense: a region of ", s, " and ", d, " is not within 0 to ", limit);
    total += s + d;
    sparse_area += output_split ? up(s) * in : up(n) * up(s);
    dense_area += output_split ? up(d) * in : d ? up(n) * (in - down(s)) : 0;
  }
  STD_TORCH_CHECK(total == (output_split ? n : k), "spense: region sizes sum to ", total, ", not to ", output_split ? n : k);
  check(values, "sparse_values", values.scalar_type() == ScalarType::Byte && values.numel() == bytes_of(sparse_area / 2, bits), "interleaved (spense::interleave_rows_cpu)");
  check(meta, "sparse_meta", meta.scalar_type() == ScalarType::Byte && meta.numel() == sparse_area / 8, "interleaved (spense::interleave_rows_cpu)");
  check(dense, "dense_weight", dense.scalar_type() == ScalarType::Byte && dense.numel() == bytes_of(dense_area, bits), "interleaved (spense::interleave_rows_cpu)");

  Tensor y = torch::stable::new_empty(x, {tokens, n});
  auto const pieces = rows_of(static_cast<uint8_t const*>(values.data_ptr()), static_cast<uint8_t const*>(meta.data_ptr()),
                              static_cast<uint8_t const*>(dense.data_ptr()), bits, n, k, sparse_sizes, dense_sizes, output_split);
  int64_t strips = 0;
  for (Rows const& rows : pieces) strips += rows.strips();
  int64_t const width = x.element_size(), pitch = in + kStep;  // not a power of two: tokens in other sets of the cache
  std::unique_ptr<char[]> quantized(new char[std::min(tokens, kQuantized) * pitch * run.x_bytes]);
  std::unique_ptr<float[]> scales(new float[std::min(tokens, kQuantized)]);
  auto const* const scale = static_cast<float const*>(weight_scale.data_ptr());
  auto const* const added = bias ? static_cast<char const*>(bias->data_ptr()) : nullptr;

  for (int64_t first = 0; first < tokens; first += kQuantized) {
    int64_t const count = std::min(kQuantized, tokens - first);
    auto const* const source = static_cast<char const*>(x.data_ptr()) + first * k * width;
    auto* const target = static_cast<char*>(y.data_ptr()) + first * n * width;
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)), [&](int64_t from, int64_t to) {
      PlainArithmetic const plain;
      run.quantize(source, dtype, k, from, to, quantized.get(), pitch, scales.get());
    });
    torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (kRows * std::max<int64_t>(1, k * count))), [&](int64_t from, int64_t to) {
      PlainArithmetic const plain;
      float out[2 * kTokens * kRows];
      int64_t before = 0;
      for (Rows const& rows : pieces) {
        int64_t const end = std::min(to - before, rows.strips());
        for (int64_t i = std::max(from - before, int64_t(0)); i < end; i += 2) {
          int const pair = int(std::min<int64_t>(2, end - i));
          Strip const both[2] = {rows.strip(i), rows.strip(i + pair - 1)};
          for (int64_t t = 0; t < count; t += kTokens) {
            int const here = int(std::min<int64_t>(kTokens, count - t));
            run.strips(both, pair, quantized.get() + t * pitch * run.x_bytes, pitch, here, out);
            for (int s = 0; s < pair; ++s) {
              int64_t const row = rows.y + (i + s) * kRows;
              int const height = int(std::min<int64_t>(kRows, rows.count - (i + s) * kRows));
              run.finish(out + s * here * kRows, here, height, scales.get() + t, scale + row, added ? added + row * width : nullptr, dtype,
                         target + (t * n + row) * width, n);
            }
          }
        }
        before += rows.strips();
      }
    });
  }
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("cpu_isa() -> int");
  m.def("interleave_rows_cpu(Tensor(a!) bytes) -> ()");
  m.def("linear_cpu(Tensor x, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, Tensor weight_scale, Tensor? bias, "
        "int[] sparse_sizes, int[] dense_sizes, bool output_split, int isa=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("interleave_rows_cpu", TORCH_BOX(&interleave_rows_cpu));
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
}

}  // namespace
