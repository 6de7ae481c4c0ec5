#include "csp/n_softmax.h"

#include "n_softmax_kernel.h"
#include "tasks.h"

namespace csp {

void n_softmax_cpu(const NSoftmaxParams& params, const Parallel& parallel) {
  if (params.rows == 0 || params.cols == 0) return;
  // About 16K elements a task: enough to outweigh the hand-over.
  const int64_t step = params.cols >= 16384 ? 1 : 16384 / params.cols;
  const int64_t tasks = (params.rows + step - 1) / step;
  for_each_task(parallel, tasks, [&](int64_t task, int32_t) {
    const int64_t begin = task * step;
    const int64_t end = begin + step < params.rows ? begin + step : params.rows;
    CSP_CALL_KERNEL(n_softmax_rows, params, begin, end);
  });
}

}  // namespace csp
