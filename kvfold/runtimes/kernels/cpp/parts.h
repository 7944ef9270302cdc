// What is asked of the tokens of a layer, part by part, and what becomes of the parts; cpu_decode.py declares the same.

#pragma once

#include <cstdint>

namespace {

// Rows of queries [batch, rows, R]: `steps` query tokens of each head, which stand at the end of a sequence and see tokens of
// an age from `youngest` to below `oldest`. softcap: of scores, 0 for none. sequences [batch, 3]: the first token, the one behind
// the last, where the first query stands. bias [batch, rows, tokens] by strides, or null.
struct Queries {
  const float *data, *bias;
  const int64_t *sequences;
  int64_t bias_batch, bias_row, batch, rows, steps, youngest, oldest, threads;
  float scale, softcap;
};

// Averages [batch, heads, steps, width] of a part of the tokens, and the logarithms of what they count [batch, heads, steps].
// They are numbers from `column` on of what the map takes.
struct Part {
  const float *averages, *log_sums;
  int64_t width, column;
};

// map: of each head of keys and values [out_width, depth], as rebuild.h has maps; null: numbers stay as they are. out [batch,
// steps, heads, out_width], or depth numbers without a map.
struct Values {
  const void *map;
  int64_t map_bytes, depth, out_width, batch, heads, kv_heads, steps, threads;
};

}  // namespace
