// Where stored numbers lie, as cpu.py describes them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"
#include "tiles.h"
#include "unpack.h"

namespace {

constexpr int AHEAD = 12;  // tokens; measured

// Keys or values [batch, heads, tokens, width], strides in bytes, numbers of a token side by side. Packed ones are rows of
// bytes; no tiers are float8; others are float32, or bfloat16 where they are `narrow`. With a table, tokens lie in pages of `page_tokens`, whose numbers are in the table's row of a
// sequence; otherwise a sequence is one page.
struct Stored {
  const void *data;
  const int32_t *table;
  int64_t table_stride, page_tokens, page_stride;
  int64_t heads, width, head_stride, token_stride;
  int64_t packed, narrow, num_tiers;
  const Tier *tiers;

  template <typename T>
  const T *at(int64_t row, int64_t head, int64_t token) const {
    const char *at = (const char *)data + head * head_stride;
    if (!table) return (const T *)(at + row * page_stride + token * token_stride);
    if (page_tokens == 1) return (const T *)(at + table[row * table_stride + token] * page_stride);  // divisions take longer
    return (const T *)(at + table[row * table_stride + token / page_tokens] * page_stride + token % page_tokens * token_stride);
  }

  bool aligned(int64_t size) const {
    return ((int64_t)data | page_stride | head_stride | token_stride) % size == 0;
  }

  // So many of `count` tokens from `token` on lie behind each other.
  int together(int64_t token, int count) const {
    if (!table) return count;
    return page_tokens == 1 ? 1 : std::min<int64_t>(count, page_tokens - token % page_tokens);
  }

  // Pages that hold few tokens lie anywhere, of which the processor guesses nothing.
  void fetch(int64_t row, int64_t head, int64_t token) const {
    const char *from = at<char>(row, head, token);
    const int64_t bytes = packed ? token_stride : width * (narrow ? 2 : 4);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  }

  // Some tokens of one head as rows of `stride` numbers; up to CODES - 1 more are written behind each.
  template <typename T>
  void read(int64_t row, int64_t head, int64_t start, int count, T *to, int64_t stride) const {
    for (int done = 0, now; done < count; done += now, to += now * stride) {
      now = together(start + done, count - done);
      if (now < AHEAD && done + AHEAD < count) fetch(row, head, start + done + AHEAD);
      if (packed) {
        unpack(at<uint8_t>(row, head, start + done), token_stride, tiers, num_tiers, width, now, to, stride);
        continue;
      }
      for (int s = 0; s < now; ++s) {
        if (narrow) copy(at<bfloat16>(row, head, start + done + s), to + s * stride);
        else copy(at<float>(row, head, start + done + s), to + s * stride);
      }
    }
  }

  template <typename From, typename T>
  void copy(const From *from, T *to) const {
    if constexpr (sizeof(From) == sizeof(T)) std::memcpy(to, from, width * sizeof(T));
    else
      for (int i = 0; i < width; i += LANES) put(Numbers<float>::wide(from + i, std::min<int>(LANES, width - i)), to + i, std::min<int>(LANES, width - i));
  }
};

// Stored heads: numbers of a head that lie in several places are side by side.
struct Side {
  const Stored *parts;
  int count, width, heads;
  bool as_they_lie;

  // rebuilt: heads are made of it, by products that take more tokens than there are.
  Side(const Stored *parts, int count, bool rebuilt) : parts(parts), count(count), width(0), heads(parts->heads) {
    for (int i = 0; i < count; ++i) width += parts[i].width;
    as_they_lie = count == 1 && !parts->packed && !rebuilt;
  }

  template <typename T>
  int stride() const {
    return apart<T>(pad(width, CODES) + CODES);
  }

  // Of so many tokens; what lies behind their numbers is multiplied by zeros, and so has to be a number.
  template <typename T>
  Room<T> room(int tokens) const {
    Room<T> made(size_t(tokens) * stride<T>());
    for (T *row = made.data(), *const end = row + made.size(); row < end; row += stride<T>())
      std::fill(row + width, row + stride<T>(), T(0.0f));
    return made;
  }

  // Rows of numbers, in `buffer` unless they can be used where they lie.
  template <typename T>
  Tokens<T> numbers(int64_t row, int64_t head, int64_t start, int tokens, Room<T> &buffer) const {
    if (as_they_lie && parts->narrow == (sizeof(T) == 2) && parts->together(start, tokens) == tokens && parts->aligned(sizeof(T)))
      return {parts->at<T>(row, head, start), parts->token_stride / int64_t(sizeof(T))};
    T *to = buffer.data();
    for (int i = 0; i < count; to += parts[i++].width) parts[i].read(row, head, start, tokens, to, stride<T>());
    return {buffer.data(), stride<T>(), pad(width, DEPTH)};
  }
};

}  // namespace
