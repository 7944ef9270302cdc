// Few query tokens over stored heads on a CPU: every stored number is read once, for all queries that it serves.
//
// Scores, softmax (running maximum and sum, as in flash attention) and weighted sums of a block of tokens follow each other
// while the block is in the processor's cache. kvfold/runtime/attend.py has the obvious version. Plain C entry, no torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, BLOCK_BYTES = 1 << 17, MOST_TOKENS = 512;
constexpr int KEYS_AHEAD = 8192, VALUES_AHEAD = 4096;  // bytes that are fetched before their turn; measured
constexpr int STRIP = 4;      // columns that are made ready at a time, in lanes
constexpr int FEW_ROWS = 4;  // up to so many, columns of values are made ready for each of them anew
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {  // to the nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};

// Keys or values [batch, heads, tokens, width]; strides in numbers, that of width is 1.
struct Stored {
  const void *data;
  int64_t heads, width, batch_stride, head_stride, token_stride;

  template <typename T>
  const T *at(int64_t row, int64_t head, int64_t token) const {
    return (const T *)data + row * batch_stride + head * head_stride + token * token_stride;
  }
};

template <typename V, typename T>
V load(const T *from, int count = sizeof(V) / sizeof(T)) {
  V out = {};
  if (count == sizeof(V) / sizeof(T)) std::memcpy(&out, from, sizeof out);
  else std::memcpy(&out, from, count * sizeof(T));
  return out;
}

// How numbers of a type meet queries and weights: STEP of them at a time, weights of PAIR tokens at a time.
template <typename T>
struct Numbers {
  using Query = float;
  using Operand = Lanes;
  static constexpr int STEP = LANES, PAIR = 1;

  static Lanes wide(const float *x, int count) { return load<Lanes>(x, count); }
  static Lanes wide(const bfloat16 *x, int count) {
    return (Lanes)(__builtin_convertvector(load<Halves>(x, count), Integers) << 16);
  }
  static Operand stored(const T *x, int count = STEP) { return wide(x, count); }
  static Operand query(const Query *x) { return load<Lanes>(x); }
  static void multiply(Lanes &sum, Operand a, Operand b) { sum += a * b; }

  // Columns of a token, ready to be weighed.
  static void columns(const T *token, const T *, int count, Lanes *out) { out[0] = wide(token, count); }
  static void weigh(Lanes &sum, const Query *weight, Lanes x) { sum += weight[0] * x; }
};

#ifdef __AVX512BF16__
template <>
struct Numbers<bfloat16> {
  using Query = bfloat16;
  using Operand = __m512bh;
  static constexpr int STEP = 2 * LANES, PAIR = 2;
  typedef uint16_t Shorts __attribute__((vector_size(64)));

  static Operand stored(const bfloat16 *x, int count = STEP) { return load<Operand>(x, count); }
  static Operand query(const Query *x) { return load<Operand>(x); }
  static void multiply(Lanes &sum, Operand a, Operand b) { sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, a, b); }

  // Numbers of two tokens side by side, as the product of pairs wants them.
  static void columns(const bfloat16 *token, const bfloat16 *next, int count, Lanes *out) {
    const Shorts a = load<Shorts>(token, count), b = load<Shorts>(next, count);
    out[0] = (Lanes)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10,
                                            42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    out[1] = (Lanes)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                            57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  }
  static void weigh(Lanes &sum, const Query *weight, Lanes x) {
    int32_t pair;
    std::memcpy(&pair, weight, 4);
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)x);
  }
};
#endif

// The sums of 16 vectors.
inline Lanes sums_of(const Lanes *x) {
  Lanes a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// e^x for x <= 0, to 2e-7.
inline Lanes exp_of(Lanes x) {
  const Lanes low = Lanes{} - 87.0f;
  x = x > low ? x : low;
  const Integers power = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  const Lanes n = __builtin_convertvector(power, Lanes), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return (y * r * r + r + 1.0f) * (Lanes)((power + 127) << 23);
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
      for (int i = 0; i < STEPS; ++i, next_lanes += PARTS)
        N::columns(token + i * N::STEP, next + i * N::STEP, N::STEP, next_lanes);
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

int pad(int width, int step) { return (width + step - 1) / step * step; }

// What one thread needs for the query rows of a group of heads, and what it has found so far.
template <typename T>
struct Running {
  using N = Numbers<T>;
  using Query = typename N::Query;
  int rows, r_padded, v_padded, block;
  std::vector<Query> queries, weights;
  std::vector<float> scores;
  std::vector<Lanes> strip = std::vector<Lanes>(MOST_TOKENS * STRIP);

  Running(int rows, int R, int V)
      : rows(rows), r_padded(pad(R, N::STEP)), v_padded(pad(V, N::STEP)),
        block(std::clamp(BLOCK_BYTES / int(sizeof(T)) / std::max(R, V) / LANES * LANES, LANES, MOST_TOKENS)),
        queries(int64_t(rows) * r_padded), weights(int64_t(rows) * block), scores(int64_t(rows) * block) {}

  void take(const float *q, int R) {
    for (int row = 0; row < rows; ++row)
      for (int r = 0; r < R; ++r) queries[row * r_padded + r] = Query(q[row * R + r]);
  }

  void score_head(int first, int count, const T *keys, int64_t stride, int width, int tokens) {
    for (int row = first; row < first + count;) {
      const int left = first + count - row, now = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      auto run = now == 8 ? score<T, 8> : now == 4 ? score<T, 4> : now == 2 ? score<T, 2> : score<T, 1>;
      run(queries.data() + int64_t(row) * r_padded, r_padded, keys, stride, width, tokens,
          scores.data() + int64_t(row) * block, block);
      row += now;
    }
  }

  // Scores become weights relative to the running maximum; sums so far shrink with it.
  void softmax(int row, int tokens, float scale, const float *bias, float *sums, float &largest, float &total) {
    float *s = scores.data() + int64_t(row) * block;
    for (int i = 0; i < tokens; ++i) s[i] *= scale;
    for (int i = 0; bias && i < tokens; ++i) s[i] += bias[i];
    std::fill(s + tokens, s + pad(tokens, LANES), -std::numeric_limits<float>::infinity());
    Lanes most = load<Lanes>(s);
    for (int i = LANES; i < tokens; i += LANES) {
      const Lanes x = load<Lanes>(s + i);
      most = x > most ? x : most;
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
    largest = highest;
  }

  void add_head(int first, int count, const T *values, int64_t stride, int width, int tokens, float *sums) {
    if (count > FEW_ROWS) {
      add_many<T>(count, weights.data() + int64_t(first) * block, block, values, stride, width, tokens,
                  sums + int64_t(first) * v_padded, v_padded, strip.data());
      return;
    }
    for (int row = first; row < first + count;) {
      const int left = first + count - row, now = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      auto run = now == 4 ? add<T, 4> : now == 2 ? add<T, 2> : add<T, 1>;
      run(weights.data() + int64_t(row) * block, block, values, stride, width, tokens,
          sums + int64_t(row) * v_padded, v_padded);
      row += now;
    }
  }
};

template <typename T>
void decode(const float *q, float scale, const Stored k, const Stored v, const float *bias, int64_t bias_batch,
            int64_t bias_head, float *out, int batch, int num_queries, int tokens, int splits, int threads) {
  const int groups = std::gcd(k.heads, v.heads), rows = num_queries / groups;
  const int R = k.width, V = v.width, v_padded = pad(V, Numbers<T>::STEP);
  const int per_split = pad((tokens + splits - 1) / splits, LANES);
  const int64_t tasks = int64_t(batch) * groups, size = int64_t(rows) * (v_padded + 2);
  std::vector<float> parts(tasks * splits * size);
#pragma omp parallel num_threads(threads)
  {
    Running<T> run(rows, R, V);
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
          run.score_head(c * (rows / k_heads), rows / k_heads, k.at<T>(b, group * k_heads + c, start), k.token_stride, R,
                         count);
        for (int row = 0; row < rows; ++row) {
          const float *added = bias ? bias + b * bias_batch + (group * rows + row) * bias_head + start : nullptr;
          run.softmax(row, count, scale, added, sums + int64_t(row) * v_padded, largest[row], total[row]);
        }
        for (int u = 0; u < v_heads; ++u)
          run.add_head(u * (rows / v_heads), rows / v_heads, v.at<T>(b, group * v_heads + u, start), v.token_stride, V,
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
    }
  }
}

}  // namespace

// q [batch, queries, R]; bias [batch, queries, tokens] by strides, or null; out [batch, queries, V]. Float32 all of them.
extern "C" void kvfold_decode(int is_bfloat16, const float *q, float scale, const Stored *k, const Stored *v,
                              const float *bias, int64_t bias_batch, int64_t bias_head, float *out, int batch, int queries,
                              int tokens, int splits, int threads) {
  auto run = is_bfloat16 ? decode<bfloat16> : decode<float>;
  run(q, scale, *k, *v, bias, bias_batch, bias_head, out, batch, queries, tokens, splits, threads);
}
