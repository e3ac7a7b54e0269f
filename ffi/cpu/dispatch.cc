#include <cstring>
#include <vector>

#include "cpu/ops.h"
#include "cpu/quantize.h"
#include "cpu/rows.h"

namespace jax_ep::cpu {
namespace {

// What is in row_scalars beside each row: its weights, or one dot product.
int64_t ScalarsPerRow(const MoEShape& shape, const DispatchParams& p) {
  return p.y != nullptr ? 1 : shape.weights_per_row();
}

// The rows of one source as they are written: those of x or, if quantising them is up to us, each
// quantised when it is first asked for.
class SourceRows {
 public:
  struct Row {
    const std::byte* elements;
    const std::byte* scales;
  };

  SourceRows(const MoEShape& shape, const DispatchSource& from, const DispatchParams& p)
      : shape_(shape),
        from_(from),
        quant_(p.quant),
        x_row_bytes_(p.x_row_bytes(shape)),
        scale_row_bytes_(p.scale_row_bytes(shape)) {
    if (!quantises()) return;
    widened_.resize(shape.hidden_size);
    elements_.resize(p.row_bytes(shape));
    scales_.resize(scale_row_bytes_);
  }

  // Valid until the next token is asked for.
  Row At(int64_t token) {
    const std::byte* x = from_.x + token * x_row_bytes_;
    if (!quantises()) return {x, from_.scales + token * scale_row_bytes_};
    if (token != quantised_token_)
      QuantizeRow(shape_.dtype, quant_, x, shape_.hidden_size, widened_.data(), elements_.data(),
                  scales_.data());
    quantised_token_ = token;
    return {elements_.data(), scales_.data()};
  }

 private:
  bool quantises() const { return quant_.block > 0 && quant_.scales == nullptr; }

  const MoEShape& shape_;
  const DispatchSource& from_;
  const QuantParams& quant_;
  const int64_t x_row_bytes_, scale_row_bytes_;
  std::vector<float> widened_;
  std::vector<std::byte> elements_, scales_;
  int64_t quantised_token_ = -1;
};

void CopyRow(const MoEShape& shape, const DispatchParams& p, const SourceRows::Row& from,
             int64_t row) {
  const int64_t row_bytes = p.row_bytes(shape), scale_bytes = p.scale_row_bytes(shape);
  std::memcpy(static_cast<std::byte*>(p.tokens) + row * row_bytes, from.elements, row_bytes);
  if (scale_bytes > 0)
    std::memcpy(static_cast<std::byte*>(p.quant.row_scales) + row * scale_bytes, from.scales,
                scale_bytes);
}

void CopyWeights(const MoEShape& shape, const DispatchParams& p, const float* weights, int k,
                 int64_t row) {
  if (shape.layout == OutputLayout::kRankMajor)
    std::memcpy(p.row_scalars + row * shape.topk, weights, shape.topk * sizeof(float));
  else
    p.row_scalars[row] = weights[k];
}

// One output row of combine's gradient: the token's gradient times the row's weight.
template <typename T>
void ScaleRow(const MoEShape& shape, const DispatchParams& p, const std::byte* x, int64_t row) {
  const int64_t hidden = shape.hidden_size, at = row * hidden;
  const T* gradient = reinterpret_cast<const T*>(x);
  Scale(static_cast<T*>(p.tokens) + at, gradient, p.row_weights[row], hidden);
  p.row_scalars[row] = Dot(gradient, static_cast<const T*>(p.y) + at, hidden);
}

void ZeroRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const auto zero = [&](void* rows, int64_t row_bytes) {
    if (rows != nullptr)
      std::memset(static_cast<std::byte*>(rows) + begin * row_bytes, 0, (end - begin) * row_bytes);
  };
  zero(p.tokens, p.row_bytes(shape));
  zero(p.quant.row_scales, p.scale_row_bytes(shape));
  zero(p.row_scalars, ScalarsPerRow(shape, p) * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

void ExpandTokens(const MoEShape& shape, int source, const DispatchSource& from,
                  const std::vector<const DispatchParams*>& to, int64_t begin, int64_t end) {
  const int per_token = shape.rows_per_token();
  SourceRows source_rows(shape, from, *to.front());
  for (int64_t token = begin; token < end; ++token) {
    const float* weights = from.weights == nullptr ? nullptr : from.weights + token * shape.topk;
    for (const DispatchParams* p : to) {
      const int32_t* rows = p->tables.recv_rows + (source * p->num_tokens + token) * per_token;
      for (int k = 0; k < per_token; ++k) {
        const int64_t row = rows[k];
        if (row < 0) continue;
        if (p->y != nullptr) {
          VisitDType(shape.dtype, [&](auto* t) {
            ScaleRow<std::remove_pointer_t<decltype(t)>>(shape, *p, source_rows.At(token).elements,
                                                         row);
          });
          continue;
        }
        CopyRow(shape, *p, source_rows.At(token), row);
        if (weights != nullptr) CopyWeights(shape, *p, weights, k, row);
      }
    }
  }
}

void FillPadding(const MoEShape& shape, const DispatchParams& p) {
  if (shape.layout == OutputLayout::kExpertMajor && !p.fill) return;
  const int groups = shape.num_row_groups();
  for (int group = 0; group < groups; ++group)
    ZeroRows(shape, p, p.tables.group_offsets[group] + p.tables.group_counts[group],
             p.tables.group_offsets[group + 1]);
  ZeroRows(shape, p, p.tables.group_offsets[groups], shape.capacity);
}

void PoisonDispatch(const MoEShape& shape, const DispatchParams& p) {
  const int64_t scale_bytes = shape.capacity * p.scale_row_bytes(shape);
  if (p.row_scalars != nullptr) FillNaN(p.row_scalars, shape.capacity * ScalarsPerRow(shape, p));
  if (p.quant.block == 0) {
    VisitDType(shape.dtype, [&](auto* t) {
      FillNaN(static_cast<decltype(t)>(p.tokens), shape.capacity * shape.hidden_size);
    });
    return;
  }
  // Not all types of elements have a NaN, but all scales do.
  std::memset(p.tokens, 0, shape.capacity * p.row_bytes(shape));
  if (p.quant.scale_dtype == ScaleDType::kE8M0)
    std::memset(p.quant.row_scales, 0xff, scale_bytes);
  else
    FillNaN(static_cast<float*>(p.quant.row_scales), scale_bytes / 4);
}

}  // namespace jax_ep::cpu
