// What instances of the Hopper kernel differ in, the shared memory that follows from it, and the kernel's parameters.
#pragma once
#include "linear/sm90_primitives.cuh"
#include "linear/tile_plan.h"

namespace spense::sm90 {

struct KernelParams {
  TilePlan plan;
  uint8_t const* metadata;
  float const* x_scale;
  float const* weight_scale;
  void const* bias;
  void* y;
  float* amax;
  int metadata_rows, tokens, out_features, out_dtype;
  uint32_t* words;
  Twell twell;
};

constexpr int kSmemLimit = 227 * 1024;

// kPromote > 0: every so many stages the accumulators are added to a second set in full fp32, because FP8 wgmma sums
// with fewer mantissa bits than fp32 and the error grows with K.
//
// kPaired: y = silu(gate) * up. One warpgroup has 64 rows of gate, the other the same rows of up, and the epilogue
// joins them. The largest |y| of each token comes along, so that quantising y for the next layer needs one pass, not
// two.
//
// kPacked: y goes out as TwELL's words, a tile of 128 rows from a tile of the kernel.
template <int kWarpgroups_, int kTokens_, bool kMulticast_, int kPromote_, bool kPaired_ = false, bool kPacked_ = false>
struct Shape {
  static constexpr bool kPaired = kPaired_, kPacked = kPacked_;
  static constexpr bool kJoined = kPaired || kPacked;  // the epilogue needs the rows of both warpgroups
  static_assert(!kJoined || kWarpgroups_ == 2);
  static_assert(!(kPaired && kPacked));
  static constexpr int kWarpgroups = kWarpgroups_, kTokens = kTokens_, kPromote = kPromote_;
  static constexpr bool kMulticast = kMulticast_;
  static constexpr int kRows = 64 * kWarpgroups;  // of weights
  static constexpr int kBoxes = kPaired ? 2 : 1, kOutRows = kRows / kBoxes;
  // Consumers, then the producer warp. Registers are handed out by warpgroup: where the accumulators need more than an
  // even share, the producer is a warpgroup that gives its own away.
  static constexpr bool kShiftRegisters = kTokens > 128 || (kMulticast && kJoined);
  static constexpr int kThreads = 128 * kWarpgroups + (kShiftRegisters ? 128 : 32);
  // Columns of W per sparse stage. 256 give decode the same 128-byte rows for both regions (one TMA shape, fewer
  // barriers); 128 give prefill twice as many stages in flight, each of which is mostly x.
  static constexpr int kSparseK = kMulticast ? 128 : 256;
  static constexpr int kBlocks = kSparseK / 128;            // x tiles and metadata blocks per sparse stage
  static constexpr int kValueBytes = kSparseK / 2;          // per row
  static constexpr int kChunk = kMulticast ? 32 : kTokens;  // tokens per pass of the epilogue
  static constexpr int kStageBytes = kRows * 128 + kBlocks * (kTokens * 128 + kRows * 16);
  static constexpr int kSumBytes = kChunk * (kRows + 4) * 4;
  static constexpr int kFit = (kSmemLimit - 1024 - 512 - kSumBytes - kWarpgroups * kTokens * 4) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static_assert(kStages >= 3);

  struct __align__(1024) Smem {
    uint8_t weights[kStages][kRows * 128];
    uint8_t x[kStages][kBlocks][kTokens * 128];
    uint8_t metadata[kStages][kBlocks][kRows * 16];
    float sums[kChunk][kRows + 4];  // a stride of 4 banks: the accumulator layout stores without conflicts
    float x_scale[kWarpgroups][kTokens];
    uint64_t full[kStages], empty[kStages], sums_full, sums_empty;
  };
  static constexpr int kSmemBytes = sizeof(Smem) + 1024;  // room to align
  static_assert(kSmemBytes <= kSmemLimit);
};

}  // namespace spense::sm90
