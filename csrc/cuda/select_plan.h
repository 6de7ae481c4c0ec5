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

constexpr int64_t kSortTile = 4096;  // elements of a block
constexpr int64_t kSortDigits = 256;

struct SelectPlan {
  SelectRule rule = SelectRule::kCalibrated;
  bool by_block = true;

  // The small path.
  LaunchShape shape;
  bool in_shared = true;
  bool spare = false;     // select_row_bytes
  int64_t bins = 0;       // words of shared memory
  int64_t row_bytes = 0;  // of the workspace, per block

  // The large path works on `rows` rows at a time; offsets into the workspace in bytes.
  int64_t rows = 0;
  int64_t tiles = 0;  // of a row
  int64_t outline = 0, positions = 0, tie = 0, keys = 0, tie_order = 0, orders = 0, counts = 0, sums = 0;
  int32_t key_bits = 32;  // of the final keys

  int64_t launches = 0;
  int64_t workspace_bytes = 0;
};

SelectPlan make_select_plan(const SelectParams& params, const CudaDevice& device,
                            const SelectLimits& limits = {});

// select_cuda by this plan.
CudaStatus launch_select(const SelectParams& params, const SelectPlan& plan, const CudaContext& context);

}  // namespace csp
