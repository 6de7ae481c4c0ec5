#pragma once

#include <atomic>
#include <cstdint>

#include "csp/parallel.h"

namespace csp {

// Hands out tasks 0 .. tasks-1 to the pool's workers as they become free and calls fn(task, worker) for each.
// A task must not depend on which worker runs it, so results are the same for any number of threads.
template <typename Fn>
void for_each_task(const Parallel& parallel, int64_t tasks, Fn&& fn) {
  if (tasks <= 0) return;
  const int64_t limit = parallel.num_threads < 1 ? 1 : parallel.num_threads;
  const int32_t workers = static_cast<int32_t>(tasks < limit ? tasks : limit);
  if (workers == 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
    return;
  }
  struct Queue {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    Fn* fn;
  } queue{{0}, tasks, &fn};
  parallel.run(
      workers,
      [](void* context, int32_t worker) {
        auto& q = *static_cast<Queue*>(context);
        for (int64_t task = q.next.fetch_add(1); task < q.tasks; task = q.next.fetch_add(1)) {
          (*q.fn)(task, worker);
        }
      },
      &queue);
}

// Rounds a byte count up to whole cache lines, so that the pieces of a workspace never share one.
constexpr size_t cache_lines(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace csp
