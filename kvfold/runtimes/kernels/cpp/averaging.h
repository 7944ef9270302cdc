// Averages of stored values over parts of the tokens -> averages of the source's values over all of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "parts.h"
#include "rebuild.h"
#include "work.h"

namespace {

constexpr int ROWS = 8;  // at a time; tiles take, and write, rows up to the next 32nd

// Parts, each weighed by what it counts, led back by the map. M: what the map's numbers are multiplied as.
template <typename T>
class Averaging final : public Work {
  using M = Product<T>;

 public:
  Averaging(const Values &v, const Part *parts, int count, T *out)
      : v(v), parts(parts), count(count), shared(v.heads / v.kv_heads * v.steps), rows(v.batch * shared),
        chunks((rows + ROWS - 1) / ROWS), columns(columns_of(v, chunks)), deep(pad(v.depth, DEPTH)), wide(v.map ? pad(v.out_width, COLUMNS) : 0),
        to_width(v.map ? v.out_width : v.depth), out(out) {}

  int64_t pieces() const override { return v.kv_heads * chunks * (wide ? wide / columns : 1); }

  void piece(int64_t i) override {
    const int64_t column = i / (v.kv_heads * chunks) * columns, within = i % (v.kv_heads * chunks);
    const int64_t kv_head = within / chunks, first = within % chunks * ROWS, last = std::min<int64_t>(rows, first + ROWS);
    Room<float> sums(deep), found(pad(ROWS, COLUMNS) * columns);
    Room<M> numbers(int64_t(pad(ROWS, COLUMNS)) * (deep + DEPTH));
    for (int64_t row = first; row < last; ++row)
      weigh(row / shared, head_of(kv_head, row), row % v.steps, sums, numbers.data() + (row - first) * (deep + DEPTH));
    if (v.map)
      mapped(numbers.data(), deep + DEPTH, last - first, deep, (const M *)((const char *)v.map + kv_head * v.map_bytes) + column * deep, columns,
             found.data(), columns);
    for (int64_t row = first; row < last; ++row) {
      T *to = out + ((row / shared * v.steps + row % v.steps) * v.heads + head_of(kv_head, row)) * to_width;
      for (int j = 0; !v.map && j < to_width; ++j) to[j] = T(numbers[(row - first) * (deep + DEPTH) + j]);
      for (int j = column; v.map && j < std::min<int>(to_width, column + columns); ++j) to[j] = T(found[(row - first) * columns + j - column]);
    }
  }

 private:
  const Values v;
  const Part *parts;
  const int count;
  const int64_t shared, rows, chunks, columns;
  const int deep, wide, to_width;
  T *out;

  // Of the map at a time: all of them, unless there is little to share out.
  static int64_t columns_of(const Values &v, int64_t chunks) {
    return v.kv_heads * chunks < 4 * v.threads ? COLUMNS : pad(v.out_width, COLUMNS);
  }

  int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head * (v.heads / v.kv_heads) + row % shared / v.steps; }

  // The numbers of one head of one query token.
  void weigh(int64_t sequence, int64_t head, int64_t step, Room<float> &sums, M *to) const {
    float largest = v.sinks ? v.sinks[head] : -std::numeric_limits<float>::infinity();
    for (int i = 0; i < count; ++i)
      if (const int64_t row = parts[i].row(sequence, head, step, v.steps); row >= 0) largest = std::max(largest, parts[i].log_sums[row]);
    float total = v.sinks ? std::exp(v.sinks[head] - largest) : 0;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int i = 0; i < count; ++i) {
      const int64_t row = parts[i].row(sequence, head, step, v.steps);
      if (row < 0) continue;
      const float share = std::exp(parts[i].log_sums[row] - largest);
      add_scaled(share, parts[i].averages + row * parts[i].width, sums.data() + parts[i].column, parts[i].width);
      total += share;
    }
    scale_by(1 / total, sums.data(), deep);
    for (int j = 0; j < deep; j += LANES) put(load<Lanes>(&sums[j]), to + j);
  }
};

// T as the output is.
inline std::unique_ptr<Work> averaging(bool is_bfloat16, const Values &v, const Part *parts, int count, void *out) {
  if (is_bfloat16) return std::make_unique<Averaging<bfloat16>>(v, parts, count, (bfloat16 *)out);
  return std::make_unique<Averaging<float>>(v, parts, count, (float *)out);
}

}  // namespace
