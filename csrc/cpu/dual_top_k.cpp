#include "csp/dual_top_k.h"

#include "dual_top_k_kernel.h"
#include "tasks.h"

namespace csp {
namespace {

// The bytes of one of a worker's two lists of entries: a key and an index, padded to the key's size.
size_t entry_bytes(const DualTopKParams& params) {
  const int64_t key = dtype_bytes(accumulate_dtype(params.dtype));
  return cache_lines(static_cast<size_t>(params.keys * 2 * key));
}

size_t worker_bytes(const DualTopKParams& params) {
  return 2 * entry_bytes(params) + cache_lines(static_cast<size_t>(params.keys) * sizeof(int32_t));
}

}  // namespace

size_t dual_top_k_cpu_workspace_bytes(const DualTopKParams& params, int32_t num_threads) {
  const int64_t workers = params.rows < num_threads ? params.rows : num_threads;
  return static_cast<size_t>(workers < 1 ? 1 : workers) * worker_bytes(params);
}

void dual_top_k_cpu(const DualTopKParams& params, void* workspace, const Parallel& parallel) {
  if (params.rows == 0 || params.keys == 0) return;
  for_each_task(parallel, params.rows, [&](int64_t row, int32_t worker) {
    char* const base = static_cast<char*>(workspace) + worker * worker_bytes(params);
    DualTopKScratch scratch;
    scratch.entries[0] = base;
    scratch.entries[1] = base + entry_bytes(params);
    scratch.order = reinterpret_cast<int32_t*>(base + 2 * entry_bytes(params));
    CSP_CALL_KERNEL(dual_top_k_row, params, row, scratch);
  });
}

}  // namespace csp
