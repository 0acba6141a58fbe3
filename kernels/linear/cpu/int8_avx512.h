// 16 rows of four bytes (AVX-512 F, BW, VL, VBMI and VNNI), for int8_strip.h.
#pragma once
#include <immintrin.h>
#include "linear/cpu/int8_strip.h"

namespace spense::cpu {
namespace {

struct Avx512Vnni {
  static constexpr int kLanes = 16;
  static constexpr int kOffset = 128;                   // of bytes of x: they are unsigned in vpdpbusd
  static constexpr int kTogether = 16, kFewBlock = 16;  // tokens whose sums are in registers
  static constexpr int kFew = 24;                       // tokens; more are faster with prepared controls
  static constexpr int kManyBlock = 12;                 // of two strips
  static constexpr int64_t kDepth = 1024;
  using Weights = __m512i;
  __m512i v;

  static Avx512Vnni zero() { return {_mm512_setzero_si512()}; }
  static Avx512Vnni load(void const* p) { return {_mm512_loadu_si512(p)}; }
  static void store(void* p, Avx512Vnni a) { _mm512_storeu_si512(p, a.v); }
  static Avx512Vnni plus(Avx512Vnni a, Avx512Vnni b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static Avx512Vnni minus(Avx512Vnni a, Avx512Vnni b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static Weights weights(uint8_t const* p) { return _mm512_loadu_si512(p); }
  static Avx512Vnni repeated(int byte) { return {_mm512_set1_epi8(char(byte))}; }
  static Avx512Vnni four(uint8_t const* x) { return {_mm512_set1_epi32(read<int32_t>(x))}; }
  static Avx512Vnni eight(uint8_t const* x) { return {_mm512_set1_epi64(read<int64_t>(x))}; }
  static Avx512Vnni dot(Avx512Vnni sum, Weights w, Avx512Vnni x) { return {_mm512_dpbusd_epi32(sum.v, x.v, w)}; }
  static Avx512Vnni permuted(Avx512Vnni eight, Avx512Vnni controls) {
    return {_mm512_shuffle_epi8(eight.v, controls.v)};
  }
  static __m512i metadata(uint8_t const* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)));
  }
  // Per row the places of its four kept values among eight columns.
  static Avx512Vnni controls(uint8_t const* meta) {
    __m512i const shifts = _mm512_set1_epi64(0x2624222006040200);
    __m512i const places = _mm512_multishift_epi64_epi8(shifts, metadata(meta));
    __m512i const three = _mm512_set1_epi8(3), odd_group = _mm512_set1_epi32(0x04040000);
    return {_mm512_ternarylogic_epi32(places, three, odd_group, 0xEA)};  // (places & 3) | odd_group
  }
};

}  // namespace
}  // namespace spense::cpu
