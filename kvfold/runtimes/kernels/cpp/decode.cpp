// Few query tokens over stored heads on a CPU: every stored number is read once, for all queries that it serves.
//
// Scores, softmax (running maximum and sum, as in flash attention) and weighted sums of a block of tokens follow each other
// while the block is in the processor's cache. kvfold/runtimes/kernels/attention.py has the obvious version. Plain C entry, no torch.

#include <numeric>

#include "parts.h"
#include "rebuild.h"
#include "running.h"
#include "stored.h"
#include "turn.h"

namespace {

constexpr int REBUILT_TOKENS = 256;  // at a time, in tiles
constexpr int TASKS_PER_THREAD = 4, LEAST_TOKENS = 256;  // long sequences of few heads are split until there are so many

struct Task {
  int64_t row, group, start, end;
};

std::vector<Task> tasks_of(const Queries &q, int groups) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < q.batch; ++b) tokens += groups * (q.sequences[3 * b + 1] - q.sequences[3 * b]);
  const int64_t wanted = tokens / (q.threads > 1 ? TASKS_PER_THREAD * q.threads : 1) + 1;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < q.batch; ++b) {
    const int64_t start = q.sequences[3 * b], end = q.sequences[3 * b + 1], count = end - start;
    const int64_t splits = std::max<int64_t>(1, std::min((count + wanted - 1) / wanted, (count + LEAST_TOKENS - 1) / LEAST_TOKENS));
    const int64_t each = pad((count + splits - 1) / splits, LANES);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t at = start; at < end; at += each) tasks.push_back({b, group, at, std::min(at + each, end)});
  }
  return tasks;
}

// Products per stored number of a token: queries of a stored head that are turned, or its keys.
bool turning_is_less(const Rebuild &map, int64_t rows) {
  return rows * map.turn->functions * (1 + double(map.head_dim) / map.turn->tokens) < map.columns();
}

// What one thread does. `values`: null where they are rebuilt from the same numbers as keys.
template <typename T>
struct Decoding {
  const Queries &q;
  const Side &keys, *values;
  const int groups, rows, steps, block;
  Running<T> run;
  std::vector<T> key_numbers, value_numbers;
  Rebuilding<T> *rebuilding;
  Turning<T> *turning;
  const float *query = nullptr;

  Decoding(const Queries &q, const Side &keys, const Side *values, int groups, int q_width, Rebuilding<T> *rebuilding,
           Turning<T> *turning, int block)
      : q(q), keys(keys), values(values), groups(groups), rows(q.rows / groups), steps(q.steps), block(block),
        run(rows, rows / (keys.heads / groups) / (rebuilding ? rebuilding->map.heads : 1), q_width,
            (values ? values : &keys)->width, block), key_numbers(size_t(block) * keys.template stride<T>()),
        value_numbers(values ? size_t(block) * values->template stride<T>() : 0), rebuilding(rebuilding), turning(turning) {}

  // sums [rows, padded width], then the largest score and the total of each row.
  void work(const Task &task, int q_width, float *sums) {
    float *largest = sums + int64_t(rows) * run.v_padded, *total = largest + rows;
    std::fill(largest, total, -std::numeric_limits<float>::infinity());
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

// The tasks of each row together.
struct Merging {
  const std::vector<Task> &tasks;
  const float *parts;
  int rows, width, padded;

  // first, last: the tasks of a sequence and a group.
  void row(size_t first, size_t last, int row, float *out, float *log_sum) const {
    const int64_t size = int64_t(rows) * (padded + 2), most = int64_t(rows) * padded + row;
    float highest = -std::numeric_limits<float>::infinity(), total = 0;
    for (size_t i = first; i < last; ++i) highest = std::max(highest, parts[i * size + most]);
    std::fill(out, out + width, 0.0f);
    for (size_t i = first; i < last; ++i) {
      const float *part = parts + i * size, weight = std::exp(part[most] - highest);
      total += weight * part[most + rows];
      for (int j = 0; j < width; ++j) out[j] += weight * part[int64_t(row) * padded + j];
    }
    for (int j = 0; first < last && j < width; ++j) out[j] /= total;
    if (log_sum) *log_sum = first < last ? highest + std::log(total) : LOWEST;
  }
};

template <typename T>
void decode(const Queries &q, const Side &keys, const Side *values, const Rebuild *map, float *out, float *log_sums) {
  const int groups = std::gcd(keys.heads, (values ? values : &keys)->heads), rows = q.rows / groups;
  const int V = (values ? values : &keys)->width, padded = pad(V, DEPTH);
  const int q_width = map ? map->head_dim : keys.width;
  const int wide = BLOCK_BYTES / int(sizeof(T)) / std::max(keys.width, V) * (rows >= MANY_ROWS ? 4 : 1);
  const bool turns = map && map->turn && turning_is_less(*map, q.rows / keys.heads);
  const int block = Running<T>::block_of(map && !turns && in_tiles<T>() ? REBUILT_TOKENS : wide);
  const std::vector<Task> tasks = tasks_of(q, groups);
  const int64_t size = int64_t(rows) * (padded + 2);
  std::vector<float> parts(tasks.size() * size);
  std::vector<size_t> firsts(q.batch * groups + 1, tasks.size());
  for (size_t i = tasks.size(); i-- > 0;) firsts[tasks[i].row * groups + tasks[i].group] = i;
  for (size_t i = firsts.size() - 1; i-- > 0;) firsts[i] = std::min(firsts[i], firsts[i + 1]);
  const Merging merging{tasks, parts.data(), rows, V, padded};
#pragma omp parallel num_threads(q.threads)
  {
    std::vector<Rebuilding<T>> rebuilding;
    std::vector<Turning<T>> turning;
    if (turns) turning.emplace_back(*map, keys.heads / groups, rows / (keys.heads / groups), keys.width, block);
    else if (map) rebuilding.emplace_back(*map, keys.width, block);
    const Tiles tiles(in_tiles<T>());
    Decoding<T> own(q, keys, values, groups, q_width, map && !turns ? rebuilding.data() : nullptr, turns ? turning.data() : nullptr,
                    block);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) own.work(tasks[i], q_width, parts.data() + i * size);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < q.batch * q.rows; ++row)
      merging.row(firsts[row / rows], firsts[row / rows + 1], row % rows, out + row * V, log_sums ? log_sums + row : nullptr);
  }
}

}  // namespace

// keys: `parts` places side by side; values: null where they are the same numbers; map: null where queries meet stored keys.
// out [batch, rows, V]; log_sums [batch, rows], the logarithms of what the exponentials of scores add up to, or null. Float32.
extern "C" void kvfold_decode(int is_bfloat16, const Queries *q, const Stored *keys, int parts, const Stored *values,
                              const Rebuild *map, float *out, float *log_sums) {
  const Side k(keys, parts, map), v(values ? values : keys, 1, false);
  const bool plain = k.as_they_lie && (!values || v.as_they_lie);
  auto run = is_bfloat16 && (plain || sizeof(Product<bfloat16>) == 2) ? decode<bfloat16> : decode<float>;
  run(*q, k, values ? &v : nullptr, map, out, log_sums);
}
