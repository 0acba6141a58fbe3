// int8 with AVX-512 VNNI and VBMI: Ice Lake, Zen 4 and later.
#include "linear/cpu/int8_avx512.h"

namespace spense::cpu {

constinit Functions const int8_avx512_vnni = int8_functions<Avx512Vnni>();

}  // namespace spense::cpu
