// Packed tokens -> numbers in memory, for keys that are rebuilt on read. Plain C entry, no torch.

#include <algorithm>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "stored.h"
#include "unpack.h"

namespace {

constexpr int AT_ONCE = 64;  // tokens

template <typename T>
void unpack_all(const Stored x, T *out, int64_t batch_stride, int64_t head_stride, int64_t token_stride, int batch, int tokens,
                int threads) {
  const int64_t parts = (tokens + AT_ONCE - 1) / AT_ONCE, stride = pad(x.width, CODES) + CODES;
  threads = std::clamp<int64_t>(batch * x.heads * tokens * x.width / 8192, 1, threads);  // few are not worth waking others
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> numbers(AT_ONCE * stride);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * x.heads * parts; ++task) {
      const int64_t start = task % parts * AT_ONCE, head = task / parts % x.heads, row = task / parts / x.heads;
      const int count = std::min<int64_t>(AT_ONCE, tokens - start);
      unpack(x.at<uint8_t>(row, head, start), x.token_stride, x.tiers, x.num_tiers, x.width, count, numbers.data(), stride);
      T *to = out + row * batch_stride + head * head_stride + start * token_stride;
      for (int s = 0; s < count; ++s) std::memcpy(to + s * token_stride, numbers.data() + s * stride, x.width * sizeof(T));
    }
  }
}

}  // namespace

// x: packed, [batch, heads, tokens, width]; out: numbers, by strides of numbers, that of width is 1.
extern "C" void kvfold_unpack(int is_bfloat16, const Stored *x, void *out, int64_t batch_stride, int64_t head_stride,
                              int64_t token_stride, int batch, int tokens, int threads) {
  if (is_bfloat16)
    unpack_all(*x, (bfloat16 *)out, batch_stride, head_stride, token_stride, batch, tokens, threads);
  else
    unpack_all(*x, (float *)out, batch_stride, head_stride, token_stride, batch, tokens, threads);
}
