// What the operators of the CPU kernels share.
#pragma once
#include <emmintrin.h>
#include <new>
#include "common/stable_abi.h"
#include "linear/cpu/kernels.h"

namespace spense::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values that are worth a second thread

inline int64_t up(int64_t n) { return (n + kStep - 1) / kStep * kStep; }
inline int64_t down(int64_t n) { return n / kStep * kStep; }

inline void check(Tensor const& t, char const* name, bool right, char const* wanted) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && right, "spense: ", name, " must be a contiguous CPU tensor, ",
                  wanted);
}

// While it lives, this thread rounds to nearest and flushes no subnormal, whatever somebody has set.
struct PlainArithmetic {
  unsigned const before = _mm_getcsr();
  PlainArithmetic() { _mm_setcsr(0x1F80); }
  ~PlainArithmetic() { _mm_setcsr(before); }
};

// Memory that begins with a cache line: a tile's rows are lines.
struct Buffer {
  static constexpr std::align_val_t kLine{64};
  char* const bytes;
  explicit Buffer(size_t size) : bytes(new (kLine) char[size]) {}
  Buffer(Buffer const&) = delete;
  ~Buffer() { ::operator delete[](bytes, kLine); }
};

}  // namespace
}  // namespace spense::cpu
