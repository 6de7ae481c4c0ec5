#include "plan.h"

#include <algorithm>
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
  Shape(const std::string& op, const py::kwargs& arguments) : op_(op) {
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

  bool flag(const char* name) { return take(name, false); }

  void finish() const {
    for (const auto& [name, value] : left_) {
      throw py::value_error("plan: " + op_ + " has no size or option " + std::string(py::str(name)));
    }
    // A few bytes or operations an element: everything must fit into 63 bits.
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
        {"batch"},
        {"num_heads", "num_kv_heads", "score_heads"},
        {"window", "queries"},
        {"keys", "capacity", "budget"},
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
  py::dict left_;
  std::map<std::string, double> sizes_;
};

csp::DType dtype_of(Shape& shape) {
  using csp::DType;
  return shape.word<DType>("dtype", {{"float32", DType::kFloat32},
                                     {"float16", DType::kFloat16},
                                     {"bfloat16", DType::kBFloat16},
                                     {"float64", DType::kFloat64}});
}

void check_group(int64_t num_heads, int64_t num_kv_heads) {
  if (num_kv_heads > 0 ? num_heads % num_kv_heads == 0 : num_heads == 0) return;
  throw py::value_error("plan: num_heads must be a multiple of num_kv_heads = " +
                        std::to_string(num_kv_heads) + ", got " + std::to_string(num_heads));
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
  // Any address will do: the planner only asks whether there is one.
  if (shape.flag("lse")) p.lse = &p;
  check_group(p.num_heads, p.num_kv_heads);
  return p;
}

csp::Pool pool_of(Shape& shape) {
  using csp::Pool;
  return shape.word<Pool>("pool", {{"none", Pool::kNone}, {"max", Pool::kMax}, {"avg", Pool::kAvg}});
}

csp::SelectParams select_of(Shape& shape) {
  csp::SelectParams p;
  p.dtype = dtype_of(shape);
  p.batch = shape.size("batch");
  p.score_heads = shape.size("score_heads");
  p.keys = shape.size("keys");
  p.window = shape.size("window");
  p.budget = shape.size("budget");
  p.pool = pool_of(shape);
  return p;
}

csp::CompactParams compact_of(Shape& shape) {
  csp::CompactParams p;
  p.element_bytes = csp::dtype_bytes(dtype_of(shape));
  p.batch = shape.size("batch");
  p.num_kv_heads = shape.size("num_kv_heads");
  p.score_heads = shape.size("score_heads", p.num_kv_heads);
  p.keys = shape.size("keys");
  p.budget = shape.size("budget");
  p.head_dim = shape.size("head_dim");
  p.value_dim = shape.size("value_dim", p.head_dim);
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
  p.select.budget = shape.size("budget");
  p.select.pool = pool_of(shape);
  p.compact.element_bytes = csp::dtype_bytes(p.score.dtype);
  p.compact.batch = p.score.batch;
  p.compact.num_kv_heads = p.score.num_kv_heads;
  p.compact.score_heads = p.select.score_heads;
  p.compact.keys = p.score.keys;
  p.compact.budget = p.select.budget;
  p.compact.head_dim = p.score.head_dim;
  p.compact.value_dim = shape.size("value_dim", p.score.head_dim);
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
  return p;
}

}  // namespace

py::dict plan(const std::string& op, const py::kwargs& arguments) {
  Shape shape(op, arguments);
  const auto threads = static_cast<int32_t>(shape.size("num_threads", 1));
  csp::Plan plan;
  const auto with = [&](const auto& params, auto planner) {
    shape.finish();
    plan = planner(params);
  };
  if (op == "score") {
    with(score_of(shape), [&](const auto& p) { return csp::plan_score_cpu(p, threads); });
  } else if (op == "select") {
    with(select_of(shape), [&](const auto& p) { return csp::plan_select_cpu(p, threads); });
  } else if (op == "compact") {
    with(compact_of(shape), [&](const auto& p) { return csp::plan_compact_cpu(p); });
  } else if (op == "decode") {
    with(decode_of(shape), [&](const auto& p) { return csp::plan_decode_cpu(p, threads); });
  } else if (op == "prune") {
    with(prune_of(shape), [&](const auto& p) { return csp::plan_prune_cpu(p, threads); });
  } else {
    throw py::value_error("plan: op must be score, select, compact, decode or prune, got " + op);
  }
  py::dict result;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["bytes_read"] = plan.bytes_read;
  result["bytes_written"] = plan.bytes_written;
  result["flops"] = plan.flops;
  result["tasks"] = plan.tasks;
  return result;
}
