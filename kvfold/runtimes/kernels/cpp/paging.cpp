// Rows of bytes out of pages, and into them: kvfold/runtimes/kernels/paging.py has the obvious version. Plain C entry, no torch.

#include <algorithm>
#include <cstring>

#include "pages.h"

// spans [batch, 2]: first and last but one token of each sequence; tables: its pages; out [batch, heads, width, row_bytes], at whose
// end it stands behind zeros.
extern "C" void kvfold_gather(const Pages *pages, const int32_t *tables, int64_t table_stride, const int64_t *spans, uint8_t *out,
                              int batch, int width, int threads) {
  const Pages p = *pages;
  threads = std::clamp<int64_t>(batch * p.heads * width * p.row_bytes / 65536, 1, threads);  // few are not worth waking others
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t start = spans[2 * b], end = spans[2 * b + 1];
      uint8_t *to = out + (b * p.heads + head) * width * p.row_bytes;
      const int64_t padding = (width - (end - start)) * p.row_bytes;
      std::memset(to, 0, padding);
      to += padding;
      for (int64_t token = start; token < end;) {
        const int64_t place = token % p.tokens, count = std::min(p.tokens - place, end - token);
        std::memcpy(to, p.at(tables[b * table_stride + token / p.tokens], head, place), count * p.row_bytes);
        to += count * p.row_bytes;
        token += count;
      }
    }
  }
}

// rows [heads, count, row_bytes] by strides of bytes; slots [count]: page * tokens + place, negative ones are left out.
extern "C" void kvfold_scatter(const Pages *pages, const int64_t *slots, const uint8_t *rows, int64_t head_stride,
                               int64_t token_stride, int64_t count) {
  for (int64_t head = 0; head < pages->heads; ++head) {
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] < 0) continue;
      std::memcpy(pages->at(slots[i] / pages->tokens, head, slots[i] % pages->tokens), rows + head * head_stride + i * token_stride,
                  pages->row_bytes);
    }
  }
}
