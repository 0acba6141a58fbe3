// TwELL's format and what a gate lets through, as every kernel knows them. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace spense {

enum Gate : int { kRelu = 0, kFatrelu = 1, kRelu2 = 2, kDrelu = 3, kInput = 4 };  // kInput: |x|, and there is no up

struct Twell {
  int tile, share;  // 128 or 256 neurons, of which 1/8, 1/4 or 1/2 can be stored
  float threshold;  // what is at most this is closed

#ifdef __CUDACC__
  __host__ __device__
#endif
      int words() const {  // of a tile, the count included
    return tile / share;
  }
  bool legal(int neurons) const {
    return (tile == 128 || tile == 256) && (share == 8 || share == 4 || share == 2) && neurons >= 0 &&
           neurons <= 0xFFFF && threshold >= 0.f;
  }
};

}  // namespace spense
