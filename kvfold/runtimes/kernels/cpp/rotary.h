// Rotating a head by tables. kvfold/runtimes/kernels/rotary.py has the obvious version.

#pragma once

#include <algorithm>

#include "unpack.h"

namespace {

// One head of one token, by half-split pairs of its first `rotated` numbers, of which the first `pairs` turn: x [width] -> to.
// offset: added before, or null.
template <typename X, typename C, typename T>
void rotate_head(const X *x, const float *offset, const C *cos, const C *sin, int width, int rotated, int pairs, T *to) {
  const auto wide = [](auto *from, int count) { return Numbers<float>::wide(from, count); };
  const auto number = [&](int i, int count) {
    return offset ? wide(x + i, count) + load<Lanes>(offset + i, count) : wide(x + i, count);
  };
  const auto keep = [&](int i, int end) {
    for (; i < end; i += LANES) put(number(i, std::min(LANES, end - i)), to + i, std::min(LANES, end - i));
  };
  const int half = rotated / 2;
  for (int i = 0; i < pairs; i += LANES) {
    const int count = std::min(LANES, pairs - i);
    const Lanes a = number(i, count), b = number(half + i, count);
    put(a * wide(cos + i, count) - b * wide(sin + i, count), to + i, count);
    put(b * wide(cos + half + i, count) + a * wide(sin + half + i, count), to + half + i, count);
  }
  keep(pairs, half);
  keep(half + pairs, width);
}

}  // namespace
