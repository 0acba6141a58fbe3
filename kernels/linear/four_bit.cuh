// Kernels for layers in 4 bits.
//
// A warp multiplies 16 rows of W with 8 or 16 tokens: tensor cores add up 16 columns at a time, and which columns these
// are does not matter as long as W and x agree. So a lane takes 32 neighbouring columns of two rows, 16 bytes of each
// where they are dense, and the activations that belong to them, and what it has decoded are its operands. The warps of
// a block share out the columns and add their sums up in shared memory.
#pragma once
#include "linear/four_bit_decode.cuh"

namespace spense::four_bit {

constexpr int kRows = 16, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStep = 4 * kChunk;  // columns of a warp's step: four lanes share a row
constexpr int kPitch = kRows + 4;  // floats between tokens of a warp's sums: no bank conflicts

__host__ __device__ constexpr int tiles(int rows) { return (rows + kRows - 1) / kRows; }

// sums [16 x 8] += a [16 x 16] b [16 x 8]
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
#define SPENSE_MMA(TYPE)                                           \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "        \
      "{%0, %1, %2, %3};"                                          \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (__is_same(T, __nv_bfloat16))
    SPENSE_MMA("bf16");
  else
    SPENSE_MMA("f16");
#undef SPENSE_MMA
}

__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, float v) { to = __float2bfloat16(v); }
__device__ __forceinline__ void narrow(__half& to, float v) { to = __float2half(v); }
__device__ __forceinline__ void narrow(float& to, float v) { to = v; }

// Where a tile of rows lies: its first row and the end in the stored matrices, and the distance from there to y.
struct Place {
  int row, end, to_y;
  bool sparse, dense;

  // Of an output split the dense regions come first: their tiles take longer.
  template <bool kSparse>
  __device__ static Place find(FourBitArgs const& p, int tile) {
    if (!kSparse || !p.output_split) return {tile * kRows, p.out_features, 0, kSparse, true};
    Place found{};
#pragma unroll
    for (int sparse = 0; sparse < 2; ++sparse) {
      int stored = 0, y = 0;
#pragma unroll
      for (int i = 0; i < kMaxShards; ++i) {
        if (i >= p.shards) continue;
        int const rows = sparse ? p.sparse[i] : p.dense[i];
        if (tile >= 0 && tile < tiles(rows))
          found = {stored + tile * kRows, stored + rows, y + (sparse ? 0 : p.sparse[i]) - stored, sparse != 0, !sparse};
        tile -= tiles(rows);
        stored += rows;
        y += p.sparse[i] + p.dense[i];
      }
    }
    return found;
  }
};

// Adds the product of a tile of 16 rows of one region with x, whose columns begin at `x`. For whole warps.
template <class T, int kTiles, bool kTwoOfFour, class Look>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], FourBitArgs const& p, FourBitMatrix const& m,
                                            T const* x, int row, int end, int first_token, Look const& look) {
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  int const rows[2] = {min(row + group, end - 1), min(row + group + 8, end - 1)};
  using Codes = Chunk<kTwoOfFour>;
  int column = warp * kStep + part * kChunk;
  Codes next[2] = {Codes::load(m, rows[0], column), Codes::load(m, rows[1], column)};
#pragma unroll 1
  for (int begin = warp * kStep; begin < m.columns; begin += kWarps * kStep, column += kWarps * kStep) {
    Codes const now[2] = {next[0], next[1]};
    uint4 b[kTiles][4] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int const token = first_token + 8 * tile + group;
      if (token < p.tokens && column < m.columns) {
        auto const* const from = reinterpret_cast<uint4 const*>(x + int64_t(token) * p.in_features + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[tile][i] = from[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = Codes::load(m, rows[i], column + kWarps * kStep);
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {  // four columns of each row: an operand of a lane
      uint32_t upper[2], lower[2];
      now[0].template group<T>(upper, i, look);
      now[1].template group<T>(lower, i, look);
      uint32_t const a[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint4 const& eight = b[tile][i / 2];
        multiply<T>(sums[tile], a, i % 2 ? eight.z : eight.x, i % 2 ? eight.w : eight.y);
      }
    }
  }
}

// 8 * kTiles tokens times 16 rows. `kSparse`: there is a 2:4 region.
template <class T, int kTiles, bool kShuffle, bool kSparse>
__global__ void __launch_bounds__(kThreads) linear_kernel(FourBitArgs const p) {
  extern __shared__ float raw[];  // two tables, then sums [warp][token][kPitch]
  float* const all_sums = raw + 2 * kEntries;
  int const token_tiles = (p.tokens + 8 * kTiles - 1) / (8 * kTiles);
  Place const place = Place::find<kSparse>(p, int(blockIdx.x) / token_tiles);
  int const first_token = int(blockIdx.x) % token_tiles * 8 * kTiles;
  auto const* const x = static_cast<T const*>(p.x);

  float sums[kTiles][4] = {};
  if constexpr (kSparse) {
    Table<kShuffle> const look(p.sparse_weight.table, raw);
    if (place.sparse)
      add_product<T, kTiles, true>(sums, p, p.sparse_weight, x, place.row, place.end, first_token, look);
  }
  Table<kShuffle> const look(p.dense_weight.table, raw + kEntries);
  if (place.dense) {
    int const before = kSparse && !p.output_split ? p.sparse_weight.columns : 0;
    add_product<T, kTiles, false>(sums, p, p.dense_weight, x + before, place.row, place.end, first_token, look);
  }

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  float* const own = all_sums + warp * 8 * kTiles * kPitch;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) own[(8 * tile + 2 * part + i % 2) * kPitch + group + i / 2 * 8] = sums[tile][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * 8 * kTiles; i += kThreads) {
    int const row = place.row + i % kRows, token = first_token + i / kRows;
    if (row >= place.end || token >= p.tokens) continue;
    float sum = p.bias ? widen(static_cast<T const*>(p.bias)[row + place.to_y]) : 0.f;
    for (int w = 0; w < kWarps; ++w) sum += all_sums[(w * 8 * kTiles + i / kRows) * kPitch + i % kRows];
    narrow(static_cast<T*>(p.y)[int64_t(token) * p.out_features + row + place.to_y], sum);
  }
}

// A thread writes eight columns of one region's matrix.
template <class T, bool kShuffle, bool kTwoOfFour>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(FourBitArgs const p) {
  extern __shared__ float raw[];
  FourBitMatrix const& m = kTwoOfFour ? p.sparse_weight : p.dense_weight;
  Table<kShuffle> const look(m.table, raw);
  uint32_t const words = uint32_t(m.columns) / 8, all = words * uint32_t(m.rows);
  uint32_t const mine = blockIdx.x * kThreads + threadIdx.x, at = mine < all ? mine : all - 1;
  int const row = int(at / words), column = int(at % words * 8);
  int const code = kTwoOfFour ? column / 2 : column;
  float const absmax = m.absmax[int64_t(row) * m.absmax_pitch + (code >> m.block_shift)];
  union {
    T values[8];
    uint4 vectors[sizeof(T) / 2];
  } out;
  if constexpr (kTwoOfFour) {
    uint32_t const codes = reinterpret_cast<uint16_t const*>(m.codes)[at], meta = m.meta[at];
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float const first = look(codes >> (8 * group + 4)) * absmax, second = look(codes >> (8 * group)) * absmax;
      uint32_t const nibble = meta >> (4 * group);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        narrow(out.values[4 * group + i], (nibble & 3) == i ? first : (nibble >> 2 & 3) == i ? second : 0.f);
    }
  } else {
    uint32_t const codes = reinterpret_cast<uint32_t const*>(m.codes)[at];
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(out.values[i], look(codes >> (4 * (i ^ 1))) * absmax);
  }
  if (mine >= all) return;
  int y = row, before = 0;
  if (p.output_split) {  // behind the regions of the shards in front, and behind the 2:4 region of its own
    int stored = 0;
#pragma unroll
    for (int i = 0; i < kMaxShards; ++i) {
      if (i >= p.shards) continue;
      if (row >= stored) y = row + before + (kTwoOfFour ? 0 : p.sparse[i]);
      stored += kTwoOfFour ? p.sparse[i] : p.dense[i];
      before += kTwoOfFour ? p.dense[i] : p.sparse[i];
    }
    before = 0;
  } else if (!kTwoOfFour) {
    before = p.sparse_weight.columns;
  }
  auto* const to = reinterpret_cast<uint4*>(static_cast<T*>(p.y) + int64_t(y) * p.in_features + before + column);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) to[i] = out.vectors[i];
}

}  // namespace spense::four_bit
