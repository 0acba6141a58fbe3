// What operators of the CUDA extension need around a launch. Host code: it builds against a CPU torch, and loads under any.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include "common/stable_abi.h"
#include "common/status.h"

// Only libtorch_cuda has this symbol; weak, so that a CPU torch can load the library (it is null there).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace spense {

// The current stream of the device of `t`.
inline cudaStream_t stream_of(Tensor const& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "spense: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_matrix(Tensor const& t, char const* name, ScalarType dtype, int dims) {
  STD_TORCH_CHECK(t.is_cuda(), "spense: ", name, " must be a CUDA tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "spense: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dims && t.is_contiguous(), "spense: ", name, " must be contiguous with ", dims, " dimensions");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, "spense: ", name, " must be 16-byte aligned");
}

// An error for a launcher's return value that is not kOk.
inline void check_status(int status, char const* kernel) {
  STD_TORCH_CHECK(status < kCudaError, "spense: ", kernel, " failed with CUDA error ", status - kCudaError, ": ",
                  cudaGetErrorString(static_cast<cudaError_t>(status - kCudaError)));
  STD_TORCH_CHECK(status == kOk, "spense: ", kernel, " refused the call with status ", status, " (see kernels/common/status.h)");
}

}  // namespace spense
