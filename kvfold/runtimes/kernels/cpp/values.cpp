// Plain C entry of averaging.h, no torch.

#include "averaging.h"

extern "C" void kvfold_values(int is_bfloat16, const Values *v, const Part *parts, int count, void *out) {
  const auto work = averaging(is_bfloat16, *v, parts, count, out);
  share_out({{work.get()}}, v->threads, v->map && is_bfloat16 && in_tiles<bfloat16>());
}
