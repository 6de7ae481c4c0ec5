#pragma once

#include "csp/segmented_column_sum.h"
#include "isa.h"

// Columns [begin, end) of head `head` of batch row `batch`.
CSP_DECLARE_KERNEL(void, segmented_column_sum_columns,
                   (const SegmentedColumnSumParams& params, int64_t batch, int64_t head, int64_t begin,
                    int64_t end))
