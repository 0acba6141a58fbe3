// MLPs of which a token uses few neurons, on x86-64 CPUs: of up and of down, transposed, only the rows of those are
// read. Written once over a vector type (avx2.cpp, avx512.h); docs/kernels.md, "Activation-sparse MLPs".
#pragma once
#include <cstdint>

namespace spense::cpu {

using Bf16Bits = uint16_t;

constexpr int kWord = 64;            // neurons whose activity for a token is one word
constexpr int64_t kColumns = 32;     // outputs that a thread takes at least: a line of bf16
constexpr int64_t kMlpTokens = 512;  // tokens that share one pass over the rows

// Tiles, where all neurons are computed; what stays in the second-level cache is half a megabyte.
constexpr int kTileRows = 4;             // rows of up in a tile
constexpr int64_t kAllTokens = 512;      // tokens that share one pass over the rows
constexpr int64_t kPanel = 64;           // rows of up that meet all tokens in turn,
constexpr int64_t kPanelColumns = 2048;  // so many columns of them at a time
constexpr int64_t kPanelPitch = kPanel + 16;
constexpr int64_t kTileDepth = 256;    // columns of up, or rows of down, in an order of their own where that is made:
constexpr int64_t kPackedTokens = 48;  // from so many tokens on for up, and
constexpr int64_t kFewTokens = 96;     // from more than these on for down

// Columns of down that meet all tokens in turn. For few tokens memory takes most of the time, and gives more where it
// is read in longer pieces.
struct OutputPanel {
  bool packed;
  int64_t columns;
  constexpr explicit OutputPanel(int64_t count)
      : packed(count > kFewTokens), columns(packed ? 128 : 32 * kColumns * (count > 32 ? 1 : 2)) {}
  constexpr int64_t pitch() const { return columns + 16; }
};

// In the order of KINDS of vllm_spense.ops.mlp.activation.
enum Kind : int { kRelu, kFatrelu, kRelu2, kDrelu, kKinds };

// A neuron that some tokens use: these, ascending, and their hidden values stand at [first, first + tokens) of lists.
struct Neuron {
  int64_t row, first;
  int tokens;
};

// bf16 [rows, columns], whose rows may lie apart.
struct Rows {
  Bf16Bits const* data;
  int64_t pitch;
  Bf16Bits const* row(int64_t i) const { return data + i * pitch; }
};

struct Gate {
  Rows values;  // in front of the activation
  Kind kind;
  int limit;  // bits of the largest bf16 that is closed
};

// What is compiled once per instruction set; each function runs on the caller's thread. Those files define nothing else
// with linkage and nothing that runs when the library is loaded.
struct MlpFunctions {
  // Words [word, tokens] of the words [from, to): bit i says whether value 64 word + i of a token is above `limit`, or
  // NaN; with `magnitudes` whether its magnitude is. Returns how many are.
  int64_t (*active)(Rows const& values, int64_t width, int limit, bool magnitudes, int64_t from, int64_t to,
                    int64_t tokens, uint64_t* words);
  // Hidden values of the neurons [from, to), and their tokens without those whose value is zero.
  void (*hidden)(Rows const& x, Gate const& gate, Rows const& up, Bf16Bits const* bias, int64_t in, Neuron* neurons,
                 int64_t from, int64_t to, uint16_t* tokens, float* values);
  // Columns [from, to), from a multiple of kColumns, of y [count, out] = values * rows of `down` + bias. `sums` begins
  // with a cache line and has room for sums_of(count, to - from).
  void (*outputs)(Neuron const* neurons, int64_t neuron_count, uint16_t const* tokens, float const* values,
                  Rows const& down, Bf16Bits const* bias, int64_t count, int64_t from, int64_t to, Bf16Bits* y,
                  int64_t y_pitch, float* sums);
  // All neurons: hidden values [count, pitch] of the neurons [from, to), from a multiple of kPanel, for up to
  // kAllTokens tokens; as bf16 or fp32, `hidden_bytes` each, and zeros behind them up to a multiple of kColumns. Room
  // that begins with a cache line: `products` for count * kPanelPitch, `packed` for kTileDepth * kPanel.
  void (*all_hidden)(Rows const& x, Gate const& gate, Rows const& up, Bf16Bits const* bias, int64_t in, int64_t count,
                     int64_t from, int64_t to, void* hidden, int64_t pitch, float* products, Bf16Bits* packed);
  // What takes their place where values are given: zeros for those whose magnitude is not above `limit`.
  void (*spread)(Rows const& values, int64_t width, int limit, int64_t from, int64_t to, void* hidden, int64_t pitch);
  // `outputs` of all neurons. Room that begins with a cache line: `sums` for count * pitch(), `packed` for columns *
  // kTileDepth of OutputPanel(count), if that is packed.
  void (*all_outputs)(void const* hidden, int64_t pitch, int64_t neurons, Rows const& down, Bf16Bits const* bias,
                      int64_t count, int64_t from, int64_t to, Bf16Bits* y, int64_t y_pitch, float* sums,
                      Bf16Bits* packed);
  int64_t hidden_bytes;
};
extern MlpFunctions const mlp_avx2, mlp_avx512, mlp_avx512_bf16;

namespace {

constexpr int64_t kSumsBytes = 32 << 10;  // of sums that stay in the cache while all neurons add to them

// Columns whose sums are kept at a time, and how far apart those of two tokens are: no power of two, so that they lie
// in other sets of the cache.
constexpr int64_t columns_at_once(int64_t count, int64_t columns) {
  int64_t const room = kSumsBytes / int64_t(sizeof(float)) / (count < 1 ? 1 : count) / kColumns * kColumns;
  int64_t const some = room < 4 * kColumns ? 4 * kColumns : room;
  return some < columns ? some : columns;
}
constexpr int64_t sums_pitch(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns + 16; }
constexpr int64_t sums_of(int64_t count, int64_t columns) {
  return count * sums_pitch(columns_at_once(count, columns));
}

}  // namespace
}  // namespace spense::cpu
