// wgmma and wgmma.sp, m64 e4m3 x e4m3 -> fp32, completing in the background at a time that schedule.h draws.
//
// Both operands are read when the instruction is issued and again when it completes: a difference is a race.
#pragma once
#include "machine.h"

static float e4m3_table[256];

static void fill_e4m3_table() {
  for (int i = 0; i < 256; ++i) {
    int const exponent = i >> 3 & 15, mantissa = i & 7;
    float const normal = ldexpf(1 + mantissa / 8.f, exponent - 7), subnormal = ldexpf(mantissa / 8.f, -6);
    float const value = exponent == 15 && mantissa == 7 ? NAN : exponent ? normal : subnormal;
    e4m3_table[i] = i >> 7 ? -value : value;
  }
}

// A descriptor has the address, the distance of groups of 8 rows, both in units of 16 bytes, and the swizzle mode.
struct Descriptor {
  uint32_t address, group_bytes, mode;
  explicit Descriptor(uint64_t bits)
      : address(uint32_t(bits & 0x3FFF) << 4),
        group_bytes(uint32_t(bits >> 32 & 0x3FFF) << 4),
        mode(uint32_t(bits >> 62)) {}
  uint32_t row_bytes() const { return mode == 1 ? 128 : 64; }
};

// The whole tiles that a wgmma's operands are columns of: they begin at multiples of 8 rows.
static std::vector<Extent> operands_of(Wgmma const& wgmma) {
  std::vector<Extent> extents;
  for (auto [bits, rows] : {std::pair(wgmma.a, 64), std::pair(wgmma.b, wgmma.columns)}) {
    Descriptor const d(bits);
    extents.push_back({d.address & ~(8 * d.row_bytes() - 1), uint32_t(rows) * d.row_bytes()});
  }
  return extents;
}

static std::vector<uint8_t> read_operand(Cta* cta, uint64_t bits, int rows, int row_bytes) {
  constexpr uint64_t kKnown = 3ull << 62 | 0x3FFFull << 32 | 0x3FFFull << 16 | 0x3FFFull;
  Descriptor const d(bits);
  std::vector<uint8_t> bytes(size_t(rows) * row_bytes);
  if ((bits & ~kKnown) || (d.mode != 1 && d.mode != 2)) {
    machine.error = "a wgmma descriptor of an unknown kind";
    return bytes;
  }
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < row_bytes; ++k) {
      uint32_t const plain =
          d.address + uint32_t(r / 8) * d.group_bytes + uint32_t(r % 8) * d.row_bytes() + uint32_t(k);
      uint32_t const at = swizzled(plain, d.mode == 1 ? 7 : 3);
      if (at < shared_base || at >= cta->shared.size()) {
        machine.error = "a wgmma operand lies outside of shared memory";
        return bytes;
      }
      bytes[size_t(r) * row_bytes + k] = cta->shared[at];
    }
  return bytes;
}

// A as 64 rows of 64 columns: thread t has the metadata of row 16 (t/32) + 8 (t%2) + (t/4)%8, columns
// 32 ((t/2)%2) and on; a nibble per four columns names the two that are stored.
static bool expand(Wgmma const& wgmma, std::vector<uint8_t> const& stored, std::vector<float>& a) {
  for (int t = 0; t < 128; ++t) {
    int const row = 16 * (t >> 5) + 8 * (t & 1) + (t >> 2 & 7), first = 32 * (t >> 1 & 1);
    for (int group = 0; group < 8; ++group) {
      int const nibble = wgmma.metadata[t] >> (4 * group) & 15, low = nibble & 3, high = nibble >> 2;
      if (low >= high) {
        char text[120];
        snprintf(text, sizeof text, "illegal metadata %x in word %08x of row %d", nibble, wgmma.metadata[t], row);
        machine.error = text;
        return false;
      }
      int const k = first + 4 * group;
      a[row * 64 + k + low] = e4m3_table[stored[row * 32 + k / 2]];
      a[row * 64 + k + high] = e4m3_table[stored[row * 32 + k / 2 + 1]];
    }
  }
  return true;
}

static void finish_wgmma(Warpgroup* group) {
  Wgmma* const wgmma = group->queue.front();
  group->queue.pop_front();
  int const depth = wgmma->sparse ? 64 : 32;
  auto const a_bytes = read_operand(wgmma->cta, wgmma->a, 64, 32);
  auto const b_bytes = read_operand(wgmma->cta, wgmma->b, wgmma->columns, depth);
  if (!machine.error.empty()) return;
  if (a_bytes != wgmma->a_seen || b_bytes != wgmma->b_seen) {
    machine.error = "the operands of a wgmma changed while it was in flight";
    return;
  }
  std::vector<float> a(64 * depth, 0.f), b(b_bytes.size());
  for (size_t i = 0; i < b.size(); ++i) b[i] = e4m3_table[b_bytes[i]];
  for (size_t i = 0; !wgmma->sparse && i < a.size(); ++i) a[i] = e4m3_table[a_bytes[i]];
  if (wgmma->sparse && !expand(*wgmma, a_bytes, a)) return;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < wgmma->columns / 2; ++i) {  // accumulator i of thread t is row m, column n
      int const m = 16 * (t / 32) + t % 32 / 4 + 8 * (i >> 1 & 1), n = 8 * (i / 4) + 2 * (t % 4) + (i & 1);
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += double(a[m * depth + k]) * b[n * depth + k];
      *wgmma->sums[t][i] = float(*wgmma->sums[t][i] + sum);
    }
  delete wgmma;
  group->completed++;
  machine.multiplied++;
  machine.progress++;
}

void start_wgmma(Thread& T, int columns, bool sparse, float** sums, uint64_t a, uint64_t b, uint32_t metadata,
                 bool add) {
  if (!add) fail(T, "a wgmma that does not add");
  Warpgroup* const group = T.warpgroup;
  uint32_t const t = T.tid % 128;
  if (group->arrived == 0) group->gathering = new Wgmma{T.cta, columns, sparse, a, b, {}, {}, {}, {}};
  Wgmma* const wgmma = group->gathering;
  if (wgmma->columns != columns || wgmma->sparse != sparse || wgmma->a != a || wgmma->b != b)
    fail(T, "the warpgroup disagrees on its wgmma");
  wgmma->metadata[t] = metadata;
  std::copy(sums, sums + columns / 2, wgmma->sums[t]);
  uint64_t const issued = group->issued;
  if (++group->arrived < 128) return block(T, "wgmma", group->arrived, [&] { return group->issued != issued; });
  group->arrived = 0;
  for (Extent const& read : operands_of(*wgmma))
    for (Copy const& copy : machine.copies)
      if (copy.cta == T.cta && overlap(copy.to, copy.bytes, read.address, read.bytes))
        fail(T, "a wgmma reads from %x on while a copy to %x is in flight", read.address, copy.to);
  wgmma->a_seen = read_operand(T.cta, a, 64, 32);
  wgmma->b_seen = read_operand(T.cta, b, columns, sparse ? 64 : 32);
  group->queue.push_back(wgmma);
  group->issued++;
  machine.progress++;
}

void commit_wgmma(Thread& T) { T.commits.push_back(T.warpgroup->issued); }

// Until at most so many of the thread's groups are in flight.
void wait_wgmma(Thread& T, int groups) {
  if (int(T.commits.size()) <= groups) return;
  uint64_t const needed = T.commits[T.commits.size() - 1 - groups];
  block(T, "wgmma group", uint32_t(groups), [&] { return T.warpgroup->completed >= needed; });
}
