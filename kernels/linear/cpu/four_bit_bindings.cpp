// torch operators of the CPU kernels for weights in 4 bits.
#include <array>
#include <bit>
#include <iterator>
#include <memory>
#include <optional>
#include "linear/cpu/four_bit.h"
#include "linear/cpu/isa.h"
#include "linear/cpu/operator.h"

namespace {

using namespace spense;
using namespace spense::cpu;

constexpr int64_t kMost = 1 << 30;   // rows, and columns, so that no product overflows
constexpr int64_t kScaleBytes = 64;  // of the 16 rows of a strip
constexpr int kTable = 16;
constexpr int kFew = 8;  // tokens, for which reading weights takes most of the time

// Instruction sets by number, in the order of ISAS of vllm_spense.ops.
struct Isa {
  int64_t number;
  bool (*here)();
  FourBitFunctions const* run;
};
constexpr Isa kIsas[] = {{1, has_avx2, &four_bit_avx2},
                         {3, has_avx512, &four_bit_avx512},
                         {5, has_avx512_bf16, &four_bit_avx512_bf16},
                         {6, has_amx, &four_bit_amx}};

// Bit i: this CPU can run instruction set i + 1.
int64_t four_bit_isas_cpu() {
  static int64_t const found = [] {
    int64_t bits = 0;
    for (Isa const& isa : kIsas) bits |= int64_t(isa.here()) << (isa.number - 1);
    return bits;
  }();
  return found;
}

// The best functions, up to `isa` if that is not 0, that take x of a dtype and regions from these columns on.
FourBitFunctions const& functions_of(int64_t isa, Dtype dtype, int64_t dense_from) {
  int64_t const here = four_bit_isas_cpu();
  STD_TORCH_CHECK(isa == 0 || (0 < isa && isa < 63 && here >> (isa - 1) & 1), "spense: instruction set ", isa,
                  " is none that this CPU has kernels in");
  FourBitFunctions const* found = nullptr;
  for (Isa const& each : kIsas)
    if (here >> (each.number - 1) & 1 && (!isa || each.number <= isa) && (dtype == kBfloat16 || !each.run->only_bf16) &&
        dense_from % each.run->granule == 0)
      found = each.run;
  STD_TORCH_CHECK(found, "spense: the CPU kernels need AVX2 and FMA");
  return *found;
}

// Parts of about the same size of so many tokens, none larger than `most`: kernels take few tokens otherwise than many,
// and a batch should go one way.
int64_t evenly(int64_t tokens, int64_t most) {
  int64_t const parts = std::max<int64_t>(1, (tokens + most - 1) / most);
  return (tokens + parts - 1) / parts;
}

// One region of a strip: its columns of x and how it is stored. In FP8: 16 scales, metadata, bytes, as strips have
// them.
struct Region {
  int64_t from, columns;
  int block;  // 0: FP8
  bool sparse;
  float const* table = nullptr;

  int64_t stored() const { return sparse ? (columns + 1) / 2 : columns; }
  Blocks blocks(uint8_t const* data) const { return {data, (stored() + block - 1) / block, block, sparse}; }
  Strip strip(uint8_t const* data) const {
    int64_t const in = up(columns);
    uint8_t const *const meta = data + kScaleBytes, *const bytes = meta + (sparse ? in / 8 * kRows : 0);
    return {bytes, meta, bytes, sparse ? in : 0, sparse ? in : 0, in};
  }
  int64_t bytes() const {
    int64_t const in = up(columns);
    if (!columns) return 0;
    if (block) return blocks(nullptr).count * block_bytes_of(blocks(nullptr));
    return kScaleBytes + (sparse ? in / 8 + in / 2 : in) * kRows;
  }
  int64_t end() const { return from + (block && columns ? columns_of(blocks(nullptr)) : up(columns)); }
};

// Consecutive rows of y that lie in the same regions. Of each strip comes first one in FP8, as those in 4 bits can add
// to sums that are there, and the 2:4 region in front of the dense one.
struct Piece {
  int64_t y, count;
  std::array<Region, 2> regions;
  uint8_t const* data = nullptr;
  int64_t strips() const { return (count + kRows - 1) / kRows; }
  int64_t stride() const { return regions[0].bytes() + regions[1].bytes(); }
};

std::vector<Piece> pieces_of(Region sparse, Region dense, int64_t n, int64_t k, Ints const& sparse_sizes,
                             Ints const& dense_sizes, bool output_split) {
  if (!output_split) {
    sparse.columns = dense.from = sparse_sizes[0];
    dense.columns = dense_sizes[0];
    if (!dense.block) std::swap(sparse, dense);
    return {{0, n, {sparse, dense}}};
  }
  std::vector<Piece> found;
  int64_t y = 0;
  for (size_t i = 0; i < sparse_sizes.size(); ++i)
    for (auto const& [rows, region] : {std::pair{sparse_sizes[i], sparse}, std::pair{dense_sizes[i], dense}}) {
      Region whole = region;
      whole.columns = k;
      if (rows) found.push_back({y, rows, {whole, Region{}}});
      y += rows;
    }
  return found;
}

// Sums of some strips.
void add_up(FourBitFunctions const& run, Piece const& piece, int64_t first, int count, void const* x, int64_t pitch,
            int tokens, float* out) {
  constexpr int kCount = 16;
  uint8_t const* data = piece.data + first * piece.stride();
  bool add = false;
  for (Region const& region : piece.regions) {
    if (!region.columns) continue;
    Strip strips[kCount];
    Blocks blocks[kCount];
    float const* scales[kCount];
    for (int s = 0; s < count; ++s) {
      uint8_t const* const here = data + s * piece.stride();
      if (region.block) {
        blocks[s] = region.blocks(here);
      } else {
        strips[s] = region.strip(here);
        scales[s] = reinterpret_cast<float const*>(here);
      }
    }
    region.block ? run.strips(blocks, count, region.table, x, region.from, pitch, tokens, out, add)
                 : run.fp8_strips(strips, count, scales, x, region.from, pitch, tokens, out);
    add = true;
    data += region.bytes();
  }
}

Tensor four_bit_linear_cpu(Tensor x, Tensor packed, Tensor table, std::optional<Tensor> bias, int64_t out_features,
                           Ints sparse_sizes, Ints dense_sizes, bool output_split, int64_t sparse_block,
                           int64_t dense_block, int64_t isa) {
  Dtype const dtype = dtype_of(x, "x");
  check(x, "x", x.dim() == 2 && x.size(1) <= kMost, "[M, K]");
  int64_t const tokens = x.size(0), k = x.size(1), n = out_features, limit = output_split ? n : k;
  STD_TORCH_CHECK(0 <= n && n <= kMost, "spense: there cannot be ", n, " outputs");
  check(table, "table", table.scalar_type() == ScalarType::Float && table.numel() == 2 * kTable, "fp32 [2, 16]");
  if (bias) check(*bias, "bias", bias->scalar_type() == x.scalar_type() && bias->numel() == n, "[N] in the dtype of x");
  for (int64_t const block : {sparse_block, dense_block})
    STD_TORCH_CHECK(block == 0 || block == 16 || block == 32 || block == 64,
                    "spense: blocks must have 16, 32 or 64 values, or 0 in FP8, not ", block);
  STD_TORCH_CHECK(sparse_block || dense_block, "spense: one region must be in 4 bits");
  STD_TORCH_CHECK(
      !sparse_sizes.empty() && sparse_sizes.size() == dense_sizes.size() && (output_split || sparse_sizes.size() == 1),
      "spense: one size of each region per fused shard is needed, and an input split has one shard");
  int64_t total = 0;
  for (size_t i = 0; i < sparse_sizes.size(); ++i) {
    int64_t const s = sparse_sizes[i], d = dense_sizes[i];
    STD_TORCH_CHECK(0 <= s && s <= limit && 0 <= d && d <= limit, "spense: a region of ", s, " and ", d,
                    " is not within 0 to ", limit);
    total += s + d;
  }
  STD_TORCH_CHECK(total == limit, "spense: region sizes sum to ", total, ", not to ", limit);
  auto const* const entries = static_cast<float const*>(table.data_ptr());
  std::vector<Piece> pieces =
      pieces_of({0, 0, int(sparse_block), true, entries}, {0, 0, int(dense_block), false, entries + kTable}, n, k,
                sparse_sizes, dense_sizes, output_split);
  int64_t strips = 0, bytes = 0, in = k, dense_from = 0;
  for (Piece& piece : pieces) {
    piece.data = static_cast<uint8_t const*>(packed.data_ptr()) + bytes;
    strips += piece.strips();
    bytes += piece.strips() * piece.stride();
    for (Region const& region : piece.regions) {
      in = std::max(in, region.end());
      if (region.columns) dense_from = std::max(dense_from, region.from);
    }
  }
  check(packed, "weight_packed", packed.scalar_type() == ScalarType::Byte && packed.numel() == bytes,
        "packed (spense::pack_four_bit_cpu)");

  FourBitFunctions const& run = functions_of(isa, dtype, dense_from);
  Tensor y = torch::stable::new_empty(x, {tokens, n});
  int64_t const width = x.element_size(), pitch = (in / 64 + 2) * 64;  // no power of two: other sets of the cache
  Buffer const converted(up(std::min(tokens, kTogether)) * pitch * run.x_bytes);
  auto const* const added = bias ? static_cast<char const*>(bias->data_ptr()) : nullptr;
  std::array<float, kTogether> ones;
  ones.fill(1.0f);

  int64_t const at_once = evenly(tokens, kTogether);
  for (int64_t first = 0; first < tokens; first += at_once) {
    int64_t const count = std::min(at_once, tokens - first);
    auto const* const source = static_cast<char const*>(x.data_ptr()) + first * k * width;
    auto* const target = static_cast<char*>(y.data_ptr()) + first * n * width;
    torch::stable::parallel_for(
        0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)),
        [&](int64_t from, int64_t to) { run.convert(source, dtype, k, from, to, count, converted.bytes, pitch); });
    torch::stable::parallel_for(
        0, strips, std::max<int64_t>(1, kGrain / (kRows * std::max<int64_t>(1, k * count))),
        [&](int64_t from, int64_t to) {
          PlainArithmetic const plain;
          int64_t const together = evenly(count, run.tokens);
          Buffer const buffer(run.count * together * kRows * sizeof(float));
          auto* const out = reinterpret_cast<float*>(buffer.bytes);
          int64_t before = 0;
          for (Piece const& piece : pieces) {
            int64_t const end = std::min(to - before, piece.strips());
            for (int64_t i = std::max(from - before, int64_t(0)); i < end; i += run.count) {
              int const some = int(std::min<int64_t>(run.count, end - i));
              int64_t const row = piece.y + i * kRows;
              int const height = int(std::min<int64_t>(some * kRows, piece.count - i * kRows));
              for (int64_t t = 0; t < count; t += together) {
                int const here = int(std::min<int64_t>(together, count - t));
                int const abreast = here <= kFew ? 1 : some;  // weights in their order in memory
                for (int s = 0; s < some; s += abreast)
                  add_up(run, piece, i + s, abreast, converted.bytes + t * pitch * run.x_bytes, pitch, here,
                         out + s * here * kRows);
                run.finish(out, here, height, ones.data(), ones.data(), added ? added + row * width : nullptr, dtype,
                           target + (t * n + row) * width, n);
              }
            }
            before += piece.strips();
          }
        });
  }
  return y;
}

// Eight codes, two per byte and the first in its high half, in the order of a unit.
uint32_t unit_of(uint8_t const* bytes) {
  uint32_t unit = 0;
  for (int i = 0; i < 4; ++i) unit |= uint32_t(bytes[i] >> 4) << 4 * i | uint32_t(bytes[i] & 15) << (4 * i + 16);
  return unit;
}

// One region of rows: codes [rows, stored / 2], metadata [rows, stored / 4] or none, scales fp32 [rows, blocks] to
// strips [rows / 16, bytes of one], which may lie apart. What is missing becomes the code `zero` with the scale 0.
void pack_four_bit_cpu(Tensor packed, Tensor codes, Tensor meta, Tensor scales, int64_t block, int64_t zero) {
  STD_TORCH_CHECK((block == 16 || block == 32 || block == 64) && 0 <= zero && zero < kTable,
                  "spense: blocks must have 16, 32 or 64 values and a code of zero, not ", block, " and ", zero);
  check(codes, "codes", codes.scalar_type() == ScalarType::Byte && codes.dim() == 2, "uint8 [rows, bytes of a row]");
  int64_t const rows = codes.size(0), width = codes.size(1), count = (2 * width + block - 1) / block;
  bool const sparse = meta.numel() != 0;
  check(meta, "metadata", meta.scalar_type() == ScalarType::Byte && meta.numel() == (sparse ? rows * width / 2 : 0),
        "a byte for two of codes");
  check(scales, "scales", scales.scalar_type() == ScalarType::Float && scales.numel() == rows * count,
        "fp32, one per block");
  Blocks const blocks{nullptr, count, int(block), sparse};
  int64_t const strips = (rows + kRows - 1) / kRows, bytes = count * block_bytes_of(blocks);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                      packed.size(0) == strips && packed.size(1) == bytes && (bytes == 0 || packed.stride(1) == 1),
                  "spense: the packed region must be uint8 [", strips, ", ", bytes, "]");
  auto* const target = static_cast<uint8_t*>(packed.data_ptr());
  auto const* const from_codes = static_cast<uint8_t const*>(codes.data_ptr());
  auto const* const from_meta = static_cast<uint8_t const*>(meta.data_ptr());
  auto const* const from_scales = static_cast<float const*>(scales.data_ptr());
  int64_t const stride = packed.stride(0), half = block / 2, quarter = block / 4;
  torch::stable::parallel_for(
      0, strips, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kRows * width)), [&](int64_t from, int64_t to) {
        for (int64_t s = from; s < to; ++s) {
          uint8_t* out = target + s * stride;
          for (int64_t b = 0; b < count; ++b) {
            auto* const scale = reinterpret_cast<float*>(out);
            uint8_t* const places = out + kScaleBytes;
            auto* const units = reinterpret_cast<uint32_t*>(places + meta_bytes_of(blocks));
            for (int r = 0; r < kRows; ++r) {
              int64_t const row = s * kRows + r;
              uint8_t bytes_here[32], meta_here[16];
              std::memset(bytes_here, int(zero * 17), sizeof bytes_here);
              std::memset(meta_here, 0x44, sizeof meta_here);
              if (row < rows) {
                int64_t const there = std::min(half, width - b * half);
                std::memcpy(bytes_here, from_codes + row * width + b * half, size_t(there));
                if (sparse) std::memcpy(meta_here, from_meta + (row * width + b * half) / 2, size_t(there / 2));
              }
              scale[r] = row < rows ? from_scales[row * count + b] : 0.0f;
              for (int64_t i = 0; sparse && i < quarter; ++i) places[i * kRows + r] = meta_here[i];
              for (int64_t i = 0; i < half / 4; ++i) units[i * kRows + r] = unit_of(bytes_here + 4 * i);
            }
            out += block_bytes_of(blocks);
          }
        }
      });
}

STABLE_TORCH_LIBRARY_FRAGMENT(spense, m) {
  m.def("four_bit_isas_cpu() -> int");
  m.def(
      "pack_four_bit_cpu(Tensor(a!) packed, Tensor codes, Tensor metadata, Tensor scales, int block, int zero) -> ()");
  m.def(
      "four_bit_linear_cpu(Tensor x, Tensor weight_packed, Tensor table, Tensor? bias, int out_features, "
      "int[] sparse_sizes, int[] dense_sizes, bool output_split, int sparse_block, int dense_block, int isa=0) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(spense, CompositeExplicitAutograd, m) {
  m.impl("four_bit_isas_cpu", TORCH_BOX(&four_bit_isas_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(spense, CPU, m) {
  m.impl("pack_four_bit_cpu", TORCH_BOX(&pack_four_bit_cpu));
  m.impl("four_bit_linear_cpu", TORCH_BOX(&four_bit_linear_cpu));
}

}  // namespace
