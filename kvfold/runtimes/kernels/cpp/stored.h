// Where stored numbers lie, as cpu.py describes them.

#pragma once

#include <cstdint>

#include "unpack.h"

namespace {

// Keys or values [batch, heads, tokens, width]; strides in numbers, that of width is 1. Packed ones: rows of bytes, with
// strides in bytes; no tiers are float8.
struct Stored {
  const void *data;
  int64_t heads, width, batch_stride, head_stride, token_stride;
  int64_t packed, num_tiers;
  const Tier *tiers;

  template <typename T>
  const T *at(int64_t row, int64_t head, int64_t token) const {
    return (const T *)data + row * batch_stride + head * head_stride + token * token_stride;
  }
};

}  // namespace
