// The Spense linear layer as separate CUTLASS GEMMs: every tile of Blackwell, and large token counts on Hopper.
#pragma once
#include <cstddef>
#include <cuda_runtime_api.h>
#include "common/status.h"
#include "linear/arguments.h"

namespace spense {

// What one GEMM writes for weight row m and token n, with acc = sum_k W[m, k] * x[n, k]:
//   final    bf16  weight_scale[m] * (x_scale[n] * acc) + bias[m]
//   partial  fp32  acc
//   addend   bf16  weight_scale[m] * (x_scale[n] * (acc + addend[n, m])) + bias[m]
enum CutlassKind : int { kSparseFinal = 0, kDenseFinal = 1, kSparsePartial = 2, kDenseAddend = 3 };

// Pointers are to the first row, token or column that this GEMM reads or writes; leading dimensions are the layer's.
struct CutlassGemm {
  int rows, tokens, cols;              // M, N, K (logical columns)
  uint8_t const* weight;               // values or dense weight
  int64_t weight_pitch;                // bytes
  uint8_t const* metadata;             // sparse kinds: first row of the first block of 128 columns
  int metadata_rows;                   // rows of a block
  uint8_t const* x;
  int64_t x_pitch;                     // bytes
  float const* x_scale;                // not read by partial, like the next two
  float const* weight_scale;
  void const* bias;                    // bf16, or null
  float const* addend;                 // addend only
  int64_t addend_pitch;                // elements
  void* d;
  int64_t d_pitch;                     // elements from one token to the next
  int device, sms;
  bool pdl;                            // may start before the previous kernel on the stream has ended
  void* workspace;
  size_t workspace_bytes;
};

}  // namespace spense

// Instance n of -DSPENSE_CUTLASS_INSTANCE=n computes kind n % 4 with:
//   n / 4  arch      tile (rows x tokens x columns)                            cluster
//   0      sm_90a    128 x 256 x 128                                           2 x 1
//   1      sm_100a   128 x  64 x 256 sparse, 128 x  64 x 128 dense             1 x 1
//   2      sm_100a   256 x 128 x 256 sparse, 256 x 128 x 128 dense, two SMs    2 x 1
// It returns a spense::Status. With `workspace_bytes` nothing is launched: it receives what the GEMM needs.
#define SPENSE_CUTLASS_DECLARE(n) \
  extern "C" int spense_cutlass_gemm_##n(spense::CutlassGemm const* gemm, size_t* workspace_bytes, cudaStream_t stream)
SPENSE_CUTLASS_DECLARE(0);
SPENSE_CUTLASS_DECLARE(1);
SPENSE_CUTLASS_DECLARE(2);
SPENSE_CUTLASS_DECLARE(3);
SPENSE_CUTLASS_DECLARE(4);
SPENSE_CUTLASS_DECLARE(5);
SPENSE_CUTLASS_DECLARE(6);
SPENSE_CUTLASS_DECLARE(7);
SPENSE_CUTLASS_DECLARE(8);
SPENSE_CUTLASS_DECLARE(9);
SPENSE_CUTLASS_DECLARE(10);
SPENSE_CUTLASS_DECLARE(11);

// Runs the layer on `stream`, bf16 output only. `arch` is 90 or 100; `tile` 0 is for few tokens (Blackwell only), 1 for
// many. kUnsupported: an instance that was not compiled in, another output type, or a size or pointer that TMA cannot
// take; kBadConfig: regions that do not cover the layer. `workspace` is 16-byte aligned and in use by no other stream.
//
// With `pdl` each GEMM may start before the kernel in front of it has ended; it waits for that end before it reads x,
// x_scale or the workspace and before it writes, so the GEMMs of a layer still run one after another. A kernel in front
// that was itself launched with PDL must execute griddepcontrol.wait, else the wait does not reach what came before
// that kernel. Weights, their scales and the bias may be read before the wait.
int spense_linear_cutlass(spense::LinearArgs const& args, int arch, int tile, void* workspace, size_t workspace_bytes,
                          bool pdl, cudaStream_t stream);

// Bytes of workspace that the same call needs; 0 where it would be refused.
size_t spense_linear_cutlass_workspace(spense::LinearArgs const& args, int arch, int tile);
