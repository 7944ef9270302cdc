// Attention of one layer over parts of its tokens, each in a form of its own, by one call: a step's time is short beside what
// calls from outside take, and beside what threads take to begin and to end. Plain C entry, no torch.

#include "averaging.h"
#include "decoding.h"

namespace {

// As kvfold_decode takes it. given: queries [batch, heads, steps, R] by strides of numbers, in bfloat16 where they are `narrow`,
// instead of those that queries have, or null; table, by rows of `table_stride`: of the pages of all places, which have it from
// here, or null; width: of its averages; heads, column: as Part has them.
struct Asked {
  Queries queries;
  const void *given;
  int64_t narrow, batch_stride, head_stride, step_stride;
  const int32_t *table;
  int64_t table_stride;
  Stored *keys, *values;
  const Rebuild *map;
  const int32_t *heads;
  int64_t places, width, column;
};

// Numbers that are made of one form, and how.
struct Answer {
  const Side keys, values;
  const int64_t rows;
  Room<float> numbers;
  const Stages stages;

  Answer(bool is_bfloat16, const Asked &asked)
      : keys(asked.keys, asked.places, asked.map), values(asked.values ? asked.values : asked.keys, 1, false),
        rows(asked.queries.batch * asked.queries.rows), numbers(rows * (asked.width + 1)),
        stages(is_bfloat16, asked.queries, keys, asked.values ? &values : nullptr, asked.map, numbers.data(),
               numbers.data() + rows * asked.width) {}
};

void put_table(const Asked &asked, Stored *places, int64_t count) {
  for (int64_t i = 0; places && asked.table && i < count; ++i) places[i].table = asked.table, places[i].table_stride = asked.table_stride;
}

int query_width(const Asked &asked) {
  int width = 0;
  for (int64_t i = 0; i < asked.places; ++i) width += asked.keys[i].width;
  return asked.map ? asked.map->head_dim : width;
}

bool same_queries(const Asked &a, const Asked &b) {
  const bool alike = a.narrow == b.narrow && a.queries.rows == b.queries.rows && query_width(a) == query_width(b);
  return alike && a.given == b.given && a.batch_stride == b.batch_stride && a.head_stride == b.head_stride && a.step_stride == b.step_stride;
}

// Rows of the queries that are given, in float32.
template <typename T>
Room<float> rows_of(const Asked &asked) {
  const int width = query_width(asked);
  const int64_t steps = asked.queries.steps, heads = asked.queries.rows / steps;
  Room<float> rows(asked.queries.batch * asked.queries.rows * width);
  for (int64_t row = 0; row < asked.queries.batch * asked.queries.rows; ++row) {
    const T *from = (const T *)asked.given + row / (heads * steps) * asked.batch_stride + row / steps % heads * asked.head_stride +
                    row % steps * asked.step_stride;
    for (int r = 0; r < width; r += LANES) {
      const int now = std::min(LANES, width - r);
      put(Numbers<float>::wide(from + r, now), rows.data() + row * width + r, now);
    }
  }
  return rows;
}

}  // namespace

// As kvfold_decode for every form, and kvfold_values over all of them.
extern "C" void kvfold_layer(int is_bfloat16, Asked *forms, int count, const Values *v, void *out) {
  std::vector<std::unique_ptr<Answer>> answers;
  std::vector<Part> parts;
  std::vector<Stage> stages(3);
  std::vector<Room<float>> rows(count);
  for (int i = 0; i < count; ++i) {
    put_table(forms[i], forms[i].keys, forms[i].places);
    put_table(forms[i], forms[i].values, 1);
    if (i && forms[i].given && same_queries(forms[i], forms[i - 1])) forms[i].queries.data = forms[i - 1].queries.data;
    else if (forms[i].given) {
      rows[i] = forms[i].narrow ? rows_of<bfloat16>(forms[i]) : rows_of<float>(forms[i]);
      forms[i].queries.data = rows[i].data();
    }
    answers.push_back(std::make_unique<Answer>(is_bfloat16, forms[i]));
    Answer &made = *answers.back();
    const Asked &asked = forms[i];
    parts.push_back({made.numbers.data(), made.numbers.data() + made.rows * asked.width, asked.heads,
                     asked.queries.rows / asked.queries.steps, asked.width, asked.column});
    stages[0].insert(stages[0].begin(), made.stages.tasks.get());  // the last form's tokens take longest
    stages[1].push_back(made.stages.merging);
  }
  const auto led_back = averaging(is_bfloat16, *v, parts.data(), count, out);
  stages[2].push_back(led_back.get());
  share_out(stages, v->threads, is_bfloat16 && in_tiles<bfloat16>());
}
