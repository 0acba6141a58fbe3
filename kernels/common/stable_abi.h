// What the operators of both extensions need of libtorch's stable ABI (torch 2.11 and later). Host code, and no CUDA.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <cstdint>
#include <vector>
#include "common/dtype.h"

namespace spense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline Dtype dtype_of(Tensor const& t, char const* name) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return kBfloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Float: return kFloat32;
    default: STD_TORCH_CHECK(false, "spense: ", name, " must be bf16, fp16 or fp32");
  }
}

}  // namespace spense
