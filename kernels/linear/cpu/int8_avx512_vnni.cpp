// int8 with AVX-512 VNNI and VBMI: Ice Lake, Zen 4 and later.
#include "linear/cpu/int8_avx512.h"
#include "linear/cpu/rows_avx512.h"

namespace spense::cpu {

constinit Functions const int8_avx512_vnni = {8,
                                              1,
                                              kAbreast,
                                              kTokens,
                                              quantize_int8_avx512<Avx512Vnni::kOffset, 1>,
                                              int8_strips<Avx512Vnni>,
                                              finish_avx512<int32_t>};

}  // namespace spense::cpu
