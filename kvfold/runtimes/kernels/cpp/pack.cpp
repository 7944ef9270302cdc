// Numbers -> packed rows of a cache, as kvfold/plan/codecs/exponent.py does it in torch's operations: of a few scales per token and tier
// the one with the least squared error. Plain C entry, no torch.

#include <limits>
#include <vector>

#include "lanes.h"
#include "unpack.h"

namespace {

// The largest whole number that is not larger, for |x| < 2^31.
inline Lanes floor_of(Lanes x) {
  const Lanes cut = __builtin_convertvector(__builtin_convertvector(x, Integers), Lanes);
  return cut > x ? cut - 1.0f : cut;
}

// Codes of b bits around zero: half is 2^(b-1).
inline Lanes codes_of(Lanes x, float scale, float half) {
  const Lanes low = Lanes{} - half, high = Lanes{} + half;
  Lanes code = x / scale;
  code = code > low ? code : low;
  code = code < high ? code : high;
  code = floor_of(code);
  return code < high - 1.0f ? code : high - 1.0f;
}

float squared_error(const float *x, int numbers, float scale, float half) {
  Lanes sum = {};
  int i = 0;
  for (; i + LANES <= numbers; i += LANES) {
    const Lanes part = load<Lanes>(x + i), lost = (codes_of(part, scale, half) + 0.5f) * scale - part;
    sum += lost * lost;
  }
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
  for (; i < numbers; ++i) {
    const float lost = (codes_of(Lanes{} + x[i], scale, half)[0] + 0.5f) * scale - x[i];
    total += lost * lost;
  }
  return total;
}

int best_exponent(const float *x, int numbers, float half, int tried) {
  float largest = std::numeric_limits<float>::min();
  for (int i = 0; i < numbers; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float highest = std::ceil(std::log2(largest / (half - 0.5f)) * STEPS_PER_OCTAVE);
  const int first = highest > -BIAS ? std::min(highest, BIAS - 1.0f) : -BIAS;  // of no number, too
  int best = first;
  float least = std::numeric_limits<float>::infinity();
  for (int exponent = first; exponent > first - tried && exponent >= -BIAS; --exponent) {
    const float error = squared_error(x, numbers, SCALES.of[exponent + BIAS], half);
    if (error < least) least = error, best = exponent;
  }
  return best;
}

// Neighbouring parts of a byte, the first in its lowest bits; 8 codes fill PART bytes.
template <int PART>
uint8_t *pack_plane(const uint8_t *codes, int numbers, int shift, uint8_t *to) {
  for (int i = 0; i < numbers; i += 8) {
    uint64_t word = 0;
    for (int j = 0; j < 8 && i + j < numbers; ++j)
      word |= uint64_t(codes[i + j] >> shift & ((1 << PART) - 1)) << PART * j;
    const int bytes = std::min(PART, (numbers * PART + 7) / 8 - i / 8 * PART);
    for (int j = 0; j < bytes; ++j) *to++ = word >> 8 * j;
  }
  return to;
}

// Returns what follows the codes.
uint8_t *pack_tier(const float *x, Tier tier, int tried, uint8_t *exponent, uint8_t *to, uint8_t *codes) {
  const float half = 1 << (tier.bits - 1);
  const int best = best_exponent(x, tier.numbers, half, tried);
  *exponent = best + BIAS;
  for (int i = 0; i < tier.numbers; i += LANES) {
    const int count = std::min(LANES, tier.numbers - i);
    const Lanes code = codes_of(load<Lanes>(x + i, count), SCALES.of[best + BIAS], half) + half;
    for (int lane = 0; lane < count; ++lane) codes[i + lane] = code[lane];
  }
  int shift = tier.bits;
  if (tier.bits & 8) to = pack_plane<8>(codes, tier.numbers, shift -= 8, to);
  if (tier.bits & 4) to = pack_plane<4>(codes, tier.numbers, shift -= 4, to);
  if (tier.bits & 2) to = pack_plane<2>(codes, tier.numbers, shift -= 2, to);
  if (tier.bits & 1) to = pack_plane<1>(codes, tier.numbers, shift -= 1, to);
  return to;
}

}  // namespace

// x [rows, width] -> out [rows, bytes of a row]; tried: scales per tier.
extern "C" void kvfold_pack(const float *x, int64_t rows, int width, int num_tiers, const Tier *tiers, const int32_t *tried,
                            uint8_t *out, int row_bytes, int threads) {
  threads = std::clamp<int64_t>(rows * width / 4096, 1, threads);  // few numbers are not worth waking others
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float *numbers = x + row * width;
      uint8_t *exponents = out + row * row_bytes, *next = exponents + num_tiers;
      for (int i = 0; i < num_tiers; numbers += tiers[i++].numbers)
        next = pack_tier(numbers, tiers[i], tried[i], exponents + i, next, codes.data());
    }
  }
}
