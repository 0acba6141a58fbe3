// int8 weights x int8 activations, per instruction set. Sums are exact integers, so all of them give the same bits.
#pragma once
#include "linear/cpu/kernels.h"

namespace spense::cpu {

// Activations are quantised to [-127, 127]: int8_avx2 takes them as int8, the others as uint8 with 128 added.
// int8_amx needs amx_permitted() of amx.h.
extern Functions const int8_avx2, int8_avx_vnni, int8_avx512_vnni, int8_amx;

}  // namespace spense::cpu
