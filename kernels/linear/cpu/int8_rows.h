// Activations to int8 per token, 8 values at a time (AVX2, F16C): included once per instruction set.
#pragma once
#include "linear/cpu/rows.h"

namespace spense::cpu {
namespace {

constexpr float kMaxInt8 = 127.0f;
constexpr float kMinInt8Scale = 0x1p-100f;  // tokens of zeros are not divided by zero

inline __m256 eight_floats(float const* x) { return _mm256_loadu_ps(x); }
inline __m256 eight_floats(Fp16 const* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(x)));
}
inline __m256 eight_floats(Bf16 const* x) {
  __m128i const bits = _mm_loadu_si128(reinterpret_cast<__m128i const*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Calls f(eight values, their place, how many of them count) for a row; behind its end come zeros.
template <class T, class F>
void for_eights(T const* row, int64_t in, F const& f) {
  int64_t i = 0;
  for (; i + 8 <= in; i += 8) f(eight_floats(row + i), i, int64_t(8));
  if (i == in) return;
  T rest[8] = {};
  std::copy(row + i, row + in, rest);
  f(eight_floats(rest), i, in - i);
}

// The largest magnitude's bits: as integers magnitudes are in the same order, with infinity and NaN above all.
template <class T>
uint32_t largest_bits(T const* row, int64_t in) {
  __m256i largest = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  for_eights(row, in, [&](__m256 v, int64_t, int64_t) {
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  });
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  return *std::max_element(lanes, lanes + 8);
}

// A token's scale, of its largest magnitude's bits.
inline float int8_scale(uint32_t largest) {
  return largest < kInfinityBits ? std::max(bit_cast<float>(largest) / kMaxInt8, kMinInt8Scale)
                                 : std::numeric_limits<float>::quiet_NaN();
}

// Bytes of (the nearest integer, ties to even) + Offset. A token with NaN or infinity has the scale NaN and zeros, so
// that its own outputs are NaN and no others.
template <int Offset, class T>
void quantize_rows_int8(T const* x, int64_t in, int64_t from, int64_t to, uint8_t* values, int64_t pitch,
                        float* scales) {
  for (int64_t t = from; t < to; ++t) {
    T const* row = x + t * in;
    uint8_t* const out = values + t * pitch;
    uint32_t const largest = largest_bits(row, in);
    bool const finite = largest < kInfinityBits;
    scales[t] = int8_scale(largest);
    std::fill(out + (finite ? in : 0), out + pitch, uint8_t(Offset));
    if (!finite) continue;
    __m256 const factor = _mm256_set1_ps(1.0f / scales[t]);  // as vLLM's CPU kernels round
    __m128i const offset = _mm_set1_epi8(char(Offset));
    for_eights(row, in, [&](__m256 v, int64_t i, int64_t count) {
      __m256i const rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v, factor));
      __m128i const words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      int64_t const bytes = _mm_cvtsi128_si64(_mm_add_epi8(_mm_packs_epi16(words, words), offset));
      std::memcpy(out + i, &bytes, size_t(count));
    });
  }
}

template <int Offset>
void quantize_int8(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t, void* values,
                   int64_t pitch, float* scales) {
  with_type(dtype, x, [&](auto const* p) {
    quantize_rows_int8<Offset>(p, in, from, to, static_cast<uint8_t*>(values), pitch, scales);
  });
}

}  // namespace
}  // namespace spense::cpu
