#include <cstring>
#include <limits>

#include "cpu/ops.h"
#include "cpu/rows.h"

namespace jax_ep::cpu {
namespace {

// What is in row_scalars beside each row: its weights, or one dot product.
int64_t ScalarsPerRow(const MoEShape& shape, const DispatchParams& p) {
  return p.y != nullptr ? 1 : shape.weights_per_row();
}

void ZeroRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::memset(static_cast<std::byte*>(p.tokens) + begin * shape.row_bytes(), 0,
              (end - begin) * shape.row_bytes());
  const int64_t per_row = ScalarsPerRow(shape, p);
  if (p.row_scalars != nullptr)
    std::memset(p.row_scalars + begin * per_row, 0, (end - begin) * per_row * sizeof(float));
}

// One output row of combine's gradient: the token's gradient times the row's weight.
template <typename T>
void ScaleRow(const MoEShape& shape, const DispatchParams& p, const std::byte* x, int64_t row) {
  const int64_t hidden = shape.hidden_size, at = row * hidden;
  const T* gradient = reinterpret_cast<const T*>(x);
  Scale(static_cast<T*>(p.tokens) + at, gradient, p.row_weights[row], hidden);
  p.row_scalars[row] = Dot(gradient, static_cast<const T*>(p.y) + at, hidden);
}

}  // namespace

void ExpandTokens(const MoEShape& shape, int source, const DispatchSource& from,
                  const DispatchParams& p, int64_t begin, int64_t end) {
  const int per_token = shape.rows_per_token(), topk = shape.topk;
  const int32_t* rows_of_source = p.tables.recv_rows + source * p.num_tokens * per_token;
  std::byte* tokens = static_cast<std::byte*>(p.tokens);
  for (int64_t token = begin; token < end; ++token) {
    const std::byte* x = from.x + token * shape.row_bytes();
    const float* weights = from.weights == nullptr ? nullptr : from.weights + token * topk;
    for (int k = 0; k < per_token; ++k) {
      const int64_t row = rows_of_source[token * per_token + k];
      if (row < 0) continue;
      if (p.y != nullptr) {
        VisitDType(shape.dtype, [&](auto* t) {
          ScaleRow<std::remove_pointer_t<decltype(t)>>(shape, p, x, row);
        });
        continue;
      }
      std::memcpy(tokens + row * shape.row_bytes(), x, shape.row_bytes());
      if (weights == nullptr) continue;
      if (shape.layout == OutputLayout::kRankMajor)
        std::memcpy(p.row_scalars + row * topk, weights, topk * sizeof(float));
      else
        p.row_scalars[row] = weights[k];
    }
  }
}

void FillPadding(const MoEShape& shape, const DispatchParams& p) {
  const int groups = shape.num_row_groups();
  for (int group = 0; group < groups; ++group)
    ZeroRows(shape, p, p.tables.group_offsets[group] + p.tables.group_counts[group],
             p.tables.group_offsets[group + 1]);
  ZeroRows(shape, p, p.tables.group_offsets[groups], shape.capacity);
}

void PoisonDispatch(const MoEShape& shape, const DispatchParams& p) {
  VisitDType(shape.dtype, [&](auto* t) {
    FillNaN(static_cast<decltype(t)>(p.tokens), shape.capacity * shape.hidden_size);
  });
  if (p.row_scalars != nullptr) FillNaN(p.row_scalars, shape.capacity * ScalarsPerRow(shape, p));
}

}  // namespace jax_ep::cpu
