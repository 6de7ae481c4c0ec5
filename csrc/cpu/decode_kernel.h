#pragma once

#include "csp/decode.h"
#include "isa.h"

namespace csp {

// How decode cuts a problem: by its shape alone, so that no result depends on the number of threads.
struct DecodePlan {
  int64_t rows = 0;     // query rows that share a KV head: Hq / Hkv * Q, heads outermost
  int64_t width = 0;    // elements of a query or accumulator row in the workspace: head_dim in whole vectors
  int64_t split = 0;    // slots of one task, counted from the row's start
  int64_t splits = 0;   // tasks of one (batch, KV head)
  int64_t partial = 0;  // elements of one task's result: max [rows], sum [rows], acc [rows, width]
  int64_t scratch = 0;  // elements of one worker's scratch
};

// Slots whose logits one pass keeps: the keys and the values of a tile pass through the cache one by one.
constexpr int64_t kDecodeTile = 64;

// The visible slots of a row [start, end), clamped to the cache.
struct DecodeRange {
  int64_t begin = 0;
  int64_t end = 0;
};

}  // namespace csp

// One split of one (batch, KV head): task = (batch * Hkv + head) * splits + split.
CSP_DECLARE_KERNEL(void, decode_split,
                   (const DecodeParams& params, const DecodePlan& plan, int64_t task,
                    const DecodeRange& range, void* partial, void* scratch))

// The splits of one (batch, KV head), head = batch * Hkv + kv head, merged into out and lse; overwrites
// `partials`.
CSP_DECLARE_KERNEL(void, decode_merge,
                   (const DecodeParams& params, const DecodePlan& plan, int64_t head, void* partials))
