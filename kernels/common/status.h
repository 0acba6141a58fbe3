// What launchers return: one of Status, or kCudaError + a cudaError_t.
#pragma once

namespace spense {

enum Status : int {
  kOk = 0,
  kBadConfig = 1,    // no such instance, or a layer that no instance computes
  kUnsupported = 2,  // a shape, dtype or device that it does not run
  kNoDriver = 3,     // the driver lacks cuTensorMapEncodeTiled
  kTensorMap = 4,    // a matrix that TMA does not take
  kWorkspace = 5,    // fewer bytes of workspace than needed
  kCutlass = 6,      // CUTLASS failed without saying why
};
constexpr int kCudaError = 1000;

}  // namespace spense
