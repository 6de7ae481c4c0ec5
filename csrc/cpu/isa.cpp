#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace csp {
namespace {

Isa detect() {
  __builtin_cpu_init();
  Isa best = Isa::kBaseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  const char* wanted = std::getenv("CSP_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "baseline") == 0) return Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0 && best != Isa::kBaseline) return Isa::kAvx2;
  return best;
}

std::atomic<int> current{-1};

}  // namespace

Isa cpu_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(detect());
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

const char* cpu_isa_name() {
  const Isa isa = cpu_isa();
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

bool cpu_has_bf16_dot() {
  return cpu_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
}

void reset_cpu_isa() {
  current.store(-1, std::memory_order_relaxed);
}

}  // namespace csp
