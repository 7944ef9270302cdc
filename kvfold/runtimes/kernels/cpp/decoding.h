// Few query tokens over stored heads on a CPU: every stored number is read once, for all queries that it serves.
//
// Scores, softmax (running maximum and sum, as in flash attention) and weighted sums of a block of tokens follow each other
// while the block is in the processor's cache. kvfold/runtimes/kernels/attention.py has the obvious version.

#pragma once

#include <omp.h>

#include <memory>
#include <numeric>

#include "parts.h"
#include "rebuild.h"
#include "running.h"
#include "stored.h"
#include "turn.h"
#include "work.h"

namespace {

constexpr int REBUILT_TOKENS = 256;  // at a time, in tiles
constexpr int TASKS_PER_THREAD = 4, LEAST_TOKENS = 256;  // long sequences of few heads are split until there are so many
constexpr int LEAST_TILES = 1;                           // and of tokens that queries are turned for

struct Task {
  int64_t row, group, start, end;
};

// unit: tokens that are not split.
std::vector<Task> tasks_of(const Queries &q, int groups, int least, int unit) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < q.batch; ++b) tokens += groups * (q.sequences[3 * b + 1] - q.sequences[3 * b]);
  const int64_t wanted = tokens / (q.threads > 1 ? TASKS_PER_THREAD * q.threads : 1) + 1;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < q.batch; ++b) {
    const int64_t start = q.sequences[3 * b], end = q.sequences[3 * b + 1], count = end - start;
    const int64_t splits = std::max<int64_t>(1, std::min((count + wanted - 1) / wanted, (count + least - 1) / least));
    const int64_t each = (count + splits * unit - 1) / (splits * unit) * unit;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t at = start; at < end; at += each) tasks.push_back({b, group, at, std::min(at + each, end)});
  }
  return tasks;
}

// Products with the stored numbers of a token: of queries of a stored head that are turned, or of its keys.
bool turning_is_less(const Rebuild &map, int64_t rows, int width) {
  double products = 0;
  int at = 0;
  for (const Met &met : map.turn->met(width, 1)) {
    for (int k = 0; k < met.rows; ++k) products += (met.end - at) * (1 + 2.0 * map.turn->reach[k] / map.turn->tokens);
    at = met.end;
  }
  return rows * products < map.columns() * at;
}

// What one thread does. `values`: null where they are rebuilt from the same numbers as keys.
template <typename T>
struct Decoding {
  const Queries &q;
  const Side &keys, *values;
  const int groups, rows, steps, block;
  Running<T> run;
  Room<T> key_numbers, value_numbers;
  Rebuilding<T> *rebuilding;
  Turning<T> *turning;
  const float *query = nullptr;

  Decoding(const Queries &q, const Side &keys, const Side *values, int groups, int q_width, Rebuilding<T> *rebuilding,
           Turning<T> *turning, int block)
      : q(q), keys(keys), values(values), groups(groups), rows(q.rows / groups), steps(q.steps), block(block),
        run(rows, rows / (keys.heads / groups) / (rebuilding ? rebuilding->map.heads : 1), q_width,
            (values ? values : &keys)->width, block), key_numbers(keys.template room<T>(block)),
        value_numbers(values ? values->template room<T>(block) : Room<T>()), rebuilding(rebuilding), turning(turning) {}

  // sums [rows, padded width], then the largest score and the total of each row.
  void work(const Task &task, int q_width, float *sums) {
    float *largest = sums + int64_t(rows) * run.v_padded, *total = largest + rows;
    std::fill(sums, largest, 0.0f);
    std::fill(largest, total, -std::numeric_limits<float>::infinity());
    std::fill(total, total + rows, 0.0f);
    query = q.data + (task.row * q.rows + task.group * rows) * q_width;
    if (turning) turning->begin(task.start);
    else run.take(0, rows, query, q_width);
    for (int64_t start = task.start; start < task.end; start += block) {
      const int count = std::min<int64_t>(block, task.end - start);
      const Tokens<T> last = scores(task, start, count, q_width);
      for (int row = 0; row < rows; ++row) weigh(task, row, start, count, sums, largest[row], total[row]);
      add(task, start, count, last, sums);
    }
  }

  Tokens<T> scores(const Task &task, int64_t start, int count, int q_width) {
    const int heads = keys.heads / groups, rows_each = rows / heads;
    Tokens<T> z{};
    for (int c = 0; c < heads; ++c) {
      z = keys.numbers<T>(task.row, task.group * heads + c, start, count, key_numbers);
      if (turning) {
        turning->score(c, query + c * rows_each * q_width, task.row, task.group * heads + c, q.sequences[3 * task.row + 1], z, start,
                       count, run.scores.data() + int64_t(c) * rows_each * block, block);
        continue;
      }
      if (!rebuilding) {
        run.score_head(c * rows_each, rows_each, z, q_width, count);
        continue;
      }
      const T *made = made_of(z, task.row, task.group * heads + c, start, count);
      const int within = rebuilding->map.heads, each = rows_each / within;
      for (int h = 0; h < within; ++h)
        run.score_head(c * rows_each + h * each, each, {made + h * q_width, rebuilding->map.columns(), q_width}, q_width, count);
    }
    return z;
  }

  const T *made_of(Tokens<T> z, int64_t row, int64_t head, int64_t start, int count) {
    if constexpr (std::is_same_v<Product<T>, T>) return rebuilding->of(z.data, z.stride, row, head, start, count);
    else return nullptr;  // those are multiplied in float32
  }

  void weigh(const Task &task, int row, int64_t start, int count, float *sums, float &largest, float &total) {
    const int64_t at = task.group * rows + row, position = q.sequences[3 * task.row + 2] + at % steps - start;
    const float *bias = q.bias ? q.bias + task.row * q.bias_batch + at * q.bias_row + start : nullptr;
    const int first = std::clamp<int64_t>(position - q.oldest + 1, 0, count);
    const int end = std::clamp<int64_t>(position - q.youngest + 1, 0, count);
    run.softmax(row, count, first, end, q.scale, q.softcap, bias, sums + int64_t(row) * run.v_padded, largest, total);
  }

  void add(const Task &task, int64_t start, int count, Tokens<T> last, float *sums) {
    const int heads = values ? values->heads / groups : 1, each = rows / heads;
    for (int u = 0; u < heads; ++u) {
      const Tokens<T> y =
          values ? values->numbers<T>(task.row, task.group * heads + u, start, count, value_numbers) : last;
      run.add_head(u * each, each, y, (values ? values : &keys)->width, count, sums);
    }
  }
};

// Attention over tokens of one form: tasks, and then the tasks of each row together.
template <typename T>
class Form final : public Work {
 public:
  Form(const Queries &q, const Side &keys, const Side *values, const Rebuild *map, float *out, float *log_sums)
      : merging(*this), q(q), keys(keys), values(values), map(map), groups(std::gcd(keys.heads, (values ? values : &keys)->heads)),
        rows(q.rows / groups), width((values ? values : &keys)->width), padded(pad(width, DEPTH)),
        q_width(map ? map->head_dim : keys.width), turns(map && map->turn && turning_is_less(*map, q.rows / keys.heads, keys.width)), out(out),
        log_sums(log_sums), own(q.threads) {
    const int unit = turns ? map->turn->tokens : LANES;
    tasks = tasks_of(q, groups, turns ? LEAST_TILES * unit : LEAST_TOKENS, unit);
    parts.resize(tasks.size() * size());
    firsts.assign(q.batch * groups + 1, tasks.size());
    for (size_t i = tasks.size(); i-- > 0;) firsts[tasks[i].row * groups + tasks[i].group] = i;
    for (size_t i = firsts.size() - 1; i-- > 0;) firsts[i] = std::min(firsts[i], firsts[i + 1]);
    for (int64_t group = 0; group < q.batch * groups; ++group) split |= !is_alone(group);
  }

  int64_t pieces() const override { return tasks.size(); }

  void piece(int64_t i) override {
    Own &mine = own[omp_get_thread_num()];
    if (!mine.decoding) start(mine);
    mine.decoding->work(tasks[i], q_width, parts.data() + i * size());
    const int64_t group = tasks[i].row * groups + tasks[i].group;
    for (int64_t row = 0; is_alone(group) && row < rows; ++row) merge(group * rows + row);  // while it is near this thread
  }

  // Of what several tasks found, maybe in several threads.
  struct Merging final : Work {
    const Form &of;
    explicit Merging(const Form &of) : of(of) {}
    int64_t pieces() const override { return of.split ? of.q.batch * of.q.rows : 0; }
    void piece(int64_t row) override {
      if (!of.is_alone(row / of.rows)) of.merge(row);
    }
  } merging;

 private:
  // What one thread needs, made when it has something to do.
  struct Own {
    std::unique_ptr<Rebuilding<T>> rebuilding;
    std::unique_ptr<Turning<T>> turning;
    std::unique_ptr<Decoding<T>> decoding;
  };

  const Queries q;
  const Side keys, *values;
  const Rebuild *map;
  const int groups, rows, width, padded, q_width;
  const bool turns;
  bool split = false;  // a sequence's tokens are shared out, or it has none
  float *out, *log_sums;
  std::vector<Task> tasks;
  Room<float> parts;
  std::vector<size_t> firsts;
  std::vector<Own> own;

  int64_t size() const { return int64_t(rows) * (padded + 2); }

  // Whether the tokens of a sequence's group are one task.
  bool is_alone(int64_t group) const { return firsts[group + 1] - firsts[group] == 1; }

  int block() const {
    int64_t longest = 1;
    for (const Task &task : tasks) longest = std::max(longest, task.end - task.start);
    const int wide = BLOCK_BYTES / int(sizeof(T)) / std::max(keys.width, width) * (rows >= MANY_ROWS ? 4 : 1);
    const int most = map && !turns && in_tiles<T>() ? REBUILT_TOKENS : wide;
    return Running<T>::block_of(std::min<int64_t>(most, longest + DEPTH - 1));
  }

  void start(Own &mine) const {
    const int heads = keys.heads / groups, tokens = block();
    if (turns) mine.turning = std::make_unique<Turning<T>>(*map, heads, rows / heads, keys.width, tokens);
    else if (map) mine.rebuilding = std::make_unique<Rebuilding<T>>(*map, keys.width, tokens);
    mine.decoding = std::make_unique<Decoding<T>>(q, keys, values, groups, q_width, mine.rebuilding.get(), mine.turning.get(), tokens);
  }

  void merge(int64_t at) const {
    const size_t first = firsts[at / rows], last = firsts[at / rows + 1];
    const int64_t row = at % rows, most = int64_t(rows) * padded + row;
    float highest = -std::numeric_limits<float>::infinity(), total = 0, *to = out + at * width;
    for (size_t i = first; i < last; ++i) highest = std::max(highest, parts[i * size() + most]);
    std::fill(to, to + width, 0.0f);
    for (size_t i = first; i < last; ++i) {
      const float *part = parts.data() + i * size(), weight = std::exp(part[most] - highest);
      total += weight * part[most + rows];
      add_scaled(weight, part + row * padded, to, width);
    }
    if (first < last) scale_by(1 / total, to, width);
    if (log_sums) log_sums[at] = first < last ? highest + std::log(total) : LOWEST;
  }
};

// keys: `places` side by side; values: null where they are the same numbers; map: null where queries meet stored keys. out [batch,
// rows, V]; log_sums [batch, rows], the logarithms of what the exponentials of scores add up to, or null. Float32.
struct Stages {
  std::unique_ptr<Work> tasks;
  Work *merging;

  Stages(bool is_bfloat16, const Queries &q, const Side &keys, const Side *values, const Rebuild *map, float *out, float *log_sums) {
    const bool plain = keys.as_they_lie && (!values || values->as_they_lie);
    if (is_bfloat16 && (plain || sizeof(Product<bfloat16>) == 2)) make<bfloat16>(q, keys, values, map, out, log_sums);
    else make<float>(q, keys, values, map, out, log_sums);
  }

 private:
  template <typename T>
  void make(const Queries &q, const Side &keys, const Side *values, const Rebuild *map, float *out, float *log_sums) {
    auto form = std::make_unique<Form<T>>(q, keys, values, map, out, log_sums);
    merging = &form->merging;
    tasks = std::move(form);
  }
};

}  // namespace
