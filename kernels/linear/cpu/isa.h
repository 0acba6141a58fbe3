// Which instruction sets this CPU has, and the operating system allows.
#pragma once
#include <cpuid.h>
#include "linear/cpu/amx.h"

namespace spense::cpu {
namespace {

inline bool has_avx2() {
  unsigned a, b, c = 0, d;
  __get_cpuid(1, &a, &b, &c, &d);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && c & bit_F16C;
}
inline bool has_avx_vnni() {
  unsigned a = 0, b, c, d;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return has_avx2() && a >> 4 & 1;
}
inline bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
inline bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
inline bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
inline bool has_amx() {
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  unsigned a, b, c, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  return has_avx512_bf16() && (d & kAmx) == kAmx && amx_permitted();
}

}  // namespace
}  // namespace spense::cpu
