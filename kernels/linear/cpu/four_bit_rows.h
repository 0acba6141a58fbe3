// Activations as they come, padded with zeros: included once per instruction set.
#pragma once
#include "linear/cpu/rows.h"

namespace spense::cpu {
namespace {

template <class To, class From>
void convert_values(From const* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<To, From>)
    std::copy_n(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) store(to + i, to_float(from[i]));
}

// FourBitFunctions::convert. Side: 1, or 16 for tokens side by side.
template <int Side, class To>
void convert(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t, void* values, int64_t pitch) {
  constexpr int64_t kHere = kSegment<To>;
  with_type(dtype, x, [&](auto const* rows) {
    for (int64_t t = from; t < to; ++t) {
      To* out = row_of<Side>(static_cast<To*>(values), t, pitch);
      auto const* row = rows + t * in;
      for (int64_t c = 0; c < pitch; c += kHere, out += kHere * Side) {
        int64_t const here = std::clamp<int64_t>(in - c, 0, kHere);
        convert_values(row + c, here, out);
        std::fill(out + here, out + kHere, To{});
      }
    }
  });
}

}  // namespace
}  // namespace spense::cpu
