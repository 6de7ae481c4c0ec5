#include <torch/csrc/stable/library.h>

// The schema of every op, in one place. Semantics: docs/ops.md.
STABLE_TORCH_LIBRARY(csp, m) {
  m.def("n_softmax(Tensor logits, float n=1.0) -> Tensor");
  m.def(
      "segmented_column_sum(Tensor attn, Tensor query_modality, Tensor key_modality)"
      " -> (Tensor self, Tensor cross)");
  m.def(
      "score(Tensor query, Tensor key, Tensor modality, *, Tensor? query_modality=None, float n=1.0,"
      " float? scale=None, str heads=\"kv\", bool causal=True, Tensor? lse=None)"
      " -> (Tensor self, Tensor cross)");
  m.def(
      "dual_top_k(Tensor self, Tensor cross, SymInt k_self, SymInt k_cross, str combine=\"intersection\","
      " Tensor? valid_self=None, Tensor? valid_cross=None) -> Tensor");
  m.def(
      "select(Tensor self, Tensor cross, Tensor modality, Tensor query_modality, *, SymInt budget,"
      " SymInt? recent=None, float cross_ratio=0.5, str combine=\"intersection\", SymInt? k_self=None,"
      " SymInt? k_cross=None, str pool=\"none\", SymInt pool_kernel=7, bool causal=True)"
      " -> (Tensor indices, Tensor lengths)");
  m.def("compact(Tensor key, Tensor value, Tensor indices) -> (Tensor key, Tensor value)");
  m.def("compact_(Tensor(a!) key, Tensor(b!) value, Tensor indices) -> ()");
  m.def(
      "prune(Tensor query, Tensor key, Tensor value, Tensor modality, *, SymInt budget,"
      " SymInt? recent=None, Tensor? query_modality=None, float n=1.0, float? scale=None,"
      " str heads=\"kv\", bool causal=True, Tensor? lse=None, float cross_ratio=0.5,"
      " str combine=\"intersection\", SymInt? k_self=None, SymInt? k_cross=None, str pool=\"none\","
      " SymInt pool_kernel=7) -> (Tensor key, Tensor value, Tensor indices, Tensor lengths)");
  m.def(
      "prune_(Tensor query, Tensor(a!) key, Tensor(b!) value, Tensor modality, *, SymInt budget,"
      " SymInt? recent=None, Tensor? query_modality=None, float n=1.0, float? scale=None,"
      " str heads=\"kv\", bool causal=True, Tensor? lse=None, float cross_ratio=0.5,"
      " str combine=\"intersection\", SymInt? k_self=None, SymInt? k_cross=None, str pool=\"none\","
      " SymInt pool_kernel=7) -> (Tensor indices, Tensor lengths)");
  m.def(
      "decode(Tensor query, Tensor key, Tensor value, Tensor? start=None, Tensor? end=None, *,"
      " float n=1.0, float? scale=None) -> (Tensor out, Tensor lse)");
}
