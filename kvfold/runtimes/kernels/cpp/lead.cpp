// Which tokens few queries read, by the first numbers of every stored key. kvfold/runtimes/readers/lead.py has the obvious
// version. Plain C entry, no torch.

#include <algorithm>
#include <limits>

#include "running.h"
#include "stored.h"

namespace {

constexpr float HIDDEN = -std::numeric_limits<float>::max() / 2;  // what is added to scores of tokens that a query does not see
constexpr int AT_ONCE = MOST_TOKENS, PLACES = (1 << 12) + 1;

// queries [batch, rows, width], scaled; bias [batch, rows, tokens] by strides, or null. `count` tokens are found for each group of
// heads: the first `sinks` that one of its queries sees, the last `newest`, and those of most weight in the mean.
struct Leading {
  const float *queries, *bias;
  int64_t bias_batch, bias_row, batch, rows, groups, tokens, count, sinks, newest, threads;
  float softcap;
};

template <typename T>
struct Choosing {
  const Leading &q;
  const Side keys;
  const int rows, heads, each;
  Running<T> run;
  Room<T> numbers;
  std::vector<float> worth;
  std::vector<int32_t> counts, alike;
  std::vector<uint16_t> places;
  std::vector<char> shown;

  Choosing(const Leading &q, const Stored &stored)
      : q(q), keys(&stored, 1, false), rows(q.rows / q.groups), heads(keys.heads / q.groups), each(rows / heads),
        run(rows, each, keys.width, keys.width, AT_ONCE), numbers(keys.template room<T>(AT_ONCE)), worth(q.tokens), counts(PLACES), places(q.tokens),
        shown(q.tokens) {}

  const float *bias(int64_t batch, int64_t row) const { return q.bias ? q.bias + batch * q.bias_batch + row * q.bias_row : nullptr; }

  void choose(int64_t batch, int64_t group, std::vector<float> &all, int32_t *found) {
    score(batch, group, all);
    std::fill(worth.begin(), worth.end(), 0.0f);
    std::fill(shown.begin(), shown.end(), !q.bias);
    for (int row = 0; row < rows; ++row) add_weights(bias(batch, group * rows + row), all.data() + row * padded());
    mark();
    best(found);
  }

  int64_t padded() const { return pad(q.tokens, AT_ONCE); }

  void score(int64_t batch, int64_t group, std::vector<float> &all) {
    run.take(0, rows, q.queries + (batch * q.rows + group * rows) * keys.width, keys.width);
    for (int64_t start = 0; start < q.tokens; start += AT_ONCE) {
      const int count = std::min<int64_t>(AT_ONCE, q.tokens - start);
      for (int c = 0; c < heads; ++c) {
        const Tokens<T> z = keys.template numbers<T>(batch, group * heads + c, start, count, numbers);
        run.score_head(c * each, each, z, keys.width, count);
      }
      for (int row = 0; row < rows; ++row)
        std::memcpy(all.data() + row * padded() + start, run.scores.data() + row * AT_ONCE, count * sizeof(float));
    }
  }

  // The softmax of a row of scores, to what tokens are worth.
  void add_weights(const float *bias, float *s) {
    const int tokens = q.tokens, whole = pad(tokens, LANES);
    cap(s, tokens, q.softcap);
    for (int i = 0; bias && i < tokens; ++i) s[i] += bias[i], shown[i] |= bias[i] > HIDDEN;
    std::fill(s + tokens, s + whole, -std::numeric_limits<float>::infinity());
    Lanes highest = load<Lanes>(s), added = {};
    for (int i = LANES; i < whole; i += LANES) highest = load<Lanes>(s + i) > highest ? load<Lanes>(s + i) : highest;
    float most = highest[0];
    for (int lane = 1; lane < LANES; ++lane) most = std::max(most, highest[lane]);
    for (int i = 0; i < whole; i += LANES) {
      const Lanes score = load<Lanes>(s + i), x = exp_of(score - most), weight = score != score ? score : x;
      std::memcpy(s + i, &weight, sizeof weight);
      if (i + LANES <= tokens) added += x;
    }
    float total = sum_of(added);
    for (int i = tokens / LANES * LANES; i < tokens; ++i) total += s[i] == s[i] ? s[i] : 0;
    for (int i = 0; i < tokens; ++i) worth[i] += s[i] / total;
  }

  // What is always read is worth more than all else, and so is what is no number, which must not be hidden; what nobody sees less.
  void mark() {
    int64_t seen = 0;
    for (int64_t i = 0; i < q.tokens; ++i) {
      seen += shown[i];
      if (!shown[i]) worth[i] = -1;
      else if (seen <= q.sinks || i >= q.tokens - q.newest || worth[i] != worth[i]) worth[i] = std::numeric_limits<float>::infinity();
    }
  }

  // Counted by their leading bits, so that only those which share a count with the last one are compared.
  void best(int32_t *found) {
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t i = 0; i < q.tokens; ++i) ++counts[places[i] = place(worth[i])];
    int64_t better = 0, last = PLACES - 1;
    while (better + counts[last] < q.count) better += counts[last--];
    alike.clear();
    for (int64_t i = 0; i < q.tokens; ++i)
      if (places[i] == last) alike.push_back(i);
    const auto before = [&](int32_t a, int32_t b) { return worth[a] != worth[b] ? worth[a] > worth[b] : a < b; };
    const int64_t wanted = q.count - better;
    if (wanted < int64_t(alike.size())) std::nth_element(alike.begin(), alike.begin() + wanted, alike.end(), before);
    std::sort(alike.begin(), alike.begin() + wanted);
    for (int64_t i = 0, next = 0, left = q.count; left; ++i) {
      const bool among = next < wanted && alike[next] == i;
      next += among;
      const bool taken = among || places[i] > last;  // without a branch that nobody foresees
      *found = i;
      found += taken, left -= taken;
    }
  }

  // Rises with what a token is worth.
  static int place(float worth) {
    uint32_t bits;
    std::memcpy(&bits, &worth, 4);
    return worth < 0 ? 0 : 1 + (bits >> 19);
  }
};

template <typename T>
void choose(const Leading &q, const Stored &keys, int32_t *found) {
#pragma omp parallel num_threads(q.threads)
  {
    const Tiles tiles(in_tiles<T>());
    Choosing<T> own(q, keys);
    std::vector<float> all(own.rows * own.padded());
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < q.batch * q.groups; ++task)
      own.choose(task / q.groups, task % q.groups, all, found + task * q.count);
  }
}

}  // namespace

// found [batch, groups, count], ascending.
extern "C" void kvfold_lead(int is_bfloat16, const Leading *q, const Stored *keys, int32_t *found) {
  (is_bfloat16 && (!keys->packed || sizeof(Product<bfloat16>) == 2) ? choose<bfloat16> : choose<float>)(*q, *keys, found);
}
