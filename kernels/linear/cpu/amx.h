// Tiles (AMX) have 8 KiB of state per thread, which Linux saves for processes that have asked only.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

namespace spense::cpu {
namespace {

// Asks once per process, for all of its threads. False: this CPU or kernel has no tiles, their instructions would trap.
inline bool amx_permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; the feature's number in XCR0
  static bool const permitted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return permitted;
}

}  // namespace
}  // namespace spense::cpu
