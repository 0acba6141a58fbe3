// Element types of activations and outputs, as kernels know them: no torch.
#pragma once

namespace spense {

enum Dtype : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

}  // namespace spense
