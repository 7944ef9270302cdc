// Keys that were rebuilt from what is stored -> heads of their own, rotated: one pass, where torch's operations take eight. kvfold/runtimes/kernels/rotary.py has the obvious version. Plain C entry, no torch.

#include <algorithm>

#include "rotary.h"

namespace {

// Rows [groups * heads of a group, width] of one token. positions [tokens]: rows of the tables; null: one follows the other.
struct Rotation {
  const int64_t *positions;
  int64_t x_batch, x_group, x_token, table_batch, out_row, out_token;
  int32_t batch, groups, heads, tokens, width, rotated, pairs;
};

template <typename T, typename C>
void rotate_all(const Rotation &r, const T *x, const C *cos, const C *sin, T *out, int threads) {
  const int64_t rows = int64_t(r.batch) * r.groups * r.heads;
  threads = std::clamp<int64_t>(rows * r.tokens * r.width / 16384, 1, threads);  // few are not worth waking others
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    for (int s = 0; s < r.tokens; ++s) {
      const int64_t head = row % r.heads, group = row / r.heads % r.groups, b = row / r.heads / r.groups;
      const int64_t table = b * r.table_batch + (r.positions ? r.positions[s] : s) * r.rotated;
      rotate_head(x + b * r.x_batch + group * r.x_group + s * r.x_token + head * r.width,
                  nullptr, cos + table, sin + table, r.width, r.rotated, r.pairs, out + row * r.out_row + s * r.out_token);
    }
  }
}

}  // namespace

// x [batch, groups, tokens, heads * width] by strides, that of the last is 1; cos and sin [batch or 1, tokens, rotated], by which the first `pairs` turn; out [batch, groups * heads, tokens, width] by strides, which may be x.
extern "C" void kvfold_rotate(int is_bfloat16, int tables_are_bfloat16, const Rotation *rotation, const void *x,
                              const void *cos, const void *sin, void *out, int threads) {
  auto run = [&](auto number, auto of_table) {
    using T = decltype(number);
    using C = decltype(of_table);
    rotate_all(*rotation, (const T *)x, (const C *)cos, (const C *)sin, (T *)out, threads);
  };
  if (is_bfloat16 && tables_are_bfloat16) run(bfloat16(), bfloat16());
  else if (is_bfloat16) run(bfloat16(), float());
  else if (tables_are_bfloat16) run(float(), bfloat16());
  else run(float(), float());
}
