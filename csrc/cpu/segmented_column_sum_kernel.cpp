#include "segmented_column_sum_kernel.h"

#include "simd.h"

namespace csp::CSP_ISA {
namespace {

typedef int8_t vbyte __attribute__((vector_size(kLanes)));

// Rows summed in registers before the running sums are touched; also shortens the chain of roundings.
constexpr int kRows = 8;

// Up to kRows observing queries of one modality.
template <typename T>
struct Rows {
  const T* at[kRows];  // column 0 of each
  int count = 0;
  int8_t modality = -1;
};

// The next ones from query i on, which moves on behind them.
template <typename T>
Rows<T> next_rows(const T* attn, int64_t stride, const int8_t* modality, int64_t window, int64_t& i) {
  Rows<T> rows;
  for (; i < window && rows.count < kRows; ++i) {
    if (modality[i] < 0) continue;
    if (rows.count > 0 && modality[i] != rows.modality) break;
    rows.modality = modality[i];
    rows.at[rows.count++] = attn + i * stride;
  }
  return rows;
}

CSP_INLINE vint load_modality(const int8_t* p, int64_t count) {
  vbyte bytes = vbyte{} - 1;
  if (count >= kLanes) {
    __builtin_memcpy(&bytes, p, sizeof bytes);
  } else {
    for (int64_t i = 0; i < count; ++i) bytes[i] = p[i];
  }
  return __builtin_convertvector(bytes, vint);
}

// Adds one batch of rows to the sums of columns [begin, end).
template <typename T>
void add_rows(const Rows<T>& rows, const int8_t* key_modality, float* self, float* cross, int64_t begin,
              int64_t end) {
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t left = end - j;
    vfloat sum{};
    for (int r = 0; r < rows.count; ++r) sum += load_n(rows.at[r] + j, left, 0.0f);
    const vint key = load_modality(key_modality + j, left);
    const vint same = key == rows.modality, real = key >= 0;
    // Selected, not multiplied: whatever stands in a padding column must not leak out as nan.
    store_n(self + j, load_n(self + j, left, 0.0f) + blend(same, sum, vfloat{}), left);
    store_n(cross + j, load_n(cross + j, left, 0.0f) + blend(real & ~same, sum, vfloat{}), left);
  }
}

void add_rows(const Rows<double>& rows, const int8_t* key_modality, double* self, double* cross,
              int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    double sum = 0;
    for (int r = 0; r < rows.count; ++r) sum += rows.at[r][j];
    if (key_modality[j] >= 0) (key_modality[j] == rows.modality ? self : cross)[j] += sum;
  }
}

template <typename T, typename Sum>
void columns_of(const SegmentedColumnSumParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  const T* attn = static_cast<const T*>(p.attn) + batch * p.attn_stride.batch + head * p.attn_stride.head;
  const int8_t* query_modality = p.query_modality + batch * p.window;
  const int8_t* key_modality = p.key_modality + batch * p.keys;
  const int64_t row = (batch * p.num_heads + head) * p.keys;
  Sum* self = static_cast<Sum*>(p.self) + row;
  Sum* cross = static_cast<Sum*>(p.cross) + row;
  for (int64_t j = begin; j < end; ++j) self[j] = cross[j] = 0;
  for (int64_t i = 0; i < p.window;) {
    const Rows<T> rows = next_rows(attn, p.attn_stride.row, query_modality, p.window, i);
    if (rows.count > 0) add_rows(rows, key_modality, self, cross, begin, end);
  }
}

}  // namespace

void segmented_column_sum_columns(const SegmentedColumnSumParams& params, int64_t batch, int64_t head,
                                  int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32:
      return columns_of<float, float>(params, batch, head, begin, end);
    case DType::kFloat16:
      return columns_of<Float16, float>(params, batch, head, begin, end);
    case DType::kBFloat16:
      return columns_of<BFloat16, float>(params, batch, head, begin, end);
    case DType::kFloat64:
      return columns_of<double, double>(params, batch, head, begin, end);
  }
}

}  // namespace csp::CSP_ISA
