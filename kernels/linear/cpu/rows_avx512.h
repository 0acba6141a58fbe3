// What happens to activations in front of and behind the strips, 16 at a time (AVX-512 F and BW), with the bits of
// rows.h: included once per instruction set.
#pragma once
#include <algorithm>
#include <array>
#include "linear/cpu/int8_rows.h"
#include "linear/cpu/rows.h"

namespace spense::cpu {
namespace {

inline __m512 sixteen(float const* p, __mmask16 there) { return _mm512_maskz_loadu_ps(there, p); }
inline __m512 sixteen(Fp16 const* p, __mmask16 there) {
  return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(there, p)));
}
inline __m512 sixteen(Bf16 const* p, __mmask16 there) {
  __m256i const bits = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(there, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 sums_of(float const* p) { return _mm512_loadu_ps(p); }
inline __m512 sums_of(int32_t const* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

inline void store(float* to, __m512 v, __mmask16 there) { _mm512_mask_storeu_ps(to, there, v); }
inline void store(Fp16* to, __m512 v, __mmask16 there) {
  __m256i const bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm512_mask_storeu_epi16(to, there, _mm512_castsi256_si512(bits));
}
inline void store(Bf16* to, __m512 v, __mmask16 there) {
  __m512i const bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i const up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  __mmask16 const nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  __m512i const rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
  _mm512_mask_cvtepi32_storeu_epi16(to, there, rounded);
}

// Which of the 16 columns from `column` on are in front of `end`.
inline __mmask16 in_front(int64_t column, int64_t end) {
  return __mmask16((1u << std::clamp<int64_t>(end - column, 0, 16)) - 1);
}

inline __m512i magnitudes(__m512 v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }

// The largest magnitude's bits: as integers magnitudes are in the same order, with infinity and NaN above all.
template <class T>
uint32_t largest_of(T const* row, int64_t in) {
  __m512i largest[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t c = 0; c < in; c += 32)
    for (int i = 0; i < 2; ++i)
      largest[i] = _mm512_max_epu32(largest[i], magnitudes(sixteen(row + c + 16 * i, in_front(c + 16 * i, in))));
  return _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]));
}

// v / scale, rounded correctly, without a division each (Markstein 1990): the quotient's error is known exactly, and
// corrected twice. Not for scales whose significand is all ones.
struct Quotient {
  __m512 const scale, inverse;
  explicit Quotient(float of) : scale(_mm512_set1_ps(of)), inverse(_mm512_set1_ps(1.0f / of)) {}
  static bool exact_for(float scale) {
    uint32_t const bits = bit_cast<uint32_t>(scale);
    return bits < kInfinityBits && (bits & 0x7FFFFF) != 0x7FFFFF;
  }
  __m512 operator()(__m512 v) const {
    __m512 q = _mm512_mul_ps(v, inverse);
    for (int i = 0; i < 2; ++i) q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, v), inverse, q);
    return q;
  }
};

// rounded_to_e4m3 of numbers.
inline __m512i e4m3_bits(__m512 v) {
  __m512i const magnitude = magnitudes(v);
  __m512i const odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  __m512i const normal =
      _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(magnitude, odd), _mm512_set1_epi32(0x7FFFF)),
                       _mm512_set1_epi32(int(0xFFF00000)));
  __m512 const step = _mm512_set1_ps(kSubnormalStep);
  __m512 const small = _mm512_sub_ps(_mm512_add_ps(_mm512_castsi512_ps(magnitude), step), step);
  __mmask16 const subnormal = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(kMinNormalBits));
  __m512i const rounded = _mm512_mask_mov_epi32(normal, subnormal, _mm512_castps_si512(small));
  return _mm512_or_si512(rounded, _mm512_xor_si512(_mm512_castps_si512(v), magnitude));
}

template <int Side, class T>
void quantize_bf16_sixteens(T const* x, int64_t in, int64_t from, int64_t to, Bf16* values, int64_t pitch,
                            float* scales) {
  alignas(64) static constexpr auto kUpperHalves = [] {
    std::array<uint16_t, 32> places{};
    for (int i = 0; i < 32; ++i) places[size_t(i)] = uint16_t(2 * i + 1);
    return places;
  }();
  __m512i const upper_halves = _mm512_load_si512(kUpperHalves.data());
  for (int64_t t = from; t < to; ++t) {
    T const* const row = x + t * in;
    float const scale = e4m3_scale(bit_cast<float>(largest_of(row, in)));
    if (!Quotient::exact_for(scale)) {
      quantize_rows<Side>(x, in, t, t + 1, values, pitch, scales);
      continue;
    }
    scales[t] = scale;
    Quotient const quotient(scale);
    Bf16* out = row_of<Side>(values, t, pitch);
    for (int64_t c = 0; c < pitch; c += 32, out += 32 * Side) {
      __m512i half[2];
      for (int i = 0; i < 2; ++i) half[i] = e4m3_bits(quotient(sixteen(row + c + 16 * i, in_front(c + 16 * i, in))));
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(half[0], upper_halves, half[1]));
    }
  }
}

template <int Offset, int Side, class T>
void quantize_int8_sixteens(T const* x, int64_t in, int64_t from, int64_t to, uint8_t* values, int64_t pitch,
                            float* scales) {
  __m128i const offset = _mm_set1_epi8(char(Offset));
  for (int64_t t = from; t < to; ++t) {
    T const* const row = x + t * in;
    uint32_t const largest = largest_of(row, in);
    scales[t] = int8_scale(largest);
    __m512 const factor = _mm512_set1_ps(1.0f / scales[t]);
    int64_t const end = largest < kInfinityBits ? in : 0;
    uint8_t* out = row_of<Side>(values, t, pitch);
    for (int64_t c = 0; c < pitch; c += 64, out += 64 * Side)
      for (int i = 0; i < 64; i += 16) {
        __mmask16 const there = in_front(c + i, end);
        __m512i const rounded = _mm512_maskz_cvtps_epi32(there, _mm512_mul_ps(sixteen(row + c + i, there), factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_add_epi8(_mm512_cvtepi32_epi8(rounded), offset));
      }
  }
}

template <float Unit, class Sum, class T>
void finish_sixteens(Sum const* out, int tokens, int rows, float const* x_scale, float const* weight_scale,
                     T const* bias, T* y, int64_t y_pitch) {
  for (int t = 0; t < tokens; ++t, out += kRows, y += y_pitch) {  // whole cache lines of y, one after the other
    __m512 const scale = _mm512_set1_ps(x_scale[t]);
    for (int r = 0; r < rows; r += kRows) {
      __mmask16 const there = in_front(r, rows);
      __m512 v = sums_of(out + int64_t(r) * tokens);
      if constexpr (Unit != 1.0f) v = _mm512_mul_ps(v, _mm512_set1_ps(Unit));
      v = _mm512_mul_ps(_mm512_mul_ps(v, scale), _mm512_maskz_loadu_ps(there, weight_scale + r));
      if (bias) v = _mm512_add_ps(v, sixteen(bias + r, there));
      store(y + r, v, there);
    }
  }
}

template <int Side>
void quantize_bf16_avx512(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t, void* values,
                          int64_t pitch, float* scales) {
  with_type(dtype, x, [&](auto const* p) {
    quantize_bf16_sixteens<Side>(p, in, from, to, static_cast<Bf16*>(values), pitch, scales);
  });
}

template <int Offset, int Side>
void quantize_int8_avx512(void const* x, Dtype dtype, int64_t in, int64_t from, int64_t to, int64_t, void* values,
                          int64_t pitch, float* scales) {
  with_type(dtype, x, [&](auto const* p) {
    quantize_int8_sixteens<Offset, Side>(p, in, from, to, static_cast<uint8_t*>(values), pitch, scales);
  });
}

template <class Sum, float Unit = 1.0f>
void finish_avx512(void const* out, int tokens, int rows, float const* x_scale, float const* weight_scale,
                   void const* bias, Dtype dtype, void* y, int64_t y_pitch) {
  with_type(dtype, bias, [&](auto const* p) {
    using T = std::remove_cvref_t<decltype(*p)>;
    finish_sixteens<Unit>(static_cast<Sum const*>(out), tokens, rows, x_scale, weight_scale, p, static_cast<T*>(y),
                          y_pitch);
  });
}

}  // namespace
}  // namespace spense::cpu
