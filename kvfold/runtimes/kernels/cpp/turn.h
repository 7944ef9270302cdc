// Scores of queries with keys that are rebuilt on read and turn slowly, without rebuilding one: queries are turned instead.
//
// A key that turns by an angle a per token has turned by a tau at tau tokens from the middle of some tokens, and there
// cos(a tau) and sin(a tau) are sums of few functions f_k(tau) that are the same for all pairs (turning.py chooses them). So
// is the score: sum_k f_k(tau) (v_k . z), with queries v_k that are made once for all these tokens and meet stored numbers z.

#pragma once

#include "rebuild.h"
#include "running.h"

namespace {

struct Range {
  int first, end;
};

// Numbers of a head that so many functions, the first ones, say something of.
struct Shared {
  int functions;
  std::vector<Range> numbers;
};

// A query [depth] for a function: its share of a query's numbers, what it begins with, and where it lies.
struct Made {
  const float *share, *begin;
  float *sums;
};

template <typename T>
struct Turning {
  const Rebuild &map;
  const Turn &turn;
  const int rows, functions, depth, half;  // rows: queries of a stored head
  const std::vector<Met> met;
  Running<T> run;
  Room<float> cos, sin, turned_cos, turned_sin, shares, made, unturned, constants;
  std::vector<float> nothing;
  std::vector<int64_t> taken;  // of each stored head, for which tokens its queries are turned
  std::vector<Made> made_of;
  int64_t first = 0;           // token of a task, from which on they are counted
  double turned_by = -1;
  std::vector<Shared> turning;
  Shared still{1, {}};

  // heads: stored ones of a task, each with `rows` queries.
  Turning(const Rebuild &map, int heads, int rows, int width, int block)
      : map(map), turn(*map.turn), rows(rows), functions(turn.functions), depth(pad(width, DEPTH)), half(map.rotated / 2),
        met(turn.met(width, rows)), run(heads * rows * functions, rows * functions, width, 0, block), cos(half), sin(half), turned_cos(half),
        turned_sin(half), shares(int64_t(rows) * functions * map.head_dim), made(int64_t(rows) * functions * depth),
        unturned(int64_t(heads) * rows * depth), constants(int64_t(heads) * rows * functions), nothing(depth), taken(heads, -1), made_of(rows * functions) {
    std::fill(made.begin(), made.end(), 0.0f);
    int kept = 0;
    while (kept < half && !turn.speeds[kept]) ++kept;
    still.numbers = {{0, kept}, {half, half + kept}, {2 * half, int(map.head_dim)}};
    for (int k = functions, from = kept; k > 0; --k) {
      const int to = std::max<int>(from, turn.reach[k - 1]);
      if (to > from) turning.push_back({k, {{from, to}, {half + from, half + to}}});
      from = to;
    }
  }

  // Tokens from here on, in as few parts as there can be.
  void begin(int64_t token) {
    first = token;
    std::fill(taken.begin(), taken.end(), -1);
  }

  // Scores [rows, stride] of the c-th stored head of a task, `head` of the cache, with tokens from `start` on. q [rows,
  // head_dim]; row, end: the sequence, and its last token but one.
  void score(int c, const float *q, int64_t row, int64_t head, int64_t end, Tokens<T> z, int64_t start, int count, float *out,
             int64_t stride) {
    for (int done = 0, now; done < count; done += now) {
      const int64_t within = (start - first + done) % turn.tokens, tile = start + done - within;
      now = std::min<int64_t>(count - done, turn.tokens - within);
      if (taken[c] != tile) take(c, q, row, head, tile, std::min(end, tile + turn.tokens) - 1);
      const Tokens<T> some{z.data + done * z.stride, z.stride, z.depth};
      run.score_head(c * rows * functions, rows * functions, some, run.r_width, now, met);
      for (int i = 0; i < rows; ++i) add_up(c * rows * functions + i, within, now, out + i * stride + done);
    }
  }

  // row: of the first function's scores, behind all of which lie those of the next.
  void add_up(int row, int64_t within, int count, float *out) {
    for (int s = 0, now; s < count; s += now) {
      now = std::min(LANES, count - s);
      Lanes sum = {};
      for (int k = 0, at = row; k < functions; ++k, at += rows) {
        const Lanes f = load<Lanes>(turn.basis + k * turn.tokens + within + s, now);
        sum += f * (load<Lanes>(run.scores.data() + int64_t(at) * run.block + s, now) + constants[at]);
      }
      put(sum, out + s, now);
    }
  }

  // For tokens from `tile` on. last: of these, one whose place in the tables says where they stand.
  void take(int c, const float *q, int64_t row, int64_t head, int64_t tile, int64_t last) {
    const bool is_first = taken[c] < 0;
    taken[c] = tile;
    middle(row * map.table_batch + last * map.rotated, last - tile - (turn.tokens - 1) / 2.0);
    const int each = rows / map.heads;
    for (int h = 0; h < map.heads; ++h) {
      const int64_t column = head * map.columns() + h * map.head_dim;
      const float *of_head = q + int64_t(h) * each * map.head_dim;
      float *same = unturned.data() + (int64_t(c) * rows + h * each) * depth, *to = made.data() + int64_t(h) * each * depth;
      for (int i = 0; i < each; ++i) share_out(of_head + i * map.head_dim, shares.data() + i * functions * map.head_dim);
      absorb_all(turn.weights + column * depth, each, is_first, same, to);
      for (int i = 0; i < each; ++i)
        for (int k = 0; k < functions; ++k)
          constants[(c * functions + k) * rows + h * each + i] =
              map.offset ? of_offset(shares.data() + (i * functions + k) * map.head_dim, map.offset + column) : 0;
    }
    run.take(c * rows * functions, rows * functions, made.data(), depth, depth);
  }

  float of_offset(const float *share, const float *offset) const {
    Lanes sums = {};
    for (int f = 0, now; f < map.head_dim; f += now) {
      now = std::min<int>(LANES, map.head_dim - f);
      sums += load<Lanes>(share + f, now) * load<Lanes>(offset + f, now);
    }
    return sum_of(sums);
  }

  // cos and sin in the middle of the tokens, `by` tokens before the one at a place of the tables.
  void middle(int64_t at, double by) {
    if (map.tables_are_bfloat16) put_down((const bfloat16 *)map.cos + at, (const bfloat16 *)map.sin + at);
    else put_down((const float *)map.cos + at, (const float *)map.sin + at);
    for (int i = 0; by != turned_by && i < half; ++i) {
      turned_cos[i] = std::cos(turn.speeds[i] * by);
      turned_sin[i] = std::sin(turn.speeds[i] * by);
    }
    turned_by = by;
    for (int i = 0, now; i < half; i += now) {
      now = std::min(LANES, half - i);
      const Lanes c = load<Lanes>(&cos[i], now), s = load<Lanes>(&sin[i], now);
      const Lanes by_cos = load<Lanes>(&turned_cos[i], now), by_sin = load<Lanes>(&turned_sin[i], now);
      put(c * by_cos + s * by_sin, &cos[i], now);
      put(s * by_cos - c * by_sin, &sin[i], now);
    }
  }

  template <typename C>
  void put_down(const C *c, const C *s) {
    for (int i = 0, now; i < half; i += now) {
      now = std::min(LANES, half - i);
      put(Numbers<float>::wide(c + i, now), &cos[i], now);
      put(Numbers<float>::wide(s + i, now), &sin[i], now);
    }
  }

  // What each function takes of the numbers of a query: out [functions, head_dim].
  void share_out(const float *q, float *out) {
    for (int i = 0, now; i < half; i += now) {
      now = std::min(LANES, half - i);
      const Lanes c = load<Lanes>(cos.data() + i, now), s = load<Lanes>(sin.data() + i, now);
      const Lanes x = load<Lanes>(q + i, now), y = load<Lanes>(q + half + i, now), a = x * c + y * s, b = y * c - x * s;
      for (int k = 0; k < functions; ++k) {
        const Lanes share = load<Lanes>(turn.shares + k * half + i, now);
        put(share * (k % 2 ? b : a), out + k * map.head_dim + i, now);
        put(share * (k % 2 ? -a : b), out + k * map.head_dim + half + i, now);
      }
    }
    for (int k = 0; k < functions; ++k) {
      float *const rest = out + k * map.head_dim + map.rotated;
      if (k) std::fill(rest, out + (k + 1) * map.head_dim, 0.0f);
      else std::copy(q + map.rotated, q + map.head_dim, rest);
    }
  }

  // Queries [functions, rows, depth] for each function, of which `each` are those of one head; same [each, depth]: what does not
  // turn gives, which is the first function's.
  void absorb_all(const float *weights, int each, bool is_first, float *same, float *to) {
    if (is_first) absorb(still, each, weights, same, nullptr);
    for (const Shared &some : turning) absorb(some, each, weights, to, &some == turning.data() ? same : to);
    for (int k = 0; turning.empty() && k < functions; ++k) {
      float *const all = to + int64_t(k) * rows * depth;
      if (k) std::fill(all, all + each * depth, 0.0f);
      else std::copy(same, same + each * depth, all);
    }
  }

  // The shares of some functions in numbers of so many queries, times the map, on top of `from`: what there is, what the first
  // function begins with [queries, depth], or nothing. All of the first function come first.
  void absorb(const Shared &some, int queries, const float *weights, float *to, const float *from) {
    constexpr int AT_ONCE = LANES > 8 ? 12 : 6;  // of 16 registers 12 for sums: additions take as long as four others
    int count = 0;
    for (int k = 0; k < some.functions; ++k)
      for (int query = 0; query < queries; ++query, ++count) {
        float *const sums = to + int64_t(k * rows + query) * depth;
        made_of[count] = {shares.data() + (query * functions + k) * map.head_dim, from == to ? sums : from && !k ? from + query * depth : nothing.data(), sums};
      }
    auto now_met = met.begin();
    for (int r = 0; r < depth; r += 2 * LANES, weights += map.head_dim * 2 * LANES) {
      if (now_met->end <= r) ++now_met;
      in_few_parts<AT_ONCE>(0, std::min(count, now_met->rows / rows * queries),
                            [&](auto now, int n) { absorb<now>(some.numbers, weights, made_of.data() + n, r); });
    }
  }

  template <int COUNT>
  void absorb(const std::vector<Range> &numbers, const float *weights, const Made *of, int r) {
    Lanes sums[COUNT][2];
    for (int i = 0; i < COUNT; ++i) sums_from(sums[i], of[i].begin + r);
    for (const Range &range : numbers)
      for (int f = range.first; f < range.end; ++f) {
        const Lanes a = in_register(load<Lanes>(weights + 2 * f * LANES));
        const Lanes b = in_register(load<Lanes>(weights + (2 * f + 1) * LANES));
        for (int i = 0; i < COUNT; ++i) {
          sums[i][0] += of[i].share[f] * a;
          sums[i][1] += of[i].share[f] * b;
        }
      }
    for (int i = 0; i < COUNT; ++i) sums_to(sums[i], of[i].sums + r);
  }
};

}  // namespace
