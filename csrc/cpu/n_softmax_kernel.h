#pragma once

#include "csp/n_softmax.h"
#include "isa.h"

// One row range [begin, end) of csp::n_softmax_cpu.
CSP_DECLARE_KERNEL(void, n_softmax_rows, (const NSoftmaxParams& params, int64_t begin, int64_t end))
