// The GEMM instances of cutlass_fp8.h, one for each compilation: an instance takes a minute and some 5 GB.
#include "linear/cutlass_fp8_gemm.cuh"

namespace spense {
namespace instances {

using cute::_1;
using cute::_2;
template <int kRows, int kTokens, int kColumns>
using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kTokens>, cute::Int<kColumns>>;

template <int kGroup, CutlassKind kKind>
struct Instance;

// Hopper: a pair of CTAs shares the tile of x. The 128 accumulators of a thread leave no registers to promote FP8 sums
// into, hence fast accumulation.
template <CutlassKind kKind>
struct Instance<0, kKind> {
  using Gemm = CutlassGemmInstance<cutlass::arch::Sm90, kKind, Tile<128, 256, 128>, cute::Shape<_2, _1, _1>,
                                   cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                                   cutlass::epilogue::TmaWarpSpecializedCooperative>;
};

constexpr bool is_sparse(CutlassKind kind) { return kind == kSparseFinal || kind == kSparsePartial; }

// Blackwell: 128 bytes of a weight row per stage, which are 256 columns of a sparse one.
template <CutlassKind kKind>
constexpr int kColumns = is_sparse(kKind) ? 256 : 128;

template <CutlassKind kKind>
struct Instance<1, kKind> {
  using Schedule = cute::conditional_t<is_sparse(kKind), cutlass::gemm::KernelSparseTmaWarpSpecialized1SmSm100,
                                       cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>;
  using Gemm = CutlassGemmInstance<cutlass::arch::Sm100, kKind, Tile<128, 64, kColumns<kKind>>,
                                   cute::Shape<_1, _1, _1>, Schedule, cutlass::epilogue::TmaWarpSpecialized1Sm>;
};

template <CutlassKind kKind>
struct Instance<2, kKind> {
  using Schedule = cute::conditional_t<is_sparse(kKind), cutlass::gemm::KernelSparseTmaWarpSpecialized2SmSm100,
                                       cutlass::gemm::KernelTmaWarpSpecialized2SmSm100>;
  using Gemm = CutlassGemmInstance<cutlass::arch::Sm100, kKind, Tile<256, 128, kColumns<kKind>>,
                                   cute::Shape<_2, _1, _1>, Schedule, cutlass::epilogue::TmaWarpSpecialized2Sm>;
};

}  // namespace instances
}  // namespace spense

// The macro's value has to be expanded before it is pasted into a name.
#define SPENSE_CUTLASS_DEFINE(n) SPENSE_CUTLASS_DECLARE(n)

SPENSE_CUTLASS_DEFINE(SPENSE_CUTLASS_INSTANCE) {
  constexpr int kGroup = SPENSE_CUTLASS_INSTANCE / 4, kKind = SPENSE_CUTLASS_INSTANCE % 4;
  using Gemm = spense::instances::Instance<kGroup, spense::CutlassKind(kKind)>::Gemm;
  return Gemm::run(*gemm, workspace_bytes, stream);
}
