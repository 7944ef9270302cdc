// Vectors of a few numbers: how stored numbers of a type meet queries and weights, sums over lanes, the exponential.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // as many as the processor takes at once: compilers take longer vectors apart, through memory
#endif
constexpr int REGISTERS = LANES == 8 ? 16 : 32;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {  // to the nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &x, 4);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};

// Numbers, up to `end` from where others end, that the first `rows` queries meet.
struct Met {
  int end, rows;
};

template <typename V, typename T>
V load(const T *from, int count = sizeof(V) / sizeof(T)) {
  V out = {};
  if (count == sizeof(V) / sizeof(T)) std::memcpy(&out, from, sizeof out);
  else std::memcpy(&out, from, count * sizeof(T));
  return out;
}

// Sums from memory and back, vector by vector: of sums that are copied at once compilers keep those in memory true in every step
// of a loop (g++ 12), which takes as long as their products.
template <int COUNT>
void sums_from(Lanes (&sums)[COUNT], const float *from) {
  for (int i = 0; i < COUNT; ++i) sums[i] = load<Lanes>(from + i * LANES);
}

template <int COUNT>
void sums_to(const Lanes (&sums)[COUNT], float *to) {
  for (int i = 0; i < COUNT; ++i) std::memcpy(to + i * LANES, &sums[i], sizeof sums[i]);
}

// What numbers are multiplied as, where they are made ready first: turning pairs into floats costs more than multiplying.
#ifdef __AVX512BF16__
template <typename T>
using Product = T;
#else
template <typename T>
using Product = float;
#endif

// Keeps what several instructions take in a register; compilers would load it again for each.
template <typename V>
inline V in_register(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// How numbers of a type meet queries and weights: STEP of them at a time, weights of PAIR tokens at a time.
template <typename T>
struct Numbers {
  using Query = float;
  using Operand = Lanes;
  static constexpr int STEP = LANES, PAIR = 1;

  static Lanes wide(const float *x, int count) { return load<Lanes>(x, count); }
  static Lanes wide(const bfloat16 *x, int count) {
    return (Lanes)(__builtin_convertvector(load<Halves>(x, count), Integers) << 16);
  }
  static Operand stored(const T *x, int count = STEP) { return wide(x, count); }
  static Operand query(const Query *x) { return load<Lanes>(x); }
  static void multiply(Lanes &sum, Operand a, Operand b) { sum += a * b; }

  // Columns of a token, ready to be weighed.
  static void columns(const T *token, const T *, int count, Lanes *out) { out[0] = wide(token, count); }
  static void weigh(Lanes &sum, const Query *weight, Lanes x) { sum += weight[0] * x; }
};

#ifdef __AVX512BF16__
template <>
struct Numbers<bfloat16> {
  using Query = bfloat16;
  using Operand = __m512bh;
  static constexpr int STEP = 2 * LANES, PAIR = 2;
  typedef uint16_t Shorts __attribute__((vector_size(64)));

  static Operand stored(const bfloat16 *x, int count = STEP) { return load<Operand>(x, count); }
  static Operand query(const Query *x) { return load<Operand>(x); }
  static void multiply(Lanes &sum, Operand a, Operand b) { sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, a, b); }

  // Numbers of two tokens side by side, as the product of pairs wants them.
  static void columns(const bfloat16 *token, const bfloat16 *next, int count, Lanes *out) {
    const Shorts a = load<Shorts>(token, count), b = load<Shorts>(next, count);
    out[0] = (Lanes)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10,
                                            42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    out[1] = (Lanes)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                            57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  }
  static void weigh(Lanes &sum, const Query *weight, Lanes x) {
    int32_t pair;
    std::memcpy(&pair, weight, 4);
    sum = (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)x);
  }
};
#endif

// By functions of their own, since what is written might be a bound that an object has: compilers take no such loop by vectors.
inline void scale_by(float factor, float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

inline void add_scaled(float factor, const float *x, float *to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * x[i];
}

// e^x for x <= 0, to 2e-7.
inline Lanes exp_of(Lanes x) {
  const Lanes low = Lanes{} - 87.0f;
  x = x > low ? x : low;
  const Integers power = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  const Lanes n = __builtin_convertvector(power, Lanes), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return (y * r * r + r + 1.0f) * (Lanes)((power + 127) << 23);
}

// (1 - e^-2|x|) / (1 + e^-2|x|), with the sign of x.
inline Lanes tanh_of(Lanes x) {
  const Integers sign = (Integers)x & (int32_t)0x80000000;
  const Lanes e = exp_of(-2.0f * (Lanes)((Integers)x & 0x7fffffff)), y = (1.0f - e) / (1.0f + e);
  return (Lanes)((Integers)y | sign);
}

// Scores as a softmax takes them that has a cap, 0 for none; up to whole vectors of them.
inline void cap(float *scores, int64_t count, float softcap) {
  for (int64_t i = 0; softcap > 0 && i < count; i += LANES) {
    const Lanes x = tanh_of(load<Lanes>(scores + i) / softcap) * softcap;
    std::memcpy(scores + i, &x, sizeof x);
  }
}

inline float sum_of(Lanes x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

// Of two vectors the lanes whose number lacks the bit D, and those that have it: of `b` where the place has the bit.
template <int D, int... L>
inline void parted(Lanes &a, Lanes &b, std::integer_sequence<int, L...>) {
  const Lanes low = __builtin_shufflevector(a, b, (L & D ? LANES + L - D : L)...);
  b = __builtin_shufflevector(a, b, (L & D ? LANES + L : L + D)...);
  a = low;
}

// Of as many vectors as lanes: lane i of vector j becomes lane j of vector i.
template <int D = LANES / 2>
inline void transpose(Lanes *x) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & D)) parted<D>(x[i], x[i + D], std::make_integer_sequence<int, LANES>());
  if constexpr (D > 1) transpose<D / 2>(x);
}

// The sums of as many vectors.
template <int D = LANES / 2>
inline Lanes sums_of(Lanes *x) {
  for (int i = 0; i < D; ++i) {
    parted<D>(x[i], x[i + D], std::make_integer_sequence<int, LANES>());
    x[i] += x[i + D];
  }
  if constexpr (D > 1) return sums_of<D / 2>(x);
  else return x[0];
}

inline int pad(int width, int step) { return (width + step - 1) / step * step; }

// Numbers from row to row, at least so many: an odd number of cache lines, so that rows do not push each other out of the
// nearest cache.
template <typename T>
int apart(int numbers) {
  constexpr int LINE = 64 / sizeof(T);
  const int lines = pad(numbers, LINE) / LINE;
  return (lines + 1 - lines % 2) * LINE;
}

// Memory that is written before it is read, so that nobody fills it with zeros first.
template <typename T>
struct Unset : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Unset<U>;
  };
  template <typename U>
  void construct(U *) {}
};
template <typename T>
using Room = std::vector<T, Unset<T>>;

}  // namespace
