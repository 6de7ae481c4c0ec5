#include <string>

#include <pybind11/pybind11.h>

#include "../cpu/isa.h"
#include "plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side facts about csp_ext: version, build, CPU capability and the planner. Needs no torch.";
  m.attr("__version__") = CSP_VERSION;

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = CSP_VERSION;
        info["compiler"] = CSP_COMPILER;
        info["build_type"] = CSP_BUILD_TYPE;
        info["torch_headers"] = CSP_TORCH_HEADERS;
        info["torch_target"] = CSP_TORCH_TARGET;
        info["cuda_compiler"] = CSP_CUDA_COMPILER;
        info["cuda_architectures"] = CSP_CUDA_ARCHITECTURES;
        return info;
      },
      "Facts fixed when the package was built.");

  m.def(
      "cpu_capability", [] { return std::string(csp::cpu_isa_name()); },
      "The instruction set in use: \"baseline\", \"avx2\" or \"avx512\" (CSP_CPU_CAPABILITY lowers it).");

  m.def("plan", &plan, py::arg("op"),
        "What one call of an op costs on the CPU: workspace, bytes moved, operations, tasks.\n\n"
        "plan(\"score\", batch, num_heads, num_kv_heads, window, keys, head_dim, heads=\"kv\", lse=False)\n"
        "plan(\"select\", batch, score_heads, keys, window, budget, pool=\"none\")\n"
        "plan(\"compact\", batch, num_kv_heads, keys, budget, head_dim, value_dim=head_dim,\n"
        "     score_heads=num_kv_heads)\n"
        "plan(\"prune\", the sizes and options of score, and budget, pool=\"none\", value_dim=head_dim)\n"
        "plan(\"decode\", batch, num_heads, num_kv_heads, capacity, head_dim, queries=1)\n\n"
        "All by keyword, each with dtype=\"float32\" and num_threads=1. workspace_bytes is what the op\n"
        "allocates beside its results, from the function that its launcher asks. bytes_read and\n"
        "bytes_written count every input and output once. flops are those of the matrix products, as if\n"
        "nothing were masked. tasks are the independent pieces: more threads cannot help.");
}
