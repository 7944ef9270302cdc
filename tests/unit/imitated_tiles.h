// A processor's tiles, number by number: for processors without them. In place of cpp/amx.h.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) imitated_zero(tile)
#define _tile_loadd(tile, from, stride) imitated_load(tile, from, stride)
#define _tile_stored(tile, to, stride) imitated_store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) imitated_products(sums, a, b)

namespace {

inline bool tiles_are_allowed() { return true; }

struct Tiles {
  explicit Tiles(bool) {}
};

alignas(64) thread_local char imitated[8][16][64];

inline void imitated_zero(int tile) { std::memset(imitated[tile], 0, sizeof imitated[tile]); }

inline void imitated_load(int tile, const void *from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(imitated[tile][row], (const char *)from + row * stride, 64);
}

inline void imitated_store(int tile, void *to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy((char *)to + row * stride, imitated[tile][row], 64);
}

inline float imitated_number(const char *row, int place) {
  uint32_t word = 0;
  std::memcpy((char *)&word + 2, row + 2 * place, 2);
  float number;
  std::memcpy(&number, &word, 4);
  return number;
}

// 16 rows of 16 sums, of pairs: a has 16 pairs in a row, b a row for each of these with a pair for each sum.
inline void imitated_products(int sums, int a, int b) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum;
      std::memcpy(&sum, imitated[sums][row] + 4 * column, 4);
      for (int i = 0; i < 32; ++i) sum += imitated_number(imitated[a][row], i) * imitated_number(imitated[b][i / 2], 2 * column + i % 2);
      std::memcpy(imitated[sums][row] + 4 * column, &sum, 4);
    }
}

}  // namespace
