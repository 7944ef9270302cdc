// Attention of one layer over parts of its tokens, each in a form of its own, by one call: a step's time is short beside what
// calls from outside take. Plain C entry, no torch.

#include <vector>

#include "parts.h"
#include "rebuild.h"
#include "stored.h"

extern "C" void kvfold_decode(int is_bfloat16, const Queries *q, const Stored *keys, int parts, const Stored *values,
                              const Rebuild *map, float *out, float *log_sums);
extern "C" void kvfold_values(int is_bfloat16, const Values *v, const Part *parts, int count, void *out);

namespace {

// As kvfold_decode takes it. width: of its averages; column: as Part has it.
struct Form {
  Queries queries;
  const Stored *keys, *values;
  const Rebuild *map;
  int64_t places, width, column;
};

}  // namespace

// As kvfold_decode for every form, and kvfold_values over all of them.
extern "C" void kvfold_layer(int is_bfloat16, const Form *forms, int count, const Values *v, void *out) {
  static thread_local std::vector<float> numbers;
  int64_t size = 0;
  for (int i = 0; i < count; ++i) size += forms[i].queries.batch * forms[i].queries.rows * (forms[i].width + 1);
  if (int64_t(numbers.size()) < size) numbers.resize(size);
  std::vector<Part> parts;
  float *next = numbers.data();
  for (int i = 0; i < count; ++i) {
    const Form &form = forms[i];
    const int64_t rows = form.queries.batch * form.queries.rows;
    parts.push_back({next, next + rows * form.width, form.width, form.column});
    kvfold_decode(is_bfloat16, &form.queries, form.keys, form.places, form.values, form.map, next, next + rows * form.width);
    next += rows * (form.width + 1);
  }
  kvfold_values(is_bfloat16, v, parts.data(), count, out);
}
