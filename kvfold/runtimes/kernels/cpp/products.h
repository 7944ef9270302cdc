// Products of few queries with numbers that lie as they are stored, and of their weights: what attention on a CPU consists of.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace {

constexpr int KEYS_AHEAD = 8192, VALUES_AHEAD = 4096;  // bytes that are fetched before their turn; measured
constexpr int MANY_ROWS = 16, WORDS = 64;  // for so many queries keys are transposed, so many words at a time
constexpr int ROWS_AT_ONCE = REGISTERS == 16 ? 6 : 12;  // two vectors of sums for each: additions take as long as four others
constexpr int STRIP = 4;     // columns that are made ready at a time, in lanes
constexpr int FEW_ROWS = 4;  // up to so many, columns of values are made ready for each of them anew

// Numbers of some tokens of one head.
template <typename T>
struct Tokens {
  const T *data;
  int64_t stride;
  int depth = 0;  // of a row so many can be read, which are numbers, if it is not 0
};

// Calls run(rows, first) for all rows from `first` on: AT_ONCE at a time, the rest in halves of that, `rows` being a constant.
// (Not a number and its function picked side by side: g++ 12.2, tuned for Intel's processors since Skylake, makes both moves by
// one comparison whose flags are overwritten after the first, noce_convert_multiple_sets, and a last row met the code for two.)
template <int AT_ONCE, typename Run>
void in_parts(int first, int end, const Run &run) {
  for (; first + AT_ONCE <= end; first += AT_ONCE) run(std::integral_constant<int, AT_ONCE>(), first);
  if constexpr (AT_ONCE > 1) in_parts<AT_ONCE / 2>(first, end, run);
}

template <int COUNT, typename Run>
void of_size(int count, int first, const Run &run) {
  if (count == COUNT) run(std::integral_constant<int, COUNT>(), first);
  else if constexpr (COUNT > 1) of_size<COUNT - 1>(count, first, run);
}

// The same in as few parts as there can be, as equal as these can be: of whatever is fetched anew for every part.
template <int MOST, typename Run>
void in_few_parts(int first, int end, const Run &run) {
  for (int parts = (end - first + MOST - 1) / MOST, now; parts > 0; --parts, first += now) {
    now = (end - first + parts - 1) / parts;
    of_size<MOST>(now, first, run);
  }
}

// Scores of ROWS queries with LANES / ROWS tokens at a time. q [ROWS, padded width]; out [ROWS, stride].
template <typename T, int ROWS>
void score(const typename Numbers<T>::Query *q, int q_stride, const T *keys, int64_t stride, int width, int tokens,
           float *out, int out_stride) {
  using N = Numbers<T>;
  constexpr int TOKENS = LANES / ROWS;
  const int full = width / N::STEP * N::STEP;
  for (int s = 0; s < tokens; s += TOKENS) {
    const T *key[TOKENS];
    for (int t = 0; t < TOKENS; ++t) key[t] = keys + std::min(s + t, tokens - 1) * stride;
    Lanes sums[ROWS * TOKENS] = {};
    const auto add = [&](int r, auto stored) {
      typename N::Operand queries[ROWS];
      for (int row = 0; row < ROWS; ++row) queries[row] = N::query(q + row * q_stride + r);
      for (int t = 0; t < TOKENS; ++t) {
        __builtin_prefetch((const char *)(key[t] + r) + KEYS_AHEAD);
        const auto x = stored(key[t] + r);
        for (int row = 0; row < ROWS; ++row) N::multiply(sums[row * TOKENS + t], queries[row], x);
      }
    };
    for (int r = 0; r < full; r += N::STEP) add(r, [](const T *x) { return N::stored(x); });
    if (full < width) add(full, [&](const T *x) { return N::stored(x, width - full); });
    const Lanes found = sums_of(sums);
    for (int row = 0; row < ROWS; ++row)
      std::memcpy(out + row * out_stride + s, (const float *)&found + row * TOKENS, TOKENS * sizeof(float));
  }
}

// Adds to the scores of ROWS queries with 2 LANES tokens what some of their numbers give. Both in words of 4 bytes, a number or a
// pair: q [ROWS, stride], keys [words, 2 LANES tokens]. out [ROWS, stride].
template <typename T, int ROWS>
void score_tile(const int32_t *q, int q_stride, const Lanes *keys, int words, float *out, int out_stride) {
  using Operand = typename Numbers<T>::Operand;
  Lanes sums[ROWS][2];
  for (int row = 0; row < ROWS; ++row) sums_from(sums[row], out + row * out_stride);
  for (int r = 0; r < words; ++r) {
    const Operand first = (Operand)in_register(keys[2 * r]), second = (Operand)in_register(keys[2 * r + 1]);
    for (int row = 0; row < ROWS; ++row) {
      const Operand query = (Operand)(Integers{} + q[row * q_stride + r]);
      Numbers<T>::multiply(sums[row][0], query, first);
      Numbers<T>::multiply(sums[row][1], query, second);
    }
  }
  for (int row = 0; row < ROWS; ++row) sums_to(sums[row], out + row * out_stride);
}

// Scores of many queries: words of 2 LANES tokens are transposed, so that scores lie side by side and need not be summed over lanes.
// met: up to the last number.
template <typename T>
void score_many(const std::vector<Met> &met, int rows, const typename Numbers<T>::Query *q, int q_stride, const T *keys, int64_t stride,
                int width, int tokens, float *out, int out_stride) {
  constexpr int PER_WORD = 4 / sizeof(T), STEP = LANES * PER_WORD, AT_ONCE = WORDS * PER_WORD;
  const int32_t *query = (const int32_t *)q;
  const int query_stride = q_stride / PER_WORD;
  Lanes turned[2 * WORDS];
  for (int s = 0; s < tokens; s += 2 * LANES) {
    for (int row = 0; row < rows; ++row) std::fill_n(out + row * out_stride + s, 2 * LANES, 0.0f);
    auto now_met = met.begin();
    for (int first = 0; first < width; first += AT_ONCE) {
      const int words = pad(std::min(width - first, AT_ONCE), STEP) / PER_WORD;
      for (int i = 0; i < 2 * words; i += LANES) {  // as many words as tokens
        const int half = i / words, from = first + (i - half * words) * PER_WORD;
        Lanes part[LANES];
        for (int t = 0; t < LANES; ++t) {
          const T *key = keys + std::min(s + half * LANES + t, tokens - 1) * stride + from;
          __builtin_prefetch(key + AT_ONCE);
          part[t] = load<Lanes>(key, std::min(width - from, STEP));
        }
        transpose(part);
        for (int t = 0; t < LANES; ++t) turned[2 * (i - half * words + t) + half] = part[t];
      }
      for (int word = 0, end; word < words; word = end) {
        if (now_met->end <= first + word * PER_WORD) ++now_met;
        end = std::min(words, (now_met->end - first + PER_WORD - 1) / PER_WORD);
        in_few_parts<ROWS_AT_ONCE>(0, now_met->rows, [&](auto now, int row) {
          score_tile<T, now>(query + int64_t(row) * query_stride + first / PER_WORD + word, query_stride, turned + 2 * word, end - word,
                             out + int64_t(row) * out_stride + s, out_stride);
        });
      }
    }
  }
}

// Adds weighted tokens to STEPS * STEP columns of ROWS sums. weights [ROWS, stride]; sums [ROWS, padded width].
template <typename T, int ROWS, int STEPS>
void add_strip(const typename Numbers<T>::Query *weights, int w_stride, const Lanes *strip, int tokens, float *sums,
               int width) {
  using N = Numbers<T>;
  constexpr int PARTS = STEPS * N::STEP / LANES;
  Lanes own[ROWS][PARTS];
  for (int row = 0; row < ROWS; ++row) sums_from(own[row], sums + row * width);
  for (int s = 0; s < tokens; s += N::PAIR, strip += PARTS)
    for (int row = 0; row < ROWS; ++row)
      for (int part = 0; part < PARTS; ++part) N::weigh(own[row][part], weights + row * w_stride + s, strip[part]);
  for (int row = 0; row < ROWS; ++row) sums_to(own[row], sums + row * width);
}

// The same for columns that only these ROWS need: they are made ready on the way.
template <typename T, int ROWS, int STEPS>
void add_once(const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int columns,
              int tokens, float *sums, int width) {
  using N = Numbers<T>;
  constexpr int PARTS = N::STEP / LANES;
  Lanes own[ROWS][STEPS * PARTS];
  for (int row = 0; row < ROWS; ++row) sums_from(own[row], sums + row * width);
  for (int s = 0; s < tokens; s += N::PAIR) {
    const T *token = values + s * stride, *next = s + 1 < tokens ? token + stride : token;
    for (int i = 0; i < STEPS; ++i) {
      __builtin_prefetch((const char *)(token + i * N::STEP) + VALUES_AHEAD);
      __builtin_prefetch((const char *)(next + i * N::STEP) + VALUES_AHEAD);
      Lanes x[PARTS];
      N::columns(token + i * N::STEP, next + i * N::STEP, std::min(columns, N::STEP), x);
      for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < PARTS; ++part) N::weigh(own[row][i * PARTS + part], weights + row * w_stride + s, x[part]);
    }
  }
  for (int row = 0; row < ROWS; ++row) sums_to(own[row], sums + row * width);
}

template <typename T, int ROWS>
void add(const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int width, int tokens,
         float *sums, int padded) {
  constexpr int STEP = Numbers<T>::STEP, STEPS = (ROWS == 1 ? 8 : REGISTERS / 2 / ROWS) * LANES / STEP;
  int v = 0;
  for (; v + STEPS * STEP <= width; v += STEPS * STEP)
    add_once<T, ROWS, STEPS>(weights, w_stride, values + v, stride, STEP, tokens, sums + v, padded);
  for (; v < width; v += STEP)
    add_once<T, ROWS, 1>(weights, w_stride, values + v, stride, std::min(STEP, width - v), tokens, sums + v, padded);
}

// STEPS steps of columns, of which `left` are there, made ready once for all rows.
template <typename T, int STEPS>
void add_columns(int rows, const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int left,
                 int tokens, float *sums, int padded, Lanes *strip) {
  using N = Numbers<T>;
  constexpr int PARTS = N::STEP / LANES, AT_ONCE = REGISTERS == 16 ? 2 : 6;  // sums of STRIP lanes each, beside a strip's
  Lanes *next_lanes = strip;
  for (int s = 0; s < tokens; s += N::PAIR) {
    const T *token = values + s * stride, *next = s + 1 < tokens ? token + stride : token;
    for (int i = 0; i < STEPS; ++i, next_lanes += PARTS) {
      __builtin_prefetch(token + (STEPS + i) * N::STEP);
      __builtin_prefetch(next + (STEPS + i) * N::STEP);
      N::columns(token + i * N::STEP, next + i * N::STEP, std::clamp(left - i * N::STEP, 0, N::STEP), next_lanes);
    }
  }
  in_few_parts<AT_ONCE>(0, rows, [&](auto now, int row) {
    add_strip<T, now, STEPS>(weights + row * w_stride, w_stride, strip, tokens, sums + int64_t(row) * padded, padded);
  });
}

// Many rows: columns are made ready once for all of them.
template <typename T>
void add_many(int rows, const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int width,
              int tokens, float *sums, int padded, Lanes *strip) {
  constexpr int STEP = Numbers<T>::STEP, STEPS = STRIP * LANES / STEP;
  int v = 0;
  for (; v < width && v + STEPS * STEP <= padded; v += STEPS * STEP)
    add_columns<T, STEPS>(rows, weights, w_stride, values + v, stride, width - v, tokens, sums + v, padded, strip);
  for (; v < width; v += STEPS / 2 * STEP)
    add_columns<T, STEPS / 2>(rows, weights, w_stride, values + v, stride, width - v, tokens, sums + v, padded, strip);
}

}  // namespace
