// Packed rows of a cache -> numbers. The format is that of kvfold/plan/number_format.py; kvfold/plan/codecs has the obvious version.

#pragma once

#include <cmath>
#include <type_traits>
#ifdef __AVX512VBMI__
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

constexpr int CODES = 4 * LANES;  // that are unpacked at a time
constexpr int STEPS_PER_OCTAVE = 8, BIAS = 128;
constexpr int ROWS_AHEAD = 4096;  // bytes that are fetched before their turn
typedef uint64_t Words __attribute__((vector_size(CODES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// In steps that are one instruction each; compilers take larger ones apart.
inline Integers widened(Bytes x) { return __builtin_convertvector(__builtin_convertvector(x, Halves), Integers); }

inline Lanes number(Bytes x) { return __builtin_convertvector(widened(x), Lanes); }

struct Tier {
  int32_t numbers, bits;
};

struct Scales {
  float of[256];
  Scales() {
    for (int e = 0; e < 256; ++e) of[e] = std::exp2(float(e - BIAS) / STEPS_PER_OCTAVE);
  }
};
const Scales SCALES;

#ifdef __AVX512VBMI__
// Of every word 8 parts of PART bits, the first in its lowest bits -> a byte each.
template <int PART>
inline Words parts_of(__m512i words) {
  const __m512i places = _mm512_set1_epi64(0x0706050403020100 * PART);
  return (Words)_mm512_and_si512(_mm512_multishift_epi64_epi8(places, words), _mm512_set1_epi8((1 << PART) - 1));
}
#endif

// CODES parts of PART bits, the first in the lowest bits of a byte -> a byte each.
template <int PART>
inline Words plane(const uint8_t *from) {
  if constexpr (PART == 8) return load<Words>(from);
#ifdef __AVX512VBMI__
  if constexpr (PART == 4) return parts_of<4>(_mm512_cvtepu32_epi64(load<__m256i>(from)));
  if constexpr (PART == 2) return parts_of<2>(_mm512_cvtepu16_epi64(load<__m128i>(from)));
  if constexpr (PART == 1) return parts_of<1>(_mm512_cvtepu8_epi64(_mm_set1_epi64x(load<int64_t>(from))));
#endif
  if constexpr (PART == 4) {
    typedef uint32_t Source __attribute__((vector_size(CODES / 2)));
    Words x = __builtin_convertvector(load<Source>(from), Words);
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
  }
  if constexpr (PART == 2) {
    typedef uint16_t Source __attribute__((vector_size(CODES / 4)));
    typedef uint32_t Wider __attribute__((vector_size(CODES / 2)));
    const Wider wider = __builtin_convertvector(load<Source>(from), Wider);
    Words x = __builtin_convertvector(wider, Words);
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    return (x | x << 6) & 0x0303030303030303;
  }
  typedef uint8_t Source __attribute__((vector_size(CODES / 8)));
  typedef uint16_t Wide __attribute__((vector_size(CODES / 4)));
  typedef uint32_t Wider __attribute__((vector_size(CODES / 2)));
  const Wide wide = __builtin_convertvector(load<Source>(from), Wide);
  Words x = __builtin_convertvector(__builtin_convertvector(wide, Wider), Words);
  x = (x | x << 28) & 0x0000000f0000000f;
  x = (x | x << 14) & 0x0003000300030003;
  return (x | x << 7) & 0x0101010101010101;
}

// CODES codes of a tier, from `at` on. What lies behind the tier's bytes is not touched where `careful`.
template <int BITS, bool careful>
inline Words codes_at(const uint8_t *row, int numbers, int at) {
  Words codes = {};
  const auto add = [&](auto part) {
    constexpr int PART = decltype(part)::value;
    if constexpr ((BITS & PART) != 0) {
      const uint8_t *from = row + at / 8 * PART;
      const int bytes = (numbers * PART + 7) / 8;
      uint8_t copy[CODES];
      if (careful) from = (const uint8_t *)std::memcpy(copy, from, std::min(bytes - at / 8 * PART, CODES / 8 * PART));
      codes = (codes << PART) | plane<PART>(from);
      row += bytes;
    }
  };
  add(std::integral_constant<int, 8>());
  add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 2>());
  add(std::integral_constant<int, 1>());
  return codes;
}

template <typename T>
inline void store(Lanes x, T *to) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(to, &x, sizeof x);
  } else {  // to the nearest, ties to even
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    const Integers bits = (Integers)x;
    const Halves halves = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
  }
}

// The first `count` of some numbers.
template <typename T>
inline void put(Lanes x, T *to, int count = LANES) {
  if (count == LANES) return store(x, to);
  T some[LANES];
  store(x, some);
  std::memcpy(to, some, count * sizeof(T));
}

// What the codes of one token's tier mean: (code + 1/2 - 2^(BITS-1)) scale.
template <int BITS, typename T>
struct Meaning {
  static constexpr float OFFSET = 0.5f - (1 << (BITS - 1));
  float scale, lowest;

  explicit Meaning(float scale) : scale(scale), lowest(OFFSET * scale) {}

  void write(Words codes, T *to) const {
    Bytes bytes[CODES / LANES];
    std::memcpy(bytes, &codes, sizeof bytes);
    for (int i = 0; i < CODES / LANES; ++i)
      store(number(bytes[i]) * scale + lowest, to + i * LANES);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Words of 16 bits from the first and the last 32 codes.
inline __m512i first_half(Words codes) { return _mm512_cvtepu8_epi16(_mm512_castsi512_si256((__m512i)codes)); }
inline __m512i last_half(Words codes) { return _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64((__m512i)codes, 1)); }

inline __m512i narrow(Lanes low, Lanes high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// Seven and eight bits are converted: a table of what they can mean would cost more.
template <int BITS>
struct Converted {
  Meaning<BITS, float> meaning;

  explicit Converted(float scale) : meaning(scale) {}

  void write(Words codes, bfloat16 *to) const {
    const __m512i x = (__m512i)codes;
    const Lanes a = converted(_mm512_castsi512_si128(x)), b = converted(_mm512_extracti32x4_epi32(x, 1));
    const Lanes c = converted(_mm512_extracti32x4_epi32(x, 2)), d = converted(_mm512_extracti32x4_epi32(x, 3));
    _mm512_storeu_si512(to, narrow(a, b));
    _mm512_storeu_si512(to + CODES / 2, narrow(c, d));
  }

  Lanes converted(__m128i codes) const {
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)) * meaning.scale + meaning.lowest;
  }
};
template <> struct Meaning<8, bfloat16> : Converted<8> { using Converted::Converted; };
template <> struct Meaning<7, bfloat16> : Converted<7> { using Converted::Converted; };

// Up to 6 bits are looked up among the numbers that they can mean.
template <int BITS>
struct Table {
  static constexpr int PARTS = BITS <= 5 ? 1 : 1 << (BITS - 5);  // of 32 numbers
  __m512i of[PARTS];

  explicit Table(float scale) {
    const Lanes first = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < PARTS; ++i) {
      const Lanes low = first + (32 * i + Meaning<BITS, float>::OFFSET);
      of[i] = narrow(low * scale, (low + 16) * scale);
    }
  }

  __m512i look_up(__m512i codes) const {
    if constexpr (PARTS == 1) return _mm512_permutexvar_epi16(codes, of[0]);
    const __m512i low = _mm512_permutex2var_epi16(of[0], codes, of[1]);
    if constexpr (PARTS == 2) return low;
    const __m512i high = _mm512_permutex2var_epi16(of[PARTS - 2], codes, of[PARTS - 1]);
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)), low, high);
  }

  void write(Words codes, bfloat16 *to) const {
    _mm512_storeu_si512(to, look_up(first_half(codes)));
    _mm512_storeu_si512(to + CODES / 2, look_up(last_half(codes)));
  }
};
template <> struct Meaning<1, bfloat16> : Table<1> { using Table::Table; };
template <> struct Meaning<2, bfloat16> : Table<2> { using Table::Table; };
template <> struct Meaning<3, bfloat16> : Table<3> { using Table::Table; };
template <> struct Meaning<4, bfloat16> : Table<4> { using Table::Table; };
template <> struct Meaning<5, bfloat16> : Table<5> { using Table::Table; };
template <> struct Meaning<6, bfloat16> : Table<6> { using Table::Table; };
#endif

// The first `wanted` numbers of a tier of some tokens -> rows; up to CODES - 1 more are written behind each.
template <int BITS, typename T>
void unpack_tier(const uint8_t *codes, const uint8_t *exponents, int64_t row_stride, int numbers, int wanted, int tokens,
                 T *to, int64_t stride) {
  const int64_t free_to_overread = tokens - 1 - CODES / std::max<int64_t>(row_stride, 1);  // so many tokens, as others follow
  for (int s = 0; s < tokens; ++s, codes += row_stride, exponents += row_stride, to += stride) {
    __builtin_prefetch(codes + ROWS_AHEAD);
    __builtin_prefetch(codes + ROWS_AHEAD + 64);
    const Meaning<BITS, T> meaning(SCALES.of[*exponents]);
    int at = 0;
    for (; at + CODES <= wanted; at += CODES) meaning.write(codes_at<BITS, false>(codes, numbers, at), to + at);
    if (at == wanted) continue;
    const bool careless = s < free_to_overread;
    meaning.write(careless ? codes_at<BITS, false>(codes, numbers, at) : codes_at<BITS, true>(codes, numbers, at), to + at);
  }
}

// Float8 e4m3: sign, four bits of exponent (bias 7), three of fraction.
inline Lanes float8(Bytes x) {
  const Integers bits = widened(x);
  const Lanes normal = (Lanes)(((bits & 0x7f) << 20) + (120 << 23));
  const Lanes tiny = __builtin_convertvector(bits & 7, Lanes) * (1 / 512.0f);
  const Integers size = (bits & 0x78) ? (Integers)normal : (Integers)tiny;
  return (Lanes)(size | (bits & 0x80) << 24);
}

template <typename T>
void write_float8(Words codes, T *to) {
  Bytes bytes[CODES / LANES];
  std::memcpy(bytes, &codes, sizeof bytes);
  for (int i = 0; i < CODES / LANES; ++i) store(float8(bytes[i]), to + i * LANES);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct Float8Table : Table<7> {
  Float8Table() : Table<7>(0.0f) {
    uint8_t codes[128];
    for (int i = 0; i < 128; ++i) codes[i] = i;
    for (int i = 0; i < PARTS; ++i)
      of[i] = narrow(float8(load<Bytes>(codes + 32 * i)), float8(load<Bytes>(codes + 32 * i + LANES)));
  }

  __m512i number(__m512i x) const {
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(look_up(_mm512_and_si512(x, _mm512_set1_epi16(0x7f))), sign);
  }
};
const Float8Table FLOAT8;

template <>
inline void write_float8(Words codes, bfloat16 *to) {
  _mm512_storeu_si512(to, FLOAT8.number(first_half(codes)));
  _mm512_storeu_si512(to + CODES / 2, FLOAT8.number(last_half(codes)));
}
#endif

template <typename T>
void unpack_float8(const uint8_t *row, int64_t row_stride, int numbers, int tokens, T *to, int64_t stride) {
  for (int s = 0; s < tokens; ++s, row += row_stride, to += stride) {
    __builtin_prefetch(row + ROWS_AHEAD);
    __builtin_prefetch(row + ROWS_AHEAD + 64);
    for (int at = 0; at < numbers; at += CODES) write_float8(load<Words>(row + at, std::min(numbers - at, CODES)), to + at);
  }
}

// Tokens of one head -> rows of `stride` numbers, CODES - 1 more than the width at least: the first `width`. No tiers: float8.
template <typename T>
void unpack(const uint8_t *rows, int64_t row_stride, const Tier *tiers, int num_tiers, int width, int tokens, T *to,
            int64_t stride) {
  typedef void (*Unpack)(const uint8_t *, const uint8_t *, int64_t, int, int, int, T *, int64_t);
  static constexpr Unpack by_bits[] = {nullptr, unpack_tier<1, T>, unpack_tier<2, T>, unpack_tier<3, T>, unpack_tier<4, T>,
                                       unpack_tier<5, T>, unpack_tier<6, T>, unpack_tier<7, T>, unpack_tier<8, T>};
  if (!num_tiers) unpack_float8(rows, row_stride, width, tokens, to, stride);
  const uint8_t *codes = rows + num_tiers;
  for (int i = 0; i < num_tiers && width > 0; ++i) {
    const Tier tier = tiers[i];
    by_bits[tier.bits](codes, rows + i, row_stride, tier.numbers, std::min(tier.numbers, width), tokens, to, stride);
    width -= tier.numbers;
    for (int part = 8; part; part /= 2)
      if (tier.bits & part) codes += (tier.numbers * part + 7) / 8;
    to += tier.numbers;
  }
}

}  // namespace
