#pragma once

#include "csp/select.h"
#include "launch.h"

namespace csp {

// What the combine rule asks of a row.
enum class SelectRule : int32_t {
  kLiteral,     // two cuts, one per list
  kOneList,     // a cut through one list, then through the other
  kCalibrated,  // a cut through the weighted shares
  kRanks,       // a cut through the keys made of both ranks
};

SelectRule select_rule(const SelectParams& params);

// Where the small path ends and how many keys the large one holds in its workspace at a time; other than the
// default in tests.
struct SelectLimits {
  int64_t block_keys = 32768;
  int64_t group_keys = 8 << 20;
};

// ---- the small path: a block per row, one launch ----

constexpr int64_t kSelectMaxBlockKeys = 1 << 15;  // that a block's 16-bit positions can name

// Arrays of one row, in shared memory or in the workspace: three words per key, and where ranks or pooling
// ask for them two and a half more.
constexpr int64_t select_row_bytes(int64_t keys, bool spare) {
  const int64_t padded = round_up(keys, 4);
  return padded * 12 + (spare ? padded * 8 + round_up(padded * 2, 16) : 0);
}

// Words of shared memory that a block counts in.
constexpr int64_t select_bins(int64_t keys, bool ranks) {
  constexpr int64_t kHistogram = 2048, kStep = 128;
  const int64_t bins = ranks ? round_up(keys + 1, kStep) : 0;
  return bins < kHistogram ? kHistogram : bins;
}

// ---- the large path: many blocks per row, stable radix sorts in global memory ----

constexpr int32_t kSortThreads = 256;
constexpr int64_t kSortTile = 4096;  // elements of a block
constexpr int32_t kSortBits = 8;     // of a pass
constexpr int64_t kOutlineWords = 136;

// Offsets into the workspace, in bytes.
struct SortLayout {
  int64_t outlines = 0;    // [batch, kOutlineWords]
  int64_t positions = 0;   // [batch, L], of the real keys
  int64_t tie = 0;         // [rows, L]
  int64_t keys = 0;        // [2, rows, L]: self and cross
  int64_t tie_order = 0;   // [rows, L]
  int64_t orders[2] = {};  // [lists, rows, L] each
  int64_t counts = 0;      // [lists, rows, digits, tiles]
  int64_t sums = 0;        // [rows, tiles, 2] doubles
  int64_t bytes = 0;
};

// ---- both ----

struct SelectPlan {
  SelectRule rule = SelectRule::kCalibrated;
  bool by_block = true;
  int64_t launches = 0;
  int64_t workspace_bytes = 0;

  // The small path.
  LaunchShape shape;
  bool in_shared = true;
  bool spare = false;     // select_row_bytes
  int64_t bins = 0;       // words of shared memory
  int64_t row_bytes = 0;  // of the workspace, per block

  // The large path.
  int64_t rows = 0;          // sorted at a time
  int64_t tiles = 0;         // of a row
  int64_t lists = 0;         // sorted at a time
  int32_t final_passes = 0;  // of the sort by the final keys
  SortLayout layout;
};

SelectPlan make_select_plan(const SelectParams& params, const CudaDevice& device,
                            const SelectLimits& limits = {});

// select_cuda by this plan.
CudaStatus launch_select(const SelectParams& params, const SelectPlan& plan, const CudaContext& context);

}  // namespace csp
