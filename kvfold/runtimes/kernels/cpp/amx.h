// A processor's tiles: whether there are any, and their configuration.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Whether the kernel lets this process use tiles.
inline bool tiles_are_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// Tiles of 16 rows of 64 bytes as long as it lives; others' configuration comes back after it.
struct Tiles {
  const bool on;
  TileConfig before;

  explicit Tiles(bool on) : on(on) {
    if (!on) return;
    TileConfig own;
    for (int i = 0; i < 8; ++i) own.row_bytes[i] = 64, own.rows[i] = 16;
    load(own, &before);
  }
  ~Tiles() {
    if (on && before.palette) load(before, nullptr);
    else if (on) _tile_release();
  }

  // Compilers believe that eight bytes of a configuration are used.
  static void load(const TileConfig &config, TileConfig *last) {
    if (last) asm volatile("sttilecfg %0" : "=m"(*last));
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
};

}  // namespace
