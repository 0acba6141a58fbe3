// Which values of a token are active, as words of 64 bits: with AVX2, as the other instruction sets need more for it.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <bit>
#include "mlp/cpu/kernels.h"

namespace spense::cpu {
namespace {

constexpr int kInfinity = 0x7F80, kMagnitude = 0x7FFF;  // of bf16; larger magnitudes are NaN

// Numbers above zero are in the order of their bits, and those of negative ones are below; a NaN may have either sign.
template <bool Magnitudes>
__m256i above(__m256i bits, __m256i limit) {
  __m256i const magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(kMagnitude));
  if constexpr (Magnitudes) return _mm256_cmpgt_epi16(magnitude, limit);
  __m256i const nan = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(kInfinity));
  return _mm256_or_si256(_mm256_cmpgt_epi16(bits, limit), nan);
}

template <bool Magnitudes>
uint64_t active_word(Bf16Bits const* p, __m256i limit) {
  uint64_t word = 0;
  for (int half = 0; half < 2; ++half, p += 32) {
    __m256i const a = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)),
                  b = _mm256_loadu_si256(reinterpret_cast<__m256i const*>(p + 16));
    __m256i const both = _mm256_packs_epi16(above<Magnitudes>(a, limit), above<Magnitudes>(b, limit));
    uint32_t const found = uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xD8)));
    word |= uint64_t(found) << 32 * half;
  }
  return word;
}

template <bool Magnitudes>
int64_t active_words(Rows const& values, int64_t width, int limit, int64_t from, int64_t to, int64_t tokens,
                     uint64_t* words) {
  __m256i const limits = _mm256_set1_epi16(int16_t(limit));
  int64_t found = 0;
  for (int64_t w = from; w < to; ++w) {
    int64_t const here = std::min<int64_t>(kWord, width - w * kWord);
    for (int64_t t = 0; t < tokens; ++t) {
      Bf16Bits const* p = values.row(t) + w * kWord;
      Bf16Bits padded[kWord] = {};  // zeros are active nowhere
      if (here < kWord) p = std::copy_n(p, here, padded) - here;
      uint64_t const word = active_word<Magnitudes>(p, limits);
      words[w * tokens + t] = word;
      found += std::popcount(word);
    }
  }
  return found;
}

int64_t active(Rows const& values, int64_t width, int limit, bool magnitudes, int64_t from, int64_t to, int64_t tokens,
               uint64_t* words) {
  return magnitudes ? active_words<true>(values, width, limit, from, to, tokens, words)
                    : active_words<false>(values, width, limit, from, to, tokens, words);
}

}  // namespace
}  // namespace spense::cpu
