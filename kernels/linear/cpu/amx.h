// Tiles (AMX): the permission to use them, their configuration, and what compilers have to be told.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <array>
#include <cstdint>

namespace spense::cpu {
namespace {

// Tiles have 8 KiB of state per thread, which Linux saves for processes that have asked only. Asks once per process,
// for all of its threads. False: this CPU or kernel has no tiles, their instructions would trap.
inline bool amx_permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; the feature's number in XCR0
  static bool const permitted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return permitted;
}

#ifdef __AMX_TILE__
// To be called between writing memory and loading tiles or their configuration from it: the intrinsics of GCC do not
// say what they read, so without it stores may come late or never.
inline void written(void const* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// While it lives, this thread has eight tiles of 64 bytes by so many rows.
class Tiles {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

 public:
  explicit Tiles(std::array<int, 8> const& rows) {
    Shapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = uint8_t(rows[i]);
    }
    written(&shapes);
    _tile_loadconfig(&shapes);
  }
  Tiles(Tiles const&) = delete;
  ~Tiles() { _tile_release(); }
};
#endif

}  // namespace
}  // namespace spense::cpu
