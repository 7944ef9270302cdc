// Keys of the source's heads out of stored numbers, tile by tile: a linear map, an offset, a rotation.

#pragma once

#include <vector>

#include "rotary.h"
#include "tiles.h"

namespace {

constexpr int COLUMNS = 2 * LANES;  // of a map, and tokens, that are made at a time

// How queries are turned instead of keys, `tokens` at a time (turn.h): weights [stored heads, heads, numbers up to the next 32nd / 2
// LANES, head_dim, 2 LANES], the map; basis [functions, tokens], the functions; shares [functions, rotated / 2], what each says of the cosine
// (the even ones) or the sine of each pair, nothing of those beyond its reach; reach [functions], falling: of the first how many pairs; speeds
// [rotated / 2], in radians per token. coarse [functions], falling: how many of the first `fine` numbers a function meets;
// it says less of the others than they, which are stored coarsely, are off by.
struct Turn {
  const float *weights, *basis, *shares;
  const double *speeds;
  const int32_t *reach, *coarse;
  int64_t functions, tokens, fine;

  // Of `width` numbers, in whole vectors that are made together: how many of `rows` queries for each function meet them.
  std::vector<Met> met(int width, int rows) const {
    const int step = 2 * LANES, all = pad(width, DEPTH), own = fine >= width ? all : int(fine / step) * step;
    std::vector<Met> found;
    int at = 0;
    for (int k = functions - 1; k >= 0; --k)
      if (const int end = k ? std::min(pad(coarse[k], step), own) : own; end > at) found.push_back({at = end, (k + 1) * rows});
    if (at < all) found.push_back({all, int(functions) * rows});
    return found;
  }
};

// Of each stored head [heads * head_dim] keys: map * numbers + offset, rotated. `map`: for each stored head and LANES columns
// the columns of number after number, of two numbers at a time in bfloat16, as `Product` has them (cpu_decode.py packs it). cos and sin [batch or 1,
// tokens, rotated], or null, where `rotated` is 0. offset [stored heads, heads * head_dim] or null. turn: null where
// keys do not turn slowly and evenly.
struct Rebuild {
  const void *map;
  const float *offset;
  const void *cos, *sin;
  int64_t map_bytes, table_batch, tables_are_bfloat16;
  int64_t heads, head_dim, rotated;
  const Turn *turn;

  int columns() const { return heads * head_dim; }
};

// LANES columns of ROWS tokens. map: those of a number (float) or of two (bfloat16) after the other.
template <typename T, int ROWS>
void product(const T *z, int64_t stride, int depth, const T *map, float *out, int64_t out_stride) {
  constexpr int PER_STEP = 4 / sizeof(T);
  Lanes sums[ROWS] = {};
  for (int r = 0; r < depth; r += PER_STEP, map += LANES * PER_STEP) {
    Lanes columns;
    std::memcpy(&columns, map, sizeof columns);
    for (int row = 0; row < ROWS; ++row) {
      int32_t word;
      std::memcpy(&word, z + row * stride + r, 4);
      const Lanes number = (Lanes)(Integers{} + word);
      if constexpr (sizeof(T) == 4) {
        sums[row] += number * columns;
      } else {
        using Operand = typename Numbers<T>::Operand;
        Numbers<T>::multiply(sums[row], (Operand)number, (Operand)columns);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) std::memcpy(out + row * out_stride, &sums[row], sizeof sums[row]);
}

// out [tokens, columns] of z [tokens, depth]; rows up to the next 32nd may be written, too.
template <typename T>
void products(const T *z, int64_t stride, int tokens, int depth, const T *map, int columns, float *out, int64_t out_stride) {
  for (int column = 0; column < columns; column += LANES, map += int64_t(depth) * LANES)
    for (int s = 0; s < tokens; s += 8) {
      float *const to = out + s * out_stride + column;
      if (tokens - s > 4) product<T, 8>(z + s * stride, stride, depth, map, to, out_stride);
      else product<T, 4>(z + s * stride, stride, depth, map, to, out_stride);
    }
}

#ifdef __AMX_BF16__
// The same as `products`, 32 tokens and 32 columns at a time.
inline void products_in_tiles(const bfloat16 *z, int64_t stride, int tokens, int depth, const bfloat16 *map, int columns,
                              float *out, int64_t out_stride) {
  const int64_t row = stride * sizeof(bfloat16), to_row = out_stride * sizeof(float), block = int64_t(depth) * LANES;
  written();
  for (int column = 0; column < columns; column += COLUMNS, map += 2 * block)
    for (int s = 0; s < tokens; s += COLUMNS) {
      const bfloat16 *first = z + s * stride, *second = first + LANES * stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int r = 0; r < depth; r += DEPTH) {
        _tile_loadd(4, first + r, row);
        _tile_loadd(6, map + r * LANES, 64);
        _tile_loadd(5, second + r, row);
        _tile_loadd(7, map + block + r * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float *to = out + s * out_stride + column;
      _tile_stored(0, to, to_row);
      _tile_stored(1, to + LANES, to_row);
      _tile_stored(2, to + LANES * out_stride, to_row);
      _tile_stored(3, to + LANES * out_stride + LANES, to_row);
    }
}
#endif

template <typename T>
void mapped(const T *z, int64_t stride, int tokens, int depth, const T *map, int columns, float *out, int64_t out_stride) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == 2)
    if (in_tiles<T>()) return products_in_tiles(z, stride, tokens, depth, map, columns, out, out_stride);
#endif
  products(z, stride, tokens, depth, map, columns, out, out_stride);
}

// What one thread needs to rebuild keys.
template <typename T>
struct Rebuilding {
  using M = Product<T>;
  const Rebuild &map;
  int depth, padded;
  Room<float> rebuilt;
  Room<T> keys;

  Rebuilding(const Rebuild &map, int numbers, int block)
      : map(map), depth(pad(numbers, DEPTH)), padded(pad(map.columns(), COLUMNS)), rebuilt(int64_t(block) * padded),
        keys(int64_t(block) * map.columns()) {}

  // Keys [tokens, columns] of a stored head, of tokens from `start` on; z has rows up to the next 32nd token.
  const T *of(const M *z, int64_t stride, int64_t row, int64_t head, int64_t start, int tokens) {
    mapped(z, stride, tokens, depth, (const M *)((const char *)map.map + head * map.map_bytes), padded, rebuilt.data(), padded);
    if (!map.cos) rotate(row, head, start, tokens, (const float *)nullptr, (const float *)nullptr);
    else if (map.tables_are_bfloat16) rotate(row, head, start, tokens, (const bfloat16 *)map.cos, (const bfloat16 *)map.sin);
    else rotate(row, head, start, tokens, (const float *)map.cos, (const float *)map.sin);
    return keys.data();
  }

  template <typename C>
  void rotate(int64_t row, int64_t head, int64_t start, int tokens, const C *cos, const C *sin) {
    const float *offset = map.offset ? map.offset + head * map.columns() : nullptr;
    for (int s = 0; s < tokens; ++s) {
      const int64_t at = row * map.table_batch + (start + s) * map.rotated;  // nowhere without a rotation
      for (int h = 0; h < map.heads; ++h) {
        const int64_t first = h * map.head_dim;
        rotate_head(rebuilt.data() + int64_t(s) * padded + first, offset ? offset + first : nullptr, cos + at, sin + at, map.head_dim,
                    map.rotated, map.rotated / 2, keys.data() + int64_t(s) * map.columns() + first);
      }
    }
  }
};

}  // namespace
