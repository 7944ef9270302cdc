// Averages of stored values over parts of the tokens -> averages of the source's values over all of them. Plain C entry, no torch.

#include <algorithm>
#include <cmath>
#include <vector>

#include "parts.h"
#include "rebuild.h"

namespace {

constexpr int ROWS = 32;  // at a time

// The numbers of one row [batch, heads, steps], every part weighed by what it counts.
template <typename M>
void weighed(const Part *parts, int count, int64_t row, int64_t depth, std::vector<float> &sums, M *to) {
  float largest = parts[0].log_sums[row], total = 0;
  for (int i = 1; i < count; ++i) largest = std::max(largest, parts[i].log_sums[row]);
  for (int i = 0; i < count; ++i) total += std::exp(parts[i].log_sums[row] - largest);
  std::fill(sums.begin(), sums.end(), 0.0f);
  for (int i = 0; i < count; ++i) {
    const float share = std::exp(parts[i].log_sums[row] - largest) / total;
    const float *from = parts[i].averages + row * parts[i].width;
    float *target = sums.data() + parts[i].column;
    for (int64_t j = 0; j < parts[i].width; ++j) target[j] += share * from[j];
  }
  for (int64_t j = 0; j < depth; ++j) to[j] = M(sums[j]);
}

template <typename T>
void values(const Values &v, const Part *parts, int count, T *out) {
  using M = Product<T>;
  const int64_t shared = v.heads / v.kv_heads * v.steps, rows = v.batch * shared, chunks = (rows + ROWS - 1) / ROWS;
  const int deep = pad(v.depth, DEPTH), wide = v.map ? pad(v.out_width, COLUMNS) : 0, to_width = v.map ? v.out_width : v.depth;
#pragma omp parallel num_threads(v.threads)
  {
    const Tiles tiles(in_tiles<T>() && v.map);
    std::vector<float> sums(deep), found(ROWS * wide);
    std::vector<M> numbers(int64_t(ROWS) * (deep + DEPTH));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < v.kv_heads * chunks; ++task) {
      const int64_t kv_head = task / chunks, first = task % chunks * ROWS, last = std::min<int64_t>(rows, first + ROWS);
      for (int64_t i = first; i < last; ++i)
        weighed(parts, count, i / shared * v.heads * v.steps + kv_head * shared + i % shared, v.depth, sums,
                numbers.data() + (i - first) * (deep + DEPTH));
      if (v.map)
        mapped(numbers.data(), deep + DEPTH, last - first, deep, (const M *)((const char *)v.map + kv_head * v.map_bytes), wide,
               found.data(), wide);
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = kv_head * (v.heads / v.kv_heads) + i % shared / v.steps, step = i % v.steps;
        T *to = out + ((i / shared * v.steps + step) * v.heads + head) * to_width;
        for (int j = 0; j < to_width; ++j)
          to[j] = v.map ? T(found[(i - first) * wide + j]) : T(numbers[(i - first) * (deep + DEPTH) + j]);
      }
    }
  }
}

}  // namespace

extern "C" void kvfold_values(int is_bfloat16, const Values *v, const Part *parts, int count, void *out) {
  if (is_bfloat16) values(*v, parts, count, (bfloat16 *)out);
  else values(*v, parts, count, (float *)out);
}
