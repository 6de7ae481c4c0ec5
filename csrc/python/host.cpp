#include <string>

#include <pybind11/pybind11.h>

#include "../cpu/isa.h"

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
}
