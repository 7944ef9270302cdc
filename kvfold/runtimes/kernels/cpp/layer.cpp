// Attention of one layer over parts of its tokens, each in a form of its own, by one call: a step's time is short beside what
// calls from outside take, and beside what threads take to begin and to end. Plain C entry, no torch.

#include "averaging.h"
#include "decoding.h"

namespace {

// As kvfold_decode takes it. width: of its averages; heads, column: as Part has them.
struct Asked {
  Queries queries;
  const Stored *keys, *values;
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

}  // namespace

// As kvfold_decode for every form, and kvfold_values over all of them.
extern "C" void kvfold_layer(int is_bfloat16, const Asked *forms, int count, const Values *v, void *out) {
  std::vector<std::unique_ptr<Answer>> answers;
  std::vector<Part> parts;
  std::vector<Stage> stages(3);
  for (int i = 0; i < count; ++i) {
    answers.push_back(std::make_unique<Answer>(is_bfloat16, forms[i]));
    Answer &made = *answers.back();
    const Asked &asked = forms[i];
    parts.push_back({made.numbers.data(), made.numbers.data() + made.rows * asked.width, asked.heads,
                     asked.queries.rows / asked.queries.steps, asked.width, asked.column});
    stages[0].push_back(made.stages.tasks.get());
    stages[1].push_back(made.stages.merging);
  }
  const auto led_back = averaging(is_bfloat16, *v, parts.data(), count, out);
  stages[2].push_back(led_back.get());
  share_out(stages, v->threads, is_bfloat16 && in_tiles<bfloat16>());
}
