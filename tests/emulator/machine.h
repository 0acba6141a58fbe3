// Memory, barriers and asynchronous copies, with a check wherever the hardware would do something undefined.
//
// Copies are queued and done later, at a time that schedule.h draws; until then nothing may touch their destination.
// Shared memory of another CTA has its rank + 1 in the top byte of the address.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "device.h"

struct Mbarrier {
  bool init = false;
  uint32_t count = 0;
  int pending = 0;    // arrivals
  int64_t bytes = 0;  // expected and not yet copied
  uint64_t phase = 0;
};

struct Cluster {
  std::vector<Cta*> ctas;
  uint32_t arrived = 0, threads = 0, size = 0;
  uint64_t phase = 0;
};

struct NamedBarrier {
  uint32_t arrived = 0, threads = 0;
  uint64_t phase = 0;
};

struct Cta {
  std::vector<uint8_t> shared;      // by address: the first shared_base bytes are not the kernel's
  std::vector<Mbarrier> mbarriers;  // by address / 8
  NamedBarrier named[16];
  std::vector<Warpgroup*> warpgroups;
  Cluster* cluster;
  uint32_t index, rank, threads, live;
};

// Lanes that meet, by mask.
struct Meeting {
  uint32_t arrived = 0;
  uint64_t phase = 0;
  uint32_t value[32], lane[32];
  Thread* thread[32];
  float* sums[32];  // of an mma, as its operands
  uint32_t const *left[32], *right[32];
};
struct Warp {
  std::map<uint32_t, Meeting> meetings;
  bool slow = false;
};

struct Wgmma {
  Cta* cta;
  int columns;
  bool sparse;
  uint64_t a, b;           // descriptors
  uint32_t metadata[128];  // by thread, as are the accumulators
  float* sums[128][128];
  std::vector<uint8_t> a_seen, b_seen;  // operands when it was issued
};
struct Warpgroup {
  uint32_t arrived = 0;
  Wgmma* gathering = nullptr;
  std::deque<Wgmma*> queue;
  uint64_t issued = 0, completed = 0;
};

// Made by recorder.h in place of a CUtensorMap.
struct TensorMap {
  uint32_t magic, swizzle;
  uint64_t base, columns, rows, pitch;
  uint32_t box_columns, box_rows;
};
constexpr uint32_t kTensorMapMagic = 0x7A9A9A9Au;

struct Copy {
  Cta* cta;
  uint32_t to, bytes, mbarrier;
  TensorMap const* map;  // null: contiguous
  int column, row;
  uint64_t from;
};

enum BufferFlags : uint64_t { kWritable = 1, kAfterPriorGrid = 2, kWriteOnce = 4 };
struct Buffer {
  uint64_t base, bytes, flags;
  std::vector<bool> written;
  bool contains(uint64_t address, uint64_t n) const { return address >= base && address + n <= base + bytes; }
};

struct Machine {
  std::string error;
  std::vector<Buffer> buffers;
  std::vector<Copy> copies;
  std::vector<Warpgroup*> warpgroups;
  bool prior_grid_done = false;
  uint64_t progress = 0;  // counts what changes the state: a deadlock is when it stands still
  uint64_t random_state = 1;
  uint32_t preempt = 0;  // 0, or one in so many memory accesses lets other threads run first
  uint64_t copied = 0, multiplied = 0;
  // Kernels that look at the clock: instead of a deadlock, waits give up and an hour has passed.
  uint64_t clock = 1;
  bool timed = false, late = false;
  std::string printed;

  uint64_t random() {  // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
  }
};
static Machine machine;
uint32_t shared_base = 1024;
uint64_t parameters = 0;

static void yield();  // to another thread, see schedule.h

// The first error ends the run; the thread that has it never goes on.
[[noreturn, gnu::format(printf, 2, 3)]] static void fail(Thread& T, char const* format, ...) {
  char text[600], where[80];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(where, sizeof where, "cta %u (rank %u) thread %u: ", T.cta->index, T.cta->rank, T.tid);
  if (machine.error.empty()) machine.error = std::string(where) + text;
  for (;;) yield();
}

template <class Condition>
static void block(Thread& T, char const* what, uint32_t address, Condition ready) {
  T.waits_for = what;
  T.waits_at = address;
  while (!ready()) yield();
  T.waits_for = nullptr;
  machine.progress++;
}

static void maybe_yield() {
  if (machine.preempt && machine.random() % machine.preempt == 0) {
    machine.progress++;
    yield();
  }
}

static bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

// ---- loads and stores ----

uint8_t* at_global(Thread& T, uint64_t address, uint32_t bytes, bool store, char const* what) {
  maybe_yield();
  if (address % bytes) fail(T, "misaligned global address %llx: %s", (unsigned long long)address, what);
  for (Buffer& buffer : machine.buffers) {
    if (!buffer.contains(address, bytes)) continue;
    if (store && !(buffer.flags & kWritable)) fail(T, "store to an input: %s", what);
    if ((buffer.flags & kAfterPriorGrid) && !machine.prior_grid_done)
      fail(T, "access before the prior grid has ended: %s", what);
    for (uint32_t i = 0; store && (buffer.flags & kWriteOnce) && i < bytes; ++i) {
      if (buffer.written[address - buffer.base + i]) fail(T, "an output is written twice: %s", what);
      buffer.written[address - buffer.base + i] = true;
    }
    return reinterpret_cast<uint8_t*>(address);
  }
  fail(T, "global address %llx is in no buffer: %s", (unsigned long long)address, what);
}

static uint8_t* shared_of(Thread& T, Cta* cta, uint32_t address, uint32_t bytes, char const* what) {
  if (address < shared_base || address + bytes > cta->shared.size())
    fail(T, "shared address %x is out of bounds: %s", address, what);
  if (address % bytes) fail(T, "misaligned shared address %x: %s", address, what);
  for (Copy const& copy : machine.copies)
    if (copy.cta == cta && overlap(address, bytes, copy.to, copy.bytes))
      fail(T, "access to %x while a copy to %x is in flight: %s", address, copy.to, what);
  return cta->shared.data() + address;
}

static Cta* owner(Thread& T, uint32_t& address) {
  uint32_t const rank = address >> 24;
  address &= 0xFFFFFF;
  if (rank == 0) return T.cta;
  auto const& ctas = T.cta->cluster->ctas;
  if (rank > ctas.size()) fail(T, "address in CTA %u of a cluster of %zu", rank - 1, ctas.size());
  if (ctas[rank - 1]->live == 0) fail(T, "access to a CTA that has exited");
  return ctas[rank - 1];
}

uint8_t* at_shared(Thread& T, uint32_t address, uint32_t bytes, bool, char const* what) {
  maybe_yield();
  if (address >> 24) fail(T, "a cluster address in shared::cta: %s", what);
  return shared_of(T, T.cta, address, bytes, what);
}

uint8_t* at_cluster(Thread& T, uint32_t address, uint32_t bytes, bool, char const* what) {
  maybe_yield();
  Cta* const cta = owner(T, address);
  return shared_of(T, cta, address, bytes, what);
}

uint32_t map_to_cta(Thread& T, uint32_t address, uint32_t rank) {
  if (address >> 24) fail(T, "mapa of a cluster address");
  // Threads that do not arrive compute such an address too; only its use is an error.
  return rank < T.cta->cluster->ctas.size() ? (rank + 1) << 24 | address : 0xFF000000u;
}

uint32_t atomic_max(Thread& T, uint64_t address, int value) {
  auto* const p = reinterpret_cast<int*>(at_global(T, address, 4, true, "atom.max"));
  int const before = *p;
  *p = std::max(before, value);
  return uint32_t(before);
}

// ---- barriers ----

static Meeting& join(Thread& T, uint32_t mask) {
  if (!(mask >> T.lane & 1)) fail(T, "the lane is not in its mask %08x", mask);
  Meeting& meeting = T.warp->meetings[mask];
  if (meeting.arrived >> T.lane & 1) fail(T, "the lane meets mask %08x twice", mask);
  meeting.arrived |= 1u << T.lane;
  return meeting;
}

static bool completes(Meeting& meeting, uint32_t mask) {
  if (meeting.arrived != mask) return false;
  meeting.arrived = 0;
  meeting.phase++;
  machine.progress++;
  return true;
}

uint32_t shuffle(Thread& T, Shuffle mode, uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask) {
  uint32_t const segment = clamp >> 8 & 31;  // of a warp: what its lanes have in common
  if ((clamp & 31) != (mode == Shuffle::up ? 0u : 31u)) fail(T, "shuffle with a last lane");
  if (segment && mode == Shuffle::bfly) fail(T, "shuffle in parts of a warp");
  Meeting& meeting = join(T, mask);
  meeting.value[T.lane] = value;
  bool const below = T.lane < (T.lane & segment) + lane;  // up: the first lanes keep what they have
  meeting.lane[T.lane] = (mode == Shuffle::bfly ? T.lane ^ lane
                          : mode == Shuffle::up ? T.lane - (below ? 0 : lane)
                                                : (T.lane & segment) | (lane & ~segment)) &
                         31;
  meeting.thread[T.lane] = &T;
  uint64_t const phase = meeting.phase;
  if (!completes(meeting, mask)) {
    block(T, "shuffle", mask, [&] { return meeting.phase != phase; });
    return T.shuffled;
  }
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (!(mask >> meeting.lane[i] & 1)) fail(T, "shuffle from a lane outside of mask %08x", mask);
    meeting.thread[i]->shuffled = meeting.value[meeting.lane[i]];
  }
  return T.shuffled;
}

// mma.sync m16n8k16: each sum is exact, and rounded once. Fragments as the PTX ISA lays them out.
static void multiply(Meeting& warp, bool bf16) {
  auto const half = [bf16](uint32_t word, int which) {
    uint16_t const bits = uint16_t(word >> (16 * which));
    return double(bf16 ? from_bf16(bits) : from_f16(bits));
  };
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float& out = warp.sums[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
      double sum = out;
      for (int k = 0; k < 16; ++k) {
        int const lane = k % 8 / 2;
        sum += half(warp.left[row % 8 * 4 + lane][row / 8 + k / 8 * 2], k % 2) *
               half(warp.right[column * 4 + lane][k / 8], k % 2);
      }
      out = float(sum);
    }
}

void multiply_in_warp(Thread& T, bool bf16, float* sums, uint32_t const* left, uint32_t const* right) {
  Meeting& meeting = join(T, ~0u);
  meeting.sums[T.lane] = sums;
  meeting.left[T.lane] = left;
  meeting.right[T.lane] = right;
  uint64_t const phase = meeting.phase;
  if (completes(meeting, ~0u))
    multiply(meeting, bf16);
  else
    block(T, "mma", ~0u, [&] { return meeting.phase != phase; });
}

void sync_warp(Thread& T, uint32_t mask) {
  Meeting& meeting = join(T, mask);
  uint64_t const phase = meeting.phase;
  if (!completes(meeting, mask)) block(T, "warp", mask, [&] { return meeting.phase != phase; });
}

void sync_threads(Thread& T, uint32_t id, uint32_t threads) {
  if (id > 15) fail(T, "named barrier %u", id);
  NamedBarrier& barrier = T.cta->named[id];
  if (barrier.arrived && barrier.threads != threads) fail(T, "named barrier %u with two numbers of threads", id);
  barrier.threads = threads;
  uint64_t const phase = barrier.phase;
  if (++barrier.arrived < threads) return block(T, "named barrier", id, [&] { return barrier.phase != phase; });
  barrier.arrived = 0;
  barrier.phase++;
  machine.progress++;
}

void arrive_cluster(Thread& T) {
  Cluster& cluster = *T.cta->cluster;
  T.cluster_phase = cluster.phase;
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  cluster.phase++;
  machine.progress++;
}

void wait_cluster(Thread& T) {
  block(T, "cluster", 0, [&] { return T.cta->cluster->phase != T.cluster_phase; });
}

void wait_prior_grid(Thread& T) {
  block(T, "prior grid", 0, [] { return machine.prior_grid_done; });
}

static Mbarrier& mbarrier_at(Thread& T, Cta* cta, uint32_t address) {
  if (address % 8 || address < shared_base || address + 8 > cta->shared.size()) fail(T, "mbarrier address %x", address);
  return cta->mbarriers[address / 8];
}

static void settle(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = int(barrier.count);
  machine.progress++;
}

void init_mbarrier(Thread& T, uint32_t address, uint32_t count) {
  Mbarrier& barrier = mbarrier_at(T, T.cta, address);
  if (barrier.init) fail(T, "mbarrier %x is initialised twice", address);
  barrier.init = true;
  barrier.count = count;
  barrier.pending = int(count);
}

void arrive_mbarrier(Thread& T, uint32_t address, uint32_t expected_bytes) {
  maybe_yield();
  Cta* const cta = owner(T, address);
  Mbarrier& barrier = mbarrier_at(T, cta, address);
  if (!barrier.init) fail(T, "arrival on mbarrier %x, which is not initialised", address);
  if (barrier.pending <= 0) fail(T, "too many arrivals on mbarrier %x", address);
  barrier.bytes += expected_bytes;
  barrier.pending--;
  settle(barrier);
  maybe_yield();
}

bool wait_mbarrier(Thread& T, uint32_t address, uint32_t parity) {
  if (parity > 1) fail(T, "parity %u", parity);
  Mbarrier& barrier = mbarrier_at(T, T.cta, address);
  if (!barrier.init) fail(T, "wait on mbarrier %x, which is not initialised", address);
  maybe_yield();
  block(T, "mbarrier", address, [&] { return (barrier.phase & 1) != parity || machine.late; });
  return (barrier.phase & 1) != parity;
}

// ---- the clock, printf and trap ----

uint64_t nanoseconds(Thread&) {
  machine.timed = true;
  return machine.clock;
}

// printf with %d, %u and %s, whose arguments lie one behind the other at multiples of their size.
void print(Thread&, uint64_t format, uint64_t arguments) {
  uint64_t at = arguments;
  auto const next = [&](uint64_t bytes) {
    return reinterpret_cast<uint8_t*>(std::exchange(at = (at + bytes - 1) / bytes * bytes, at + bytes));
  };
  for (auto const* p = reinterpret_cast<char const*>(format); *p; ++p) {
    if (*p != '%')
      machine.printed += *p;
    else if (*++p == 's')
      machine.printed += load<char const*>(next(8));
    else
      machine.printed += *p == 'd' ? std::to_string(load<int>(next(4))) : std::to_string(load<uint32_t>(next(4)));
  }
}

void trap(Thread& T) { fail(T, "trap: %s", machine.printed.c_str()); }

// ---- copies ----

struct Extent {
  uint32_t address, bytes;
};
static std::vector<Extent> operands_of(Wgmma const& wgmma);  // tensor_core.h

static void start_copy(Thread& T, Copy const& copy) {
  if (copy.to < shared_base || copy.to + copy.bytes > copy.cta->shared.size()) fail(T, "copy to %x", copy.to);
  if (copy.cta->live == 0) fail(T, "copy to a CTA that has exited");
  for (Warpgroup* group : copy.cta->warpgroups)
    for (Wgmma* wgmma : group->queue)
      for (Extent const& read : operands_of(*wgmma))
        if (overlap(copy.to, copy.bytes, read.address, read.bytes))
          fail(T, "copy to %x, which a wgmma in flight reads from %x on", copy.to, read.address);
  for (Copy const& other : machine.copies)
    if (other.cta == copy.cta && overlap(copy.to, copy.bytes, other.to, other.bytes))
      fail(T, "two copies to %x in flight", copy.to);
  if (!mbarrier_at(T, copy.cta, copy.mbarrier).init) fail(T, "copy: mbarrier %x is not initialised", copy.mbarrier);
  memset(copy.cta->shared.data() + copy.to, 0xFF, copy.bytes);  // e4m3 NaN: what is read too early shows
  machine.copies.push_back(copy);
  machine.copied++;
  machine.progress++;
}

void copy_tensor(Thread& T, uint32_t to, uint64_t map_address, uint32_t column, uint32_t row, uint32_t barrier,
                 uint32_t ctas) {
  maybe_yield();
  auto const* const map = reinterpret_cast<TensorMap const*>(map_address);
  if (map->magic != kTensorMapMagic) fail(T, "not a tensor map");
  if (to % 128) fail(T, "tensor copy to %x: misaligned", to);
  if (barrier >> 24 || to >> 24) fail(T, "a cluster address in a tensor copy");
  if (ctas == 0) fail(T, "multicast to nobody");
  auto const& all = T.cta->cluster->ctas;
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (ctas == kOwnCta ? rank != T.cta->rank : !(ctas >> rank & 1)) continue;
    if (rank >= all.size()) fail(T, "multicast to rank %u", rank);
    start_copy(T, {all[rank], to, map->box_columns * map->box_rows, barrier, map, int(column), int(row), 0});
  }
}

void copy_bulk(Thread& T, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
  maybe_yield();
  if (to % 16 || from % 16 || bytes % 16 || !bytes) fail(T, "bulk copy: misaligned");
  if (std::none_of(machine.buffers.begin(), machine.buffers.end(),
                   [&](Buffer const& b) { return b.contains(from, bytes); }))
    fail(T, "bulk copy of %u bytes reads outside of the buffers", bytes);
  start_copy(T, {T.cta, to, bytes, barrier, nullptr, 0, 0, from});
}

// The 16-byte units of a row are permuted within the swizzle span by the row's number.
static uint32_t swizzled(uint32_t address, uint32_t swizzle) { return address ^ ((address >> 7) & swizzle) << 4; }

static void finish_copy(size_t which) {
  Copy const copy = machine.copies[which];
  machine.copies.erase(machine.copies.begin() + long(which));
  uint8_t* const shared = copy.cta->shared.data();
  uint64_t const source = copy.map ? copy.map->base : copy.from;
  for (Buffer const& buffer : machine.buffers)
    if (buffer.contains(source, 1) && (buffer.flags & kAfterPriorGrid) && !machine.prior_grid_done)
      machine.error = "a copy reads x before the prior grid has ended";
  if (!copy.map) {
    memcpy(shared + copy.to, reinterpret_cast<void const*>(copy.from), copy.bytes);
  } else {
    TensorMap const& map = *copy.map;
    for (int64_t r = 0; r < map.box_rows; ++r)
      for (int64_t c = 0; c < map.box_columns; ++c) {
        int64_t const row = copy.row + r, column = copy.column + c;
        bool const inside = row >= 0 && row < int64_t(map.rows) && column >= 0 && column < int64_t(map.columns);
        uint32_t const at = swizzled(copy.to + uint32_t(r * map.box_columns + c), map.swizzle);
        shared[at] = inside ? reinterpret_cast<uint8_t const*>(map.base)[row * int64_t(map.pitch) + column] : 0;
      }
  }
  Mbarrier& barrier = copy.cta->mbarriers[copy.mbarrier / 8];
  barrier.bytes -= copy.bytes;
  settle(barrier);
  machine.progress++;
}
