// The codecs that every instruction set is compiled for. One more is a header like weights_fp8.h, its name in Codec and its place in
// Codecs. It has kCodec, kBits of a weight, widened<V>() for fp32 lanes, and codes() and LookUp for AVX-512 BF16, where its values must
// be exact in bf16. Bytes of zeros are zeros: layouts are padded with them. The bindings choose which one a call runs.
#pragma once
#include "linear/cpu/weights_fp8.h"

namespace spense::cpu {
namespace {

template <class... W>
struct List {};
using Codecs = List<Fp8>;

template <class W>
constexpr int64_t bytes(int64_t weights) {
  return bytes_of(weights, W::kBits);
}

}  // namespace
}  // namespace spense::cpu
