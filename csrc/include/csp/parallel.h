#pragma once

#include <cstdint>

namespace csp {

// The caller's thread pool. The default runs everything on the calling thread.
// Results never depend on num_threads: an op cuts its work by the problem's shape alone.
struct Parallel {
  int32_t num_threads = 1;

  // Calls body(context, worker) once for each worker in [0, workers), workers <= num_threads; may run them
  // one after another. body never throws.
  void (*run)(int32_t workers, void (*body)(void* context, int32_t worker),
              void* context) = [](int32_t workers, void (*body)(void*, int32_t), void* context) {
    for (int32_t worker = 0; worker < workers; ++worker) body(context, worker);
  };
};

}  // namespace csp
