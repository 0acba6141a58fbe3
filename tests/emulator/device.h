// What translated kernels see: their thread, the instructions that touch the machine, and plain arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Cta;
struct Warp;
struct Warpgroup;

struct Thread {
  void* stack_pointer;
  char* stack;
  Cta* cta;
  Warp* warp;
  Warpgroup* warpgroup;
  uint32_t tid, lane, cta_index, cta_rank, cluster_ctas, block_threads;
  bool done = false;
  uint32_t shuffled = 0;            // what its last shuffle gave
  uint64_t cluster_phase = 0;       // of the cluster barrier, when it arrived
  std::vector<uint64_t> commits;    // wgmmas issued before each commit of a group
  char const* waits_for = nullptr;  // and of what address, for the report of a deadlock
  uint32_t waits_at = 0;
};

extern uint32_t shared_base;  // address of the dynamic shared memory
extern uint64_t parameters;   // of the kernel
constexpr uint32_t kPoison = 0x5EADBEEFu;
constexpr uint32_t kOwnCta = 1u << 31;  // destination of a copy without multicast

using KernelFunction = void (*)(Thread&);
struct KernelEntry {
  char const* name;
  KernelFunction run;
};
extern KernelEntry const kernel_table[];

enum class Shuffle { idx, bfly, up };

uint8_t* at_global(Thread&, uint64_t address, uint32_t bytes, bool store, char const* what);
uint8_t* at_shared(Thread&, uint32_t address, uint32_t bytes, bool store, char const* what);
uint8_t* at_cluster(Thread&, uint32_t address, uint32_t bytes, bool store, char const* what);
uint32_t map_to_cta(Thread&, uint32_t address, uint32_t rank);
uint32_t atomic_max(Thread&, uint64_t address, int value);
uint32_t shuffle(Thread&, Shuffle mode, uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask);
void multiply_in_warp(Thread&, bool bf16, float* sums, uint32_t const* left, uint32_t const* right);
void sync_warp(Thread&, uint32_t mask);
void sync_threads(Thread&, uint32_t barrier, uint32_t threads);
void arrive_cluster(Thread&);
void wait_cluster(Thread&);
void wait_prior_grid(Thread&);
void init_mbarrier(Thread&, uint32_t address, uint32_t count);
void arrive_mbarrier(Thread&, uint32_t address, uint32_t expected_bytes);
bool wait_mbarrier(Thread&, uint32_t address, uint32_t parity);
void copy_tensor(Thread&, uint32_t to, uint64_t map, uint32_t column, uint32_t row, uint32_t barrier, uint32_t ctas);
void copy_bulk(Thread&, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier);
void start_wgmma(Thread&, int columns, bool sparse, float** sums, uint64_t a, uint64_t b, uint32_t metadata, bool add);
void commit_wgmma(Thread&);
void wait_wgmma(Thread&, int groups);
uint64_t nanoseconds(Thread&);
void print(Thread&, uint64_t format, uint64_t arguments);
[[noreturn]] void trap(Thread&);

template <class T>
inline T load(void const* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
inline void store(uint8_t* p, T value) {
  memcpy(p, &value, sizeof value);
}
inline float as_float(uint32_t bits) { return load<float>(&bits); }
inline uint32_t as_bits(float value) { return load<uint32_t>(&value); }

// PTX shifts by the width or more give zero, or the sign.
template <class T>
inline T shift_left(T value, uint32_t by) {
  return by >= sizeof(T) * 8 ? T(0) : T(value << by);
}
template <class T>
inline T shift_right(T value, uint32_t by) {
  return by >= sizeof(T) * 8 ? (value < 0 ? T(-1) : T(0)) : T(value >> by);
}
// Each byte of the result is one of the eight of `low` and `high`, or eight times the sign of one.
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t const from = uint64_t(high) << 32 | low;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t const nibble = selector >> (4 * i) & 15;
    uint32_t const byte = uint32_t(from >> (8 * (nibble & 7))) & 255;
    to |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return to;
}
inline uint32_t insert_bits(uint32_t from, uint32_t to, uint32_t position, uint32_t length) {
  uint32_t const mask = ((length >= 32 ? 0u : 1u << length) - 1u) << position;
  return (to & ~mask) | ((from << position) & mask);
}

inline float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float value) {
  if (value != value) return 0x7FFF;
  uint32_t const bits = as_bits(value);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float from_f16(uint16_t bits) { return float(load<_Float16>(&bits)); }
inline uint16_t to_f16(float value) {
  _Float16 const half = _Float16(value);
  return load<uint16_t>(&half);
}
