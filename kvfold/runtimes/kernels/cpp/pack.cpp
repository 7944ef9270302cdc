// Numbers -> packed rows of a cache, as kvfold/plan/codecs/exponent.py does it in torch's operations: of a few scales per token and tier
// the one with the least squared error. Plain C entry, no torch.

#include <limits>
#include <vector>

#include "lanes.h"
#include "pages.h"
#include "unpack.h"

namespace {

// The largest whole number that is not larger, for |x| < 2^31.
inline Lanes floor_of(Lanes x) {
  const Lanes cut = __builtin_convertvector(__builtin_convertvector(x, Integers), Lanes);
  return cut > x ? cut - 1.0f : cut;
}

// Codes of b bits around zero, of numbers in units of a scale: half is 2^(b-1).
inline Lanes codes_of(Lanes code, float half) {
  const Lanes low = Lanes{} - half, high = Lanes{} + half;
  code = code > low ? code : low;
  code = code < high ? code : high;
  code = floor_of(code);
  return code < high - 1.0f ? code : high - 1.0f;
}

// (Numbers are multiplied by how many there are of a scale's unit, since dividing takes several times as long: where that gives another
// code the number lies halfway between two, to a rounding.)
float squared_error(const float *x, int numbers, float scale, float half) {
  const float per_unit = 1 / scale;
  Lanes sum = {};
  int i = 0;
  for (; i + LANES <= numbers; i += LANES) {
    const Lanes part = load<Lanes>(x + i), lost = (codes_of(part * per_unit, half) + 0.5f) * scale - part;
    sum += lost * lost;
  }
  float total = sum_of(sum);
  for (; i < numbers; ++i) {
    const float lost = (codes_of(Lanes{} + x[i] * per_unit, half)[0] + 0.5f) * scale - x[i];
    total += lost * lost;
  }
  return total;
}

float largest_of(const float *x, int numbers) {
  Lanes most = {};
  for (int i = 0, now; i < numbers; i += now) {
    now = std::min(LANES, numbers - i);
    const Lanes part = (Lanes)((Integers)load<Lanes>(x + i, now) & 0x7fffffff);
    most = part > most ? part : most;
  }
  float largest = std::numeric_limits<float>::min();
  for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
  return largest;
}

int best_exponent(const float *x, int numbers, float half, int tried) {
  const float largest = largest_of(x, numbers);
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
    const Lanes code = codes_of(load<Lanes>(x + i, count) / SCALES.of[best + BIAS], half) + half;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(code, Integers), Halves), Bytes);
    std::memcpy(codes + i, &bytes, count);
  }
  int shift = tier.bits;
  if (tier.bits & 8) to = pack_plane<8>(codes, tier.numbers, shift -= 8, to);
  if (tier.bits & 4) to = pack_plane<4>(codes, tier.numbers, shift -= 4, to);
  if (tier.bits & 2) to = pack_plane<2>(codes, tier.numbers, shift -= 2, to);
  if (tier.bits & 1) to = pack_plane<1>(codes, tier.numbers, shift -= 1, to);
  return to;
}

// How numbers become a row of bytes; tried: scales per tier.
struct Packing {
  const Tier *tiers;
  const int32_t *tried;
  int64_t num_tiers, width, row_bytes;

  void pack(const float *numbers, uint8_t *row, uint8_t *codes) const {
    uint8_t *next = row + num_tiers;
    for (int i = 0; i < num_tiers; numbers += tiers[i++].numbers)
      next = pack_tier(numbers, tiers[i], tried[i], row + i, next, codes);
  }
};

// What is known of a token already: the first `numbers` of rows [heads, tokens, stride].
struct Known {
  const void *rows;
  int64_t stride, numbers;
};

// Numbers x [heads, tokens, width] by strides of numbers that go into pages, to slots [tokens]: page * tokens + place, negative ones are
// left out. ways [known numbers, width]: what they say of x, which is taken off it. stored [heads, tokens, width]: as they are then
// read, or null.
struct Storing {
  const Packing *form;
  const Pages *pages;
  const int64_t *slots;
  const void *x;
  int64_t head_stride, token_stride;
  const Known *known;
  int64_t places;
  const float *ways;
  void *stored;
};

// What one thread needs.
template <typename T>
struct Storer {
  std::vector<uint8_t> codes, row;
  std::vector<float> numbers;
  std::vector<T> read;

  void store(const Storing &to, int64_t head, int64_t token, int64_t tokens) {
    const Packing &form = *to.form;
    make_room(form);
    const T *from = (const T *)to.x + head * to.head_stride + token * to.token_stride;
    for (int r = 0; r < form.width; r += LANES) {
      const Lanes wide = Numbers<float>::wide(from + r, std::min<int>(LANES, form.width - r));
      std::memcpy(numbers.data() + r, &wide, sizeof wide);
    }
    take_off(to, head * tokens + token);
    form.pack(numbers.data(), row.data(), codes.data());
    const int64_t slot = to.slots[token], page_tokens = to.pages->tokens;
    if (slot >= 0) std::memcpy(to.pages->at(slot / page_tokens, head, slot % page_tokens), row.data(), form.row_bytes);
    if (!to.stored) return;
    unpack(row.data(), form.row_bytes, form.tiers, form.num_tiers, form.width, 1, read.data(), read.size());
    std::memcpy((T *)to.stored + (head * tokens + token) * form.width, read.data(), form.width * sizeof(T));
  }

  // What is known of the `at`-th row.
  void take_off(const Storing &to, int64_t at) {
    const float *way = to.ways;
    for (int i = 0; i < to.places; ++i) {
      const T *row = (const T *)to.known[i].rows + at * to.known[i].stride;
      for (int n = 0; n < to.known[i].numbers; ++n, way += to.form->width) add_scaled(-Numbers<float>::wide(row + n, 1)[0], way, numbers.data(), to.form->width);
    }
  }

  void make_room(const Packing &form) {
    if (int64_t(codes.size()) < form.width) codes.resize(form.width), numbers.resize(form.width + LANES);
    if (int64_t(row.size()) < form.row_bytes + CODES) row.resize(form.row_bytes + CODES);
    if (int(read.size()) < pad(form.width, CODES) + CODES) read.resize(pad(form.width, CODES) + CODES);
  }
};

// The same tokens of several storages.
template <typename T>
void store(const Storing *parts, int count, int64_t tokens, int threads) {
  int64_t heads = 0, numbers = 0;
  for (int i = 0; i < count; ++i) heads += parts[i].pages->heads, numbers += parts[i].pages->heads * tokens * parts[i].form->width;
  threads = std::clamp<int64_t>(numbers / 512, 1, threads);  // few numbers are not worth waking others
#pragma omp parallel num_threads(threads)
  {
    Storer<T> storer;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * tokens; ++i) {
      int64_t head = i / tokens;
      const Storing *to = parts;
      for (; head >= to->pages->heads; ++to) head -= to->pages->heads;
      storer.store(*to, head, i % tokens, tokens);
    }
  }
}

}  // namespace

// x [rows, width] -> out [rows, bytes of a row].
extern "C" void kvfold_pack(const Packing *form, const float *x, int64_t rows, uint8_t *out, int threads) {
  threads = std::clamp<int64_t>(rows * form->width / 4096, 1, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(form->width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) form->pack(x + row * form->width, out + row * form->row_bytes, codes.data());
  }
}

// Numbers in bfloat16 or float32, x and `stored` alike.
extern "C" void kvfold_store(int is_bfloat16, const Storing *parts, int count, int64_t tokens, int threads) {
  if (is_bfloat16) store<bfloat16>(parts, count, tokens, threads);
  else store<float>(parts, count, tokens, threads);
}
