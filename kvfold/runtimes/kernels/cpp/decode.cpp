// Attention over tokens of one form. Plain C entry, no torch.

#include "decoding.h"

// As `Stages` has it, of numbers that lie in `places` side by side.
extern "C" void kvfold_decode(int is_bfloat16, const Queries *q, const Stored *keys, int places, const Stored *values,
                              const Rebuild *map, float *out, float *log_sums) {
  const Side k(keys, places, map), v(values ? values : keys, 1, false);
  const Stages stages(is_bfloat16, *q, k, values ? &v : nullptr, map, out, log_sums);
  share_out({{stages.tasks.get()}, {stages.merging}}, q->threads, is_bfloat16 && in_tiles<bfloat16>());
}
