// 8 rows of four bytes (AVX2), for int8_strip.h: what its two kinds of dot products share.
#pragma once
#include <immintrin.h>
#include "linear/cpu/int8_strip.h"

namespace spense::cpu {
namespace {

template <class V>
struct Ymm {
  static constexpr int kLanes = 8;
  static constexpr int64_t kDepth = 1024;
  __m256i v;

  static V of(__m256i v) {
    V made;
    made.v = v;
    return made;
  }
  static V zero() { return of(_mm256_setzero_si256()); }
  static V load(void const* p) { return of(_mm256_loadu_si256(static_cast<__m256i const*>(p))); }
  static void store(void* p, V a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
  static V plus(V a, V b) { return of(_mm256_add_epi32(a.v, b.v)); }
  static V minus(V a, V b) { return of(_mm256_sub_epi32(a.v, b.v)); }
  static V repeated(int byte) { return of(_mm256_set1_epi8(char(byte))); }
  static V four(uint8_t const* x) { return of(_mm256_set1_epi32(read<int32_t>(x))); }
  static V eight(uint8_t const* x) { return of(_mm256_set1_epi64x(read<int64_t>(x))); }
  static V permuted(V eight, V controls) { return of(_mm256_shuffle_epi8(eight.v, controls.v)); }
  // Per row the places of its four kept values among eight columns: a metadata byte's bits 0, 2, 4, 6 come to the four
  // bytes' ends, and nothing beside them is in the way.
  static V controls(uint8_t const* meta) {
    __m256i const m = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(meta)));
    __m256i const halves = _mm256_or_si256(m, _mm256_slli_epi32(m, 12));
    __m256i const places = _mm256_or_si256(halves, _mm256_slli_epi32(halves, 6));
    return of(_mm256_or_si256(_mm256_and_si256(places, _mm256_set1_epi8(3)), _mm256_set1_epi32(0x04040000)));
  }
};

}  // namespace
}  // namespace spense::cpu
