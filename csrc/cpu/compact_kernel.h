#pragma once

#include "csp/compact.h"
#include "isa.h"

namespace csp {

// One head of one of the two caches, in bytes.
struct CompactHead {
  const char* in;          // [L, bytes]
  char* out;               // [T, bytes], contiguous
  const int32_t* indices;  // [T]
  int64_t row_stride;      // of in
  int64_t bytes;           // of one row
  int64_t keys;            // L
  bool stream;             // write past the caches: out and bytes are multiples of 64
};

// The same, in place.
struct CompactInPlaceHead {
  char* rows;              // [L, bytes]
  const int32_t* indices;  // [T], those that are not free in ascending order
  int64_t row_stride;
  int64_t bytes;  // of one row
  int64_t keys;   // L
  int64_t slots;  // T <= L
  bool stream;    // write past the caches: rows, row_stride and bytes are multiples of 64
};

}  // namespace csp

// Rows [begin, end) of a head's output.
CSP_DECLARE_KERNEL(void, compact_rows, (const CompactHead& head, int64_t begin, int64_t end))

CSP_DECLARE_KERNEL(void, compact_rows_in_place, (const CompactInPlaceHead& head))
