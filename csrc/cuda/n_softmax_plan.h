#pragma once

#include "csp/n_softmax.h"
#include "launch.h"

// How n_softmax_cuda cuts its problem.
namespace csp {

// A team of threads holds a row in its registers, `values` in each, so that it is read once; a block has
// threads / team rows. A multiprocessor has `blocks` blocks, each with all of its reads on the way at once.
struct NSoftmaxTier {
  int team;
  int threads;
  int values;
  int blocks;
};
constexpr NSoftmaxTier kNSoftmaxTiers[] = {
    {32, 256, 8, 4}, {32, 256, 32, 4}, {256, 256, 16, 4}, {256, 256, 32, 4}, {512, 512, 32, 2}};
constexpr int kNSoftmaxTierCount = sizeof(kNSoftmaxTiers) / sizeof(NSoftmaxTier);

// Longer rows are read twice, each by a block of this many threads.
constexpr int kNSoftmaxLongThreads = 512;

struct NSoftmaxCut {
  int tier = 0;         // kNSoftmaxTierCount: read twice
  bool vectors = true;  // 16-byte accesses; without them a row is read twice
  int lead = 0;         // elements from a 16-byte boundary to the first logit
  int64_t blocks = 0;   // a block may have several of the rows that are read twice
};

NSoftmaxCut n_softmax_cut(const NSoftmaxParams& params, const CudaDevice& device);

}  // namespace csp
