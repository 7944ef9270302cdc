// The source's heads of all tokens of some sequences, rebuilt from stored numbers, for prompts. Plain C entry, no torch.

#include <algorithm>
#include <cstring>
#include <vector>

#include "rebuild.h"
#include "stored.h"

namespace {

constexpr int AT_ONCE = 128;  // tokens

// out [batch, stored heads * heads, width, head_dim]: the tokens start:end of each sequence (spans [batch, 2]) at the end of rows
// of zeros.
template <typename T>
void rebuild(const Side &stored, const Rebuild &map, const int64_t *spans, int64_t batch, int64_t width, int threads, T *out) {
  const int64_t chunks = (width + AT_ONCE - 1) / AT_ONCE, size = map.head_dim;
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles(in_tiles<T>());
    Room<Product<T>> numbers = stored.room<Product<T>>(AT_ONCE);
    Rebuilding<T> rebuilding(map, stored.width, AT_ONCE);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * stored.heads * chunks; ++task) {
      const int64_t first = task % chunks * AT_ONCE, head = task / chunks % stored.heads, row = task / chunks / stored.heads;
      const int64_t start = spans[2 * row], padding = width - (spans[2 * row + 1] - start);
      const int64_t end = std::min(width, first + AT_ONCE), begin = std::clamp(padding, first, end);
      const T *made = nullptr;
      if (begin < end) {
        const Tokens<Product<T>> z = stored.numbers(row, head, start + begin - padding, end - begin, numbers);
        made = rebuilding.of(z.data, z.stride, row, head, start + begin - padding, end - begin);
      }
      for (int64_t h = 0; h < map.heads; ++h) {
        T *to = out + (((row * stored.heads + head) * map.heads + h) * width + first) * size;
        std::memset((void *)to, 0, (begin - first) * size * sizeof(T));
        for (int64_t s = begin; s < end; ++s)
          std::memcpy(to + (s - first) * size, made + (s - begin) * map.columns() + h * size, size * sizeof(T));
      }
    }
  }
}

}  // namespace

// As how many columns maps lie side by side, and in how many bytes a number of theirs where heads are bfloat16.
extern "C" void kvfold_layout(int32_t *lanes, int32_t *bytes) {
  *lanes = LANES;
  *bytes = sizeof(Product<bfloat16>);
}

extern "C" void kvfold_rebuild(int is_bfloat16, const Stored *parts, int count, const Rebuild *map, const int64_t *spans,
                               int64_t batch, int64_t width, int threads, void *out) {
  const Side stored(parts, count, true);
  if (is_bfloat16) rebuild(stored, *map, spans, batch, width, threads, (bfloat16 *)out);
  else rebuild(stored, *map, spans, batch, width, threads, (float *)out);
}
