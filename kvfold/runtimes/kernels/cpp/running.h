// Softmax and weighted sums over blocks of tokens that come one after the other, for few queries.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "products.h"
#include "tiles.h"
#include "unpack.h"

namespace {

constexpr int BLOCK_BYTES = 1 << 17, MOST_TOKENS = 512;
constexpr float LOWEST = -1e30f;  // a score that counts nothing beside any other

// What one thread needs for the query rows of a group of heads, and what it has found so far.
template <typename T>
struct Running {
  using N = Numbers<T>;
  using Query = typename N::Query;
  int rows, per_head, r_width, r_padded, r_stride, v_padded, block;
  Room<Query> queries, weights;
  Room<float> scores;
  Room<Lanes> strip = Room<Lanes>(MOST_TOKENS * STRIP);
  std::vector<Lanes> pairs;

  // per_head: queries that meet the same keys.
  Running(int rows, int per_head, int q_width, int V, int block)
      : rows(rows), per_head(per_head), r_width(q_width), r_padded(pad(q_width, DEPTH)), r_stride(apart<Query>(r_padded)),
        v_padded(pad(V, DEPTH)), block(block), queries(int64_t(rows) * r_stride), weights(int64_t(rows + LANES) * block), scores(int64_t(rows) * block),
        pairs(in_tiles<T>() ? int64_t(rows / per_head) * pad(per_head, LANES) / LANES * r_padded / 2 : 0) {}

  static int block_of(int tokens) { return std::clamp(tokens / DEPTH, 1, MOST_TOKENS / DEPTH) * DEPTH; }

  // Some of the queries [count, stride], of whole heads.
  void take(int first, int count, const float *q, int64_t stride) { take(first, count, q, stride, r_width); }

  // there: so many numbers of a row can be read, up to whole vectors, behind its own ones zeros.
  void take(int first, int count, const float *q, int64_t stride, int there) {
    for (int row = 0; row < count; ++row) {
      Query *to = queries.data() + (first + row) * r_stride;
      for (int r = 0; r < there; r += LANES) {
        const int now = std::min(LANES, there - r);
        put(load<Lanes>(q + row * stride + r, now), to + r, now);
      }
      std::fill(to + there, to + r_stride, Query(0.0f));
    }
#ifdef __AMX_BF16__
    if constexpr (sizeof(Query) == 2)
      for (int head = first / per_head; pairs.size() && head < (first + count) / per_head; ++head)
        for (int row = 0, chunks = pad(per_head, LANES) / LANES; row < per_head; row += LANES)
          paired(std::min(per_head - row, LANES), queries.data() + (head * per_head + row) * r_stride, r_stride, r_padded,
                 pairs.data() + (head * chunks + row / LANES) * int64_t(r_padded / 2));
#endif
  }

  // Scores of the tokens that are pairs of whole tiles: how many those are. (Pairs, as `score_many`, which makes the rest, writes as
  // many scores at a time as there is room for.)
  int score_tiles(int first, int count, Tokens<T> keys, int tokens) {
#ifdef __AMX_BF16__
    if constexpr (sizeof(Query) == 2)
      if (pairs.size() && keys.depth == r_padded && count > 1) {
        const Lanes *part = pairs.data() + int64_t(first / per_head) * (pad(per_head, LANES) / LANES) * (r_padded / 2);
        const int whole = tokens / (2 * LANES) * (2 * LANES);
        for (int row = 0; row < count; row += LANES, part += r_padded / 2)
          score_in_tiles(std::min(count - row, LANES), part, keys.data, keys.stride, r_padded, whole,
                         scores.data() + int64_t(first + row) * block, block);
        return whole;
      }
#endif
    return 0;
  }

  void score_head(int first, int count, Tokens<T> keys, int width, int tokens) {
    score_head(first, count, keys, width, tokens, {{std::numeric_limits<int>::max() / 2, count}});
  }

  // met: of queries that are zeros where they meet nothing.
  void score_head(int first, int count, Tokens<T> keys, int width, int tokens, const std::vector<Met> &met) {
    const int done = score_tiles(first, count, keys, tokens);
    keys.data += done * keys.stride;
    score_rest(first, count, keys, width, tokens - done, scores.data() + done, met);
  }

  void score_rest(int first, int count, Tokens<T> keys, int width, int tokens, float *out, const std::vector<Met> &met) {
    if (!tokens) return;
    if constexpr (sizeof(Query) == sizeof(T)) {
      if (count >= MANY_ROWS) {
        score_many<T>(met, count, queries.data() + int64_t(first) * r_stride, r_stride, keys.data, keys.stride, std::max(width, keys.depth), tokens,
                      out + int64_t(first) * block, block);
        return;
      }
    }
    in_parts<std::min(LANES, 8)>(first, first + count, [&](auto now, int row) {
      score<T, now>(queries.data() + int64_t(row) * r_stride, r_stride, keys.data, keys.stride, width, tokens,
                    out + int64_t(row) * block, block);
    });
  }

  // Scores become weights relative to the running maximum; sums so far shrink with it.
  // Those of tokens before `first` and from `end` on count nothing.
  void softmax(int row, int tokens, int first, int end, float scale, float softcap, const float *bias, float *sums,
               float &largest, float &total) {
    float *s = scores.data() + int64_t(row) * block;
    scale_by(scale, s, tokens);
    cap(s, tokens, softcap);
    for (int i = 0; bias && i < tokens; ++i) s[i] += bias[i];
    std::fill(s, s + std::clamp(first, 0, tokens), LOWEST);
    std::fill(s + std::clamp(end, 0, tokens), s + tokens, LOWEST);
    std::fill(s + tokens, s + pad(tokens, LANES), -std::numeric_limits<float>::infinity());
    Lanes most = load<Lanes>(s);
    Integers no_number = most != most;
    for (int i = LANES; i < tokens; i += LANES) {
      const Lanes x = load<Lanes>(s + i);
      most = x > most ? x : most;
      no_number |= x != x;
    }
    float highest = largest;
    for (int lane = 0; lane < LANES; ++lane) highest = std::max(highest, most[lane]);
    Lanes added = {};
    for (int i = 0; i < tokens; i += LANES) {
      const Lanes x = exp_of(load<Lanes>(s + i) - highest);
      std::memcpy(s + i, &x, sizeof x);
      added += x;
    }
    Query *w = weights.data() + int64_t(row) * block;
    std::fill(s + tokens, s + pad(tokens, DEPTH), 0.0f);
    for (int i = 0; i < pad(tokens, DEPTH); i += LANES) put(load<Lanes>(s + i), w + i);
    const float sum = sum_of(added);
    const float shrink = std::exp(largest - highest);
    if (shrink != 1.0f) scale_by(shrink, sums, v_padded);
    total = total * shrink + sum;
    for (int lane = 0; lane < LANES; ++lane)  // comparisons above would hide it
      if (no_number[lane]) total = std::numeric_limits<float>::quiet_NaN();
    largest = highest;
  }

  void add_head(int first, int count, Tokens<T> values, int width, int tokens, float *sums) {
    width = std::max(width, values.depth);  // what can be read is read by whole vectors
#ifdef __AMX_BF16__
    if constexpr (sizeof(Query) == 2)
      if (in_tiles<T>() && count > FEW_ROWS)
        return add_in_tiles(count, weights.data() + int64_t(first) * block, block, values.data, values.stride, width, tokens,
                            sums + int64_t(first) * v_padded, v_padded, strip.data());
#endif
    if (count > FEW_ROWS) {
      add_many<T>(count, weights.data() + int64_t(first) * block, block, values.data, values.stride, width,
                  tokens, sums + int64_t(first) * v_padded, v_padded, strip.data());
      return;
    }
    in_parts<4>(first, first + count, [&](auto now, int row) {
      add<T, now>(weights.data() + int64_t(row) * block, block, values.data, values.stride, width, tokens,
                  sums + int64_t(row) * v_padded, v_padded);
    });
  }
};

}  // namespace
