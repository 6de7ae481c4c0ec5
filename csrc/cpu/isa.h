#pragma once

// One kernel source, three instruction sets. CMake compiles each *_kernel.cpp once per set with CSP_ISA
// naming the namespace; the launcher beside it picks one when the process first asks.

namespace csp {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best set this machine runs, lowered by CSP_CPU_CAPABILITY=baseline|avx2|avx512 where set.
Isa cpu_isa();
const char* cpu_isa_name();

// Whether the set in use comes with a dot product of bfloat16 pairs (AVX512-BF16).
bool cpu_has_bf16_dot();

// Forgets the choice, so that the next call reads CSP_CPU_CAPABILITY again: tests walk through the sets.
void reset_cpu_isa();

}  // namespace csp

// Declares `ret name args` in the namespace of every instruction set.
#define CSP_DECLARE_KERNEL(ret, name, args) \
  namespace csp::baseline {                 \
  ret name args;                            \
  }                                         \
  namespace csp::avx2 {                     \
  ret name args;                            \
  }                                         \
  namespace csp::avx512 {                   \
  ret name args;                            \
  }

// Calls the kernel of the instruction set in use.
#define CSP_CALL_KERNEL(name, ...)                                     \
  (::csp::cpu_isa() == ::csp::Isa::kAvx512 ? avx512::name(__VA_ARGS__) \
   : ::csp::cpu_isa() == ::csp::Isa::kAvx2 ? avx2::name(__VA_ARGS__)   \
                                           : baseline::name(__VA_ARGS__))
