#include "csp/select.h"

#include "select_kernel.h"
#include "tasks.h"

namespace csp {
namespace {

// Cuts one worker's workspace into pieces; returns the bytes that they take.
size_t cut(const SelectParams& params, char* base, SelectScratch* scratch) {
  const size_t keys = static_cast<size_t>(params.keys);
  const size_t real = static_cast<size_t>(dtype_bytes(accumulate_dtype(params.dtype)));
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* const piece = base + used;
    used += cache_lines(bytes);
    return piece;
  };
  SelectScratch s;
  s.position = reinterpret_cast<int32_t*>(take(keys * sizeof(int32_t)));
  s.valid = reinterpret_cast<uint8_t*>(take(keys));
  s.state = reinterpret_cast<uint8_t*>(take(keys));
  s.self = take(keys * real);
  s.cross = take(keys * real);
  s.tie = take(keys * real);
  s.pooled_self = params.pool == Pool::kNone ? s.self : take(keys * real);
  s.pooled_cross = params.pool == Pool::kNone ? s.cross : take(keys * real);
  for (void*& entries : s.entries) entries = take(keys * 2 * real);
  for (int32_t*& order : s.order) order = reinterpret_cast<int32_t*>(take(keys * sizeof(int32_t)));
  if (scratch) *scratch = s;
  return used;
}

int64_t heads_per_task(const SelectParams& params) {
  // Heads of a task share the candidates of their batch row; 8 tasks a row still balance well.
  return params.score_heads < 16 ? 1 : params.score_heads / 8;
}

int64_t tasks_per_row(const SelectParams& params) {
  const int64_t step = heads_per_task(params);
  return (params.score_heads + step - 1) / step;
}

}  // namespace

int64_t select_cpu_tasks(const SelectParams& params) {
  return params.batch * tasks_per_row(params);
}

size_t select_cpu_workspace_bytes(const SelectParams& params, int32_t num_threads) {
  const int64_t tasks = select_cpu_tasks(params);
  const int64_t workers = tasks < num_threads ? tasks : num_threads;
  return static_cast<size_t>(workers < 1 ? 1 : workers) * cut(params, nullptr, nullptr);
}

void select_cpu(const SelectParams& params, void* workspace, const Parallel& parallel) {
  const int64_t step = heads_per_task(params);
  const int64_t row_tasks = tasks_per_row(params);
  const size_t worker_bytes = cut(params, nullptr, nullptr);
  for_each_task(parallel, select_cpu_tasks(params), [&](int64_t task, int32_t worker) {
    SelectScratch scratch;
    cut(params, static_cast<char*>(workspace) + worker * worker_bytes, &scratch);
    const int64_t begin = task % row_tasks * step;
    const int64_t end = begin + step < params.score_heads ? begin + step : params.score_heads;
    CSP_CALL_KERNEL(select_heads, params, task / row_tasks, begin, end, scratch);
  });
}

}  // namespace csp
