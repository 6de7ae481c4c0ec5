#pragma once

#include "csp/compact.h"

namespace csp {

// compact within the caches: key_out is key and value_out is value, laid out by key_stride and value_stride.
// Slots 0 to T - 1 of a head become what compact would write, the others stay as they are. T <= L, no two
// elements share memory, and along T the indices that are not free ascend.
//
// That order is what makes it possible. Let slot t take row p(t). If t < p(t) the row moves left, and row t
// is the source of no slot after t; if t > p(t) it moves right, and row t is the source of no slot before t.
// Nor is it the source of one that moves the other way: from p(u) = t > p(t) follows u > t, so u moves right
// where t does. So rows that move right, from the last slot down, and rows that move left, from the first
// slot up, never meet; zeros for free slots come after both.

// The flat place in `indices` of the first one that is not free and not larger than those before it in its
// row, or -1. Indices are in [-1, L).
int64_t compact_in_place_cpu_bad_order(const CompactParams& params);

// Independent pieces: the heads of both caches.
int64_t compact_in_place_cpu_tasks(const CompactParams& params);

void compact_in_place_cpu(const CompactParams& params, const Parallel& parallel = {});

// Needs no workspace. Where the indices do not ascend, the slots hold unspecified rows.
CudaStatus compact_in_place_cuda(const CompactParams& params, const CudaContext& context);

}  // namespace csp
