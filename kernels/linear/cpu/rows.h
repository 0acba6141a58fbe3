// What happens to activations in front of and behind the strips, in plain loops that the compiler vectorises: included
// once per instruction set. Needs -ffp-contract=off, as the definition rounds after every step.
#pragma once
#include <immintrin.h>
#include <cstring>
#include <limits>
#include <type_traits>
#include "linear/cpu/kernels.h"

namespace spense::cpu {
namespace {

constexpr float kMaxE4m3 = 448.0f;
constexpr float kMinScale = 1.0f / (448.0f * 512.0f);  // vLLM's own lower bound
constexpr float kSubnormalStep = 0x1.8p14f;            // behind it, fp32 has steps of 2^-9, as e4m3 below 2^-6
constexpr uint32_t kMinNormalBits = 0x3C800000;        // 2^-6: the smallest normal e4m3
constexpr uint32_t kInfinityBits = 0x7F800000;         // magnitudes from here on: infinity, NaN

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T read(void const* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(Fp16 x) { return _cvtsh_ss(x.bits); }
inline float to_float(Bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline void store(float* to, float x) { *to = x; }
inline void store(Fp16* to, float x) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store(Bf16* to, float x) {
  uint32_t const bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// To the nearest e4m3, ties to even, for |x| <= 448; NaN stays NaN.
inline float rounded_to_e4m3(float x) {
  uint32_t const bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
  uint32_t const normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1)) & 0xFFF00000;
  uint32_t const subnormal = bit_cast<uint32_t>((bit_cast<float>(magnitude) + kSubnormalStep) - kSubnormalStep);
  float const rounded = bit_cast<float>((magnitude < kMinNormalBits ? subnormal : normal) | (bits & 0x80000000));
  return x != x ? x : rounded;
}

// A token's scale, of its largest magnitude or NaN.
inline float e4m3_scale(float largest) {
  float const scale = largest / kMaxE4m3;
  return scale < kMinScale ? kMinScale : scale;
}

// Calls f with a pointer of the type that `dtype` names.
template <class F>
void with_type(Dtype dtype, void const* p, F const& f) {
  if (dtype == kBfloat16) return f(static_cast<Bf16 const*>(p));
  if (dtype == kFloat16) return f(static_cast<Fp16 const*>(p));
  f(static_cast<float const*>(p));
}

// Columns of a token that lie together where tokens lie side by side: a line of a tile.
template <class Value>
constexpr int kSegment = std::max(64 / int(sizeof(Value)), 32);

// Where a token's first segment lies; the next is kSegment * Side behind it. Side: 1, or 16 for tokens side by side.
template <int Side, class Value>
Value* row_of(Value* values, int64_t token, int64_t pitch) {
  return values + token / Side * Side * pitch + token % Side * kSegment<Value>;
}

// Calls f with `count`; with a constant where it is the usual one, which compilers make straight code of.
template <int Usual, class F>
void times(int count, F const& f) {
  count == Usual ? f(std::integral_constant<int, Usual>{}) : f(count);
}

template <int Side, class T, class Value>
void quantize_rows(T const* x, int64_t in, int64_t from, int64_t to, Value* values, int64_t pitch, float* scales) {
  for (int64_t t = from; t < to; ++t) {
    T const* row = x + t * in;
    Value* out = row_of<Side>(values, t, pitch);
    uint32_t largest = 0;  // as integers magnitudes are in the same order, with NaN above all
    for (int64_t i = 0; i < in; ++i) largest = std::max(largest, bit_cast<uint32_t>(to_float(row[i])) & 0x7FFFFFFF);
    float const scale = scales[t] = e4m3_scale(bit_cast<float>(largest));
    constexpr int kHere = kSegment<Value>;
    for (int64_t c = 0; c < pitch; c += kHere, row += kHere, out += kHere * Side) {
      int const here = int(std::clamp<int64_t>(in - c, 0, kHere));
      times<kHere>(here, [from = row, to = out, scale](auto count) {
        float rounded[kHere];
        for (int i = 0; i < count; ++i) {
          float v = to_float(from[i]) / scale;
          v = v > kMaxE4m3 ? kMaxE4m3 : v;
          v = v < -kMaxE4m3 ? -kMaxE4m3 : v;
          rounded[i] = rounded_to_e4m3(v);
        }
        for (int i = 0; i < count; ++i) store(to + i, rounded[i]);
      });
      std::fill(out + here, out + kHere, Value{});
    }
  }
}

template <float Unit, class Sum, class T>
void finish_rows(Sum const* out, int tokens, int rows, float const* x_scale, float const* weight_scale, T const* bias,
                 T* y, int64_t y_pitch) {
  for (int t = 0; t < tokens; ++t, out += kRows, y += y_pitch)  // whole cache lines of y, one after the other
    for (int first = 0; first < rows; first += kRows) {
      Sum const* const sums = out + int64_t(first) * tokens;
      for (int i = 0, r = first; i < std::min(kRows, rows - first); ++i, ++r) {
        float const scaled = float(sums[i]) * Unit * x_scale[t] * weight_scale[r];
        store(y + r, bias ? scaled + to_float(bias[r]) : scaled);
      }
    }
}

template <class Value>
void quantize(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t, void* values, int64_t pitch,
              float* scales) {
  with_type(dtype, x,
            [&](auto const* p) { quantize_rows<1>(p, in, from, to, static_cast<Value*>(values), pitch, scales); });
}

// Unit: what sums are multiplied with first, a power of two.
template <class Sum = float, float Unit = 1.0f>
void finish(void const* out, int tokens, int rows, float const* x_scale, float const* weight_scale, void const* bias,
            Dtype dtype, void* y, int64_t y_pitch) {
  with_type(dtype, bias, [&](auto const* p) {
    using T = std::remove_cvref_t<decltype(*p)>;
    finish_rows<Unit>(static_cast<Sum const*>(out), tokens, rows, x_scale, weight_scale, p, static_cast<T*>(y),
                      y_pitch);
  });
}

}  // namespace
}  // namespace spense::cpu
