// What threads share out among themselves.

#pragma once

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace {

// Pieces that do not wait for each other.
struct Work {
  virtual ~Work() = default;
  virtual int64_t pieces() const = 0;
  virtual void piece(int64_t i) = 0;
};

using Stage = std::vector<Work *>;

// All pieces of a stage, in this order, before those of the next.
inline void share_out(const std::vector<Stage> &stages, int threads, bool in_tiles) {
#pragma omp parallel num_threads(threads)
  {
    const Tiles tiles(in_tiles);
    for (const Stage &stage : stages) {
      int64_t pieces = 0;
      for (const Work *work : stage) pieces += work->pieces();
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces; ++i) {
        int64_t at = i;
        auto work = stage.begin();
        for (; at >= (*work)->pieces(); ++work) at -= (*work)->pieces();
        (*work)->piece(at);
      }
    }
  }
}

}  // namespace
