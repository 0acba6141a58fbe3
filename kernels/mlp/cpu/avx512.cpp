// AVX-512 F: Skylake-SP, Zen 4 and later.
#include "mlp/cpu/avx512.h"

namespace spense::cpu {

constinit MlpFunctions const mlp_avx512 = mlp_functions<Avx512>();

}  // namespace spense::cpu
