// Included in front of mlp/sparse_mlp.cu: rows of up are a launch, and rows of down.
#pragma once
#include "mlp/sparse_mlp.cuh"
#include "recorded.h"

extern "C" int sparse_mlp_arguments_bytes() { return sizeof(spense::SparseMlpArgs); }
extern "C" int record(spense::SparseMlpArgs const* args, bool pack) {
  return (pack ? spense::pack_twell : spense::sparse_mlp)(*args, nullptr);
}
