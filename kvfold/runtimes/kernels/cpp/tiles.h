// Products of bfloat16 by the processor's tiles (AMX): 16 rows of 32 numbers times 32 of 16, sums in float32.

#pragma once

#include "lanes.h"
#ifdef __AMX_BF16__
#ifndef TILES_BY  // a test has others
#define TILES_BY "amx.h"
#endif
#include TILES_BY
#endif

namespace {

constexpr int TILE = LANES, DEPTH = 32;

#ifdef __AMX_BF16__
// What was written is in memory: compilers are not told that tiles are loaded from there (g++ 12).
inline void written() { asm volatile("" ::: "memory"); }

template <typename T>
bool in_tiles() {
  return sizeof(T) == 2 && tiles_are_allowed();
}

// Scores out [rows, stride] of up to 16 queries with `tokens` keys, of which whole tiles can be read: keys [tokens up to the next
// 16th, depth], depth a multiple of 32. queries: as `paired` makes them.
inline void score_in_tiles(int rows, const Lanes *queries, const bfloat16 *keys, int64_t stride, int depth, int tokens,
                           float *out, int64_t out_stride) {
  written();
  for (int s = 0; s < tokens; s += TILE) {
    _tile_zero(0);
    for (int r = 0; r < depth; r += DEPTH) {
      _tile_loadd(1, keys + s * stride + r, stride * sizeof(bfloat16));
      _tile_loadd(2, queries + r / 2, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
    Lanes found[TILE];
    _tile_stored(0, found, 64);
    transpose(found);
    for (int row = 0; row < rows; ++row) std::memcpy(out + row * out_stride + s, &found[row], sizeof found[row]);
  }
}

// Up to 16 queries [rows, stride], depth numbers of each, as the right side of a product: pairs of numbers of all of them.
inline void paired(int rows, const bfloat16 *queries, int64_t stride, int depth, Lanes *out) {
  uint32_t *word = (uint32_t *)out;
  for (int r = 0; r < depth; r += 2, word += TILE)
    for (int row = 0; row < TILE; ++row) {
      word[row] = 0;
      if (row < rows) std::memcpy(word + row, queries + row * stride + r, 4);
    }
}

// Adds weighted tokens to sums [rows, stride]. weights [rows up to the next 16th, stride], 0 up to the next 32nd token.
// strip: room for a lane per token, up to the next 32nd.
inline void add_in_tiles(int rows, const bfloat16 *weights, int64_t w_stride, const bfloat16 *values, int64_t stride, int width,
                         int tokens, float *sums, int64_t sums_stride, Lanes *strip) {
  const int padded = pad(tokens, DEPTH);
  for (int v = 0; v < width; v += 2 * TILE) {
    for (int s = 0; s < padded; s += 2) {
      Lanes pairs[2] = {};
      const bfloat16 *token = values + s * stride + v;
      if (s + 1 < tokens) Numbers<bfloat16>::columns(token, token + stride, std::min(width - v, 2 * TILE), pairs);
      else if (s < tokens) Numbers<bfloat16>::columns(token, token, std::min(width - v, 2 * TILE), pairs);  // whose weight is 0
      strip[s / 2] = pairs[0];
      strip[(padded + s) / 2] = pairs[1];
    }
    written();
    for (int row = 0; row < rows; row += TILE) {
      _tile_zero(0);
      _tile_zero(1);
      for (int s = 0; s < padded; s += DEPTH) {
        _tile_loadd(2, weights + row * w_stride + s, w_stride * sizeof(bfloat16));
        _tile_loadd(3, strip + s / 2, 64);
        _tile_loadd(4, strip + (padded + s) / 2, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      Lanes found[2][TILE];
      _tile_stored(0, found[0], 64);
      _tile_stored(1, found[1], 64);
      for (int i = 0; i < std::min(rows - row, TILE); ++i) {
        float *to = sums + (row + i) * sums_stride + v;
        for (int part = 0; part < 2; ++part) {
          const Lanes x = load<Lanes>(to + part * TILE) + found[part][i];
          std::memcpy(to + part * TILE, &x, sizeof x);
        }
      }
    }
  }
}
#else
template <typename T>
bool in_tiles() {
  return false;
}

struct Tiles {
  explicit Tiles(bool) {}
};
#endif

}  // namespace
