#pragma once

#include "csp/score.h"
#include "isa.h"
#include "tasks.h"

namespace csp {

constexpr int64_t kScoreRows = 16;   // query rows of a tile
constexpr int64_t kScoreBlock = 96;  // keys between two looks at the running maximum

// How score_cpu cuts its work: a task is `chunk_rows` query rows of one KV head. By the shape alone.
struct ScorePlan {
  int64_t group = 0;        // query heads of a KV head
  int64_t chunk_rows = 0;   // a multiple of kScoreRows
  int64_t chunks = 0;       // of a KV head
  int64_t tasks = 0;        // B * Hkv * chunks
  int64_t partials = 0;     // tasks that add up to one output row; 1: they write it themselves
  int64_t padded_keys = 0;  // L in whole blocks
  double mean = 0;          // 1 / (query heads of an output row)
  bool bf16_dot = false;    // bfloat16 pairs go to the CPU's own dot product
};

// One worker's scratch, cut into its pieces.
struct ScoreScratch {
  int32_t* order = nullptr;    // [O] observing queries, sorted by modality
  int8_t* modality = nullptr;  // [padded L] the keys', -1 past the end
  int8_t* real = nullptr;      // [blocks] keys of each block that are no padding
  void* query = nullptr;       // [D, 16] the tile's queries; bf16_dot: [D / 2, 16, 2]
  void* keys = nullptr;        // [12, D] keys converted to float32 or copied together
  float* tops = nullptr;       // [blocks, 16] maximum of each block
  float* sums = nullptr;       // [blocks, 16] sum of each block, relative to its maximum
  void* tile = nullptr;        // [padded L, 16] exponentials; [L] doubles in float64
};

}  // namespace csp

// One task. `self` and `cross` [L] are the output row itself or the task's partial sums.
CSP_DECLARE_KERNEL(void, score_chunk,
                   (const ScoreParams& params, const ScorePlan& plan, int64_t task,
                    const ScoreScratch& scratch, void* self, void* cross))

// Keys [begin, end) of an output row: the sum of its partials [partials, 2, L], first to last.
CSP_DECLARE_KERNEL(void, score_reduce,
                   (const ScoreParams& params, const ScorePlan& plan, int64_t row, const void* partials,
                    int64_t begin, int64_t end))
