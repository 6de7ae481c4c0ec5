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

  m.def("plan", &plan, py::arg("op"), py::arg("device") = "cpu",
        "What one call of an op costs: workspace, bytes moved, operations, tasks or launches.\n\n"
        "plan(\"score\", batch, num_heads, num_kv_heads, window, keys, head_dim, heads=\"kv\", lse=False)\n"
        "plan(\"select\", batch, score_heads, keys, window, budget, recent=window,\n"
        "     combine=\"intersection\", cross_ratio=0.5, k_self=None, k_cross=None, pool=\"none\",\n"
        "     pool_kernel=7, causal=True)\n"
        "plan(\"compact\", batch, num_kv_heads, keys, budget, head_dim, value_dim=head_dim,\n"
        "     score_heads=num_kv_heads)\n"
        "plan(\"compact_\", the sizes of compact)\n"
        "plan(\"prune\", the sizes and options of score and select, and value_dim=head_dim)\n"
        "plan(\"prune_\", the sizes and options of prune)\n"
        "plan(\"decode\", batch, num_heads, num_kv_heads, capacity, head_dim, queries=1)\n"
        "and with device=\"cuda\" also\n"
        "plan(\"n_softmax\", rows, cols)\n"
        "plan(\"segmented_column_sum\", batch, num_heads, window, keys)\n"
        "plan(\"dual_top_k\", rows, keys, k_self, k_cross, combine=\"intersection\", valid_self=False,\n"
        "     valid_cross=False)\n\n"
        "All by keyword, each with dtype=\"float32\". workspace_bytes is what the op allocates beside its\n"
        "results, from the function that its launcher asks. bytes_read and bytes_written count every input\n"
        "and output once. flops are those of the matrix products, as if nothing were masked.\n\n"
        "device=\"cpu\" takes num_threads=1; tasks are the independent pieces: more threads cannot help.\n"
        "device=\"cuda\" takes multiprocessors, capability (10 * major + minor), shared_bytes (that one\n"
        "block may have) and l2_bytes, by default those of an H200, and needs no GPU; launches are the\n"
        "kernels on the stream. csp_ext.cuda_device() gives the four of the GPU at hand.");
}
