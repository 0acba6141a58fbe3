// torch operators of the CPU kernels, on libtorch's stable ABI (torch 2.11 and later).
#include <emmintrin.h>
#include <sys/mman.h>
#include <bit>
#include <iterator>
#include <memory>
#include <optional>
#include "linear/cpu/int8.h"
#include "linear/cpu/isa.h"
#include "linear/cpu/operator.h"

namespace {

using namespace spense;
using namespace spense::cpu;

// Instruction sets by number, in the order of ISAS of vllm_spense.ops: what they need and the functions of each codec,
// or null where they are no better than those before.
struct Isa {
  bool (*here)();
  Functions const* codec[kCodecs];
};
constexpr Isa kIsas[] = {
    {has_avx2, {&fp8_avx2, &int8_avx2}},
    {has_avx_vnni, {nullptr, &int8_avx_vnni}},
    {has_avx512, {&fp8_avx512, nullptr}},
    {has_avx512_vnni, {nullptr, &int8_avx512_vnni}},
    {has_avx512_bf16, {&fp8_avx512_bf16, nullptr}},
    {has_amx, {&fp8_amx, &int8_amx}},
};

// Bit i: this CPU can run what there is for a codec in instruction set i.
int64_t cpu_isas(int64_t codec) {
  STD_TORCH_CHECK(0 <= codec && codec < kCodecs, "spense: there is no codec ", codec);
  int64_t found = 0;
  for (size_t i = 0; i < std::size(kIsas); ++i) found |= int64_t(kIsas[i].codec[codec] && kIsas[i].here()) << i;
  return found;
}

// `isa` from 1 on, or the best one for 0.
Functions const& functions_of(Codec codec, int64_t isa) {
  static int64_t const here[kCodecs] = {cpu_isas(kFp8), cpu_isas(kInt8)};
  int64_t const best = std::bit_width(uint64_t(here[codec]));
  if (!isa) isa = best;
  STD_TORCH_CHECK(0 < isa && isa <= best && here[codec] >> (isa - 1) & 1, "spense: instruction set ", isa,
                  " is none that this CPU has kernels in");
  return *kIsas[isa - 1].codec[codec];
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

// Every 16 rows of T [16, pitch] become [pitch, 16].
template <class T>
void transpose_rows(uint8_t const* from, int64_t pitch, uint8_t* to) {
  auto const* rows = reinterpret_cast<T const*>(from);
  auto* columns = reinterpret_cast<T*>(to);
  int64_t c = 0;
  if constexpr (sizeof(T) == 1)
    for (; c + 16 <= pitch; c += 16) transpose(from + c, pitch, to + c * kRows);
  for (; c < pitch; ++c)
    for (int r = 0; r < kRows; ++r) columns[c * kRows + r] = rows[r * pitch + c];
}

// Every 16 rows [16, pitch] of units of 1 or 4 bytes become [pitch, 16], in place.
void interleave_rows_cpu(Tensor bytes, int64_t unit) {
  check(bytes, "the tensor to interleave",
        bytes.element_size() == 1 && bytes.dim() == 2 && bytes.size(0) % kRows == 0 && (unit == 1 || unit == kUnit) &&
            bytes.size(1) % unit == 0,
        "of bytes [a multiple of 16, bytes of a row], in units of 1 or 4");
  int64_t const row = bytes.size(1), strips = bytes.size(0) / kRows;
  if (!bytes.numel()) return;
  auto* const data = static_cast<uint8_t*>(bytes.data_ptr());
  torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (kRows * row)), [&](int64_t from, int64_t to) {
    std::unique_ptr<uint8_t[]> rows(new uint8_t[kRows * row]);
    for (int64_t s = from; s < to; ++s) {
      uint8_t* const strip = data + s * kRows * row;
      std::memcpy(rows.get(), strip, kRows * row);
      if (unit == 1)
        transpose_rows<uint8_t>(rows.get(), row, strip);
      else
        transpose_rows<uint32_t>(rows.get(), row / kUnit, strip);
    }
  });
}

// Asks Linux for huge pages where the tensor lies, so that reading weights takes fewer walks through page tables: what
// has been touched moves there now, the rest will be there when it is touched.
void huge_pages_cpu(Tensor bytes, bool touched) {
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1 and later; refused by others, which may do it by and by
  auto const begin = reinterpret_cast<uintptr_t>(bytes.data_ptr()), end = begin + bytes.numel() * bytes.element_size();
  uintptr_t const from = (begin + kHuge - 1) / kHuge * kHuge, to = end / kHuge * kHuge;
  if (from >= to) return;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  if (touched) madvise(reinterpret_cast<void*>(from), to - from, kCollapse);
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

std::vector<Rows> rows_of(uint8_t const* values, uint8_t const* meta, uint8_t const* dense, int64_t bits, int64_t n,
                          int64_t k, Ints const& sparse, Ints const& dense_sizes, bool output_split) {
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

Tensor linear_cpu(Tensor x, Tensor values, Tensor meta, Tensor dense, Tensor weight_scale, std::optional<Tensor> bias,
                  Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t isa) {
  bool const int8 = values.scalar_type() == ScalarType::Char;
  ScalarType const stored = int8 ? ScalarType::Char : ScalarType::Byte;
  Functions const& run = functions_of(int8 ? kInt8 : kFp8, isa);
  int64_t const bits = run.weight_bits;
  Dtype const dtype = dtype_of(x, "x");
  check(x, "x", x.dim() == 2, "[M, K]");
  check(weight_scale, "weight_scale", weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1,
        "fp32 [N]");
  int64_t const tokens = x.size(0), k = x.size(1), n = weight_scale.numel(), in = up(k);
  if (bias) check(*bias, "bias", bias->scalar_type() == x.scalar_type() && bias->numel() == n, "[N] in the dtype of x");
  STD_TORCH_CHECK(
      !sparse_sizes.empty() && sparse_sizes.size() == dense_sizes.size() && (output_split || sparse_sizes.size() == 1),
      "spense: one size of each region per fused shard is needed, and an input split has one shard");
  int64_t total = 0, sparse_area = 0, dense_area = 0;
  for (size_t i = 0; i < sparse_sizes.size(); ++i) {
    int64_t const s = sparse_sizes[i], d = dense_sizes[i];
    int64_t const limit = output_split ? n : k;
    STD_TORCH_CHECK(0 <= s && s <= limit && 0 <= d && d <= limit, "spense: a region of ", s, " and ", d,
                    " is not within 0 to ", limit);
    total += s + d;
    sparse_area += output_split ? up(s) * in : up(n) * up(s);
    dense_area += output_split ? up(d) * in : d ? up(n) * (in - down(s)) : 0;
  }
  STD_TORCH_CHECK(total == (output_split ? n : k), "spense: region sizes sum to ", total, ", not to ",
                  output_split ? n : k);
  check(values, "sparse_values", values.scalar_type() == stored && values.numel() == bytes_of(sparse_area / 2, bits),
        "interleaved (spense::interleave_rows_cpu)");
  check(meta, "sparse_meta", meta.scalar_type() == ScalarType::Byte && meta.numel() == sparse_area / 8,
        "interleaved (spense::interleave_rows_cpu)");
  check(dense, "dense_weight", dense.scalar_type() == stored && dense.numel() == bytes_of(dense_area, bits),
        "interleaved (spense::interleave_rows_cpu)");

  Tensor y = torch::stable::new_empty(x, {tokens, n});
  auto const pieces =
      rows_of(static_cast<uint8_t const*>(values.data_ptr()), static_cast<uint8_t const*>(meta.data_ptr()),
              static_cast<uint8_t const*>(dense.data_ptr()), bits, n, k, sparse_sizes, dense_sizes, output_split);
  int64_t strips = 0;
  for (Rows const& rows : pieces) strips += rows.strips();
  int64_t const width = x.element_size(), pitch = (in / 64 + 2) * 64;  // no power of two: other sets of the cache
  int64_t const room = up(std::min(tokens, kTogether));  // kernels read sixteens, and drop what is too much
  Buffer const quantized(room * pitch * run.x_bytes);
  std::unique_ptr<float[]> scales(new float[room]);
  auto const* const scale = static_cast<float const*>(weight_scale.data_ptr());
  auto const* const added = bias ? static_cast<char const*>(bias->data_ptr()) : nullptr;

  for (int64_t first = 0; first < tokens; first += kTogether) {
    int64_t const count = std::min<int64_t>(kTogether, tokens - first);
    auto const* const source = static_cast<char const*>(x.data_ptr()) + first * k * width;
    auto* const target = static_cast<char*>(y.data_ptr()) + first * n * width;
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)),
                                [&](int64_t from, int64_t to) {
                                  PlainArithmetic const plain;
                                  run.quantize(source, dtype, k, from, to, count, quantized.bytes, pitch, scales.get());
                                });
    torch::stable::parallel_for(
        0, strips, std::max<int64_t>(1, kGrain / (kRows * std::max<int64_t>(1, k * count))),
        [&](int64_t from, int64_t to) {
          PlainArithmetic const plain;
          int64_t const together = std::min<int64_t>(run.tokens, count);
          Buffer const out(run.count * together * kRows * sizeof(float));
          std::unique_ptr<Strip[]> const strips_here(new Strip[run.count]);
          int64_t before = 0;
          for (Rows const& rows : pieces) {
            int64_t const end = std::min(to - before, rows.strips());
            for (int64_t i = std::max(from - before, int64_t(0)); i < end; i += run.count) {
              int const some = int(std::min<int64_t>(run.count, end - i));
              for (int s = 0; s < some; ++s) strips_here[s] = rows.strip(i + s);
              for (int64_t t = 0; t < count; t += together) {
                int const here = int(std::min<int64_t>(together, count - t));
                run.strips(strips_here.get(), some, quantized.bytes + t * pitch * run.x_bytes, pitch, here, out.bytes);
                int64_t const row = rows.y + i * kRows;
                int const height = int(std::min<int64_t>(some * kRows, rows.count - i * kRows));
                run.finish(out.bytes, here, height, scales.get() + t, scale + row,
                           added ? added + row * width : nullptr, dtype, target + (t * n + row) * width, n);
              }
            }
            before += rows.strips();
          }
        });
  }
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("cpu_isas(int codec) -> int");
  m.def("huge_pages_cpu(Tensor(a!) bytes, bool touched) -> ()");
  m.def("interleave_rows_cpu(Tensor(a!) bytes, int unit) -> ()");
  m.def(
      "linear_cpu(Tensor x, Tensor sparse_values, Tensor sparse_meta, Tensor dense_weight, Tensor weight_scale, "
      "Tensor? bias, int[] sparse_sizes, int[] dense_sizes, bool output_split, int isa=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) { m.impl("cpu_isas", TORCH_BOX(&cpu_isas)); }
STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("huge_pages_cpu", TORCH_BOX(&huge_pages_cpu));
  m.impl("interleave_rows_cpu", TORCH_BOX(&interleave_rows_cpu));
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
}

}  // namespace
