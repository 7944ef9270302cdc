// Where rows of bytes lie in pages, as cpu.py describes it.

#pragma once

#include <cstdint>

namespace {

// One region of all pages, [pages, heads, tokens, row_bytes]; inside a page it is one piece of memory.
struct Pages {
  uint8_t *data;
  int64_t page_stride, heads, tokens, row_bytes;

  uint8_t *at(int64_t page, int64_t head, int64_t token) const {
    return data + page * page_stride + (head * tokens + token) * row_bytes;
  }
};

}  // namespace
