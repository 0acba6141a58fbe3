// From words of activity to lists of neurons, each with the tokens that use it.
#pragma once
#include <bit>
#include <memory>
#include <vector>
#include "linear/cpu/operator.h"
#include "mlp/cpu/kernels.h"

namespace spense::cpu {
namespace {

// Calls f with the position of every bit that is set.
template <class F>
void each_bit(uint64_t word, F const& f) {
  for (; word; word &= word - 1) f(std::countr_zero(word));
}

// Neurons, ascending, that tokens [from, to) use, without those that none of them does. `values` is for the caller to
// fill in.
struct Lists {
  std::vector<Neuron> neurons;
  std::unique_ptr<uint16_t[]> tokens;
  std::unique_ptr<float[]> values;
  int64_t pairs = 0;

  // words [word_count, all tokens]
  Lists(uint64_t const* words, int64_t word_count, int64_t all, int64_t from, int64_t to) {
    struct Before {
      int64_t neurons, pairs;
    };
    std::vector<Before> before(size_t(word_count + 1));
    auto const in_parallel = [&](auto const& f) {
      torch::stable::parallel_for(0, word_count, std::max<int64_t>(1, kGrain / (kWord * (to - from))), f);
    };
    in_parallel([&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) {
        uint64_t any = 0;
        int64_t count = 0;
        for (int64_t t = from; t < to; ++t) {
          any |= words[w * all + t];
          count += std::popcount(words[w * all + t]);
        }
        before[size_t(w + 1)] = {std::popcount(any), count};
      }
    });
    for (size_t w = 0; w < size_t(word_count); ++w) {
      before[w + 1].neurons += before[w].neurons;
      before[w + 1].pairs += before[w].pairs;
    }
    pairs = before.back().pairs;
    neurons.resize(size_t(before.back().neurons));
    tokens.reset(new uint16_t[size_t(pairs)]);
    values.reset(new float[size_t(pairs)]);
    in_parallel([&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) {
        int counts[kWord] = {};
        for (int64_t t = from; t < to; ++t) each_bit(words[w * all + t], [&](int bit) { ++counts[bit]; });
        int64_t places[kWord], place = before[size_t(w)].pairs;
        Neuron* next = neurons.data() + before[size_t(w)].neurons;
        for (int bit = 0; bit < kWord; ++bit) {
          places[bit] = place;
          if (counts[bit]) *next++ = {w * kWord + bit, place, counts[bit]};
          place += counts[bit];
        }
        for (int64_t t = from; t < to; ++t)
          each_bit(words[w * all + t], [&](int bit) { tokens[size_t(places[bit]++)] = uint16_t(t - from); });
      }
    });
  }
};

}  // namespace
}  // namespace spense::cpu
