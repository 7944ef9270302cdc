// Few query tokens over stored heads on a CPU: every stored number is read once, for all queries that it serves.
//
// Scores, softmax (running maximum and sum, as in flash attention) and weighted sums of a block of tokens follow each other
// while the block is in the processor's cache. kvfold/runtimes/kernels/attention.py has the obvious version. Plain C entry, no torch.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "stored.h"
#include "unpack.h"

namespace {

constexpr int BLOCK_BYTES = 1 << 17, MOST_TOKENS = 512;
constexpr int KEYS_AHEAD = 8192, VALUES_AHEAD = 4096;  // bytes that are fetched before their turn; measured
constexpr int MANY_ROWS = 16, WORDS = 64;  // for so many queries keys are transposed, so many words at a time
constexpr int STRIP = 4;     // columns that are made ready at a time, in lanes
constexpr int FEW_ROWS = 4;  // up to so many, columns of values are made ready for each of them anew

// Numbers of some tokens of one head.
template <typename T>
struct Tokens {
  const T *data;
  int64_t stride;
};

// Calls run(rows, first) for all rows from `first` on: AT_ONCE at a time, the rest in halves of that, `rows` being a constant.
// (Not a number and its function picked side by side: g++ 12.2, tuned for Intel's processors since Skylake, makes both moves by
// one comparison whose flags are overwritten after the first, noce_convert_multiple_sets, and a last row met the code for two.)
template <int AT_ONCE, typename Run>
void in_parts(int first, int end, const Run &run) {
  for (; first + AT_ONCE <= end; first += AT_ONCE) run(std::integral_constant<int, AT_ONCE>(), first);
  if constexpr (AT_ONCE > 1) in_parts<AT_ONCE / 2>(first, end, run);
}

// Scores of ROWS queries with 16 / ROWS tokens at a time. q [ROWS, padded width]; out [ROWS, stride].
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
    for (int r = 0; r < width; r += N::STEP) {
      typename N::Operand queries[ROWS];
      for (int row = 0; row < ROWS; ++row) queries[row] = N::query(q + row * q_stride + r);
      for (int t = 0; t < TOKENS; ++t) {
        __builtin_prefetch((const char *)(key[t] + r) + KEYS_AHEAD);
        const auto x = r < full ? N::stored(key[t] + r) : N::stored(key[t] + r, width - r);
        for (int row = 0; row < ROWS; ++row) N::multiply(sums[row * TOKENS + t], queries[row], x);
      }
    }
    const Lanes found = sums_of(sums);
    for (int row = 0; row < ROWS; ++row)
      std::memcpy(out + row * out_stride + s, (const float *)&found + row * TOKENS, TOKENS * sizeof(float));
  }
}

// Adds to the scores of ROWS queries with 32 tokens what some of their numbers give. Both in words of 4 bytes, a number or a
// pair: q [ROWS, stride], keys [words, 32 tokens]. out [ROWS, stride].
template <typename T, int ROWS>
void score_tile(const int32_t *q, int q_stride, const Lanes *keys, int words, float *out, int out_stride) {
  using Operand = typename Numbers<T>::Operand;
  Lanes sums[ROWS][2];
  for (int row = 0; row < ROWS; ++row) std::memcpy(sums[row], out + row * out_stride, sizeof sums[row]);
  for (int r = 0; r < words; ++r)
    for (int row = 0; row < ROWS; ++row) {
      const Integers query = Integers{} + q[row * q_stride + r];
      for (int i = 0; i < 2; ++i) Numbers<T>::multiply(sums[row][i], (Operand)query, (Operand)keys[2 * r + i]);
    }
  for (int row = 0; row < ROWS; ++row) std::memcpy(out + row * out_stride, sums[row], sizeof sums[row]);
}

// Scores of many queries: words of 32 tokens are transposed, so that scores lie side by side and need not be summed over lanes.
template <typename T>
void score_many(int rows, const typename Numbers<T>::Query *q, int q_stride, const T *keys, int64_t stride, int width,
                int tokens, float *out, int out_stride) {
  constexpr int PER_WORD = 4 / sizeof(T), STEP = LANES * PER_WORD, AT_ONCE = WORDS * PER_WORD;
  const int32_t *query = (const int32_t *)q;
  const int query_stride = q_stride / PER_WORD;
  Lanes turned[2 * WORDS];
  for (int s = 0; s < tokens; s += 2 * LANES) {
    for (int row = 0; row < rows; ++row) std::fill_n(out + row * out_stride + s, 2 * LANES, 0.0f);
    for (int first = 0; first < width; first += AT_ONCE) {
      const int words = pad(std::min(width - first, AT_ONCE), STEP) / PER_WORD;
      for (int i = 0; i < 2 * words; i += LANES) {  // 16 words of 16 tokens
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
      in_parts<8>(0, rows, [&](auto now, int row) {
        score_tile<T, now>(query + int64_t(row) * query_stride + first / PER_WORD, query_stride, turned, words,
                           out + int64_t(row) * out_stride + s, out_stride);
      });
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
  for (int row = 0; row < ROWS; ++row) std::memcpy(own[row], sums + row * width, sizeof own[row]);
  for (int s = 0; s < tokens; s += N::PAIR, strip += PARTS)
    for (int row = 0; row < ROWS; ++row)
      for (int part = 0; part < PARTS; ++part) N::weigh(own[row][part], weights + row * w_stride + s, strip[part]);
  for (int row = 0; row < ROWS; ++row) std::memcpy(sums + row * width, own[row], sizeof own[row]);
}

// The same for columns that only these ROWS need: they are made ready on the way.
template <typename T, int ROWS, int STEPS>
void add_once(const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int columns,
              int tokens, float *sums, int width) {
  using N = Numbers<T>;
  constexpr int PARTS = N::STEP / LANES;
  Lanes own[ROWS][STEPS * PARTS];
  for (int row = 0; row < ROWS; ++row) std::memcpy(own[row], sums + row * width, sizeof own[row]);
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
  for (int row = 0; row < ROWS; ++row) std::memcpy(sums + row * width, own[row], sizeof own[row]);
}

template <typename T, int ROWS>
void add(const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int width, int tokens,
         float *sums, int padded) {
  constexpr int STEP = Numbers<T>::STEP, STEPS = (ROWS == 1 ? 8 : 16 / ROWS) * LANES / STEP;
  int v = 0;
  for (; v + STEPS * STEP <= width; v += STEPS * STEP)
    add_once<T, ROWS, STEPS>(weights, w_stride, values + v, stride, STEP, tokens, sums + v, padded);
  for (; v < width; v += STEP)
    add_once<T, ROWS, 1>(weights, w_stride, values + v, stride, std::min(STEP, width - v), tokens, sums + v, padded);
}

// Many rows: columns are made ready once for all of them.
template <typename T>
void add_many(int rows, const typename Numbers<T>::Query *weights, int w_stride, const T *values, int64_t stride, int width,
              int tokens, float *sums, int padded, Lanes *strip) {
  using N = Numbers<T>;
  constexpr int STEPS = STRIP * LANES / N::STEP, PARTS = N::STEP / LANES;
  int v = 0;
  for (; v + STEPS * N::STEP <= width; v += STEPS * N::STEP) {
    Lanes *next_lanes = strip;
    for (int s = 0; s < tokens; s += N::PAIR) {
      const T *token = values + s * stride + v, *next = s + 1 < tokens ? token + stride : token;
      for (int i = 0; i < STEPS; ++i, next_lanes += PARTS) {
        __builtin_prefetch(token + (STEPS + i) * N::STEP);
        __builtin_prefetch(next + (STEPS + i) * N::STEP);
        N::columns(token + i * N::STEP, next + i * N::STEP, N::STEP, next_lanes);
      }
    }
    int row = 0;
    for (; row + 4 <= rows; row += 4)
      add_strip<T, 4, STEPS>(weights + row * w_stride, w_stride, strip, tokens, sums + int64_t(row) * padded + v, padded);
    for (; row < rows; ++row)
      add_strip<T, 1, STEPS>(weights + row * w_stride, w_stride, strip, tokens, sums + int64_t(row) * padded + v, padded);
  }
  for (; v < width; v += N::STEP)
    for (int row = 0; row < rows; ++row)
      add_once<T, 1, 1>(weights + row * w_stride, w_stride, values + v, stride, std::min(N::STEP, width - v), tokens,
                        sums + int64_t(row) * padded + v, padded);
}

// What one thread needs for the query rows of a group of heads, and what it has found so far.
template <typename T>
struct Running {
  using N = Numbers<T>;
  using Query = typename N::Query;
  int rows, r_padded, v_padded, block;
  std::vector<Query> queries, weights;
  std::vector<float> scores;
  std::vector<T> unpacked;
  std::vector<Lanes> strip = std::vector<Lanes>(MOST_TOKENS * STRIP);

  Running(int rows, int R, int V, bool packed)
      : rows(rows), r_padded(pad(R, N::STEP)), v_padded(pad(V, N::STEP)),
        block(block_of((rows >= MANY_ROWS ? 4 : 1) * BLOCK_BYTES / int(sizeof(T)) / std::max(R, V))),
        queries(int64_t(rows) * r_padded), weights(int64_t(rows) * block), scores(int64_t(rows) * block),
        unpacked(packed ? int64_t(block) * (pad(std::max(R, V), CODES) + CODES) : 0) {}

  static int block_of(int tokens) { return std::clamp(tokens / (2 * LANES), 1, MOST_TOKENS / (2 * LANES)) * 2 * LANES; }

  void take(const float *q, int R) {
    for (int row = 0; row < rows; ++row)
      for (int r = 0; r < R; ++r) queries[row * r_padded + r] = Query(q[row * R + r]);
  }

  // Stored numbers where they lie; packed ones are turned back into numbers, until the next call.
  Tokens<T> numbers(const Stored &x, int64_t row, int64_t head, int64_t start, int tokens) {
    if (!x.packed) return {x.at<T>(row, head, start), x.token_stride};
    const int64_t stride = pad(x.width, CODES) + CODES;
    unpack(x.at<uint8_t>(row, head, start), x.token_stride, x.tiers, x.num_tiers, x.width, tokens, unpacked.data(), stride);
    return {unpacked.data(), stride};
  }

  void score_head(int first, int count, Tokens<T> keys, int width, int tokens) {
    if constexpr (sizeof(Query) == sizeof(T)) {
      if (count >= MANY_ROWS) {
        score_many<T>(count, queries.data() + int64_t(first) * r_padded, r_padded, keys.data, keys.stride, width, tokens,
                      scores.data() + int64_t(first) * block, block);
        return;
      }
    }
    in_parts<8>(first, first + count, [&](auto now, int row) {
      score<T, now>(queries.data() + int64_t(row) * r_padded, r_padded, keys.data, keys.stride, width, tokens,
                    scores.data() + int64_t(row) * block, block);
    });
  }

  // Scores become weights relative to the running maximum; sums so far shrink with it.
  void softmax(int row, int tokens, float scale, const float *bias, float *sums, float &largest, float &total) {
    float *s = scores.data() + int64_t(row) * block;
    for (int i = 0; i < tokens; ++i) s[i] *= scale;
    for (int i = 0; bias && i < tokens; ++i) s[i] += bias[i];
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
    std::fill(s + tokens, s + pad(tokens, LANES), 0.0f);
    for (int i = 0; i < pad(tokens, LANES); ++i) w[i] = Query(s[i]);
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += added[lane];
    const float shrink = std::exp(largest - highest);
    if (shrink != 1.0f)
      for (int i = 0; i < v_padded; ++i) sums[i] *= shrink;
    total = total * shrink + sum;
    for (int lane = 0; lane < LANES; ++lane)  // comparisons above would hide it
      if (no_number[lane]) total = std::numeric_limits<float>::quiet_NaN();
    largest = highest;
  }

  void add_head(int first, int count, Tokens<T> values, int width, int tokens, float *sums) {
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

template <typename T>
void decode(const float *q, float scale, const Stored k, const Stored v, const float *bias, int64_t bias_batch,
            int64_t bias_head, float *out, float *log_sums, int batch, int num_queries, int tokens, int splits, int threads) {
  const int groups = std::gcd(k.heads, v.heads), rows = num_queries / groups;
  const int R = k.width, V = v.width, v_padded = pad(V, Numbers<T>::STEP);
  const int per_split = pad((tokens + splits - 1) / splits, LANES);
  const int64_t tasks = int64_t(batch) * groups, size = int64_t(rows) * (v_padded + 2);
  std::vector<float> parts(tasks * splits * size);
#pragma omp parallel num_threads(threads)
  {
    Running<T> run(rows, R, V, k.packed || v.packed);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks * splits; ++task) {
      const int64_t split = task % splits, group = task / splits % groups, b = task / splits / groups;
      float *sums = parts.data() + task * size, *largest = sums + int64_t(rows) * v_padded, *total = largest + rows;
      std::fill(largest, total, -std::numeric_limits<float>::infinity());
      run.take(q + (b * num_queries + group * rows) * R, R);
      const int end = std::min<int64_t>(tokens, (split + 1) * per_split);
      for (int start = split * per_split; start < end; start += run.block) {
        const int count = std::min(run.block, end - start), k_heads = k.heads / groups, v_heads = v.heads / groups;
        for (int c = 0; c < k_heads; ++c)
          run.score_head(c * (rows / k_heads), rows / k_heads, run.numbers(k, b, group * k_heads + c, start, count), R,
                         count);
        for (int row = 0; row < rows; ++row) {
          const float *added = bias ? bias + b * bias_batch + (group * rows + row) * bias_head + start : nullptr;
          run.softmax(row, count, scale, added, sums + int64_t(row) * v_padded, largest[row], total[row]);
        }
        for (int u = 0; u < v_heads; ++u)
          run.add_head(u * (rows / v_heads), rows / v_heads, run.numbers(v, b, group * v_heads + u, start, count), V,
                       count, sums);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tasks * rows; ++row) {  // the splits of a row together
      const float *first = parts.data() + row / rows * splits * size;
      const int64_t at = row % rows;
      float highest = -std::numeric_limits<float>::infinity(), total = 0;
      for (int i = 0; i < splits; ++i) highest = std::max(highest, first[i * size + rows * v_padded + at]);
      float *target = out + row * V;
      std::fill(target, target + V, 0.0f);
      for (int i = 0; i < splits; ++i) {
        const float *part = first + i * size, weight = std::exp(part[rows * v_padded + at] - highest);
        total += weight * part[rows * (v_padded + 1) + at];
        for (int j = 0; j < V; ++j) target[j] += weight * part[at * v_padded + j];
      }
      for (int j = 0; j < V; ++j) target[j] /= total;
      if (log_sums) log_sums[row] = highest + std::log(total);
    }
  }
}

}  // namespace

// q [batch, queries, R]; bias [batch, queries, tokens] by strides, or null; out [batch, queries, V]; log_sums [batch, queries],
// the logarithms of what the exponentials of scores add up to, or null. Float32 all of them.
extern "C" void kvfold_decode(int is_bfloat16, const float *q, float scale, const Stored *k, const Stored *v,
                              const float *bias, int64_t bias_batch, int64_t bias_head, float *out, float *log_sums,
                              int batch, int queries, int tokens, int splits, int threads) {
  auto run = is_bfloat16 ? decode<bfloat16> : decode<float>;
  run(q, scale, *k, *v, bias, bias_batch, bias_head, out, log_sums, batch, queries, tokens, splits, threads);
}
