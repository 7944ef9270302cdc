// What queries lose with each of the tokens, when they are asked again. kvfold/runtimes/scorers/base.py has the obvious version.
// Plain C entry, no torch.

#include <cmath>
#include <limits>

#include "running.h"
#include "stored.h"

namespace {

constexpr int AT_ONCE = MOST_TOKENS;

// queries [batch, heads, rows, width of keys], scaled; bias [batch, heads, tokens] by strides, which is added to scores, or null.
// root [heads, V, V]: the square of root v is what a stored value v weighs in the residual stream. part: queries of which weights
// lie in the cache together, and which a thread takes.
struct Asked {
  const float *queries, *bias, *root;
  int64_t bias_batch, bias_head, batch, heads, rows, tokens, part, threads;
  float softcap;
};

// effect [batch, heads, parts, tokens] of `part` queries each; lengths [batch, heads, tokens], of root v squared; of every query
// log_sums [batch, heads, rows] and averages of stored values [batch, heads, rows, V].
struct Effects {
  float *effect, *lengths, *log_sums, *averages;
};

// Sum of rows [count, wide], each times a number, and the square of that sum. wide: a multiple of DEPTH.
inline float combine(const float *rows, const float *x, int count, int wide, float *out) {
  Lanes squares = {};
  constexpr int AT_A_TIME = DEPTH / LANES;
  for (int at = 0; at < wide; at += DEPTH) {
    Lanes sums[2][AT_A_TIME] = {};  // of even and odd rows: an addition takes as long as four others
    for (int i = 0; i < count; ++i)
      for (int part = 0; part < AT_A_TIME; ++part) sums[i % 2][part] += x[i] * load<Lanes>(rows + i * wide + at + part * LANES);
    for (int part = 0; part < AT_A_TIME; ++part) {
      const Lanes sum = sums[0][part] + sums[1][part];
      std::memcpy(out + at + part * LANES, &sum, sizeof sum);
      squares += sum * sum;
    }
  }
  return sum_of(squares);
}

class Asking {
  const Asked &q;
  const Side keys, values;
  const Effects &found;
  const int each, V, wide;
  const int64_t padded;
  int64_t rooted = -1;
  Running<float> by_keys, by_values;
  Room<float> key_numbers, value_numbers, weights, root, columns;

 public:
  Asking(const Asked &q, const Stored &k, const Stored &v, const Effects &found)
      : q(q), keys(&k, 1, false), values(&v, 1, false), found(found), each(q.heads / keys.heads), V(values.width),
        wide(pad(V, DEPTH)), padded(pad(q.tokens, AT_ONCE)), by_keys(q.part, q.part, keys.width, V, AT_ONCE),
        by_values(std::max<int>(q.part, V), V, V, V, AT_ONCE), key_numbers(keys.room<float>(AT_ONCE)),
        value_numbers(values.room<float>(AT_ONCE)), weights(q.part * padded), root(V * wide), columns(V * wide) {}

  // Of the tokens from `start` on: how much each weighs.
  void weigh(int64_t batch, int64_t head, int64_t start) {
    const int count = std::min<int64_t>(AT_ONCE, q.tokens - start);
    float *to = found.lengths + (batch * q.heads + head) * q.tokens + start;
    std::fill(to, to + count, 0.0f);
    by_values.take(0, V, q.root + head * V * V, V);
    by_values.score_head(0, V, values_of(batch, head, start, count), V, count);
    for (int row = 0; row < V; ++row) {
      const float *x = by_values.scores.data() + row * AT_ONCE;
      for (int s = 0; s < count; ++s) to[s] += x[s] * x[s];
    }
  }

  void ask(int64_t batch, int64_t head, int64_t part) {
    const int64_t at = (batch * q.heads + head) * q.rows + part * q.part;
    const int rows = std::min<int64_t>(q.part, q.rows - part * q.part);
    std::vector<float> sums(q.part * by_keys.v_padded), totals(rows), led(rows * wide), own(rows);
    std::vector<int64_t> most(rows);
    if (head != rooted) load_root(head);
    score(batch, head, at, rows);
    for (int row = 0; row < rows; ++row) {
      float *w = weights.data() + row * padded;
      totals[row] = part_of_most(w, bias(batch, head), most[row], found.log_sums[at + row]);
    }
    average(batch, head, rows, sums.data());
    float *to = found.effect + ((batch * q.heads + head) * parts() + part) * q.tokens;
    std::fill(to, to + q.tokens, 0.0f);
    for (int row = 0; row < rows; ++row) {
      const float *rest = sums.data() + row * by_keys.v_padded;
      to[most[row]] += lose_most(batch, head, most[row], rest, totals[row], found.averages + (at + row) * V);
      own[row] = lead(found.averages + (at + row) * V, led.data() + row * wide);
    }
    lose_others(batch, head, rows, totals, led, own, to);
  }

  int64_t parts() const { return (q.rows + q.part - 1) / q.part; }

 private:
  const float *bias(int64_t batch, int64_t head) const {
    return q.bias ? q.bias + batch * q.bias_batch + head * q.bias_head : nullptr;
  }

  Tokens<float> values_of(int64_t batch, int64_t head, int64_t start, int count) {
    return values.numbers<float>(batch, head / each, start, count, value_numbers);
  }

  // Rows of the root, padded with zeros, and its columns.
  void load_root(int64_t head) {
    rooted = head;
    std::fill(root.begin(), root.end(), 0.0f);
    std::fill(columns.begin(), columns.end(), 0.0f);
    for (int i = 0; i < V; ++i)
      for (int j = 0; j < V; ++j) root[i * wide + j] = columns[j * wide + i] = q.root[(head * V + i) * V + j];
  }

  void score(int64_t batch, int64_t head, int64_t at, int rows) {
    by_keys.take(0, rows, q.queries + at * keys.width, keys.width);
    for (int64_t start = 0; start < q.tokens; start += AT_ONCE) {
      const int count = std::min<int64_t>(AT_ONCE, q.tokens - start);
      by_keys.score_head(0, rows, keys.numbers<float>(batch, head / each, start, count, key_numbers), keys.width, count);
      for (int row = 0; row < rows; ++row)
        std::memcpy(weights.data() + row * padded + start, by_keys.scores.data() + row * AT_ONCE, count * sizeof(float));
    }
  }

  // Scores of a row become e^(score - highest), 0 of the token whose score that is: its p may be almost 1, and 1 - p nothing.
  // The sum of the others.
  float part_of_most(float *s, const float *bias, int64_t &most, float &log_sum) const {
    const int64_t whole = pad(q.tokens, LANES);
    cap(s, q.tokens, q.softcap);
    for (int64_t i = 0; bias && i < q.tokens; ++i) s[i] += bias[i];
    std::fill(s + q.tokens, s + padded, -std::numeric_limits<float>::infinity());
    Lanes highest = load<Lanes>(s);
    Integers places = {};
    for (int64_t i = LANES; i < whole; i += LANES) {
      const Lanes x = load<Lanes>(s + i);
      places = x > highest ? Integers{} + int32_t(i) : places;
      highest = x > highest ? x : highest;
    }
    int top_lane = 0;
    for (int lane = 1; lane < LANES; ++lane)
      if (highest[lane] > highest[top_lane]) top_lane = lane;
    const float top = highest[top_lane];
    most = std::min<int64_t>(places[top_lane] + top_lane, q.tokens - 1);
    for (int64_t i = 0; i < whole; i += LANES) {
      const Lanes x = exp_of(load<Lanes>(s + i) - top);
      std::memcpy(s + i, &x, sizeof x);
    }
    s[most] = 0;
    std::fill(s + q.tokens, s + padded, 0.0f);
    Lanes added = {};
    for (int64_t i = 0; i < whole; i += LANES) added += load<Lanes>(s + i);
    const float others = sum_of(added);
    log_sum = top + std::log1p(others);
    return others;
  }

  // Sums of values by the weights of the others.
  void average(int64_t batch, int64_t head, int rows, float *sums) {
    for (int64_t start = 0; start < q.tokens; start += AT_ONCE) {
      const int count = std::min<int64_t>(AT_ONCE, q.tokens - start);
      for (int row = 0; row < rows; ++row)
        std::memcpy(by_keys.weights.data() + row * AT_ONCE, weights.data() + row * padded + start, AT_ONCE * sizeof(float));
      by_keys.add_head(0, rows, values_of(batch, head, start, count), V, count, sums);
    }
  }

  // The average of all tokens, and what is lost with the one that counts most, by the average of the others.
  float lose_most(int64_t batch, int64_t head, int64_t most, const float *rest, float others, float *average) {
    const float share = 1 / (1 + others);
    std::vector<float> away(V), turned(wide);
    const float *own = values_of(batch, head, most, 1).data;
    for (int i = 0; i < V; ++i) {
      away[i] = own[i] - rest[i] / std::max(others, 1e-30f);
      average[i] = (rest[i] + own[i]) * share;
    }
    return combine(columns.data(), away.data(), V, wide, turned.data()) * share * share;
  }

  // What an average is multiplied by with a value v for o M v, [wide]; o M o.
  float lead(const float *average, float *to) const {
    std::vector<float> turned(wide);
    const float square = combine(columns.data(), average, V, wide, turned.data());
    combine(root.data(), turned.data(), V, wide, to);
    return square;
  }

  // Of all others (p / (1 - p))^2 (v - o) M (v - o), added up over queries.
  void lose_others(int64_t batch, int64_t head, int rows, const std::vector<float> &totals, const std::vector<float> &led,
                   const std::vector<float> &own, float *to) {
    const float *lengths = found.lengths + (batch * q.heads + head) * q.tokens;
    by_values.take(0, rows, led.data(), wide);
    for (int64_t start = 0; start < q.tokens; start += AT_ONCE) {
      const int count = std::min<int64_t>(AT_ONCE, q.tokens - start);
      by_values.score_head(0, rows, values_of(batch, head, start, count), V, count);
      for (int row = 0; row < rows; ++row) {
        const float *w = weights.data() + row * padded + start, *x = by_values.scores.data() + row * AT_ONCE;
        const float all = 1 + totals[row], square = own[row];
        for (int s = 0; s < count; ++s) {
          const float odds = w[s] / (all - w[s]);
          to[start + s] += odds * odds * std::max(lengths[start + s] + square - 2 * x[s], 0.0f);
        }
      }
    }
  }
};

}  // namespace

extern "C" void kvfold_effects(const Asked *q, const Stored *keys, const Stored *values, const Effects *found) {
  const int64_t heads = q->batch * q->heads, blocks = (q->tokens + AT_ONCE - 1) / AT_ONCE;
#pragma omp parallel num_threads(q->threads)
  {
    Asking own(*q, *keys, *values, *found);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * blocks; ++task)
      own.weigh(task / blocks / q->heads, task / blocks % q->heads, task % blocks * AT_ONCE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * own.parts(); ++task) {
      const int64_t head = task / own.parts();
      own.ask(head / q->heads, head % q->heads, task % own.parts());
    }
  }
}
