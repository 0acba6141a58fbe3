// Included in front of linear/four_bit.cu: a matrix takes a launch for each region.
#pragma once
#include "linear/four_bit.cuh"
#include "recorded.h"

extern "C" int four_bit_arguments_bytes() { return sizeof(spense::FourBitArgs); }
extern "C" int record(spense::FourBitArgs const* args, bool matrix, bool shuffle) {
  return (matrix ? spense::dequantize_four_bit : spense::linear_four_bit)(*args, shuffle, nullptr);
}
