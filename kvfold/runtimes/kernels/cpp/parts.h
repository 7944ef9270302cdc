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

// Averages [batch, own heads, steps, width] of a part of the tokens, and the logarithms of what they count [batch, own heads, steps].
// They are numbers from `column` on of what the map takes. heads: of all heads, which of its own each is, or -1; null: the same.
struct Part {
  const float *averages, *log_sums;
  const int32_t *heads;
  int64_t own_heads, width, column;

  // Where the numbers of a head begin; -1 without any.
  int64_t row(int64_t sequence, int64_t head, int64_t step, int64_t steps) const {
    const int64_t own = heads ? heads[head] : head;
    return own < 0 ? -1 : (sequence * own_heads + own) * steps + step;
  }
};

// map: of each head of keys and values [out_width, depth], as rebuild.h has maps; null: numbers stay as they are. sinks: scores of
// heads [heads] that no token goes with, or null. out [batch, steps, heads, out_width], or depth numbers without a map.
struct Values {
  const void *map;
  const float *sinks;
  int64_t map_bytes, depth, out_width, batch, heads, kv_heads, steps, threads;
};

}  // namespace
