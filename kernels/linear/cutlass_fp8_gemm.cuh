// One FP8 e4m3 GEMM from CUTLASS 3.x collectives, 2:4-sparse or dense, with A and B swapped: the weight is operand A
// (its rows are M), the tokens are N. D is column-major M x N, which is y row-major, so a GEMM can write a range of
// y's columns: its leading dimension is the whole layer's.
#pragma once
#include <cuda_runtime_api.h>

#include "cute/tensor.hpp"
#include "cutlass/arch/grid_dependency_control.h"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "linear/cutlass_fp8.h"

namespace spense {

// A kernel that was started early (PDL) may read what the previous one writes only after griddepcontrol.wait. CUTLASS
// executes it in the warps that issue TMA loads. Blackwell's epilogue warps read the broadcast vectors before they wait
// for an accumulator, ordered by nothing, so x_scale, which the kernel in front may write, gets a wait of its own.
template <class Node>
struct AfterGridWait : Node {
  using Node::Node;

  template <class Callbacks>
  struct Waiting : Callbacks {
    CUTLASS_DEVICE explicit Waiting(Callbacks const& callbacks) : Callbacks(callbacks) {}
    CUTLASS_DEVICE void begin() {
      cutlass::arch::wait_on_dependent_grids();
      asm volatile("" ::: "memory");   // the wait names no memory: keep the loads below it
      Callbacks::begin();
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    auto const callbacks = Node::template get_consumer_store_callbacks<kReferenceSrc>(args);
    return Waiting<cute::remove_cvref_t<decltype(callbacks)>>(callbacks);
  }
};

// The epilogue as a tree of visitors; x_scale is a row vector of D and weight_scale and bias are column vectors.
template <CutlassKind kKind, class CtaTile>
struct CutlassEpilogue {
  template <template <class> class Op, class Out, class... Nodes>
  using Apply = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Op, Out, float, cutlass::FloatRoundStyle::round_to_nearest>, Nodes...>;
  using Acc = cutlass::epilogue::fusion::Sm90AccFetch;
  using XScale = AfterGridWait<cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float>>;
  using WeightScale = cutlass::epilogue::fusion::Sm90ColBroadcast<0, CtaTile, float>;
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, CtaTile, cutlass::bfloat16_t, float>;   // null: zeros

  template <class Sum>
  using Scaled = Apply<cutlass::homogeneous_multiply_add, cutlass::bfloat16_t, WeightScale,
                       Apply<cutlass::multiplies, float, XScale, Sum>, Bias>;
  using WithAddend = Apply<cutlass::plus, float, Acc, cutlass::epilogue::fusion::Sm90SrcFetch<float>>;

  static constexpr bool kPartial = kKind == kSparsePartial, kAddend = kKind == kDenseAddend;
  using Tree = cute::conditional_t<kPartial, Apply<cutlass::epilogue::thread::Identity, float, Acc>,
                                   Scaled<cute::conditional_t<kAddend, WithAddend, Acc>>>;
  using C = cute::conditional_t<kAddend, float, void>;
  using D = cute::conditional_t<kPartial, float, cutlass::bfloat16_t>;

  // One initializer per node of Scaled: weight_scale, {x_scale, sum, op}, bias, op.
  static typename Tree::Arguments arguments(CutlassGemm const& gemm) {
    if constexpr (kPartial) {
      return {};
    } else {
      auto const* bias = static_cast<cutlass::bfloat16_t const*>(gemm.bias);
      return {{gemm.weight_scale}, {{gemm.x_scale}, {}, {}}, {bias}, {}};
    }
  }
};

template <class Arch, CutlassKind kKind, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule>
struct CutlassGemmInstance {
  using Element = cutlass::float_e4m3_t;
  static constexpr bool kSparse = kKind == kSparseFinal || kKind == kSparsePartial;
  using OpClass = cute::conditional_t<kSparse, cutlass::arch::OpClassSparseTensorOp, cutlass::arch::OpClassTensorOp>;

  // The builders take the tile of an MMA, the visitors that of a CTA: half the rows where two SMs share one MMA.
  static constexpr int kSms = cute::is_base_of_v<cutlass::gemm::KernelSchedule2Sm, MainloopSchedule> ? 2 : 1;
  using CtaTile = decltype(cute::shape_div(Tile{}, cute::Shape<cute::Int<kSms>, cute::_1, cute::_1>{}));
  using Epi = CutlassEpilogue<kKind, CtaTile>;

  // Alignments in elements: 16 bytes for TMA, which of the sparse A are 32 logical columns.
  static constexpr int kAlignA = kSparse ? 32 : 16, kAlignB = 16, kAlignC = 4;
  static constexpr int kAlignD = 16 / int(sizeof(typename Epi::D));
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, OpClass, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
      typename Epi::C, cutlass::layout::ColumnMajor, kAlignC, typename Epi::D, cutlass::layout::ColumnMajor, kAlignD,
      EpilogueSchedule, typename Epi::Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, OpClass, Element, cutlass::layout::RowMajor, kAlignA, Element, cutlass::layout::ColumnMajor, kAlignB, float,
      Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Arguments = typename Kernel::Arguments;

  // CUTLASS's own check compares the layouts of A and E with packed ones, so it gets a packed problem of the same
  // size, with K rounded up to what a row of A holds; what differs from it is strides and pointers, checked below.
  static bool supported(CutlassGemm const& gemm, Arguments args) {
    auto aligned = [](auto bytes) { return uint64_t(bytes) % 16 == 0; };
    int64_t const row_bytes = kSparse ? (gemm.cols + 1) / 2 : gemm.cols;
    if (gemm.weight_pitch < row_bytes || !aligned(gemm.weight_pitch) || !aligned(gemm.x_pitch) ||
        !aligned(uintptr_t(gemm.weight)) || !aligned(uintptr_t(gemm.x)) || !aligned(uintptr_t(gemm.d)) ||
        !aligned(gemm.d_pitch * int64_t(sizeof(typename Epi::D))))
      return false;
    if constexpr (kSparse) {
      if (!aligned(uintptr_t(gemm.metadata))) return false;
      auto const packed = cute::make_shape(gemm.rows, gemm.tokens, cutlass::round_up(gemm.cols, kAlignA), 1);
      args.problem_shape = packed;
      args.mainloop.layout_a = Mainloop::SparseConfig::fill_layoutA(packed);
      args.mainloop.layout_e = Mainloop::SparseConfig::fill_layoutE(packed);
    }
    if constexpr (Epi::kAddend)
      if (!aligned(uintptr_t(gemm.addend)) || !aligned(gemm.addend_pitch * 4)) return false;
    return Kernel::can_implement(args);
  }

  static Arguments arguments(CutlassGemm const& gemm) {
    using namespace cute;
    auto elements = [](uint8_t const* bytes) { return reinterpret_cast<Element const*>(bytes); };
    auto const problem = make_shape(gemm.rows, gemm.tokens, gemm.cols, 1);
    typename Kernel::StrideB const stride_x{gemm.x_pitch, {}, {}};
    Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = problem;
    if constexpr (kSparse) {
      using Config = typename Mainloop::SparseConfig;
      // A's rows are weight_pitch apart, in units of logical columns. Beyond K up to a multiple of 32 its bytes are
      // zero, and x beyond K is out of bounds, which TMA fills with zeros.
      auto const a = Config::fill_layoutA(problem);
      auto const layout_a = make_layout(shape(a), make_stride(2 * gemm.weight_pitch, stride<1>(a), stride<2>(a)));
      // E's blocks of 128 columns are metadata_rows rows apart, however many rows this GEMM has, as a shard may start
      // anywhere in the buffer. Its extent is a multiple of 128 rows from the shard's first, so it ends at most 127
      // rows after the shard's last: metadata_rows >= sparse rows + 127 keeps that inside every block. K is that of
      // the buffer, an even number of blocks: a tile of 256 columns then never gets TMA's zeros for metadata, which
      // are no legal indices. (A tile of 256 rows may, in rows that are not stored.)
      auto const blocks = make_shape(round_up(gemm.rows, 128), gemm.tokens, round_up(gemm.cols, 256), 1);
      auto const e = Config::fill_layoutE(blocks);
      auto const stride_k = make_stride(get<0>(stride<1>(e)), int64_t(gemm.metadata_rows) * 128);
      auto const layout_e = make_layout(shape(e), make_stride(stride<0>(e), stride_k, stride<2>(e)));
      args.mainloop = {elements(gemm.weight), layout_a, elements(gemm.x), stride_x, gemm.metadata, layout_e};
    } else {
      args.mainloop = {elements(gemm.weight), {gemm.weight_pitch, {}, {}}, elements(gemm.x), stride_x};
    }
    args.epilogue.thread = Epi::arguments(gemm);
    if constexpr (Epi::kAddend) {
      args.epilogue.ptr_C = gemm.addend;
      args.epilogue.dC = {{}, gemm.addend_pitch, {}};
    }
    args.epilogue.ptr_D = static_cast<typename Epi::D*>(gemm.d);
    args.epilogue.dD = {{}, gemm.d_pitch, {}};
    args.hw_info.device_id = gemm.device;
    args.hw_info.sm_count = gemm.sms;
    return args;
  }

  // Launched here rather than through CUTLASS's adapter, which drops the cudaError_t.
  static int run(CutlassGemm const& gemm, size_t* workspace_bytes, cudaStream_t stream) {
    Arguments const args = arguments(gemm);
    if (!supported(gemm, args)) return kUnsupported;
    size_t const needed = Kernel::get_workspace_size(args);
    if (workspace_bytes) {
      *workspace_bytes = needed;
      return kOk;
    }
    if (needed > gemm.workspace_bytes) return kWorkspace;
    if (Kernel::initialize_workspace(args, gemm.workspace, stream) != cutlass::Status::kSuccess) return kCutlass;
    typename Kernel::Params params = Kernel::to_underlying_arguments(args, gemm.workspace);

    auto const* kernel = reinterpret_cast<void const*>(&cutlass::device_kernel<Kernel>);
    constexpr int kSmemBytes = Kernel::SharedStorageSize;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
    if (error == cudaSuccess) {
      cudaLaunchAttribute attributes[2];
      cudaLaunchConfig_t launch{};
      launch.gridDim = Kernel::get_grid_shape(params);
      launch.blockDim = Kernel::get_block_shape();
      launch.dynamicSmemBytes = kSmemBytes;
      launch.stream = stream;
      launch.attrs = attributes;
      if constexpr (cute::size(Cluster{}) > 1) {
        attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[launch.numAttrs++].val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
      }
      if (gemm.pdl) {
        attributes[launch.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[launch.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
      }
      void* kernel_args[] = {&params};
      error = cudaLaunchKernelExC(&launch, kernel, kernel_args);
    }
    if (error == cudaSuccess) return kOk;
    (void)cudaGetLastError();
    return kCudaError + int(error);
  }
};

}  // namespace spense
