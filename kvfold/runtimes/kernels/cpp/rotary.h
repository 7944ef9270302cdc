// Rotating a head by tables. kvfold/runtimes/kernels/rotary.py has the obvious version.

#pragma once

#include <algorithm>

#include "unpack.h"

namespace {

// One head of one token, by half-split pairs of its first `rotated` numbers: x [width] -> to. offset: added before, or null.
template <typename X, typename C, typename T>
void rotate_head(const X *x, const float *offset, const C *cos, const C *sin, int width, int rotated, T *to) {
  const auto wide = [](auto *from, int count) { return Numbers<float>::wide(from, count); };
  const auto number = [&](int i, int count) {
    return offset ? wide(x + i, count) + load<Lanes>(offset + i, count) : wide(x + i, count);
  };
  const int half = rotated / 2;
  for (int i = 0; i < half; i += LANES) {
    const int count = std::min(LANES, half - i);
    const Lanes a = number(i, count), b = number(half + i, count);
    put(a * wide(cos + i, count) - b * wide(sin + i, count), to + i, count);
    put(b * wide(cos + half + i, count) + a * wide(sin + half + i, count), to + half + i, count);
  }
  for (int i = rotated; i < width; i += LANES) put(number(i, std::min(LANES, width - i)), to + i, std::min(LANES, width - i));
}

}  // namespace
