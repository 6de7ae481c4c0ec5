#include "plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "csp/plan.h"

namespace py = pybind11;

namespace {

// The keyword arguments, taken out one by one; what is left at the end was not understood.
class Shape {
 public:
  Shape(const std::string& op, bool cuda, const py::kwargs& arguments) : op_(op), cuda_(cuda) {
    for (const auto& [name, value] : arguments) left_[name] = value;
  }

  int64_t size(const char* name) {
    if (!left_.contains(name)) throw py::value_error("plan: " + op_ + " needs the size " + name);
    return size(name, 0);
  }

  int64_t size(const char* name, int64_t otherwise) {
    const int64_t value = take(name, otherwise);
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
      throw py::value_error(std::string("plan: ") + name + " must be between 0 and 2147483647, got " +
                            std::to_string(value));
    }
    sizes_[name] = static_cast<double>(value);
    return value;
  }

  // A property of the device, not of the problem.
  int64_t property(const char* name, int64_t least, int64_t otherwise) {
    const int64_t value = take(name, otherwise);
    if (value < least) {
      throw py::value_error(std::string("plan: ") + name + " must be at least " + std::to_string(least) +
                            ", got " + std::to_string(value));
    }
    return value;
  }

  // The value of a word, by its place among the words known.
  template <typename Enum>
  Enum word(const char* name, std::initializer_list<std::pair<const char*, Enum>> known) {
    const std::string given = take(name, std::string(known.begin()->first));
    std::string words;
    for (const auto& [text, value] : known) {
      if (given == text) return value;
      words += std::string(words.empty() ? "" : ", ") + text;
    }
    throw py::value_error(std::string("plan: ") + name + " must be one of " + words + ", got " + given);
  }

  bool flag(const char* name, bool otherwise) { return take(name, otherwise); }

  double share(const char* name, double otherwise) {
    const double value = take(name, otherwise);
    if (value >= 0 && value <= 1) return value;
    throw py::value_error(std::string("plan: ") + name + " must be between 0 and 1, got " +
                          std::to_string(value));
  }

  bool cuda() const { return cuda_; }
  bool given(const char* name) const { return left_.contains(name); }

  void finish() const {
    for (const auto& [name, value] : left_) {
      throw py::value_error("plan: " + op_ + " has no size or option " + std::string(py::str(name)));
    }
    check_volume();
  }

  // A few bytes or operations an element: everything must fit into 63 bits.
  void check_volume() const {
    if (most_elements() > 0x1p56) throw py::value_error("plan: the sizes multiply to more than 2^56");
  }

 private:
  template <typename T>
  T take(const char* name, T otherwise) {
    if (!left_.contains(name)) return otherwise;
    try {
      return left_.attr("pop")(name).template cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("plan: ") + name + " has the wrong type");
    }
  }

  double most_elements() const {
    const std::initializer_list<std::initializer_list<const char*>> dimensions = {
        {"batch", "rows"},
        {"num_heads", "num_kv_heads", "score_heads"},
        {"window", "queries"},
        {"keys", "cols", "capacity", "budget"},
        {"head_dim", "value_dim"}};
    double elements = 1;
    for (const auto& names : dimensions) {
      double largest = 1;
      for (const char* name : names) {
        const auto size = sizes_.find(name);
        if (size != sizes_.end()) largest = std::max(largest, size->second);
      }
      elements *= largest;
    }
    return elements;
  }

  std::string op_;
  bool cuda_;
  py::dict left_;
  std::map<std::string, double> sizes_;
};

csp::DType any_dtype_of(Shape& shape) {
  using csp::DType;
  return shape.word<DType>("dtype", {{"float32", DType::kFloat32},
                                     {"float16", DType::kFloat16},
                                     {"bfloat16", DType::kBFloat16},
                                     {"float64", DType::kFloat64}});
}

// Of an op that computes with it.
csp::DType dtype_of(Shape& shape) {
  const csp::DType dtype = any_dtype_of(shape);
  if (shape.cuda() && dtype == csp::DType::kFloat64) {
    throw py::value_error("plan: float64 is not supported on CUDA");
  }
  return dtype;
}

void check_group(int64_t num_heads, int64_t num_kv_heads) {
  if (num_kv_heads > 0 ? num_heads % num_kv_heads == 0 : num_heads == 0) return;
  throw py::value_error("plan: num_heads must be a multiple of num_kv_heads = " +
                        std::to_string(num_kv_heads) + ", got " + std::to_string(num_heads));
}

csp::Combine combine_of(Shape& shape) {
  using csp::Combine;
  return shape.word<Combine>("combine", {{"intersection", Combine::kIntersection},
                                         {"union", Combine::kUnion},
                                         {"calibrated", Combine::kCalibrated}});
}

// Of a contiguous [batch, heads, rows, dim] tensor.
csp::Strides strides_of(int64_t heads, int64_t rows, int64_t dim) {
  return {heads * rows * dim, rows * dim, dim};
}

csp::NSoftmaxParams n_softmax_of(Shape& shape) {
  csp::NSoftmaxParams p;
  p.dtype = dtype_of(shape);
  p.rows = shape.size("rows");
  p.cols = shape.size("cols");
  return p;
}

csp::SegmentedColumnSumParams segmented_column_sum_of(Shape& shape) {
  csp::SegmentedColumnSumParams p;
  p.dtype = dtype_of(shape);
  p.batch = shape.size("batch");
  p.num_heads = shape.size("num_heads");
  p.window = shape.size("window");
  p.keys = shape.size("keys");
  shape.check_volume();
  p.attn_stride = strides_of(p.num_heads, p.window, p.keys);
  return p;
}

csp::DualTopKParams dual_top_k_of(Shape& shape) {
  csp::DualTopKParams p;
  p.dtype = dtype_of(shape);
  p.rows = shape.size("rows");
  p.keys = shape.size("keys");
  p.k_self = shape.size("k_self");
  p.k_cross = shape.size("k_cross");
  p.combine = combine_of(shape);
  static const bool mask =
      true;  // any address will do, here and below: the planner asks whether there is one
  if (shape.flag("valid_self", false)) p.valid_self = &mask;
  if (shape.flag("valid_cross", false)) p.valid_cross = &mask;
  return p;
}

csp::ScoreParams score_of(Shape& shape) {
  csp::ScoreParams p;
  p.dtype = dtype_of(shape);
  p.batch = shape.size("batch");
  p.num_heads = shape.size("num_heads");
  p.num_kv_heads = shape.size("num_kv_heads");
  p.window = shape.size("window");
  p.keys = shape.size("keys");
  p.head_dim = shape.size("head_dim");
  p.heads = shape.word<csp::Heads>("heads", {{"kv", csp::Heads::kKv}, {"shared", csp::Heads::kShared}});
  if (shape.flag("lse", false)) p.lse = &p;
  check_group(p.num_heads, p.num_kv_heads);
  shape.check_volume();
  p.query_stride = strides_of(p.num_heads, p.window, p.head_dim);
  p.key_stride = strides_of(p.num_kv_heads, p.keys, p.head_dim);
  return p;
}

// The options that select and prune share; the sizes but the budget are there.
void fill_options(Shape& shape, csp::SelectParams& p) {
  using csp::Pool;
  p.budget = shape.size("budget");
  p.recent = shape.size("recent", std::min(p.window, p.budget));
  p.combine = combine_of(shape);
  p.rho_thousandths = static_cast<int32_t>(std::nearbyint(1000 * shape.share("cross_ratio", 0.5)));
  if (shape.given("k_self") != shape.given("k_cross")) {
    throw py::value_error("plan: k_self and k_cross go together");
  }
  if (shape.given("k_self")) {
    p.k_self = shape.size("k_self");
    p.k_cross = shape.size("k_cross");
  }
  p.pool = shape.word<Pool>(
      "pool", {{"none", Pool::kNone}, {"max", Pool::kMax}, {"past", Pool::kPast}, {"avg", Pool::kAvg}});
  p.pool_kernel = shape.size("pool_kernel", 7);
  p.causal = shape.flag("causal", true);
}

csp::SelectParams select_of(Shape& shape) {
  csp::SelectParams p;
  p.dtype = dtype_of(shape);
  p.batch = shape.size("batch");
  p.score_heads = shape.size("score_heads");
  p.keys = shape.size("keys");
  p.window = shape.size("window");
  fill_options(shape, p);
  return p;
}

csp::CompactParams compact_of(Shape& shape) {
  csp::CompactParams p;
  p.element_bytes = csp::dtype_bytes(any_dtype_of(shape));
  p.batch = shape.size("batch");
  p.num_kv_heads = shape.size("num_kv_heads");
  p.score_heads = shape.size("score_heads", p.num_kv_heads);
  p.keys = shape.size("keys");
  p.budget = shape.size("budget");
  p.head_dim = shape.size("head_dim");
  p.value_dim = shape.size("value_dim", p.head_dim);
  shape.check_volume();
  p.key_stride = strides_of(p.num_kv_heads, p.keys, p.head_dim);
  p.value_stride = strides_of(p.num_kv_heads, p.keys, p.value_dim);
  return p;
}

void check_in_place(const csp::CompactParams& p) {
  if (p.budget <= p.keys) return;
  throw py::value_error("plan: budget must be at most keys = " + std::to_string(p.keys) + " in place, got " +
                        std::to_string(p.budget));
}

csp::CompactParams compact_in_place_of(Shape& shape) {
  const csp::CompactParams p = compact_of(shape);
  check_in_place(p);
  return p;
}

csp::PruneParams prune_of(Shape& shape) {
  csp::PruneParams p;
  p.score = score_of(shape);
  p.select.dtype = csp::accumulate_dtype(p.score.dtype);
  p.select.batch = p.score.batch;
  p.select.score_heads = p.score.heads == csp::Heads::kShared ? 1 : p.score.num_kv_heads;
  p.select.keys = p.score.keys;
  p.select.window = p.score.window;
  fill_options(shape, p.select);
  p.score.causal = p.select.causal;
  p.compact.element_bytes = csp::dtype_bytes(p.score.dtype);
  p.compact.batch = p.score.batch;
  p.compact.num_kv_heads = p.score.num_kv_heads;
  p.compact.score_heads = p.select.score_heads;
  p.compact.keys = p.score.keys;
  p.compact.budget = p.select.budget;
  p.compact.head_dim = p.score.head_dim;
  p.compact.value_dim = shape.size("value_dim", p.score.head_dim);
  shape.check_volume();
  p.compact.key_stride = p.score.key_stride;
  p.compact.value_stride = strides_of(p.score.num_kv_heads, p.score.keys, p.compact.value_dim);
  return p;
}

csp::PruneParams prune_in_place_of(Shape& shape) {
  const csp::PruneParams p = prune_of(shape);
  check_in_place(p.compact);
  return p;
}

csp::DecodeParams decode_of(Shape& shape) {
  csp::DecodeParams p;
  p.dtype = dtype_of(shape);
  p.batch = shape.size("batch");
  p.num_heads = shape.size("num_heads");
  p.num_kv_heads = shape.size("num_kv_heads");
  p.queries = shape.size("queries", 1);
  p.capacity = shape.size("capacity");
  p.head_dim = shape.size("head_dim");
  check_group(p.num_heads, p.num_kv_heads);
  shape.check_volume();
  p.query_stride = strides_of(p.num_heads, p.queries, p.head_dim);
  p.key_stride = p.value_stride = strides_of(p.num_kv_heads, p.capacity, p.head_dim);
  return p;
}

csp::CudaDevice device_of(Shape& shape) {
  csp::CudaDevice device;
  device.multiprocessors = static_cast<int32_t>(shape.property("multiprocessors", 1, device.multiprocessors));
  device.capability =
      static_cast<int32_t>(shape.property("capability", csp::kMinCudaCapability, device.capability));
  device.shared_bytes = shape.property("shared_bytes", 1, device.shared_bytes);
  device.l2_bytes = shape.property("l2_bytes", 1, device.l2_bytes);
  return device;
}

csp::Plan plan_cpu(const std::string& op, Shape& shape) {
  const auto threads = static_cast<int32_t>(shape.size("num_threads", 1));
  const auto with = [&](const auto& params, auto planner) {
    shape.finish();
    return planner(params);
  };
  if (op == "score") return with(score_of(shape), [&](auto& p) { return csp::plan_score_cpu(p, threads); });
  if (op == "select")
    return with(select_of(shape), [&](auto& p) { return csp::plan_select_cpu(p, threads); });
  if (op == "compact") return with(compact_of(shape), csp::plan_compact_cpu);
  if (op == "compact_") return with(compact_in_place_of(shape), csp::plan_compact_in_place_cpu);
  if (op == "decode")
    return with(decode_of(shape), [&](auto& p) { return csp::plan_decode_cpu(p, threads); });
  if (op == "prune") return with(prune_of(shape), [&](auto& p) { return csp::plan_prune_cpu(p, threads); });
  if (op == "prune_") {
    return with(prune_in_place_of(shape), [&](auto& p) { return csp::plan_prune_in_place_cpu(p, threads); });
  }
  throw py::value_error(
      "plan: op must be score, select, compact, compact_, prune, prune_ or decode on the CPU, got " + op);
}

csp::Plan plan_cuda(const std::string& op, Shape& shape) {
  const csp::CudaDevice device = device_of(shape);
  const auto with = [&](const auto& params, auto planner) {
    shape.finish();
    return planner(params, device);
  };
  if (op == "n_softmax") return with(n_softmax_of(shape), csp::plan_n_softmax_cuda);
  if (op == "segmented_column_sum") {
    return with(segmented_column_sum_of(shape), csp::plan_segmented_column_sum_cuda);
  }
  if (op == "score") return with(score_of(shape), csp::plan_score_cuda);
  if (op == "dual_top_k") return with(dual_top_k_of(shape), csp::plan_dual_top_k_cuda);
  if (op == "select") return with(select_of(shape), csp::plan_select_cuda);
  if (op == "compact") return with(compact_of(shape), csp::plan_compact_cuda);
  if (op == "compact_") return with(compact_in_place_of(shape), csp::plan_compact_in_place_cuda);
  if (op == "prune") return with(prune_of(shape), csp::plan_prune_cuda);
  if (op == "prune_") return with(prune_in_place_of(shape), csp::plan_prune_in_place_cuda);
  if (op == "decode") return with(decode_of(shape), csp::plan_decode_cuda);
  throw py::value_error(
      "plan: op must be n_softmax, segmented_column_sum, score, dual_top_k, select, compact, "
      "compact_, prune, prune_ or decode, got " +
      op);
}

}  // namespace

py::dict plan(const std::string& op, const std::string& device, const py::kwargs& arguments) {
  if (device != "cpu" && device != "cuda") {
    throw py::value_error("plan: device must be cpu or cuda, got " + device);
  }
  const bool cuda = device == "cuda";
  Shape shape(op, cuda, arguments);
  const csp::Plan plan = cuda ? plan_cuda(op, shape) : plan_cpu(op, shape);
  py::dict result;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["bytes_read"] = plan.bytes_read;
  result["bytes_written"] = plan.bytes_written;
  result["flops"] = plan.flops;
  if (cuda) {
    result["launches"] = plan.launches;
  } else {
    result["tasks"] = plan.tasks;
  }
  return result;
}
