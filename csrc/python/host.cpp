#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "../cpu/isa.h"
#include "csp/score.h"

namespace py = pybind11;

namespace {

csp::DType dtype_of(const std::string& name) {
  if (name == "float32") return csp::DType::kFloat32;
  if (name == "float16") return csp::DType::kFloat16;
  if (name == "bfloat16") return csp::DType::kBFloat16;
  if (name == "float64") return csp::DType::kFloat64;
  throw std::invalid_argument("dtype must be float32, float16, bfloat16 or float64, got " + name);
}

size_t score_workspace_bytes(int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t window,
                             int64_t keys, int64_t head_dim, const std::string& dtype, bool shared,
                             bool with_lse, int32_t threads) {
  if (batch < 0 || num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0 || window < 0 ||
      keys < window || head_dim < 0) {
    throw std::invalid_argument("sizes must be >= 0, window <= keys, num_heads a multiple of num_kv_heads");
  }
  csp::ScoreParams params;
  params.dtype = dtype_of(dtype);
  params.batch = batch;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.window = window;
  params.keys = keys;
  params.head_dim = head_dim;
  params.heads = shared ? csp::Heads::kShared : csp::Heads::kKv;
  params.lse = with_lse ? &params : nullptr;  // only asked whether it is there
  return csp::score_cpu_workspace_bytes(params, threads);
}

}  // namespace

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

  m.def("score_workspace_bytes", &score_workspace_bytes, py::kw_only(), py::arg("batch"),
        py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("window"), py::arg("keys"),
        py::arg("head_dim"), py::arg("dtype"), py::arg("shared") = false, py::arg("with_lse") = false,
        py::arg("threads") = 1, "Scratch bytes that csp::score takes on the CPU.");
}
