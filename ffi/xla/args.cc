#include "xla/args.h"

#include <algorithm>

namespace jax_ep::xla_ffi {
namespace {

// Collects the first mismatch, so that checks read as one list.
class Checks {
 public:
  void Elements(const char* name, int64_t got, int64_t expected) {
    if (got != expected && error_.empty())
      error_ = std::string("jax_ep: ") + name + ": expected " + std::to_string(expected) +
               " elements, got " + std::to_string(got);
  }
  void Type(const char* name, ffi::DataType got, DType expected) {
    static constexpr ffi::DataType kTypes[] = {ffi::F16, ffi::BF16, ffi::F32, ffi::F64};
    const ffi::DataType type = kTypes[static_cast<int>(expected)];
    if (got != type && error_.empty())
      error_ = std::string("jax_ep: ") + name + ": expected XLA type " +
               std::to_string(static_cast<int>(type)) + ", got " +
               std::to_string(static_cast<int>(got));
  }
  void True(bool condition, const char* text) {
    if (!condition && error_.empty()) error_ = std::string("jax_ep: ") + text;
  }
  template <typename Params>
  ffi::ErrorOr<Params> Result(const Params& params) const {
    if (!error_.empty()) return ffi::Unexpected(ffi::Error::InvalidArgument(error_));
    return params;
  }

 private:
  std::string error_;
};

template <typename Buffer>
int64_t Size(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

float* OrNull(const Floats& buffer) { return Size(buffer) == 0 ? nullptr : buffer.typed_data(); }

// [T, H] or [C, H]; T may be 0.
int64_t Rows(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() == 0 ? 0 : buffer.dimensions()[0];
}

// How rows travel follows from what is given and what is asked for: tokens that are no floats of
// `shape` are quantised, by us unless x has their type already.
QuantParams ParseQuant(const MoEShape& shape, const ffi::AnyBuffer& x, const ffi::AnyBuffer& scales,
                       const ffi::AnyBuffer& tokens, const ffi::AnyBuffer& row_scales,
                       Checks* checks) {
  QuantParams quant;
  if (Size(row_scales) == 0) return quant;
  quant.block = static_cast<int32_t>(shape.capacity * shape.hidden_size / Size(row_scales));
  checks->Elements("row_scales", Size(row_scales) * quant.block,
                   shape.capacity * shape.hidden_size);
  checks->True(quant.block > 0 && shape.hidden_size % quant.block == 0,
               "row_scales: not a whole number for each row");
  switch (tokens.element_type()) {
    case ffi::F8E4M3FN:
      quant.dtype = QuantDType::kE4M3;
      break;
    case ffi::F8E5M2:
      quant.dtype = QuantDType::kE5M2;
      break;
    default:
      quant.dtype = QuantDType::kInt8;
      checks->True(tokens.element_type() == ffi::S8, "tokens: not a type for quantised rows");
  }
  const bool is_e8m0 = row_scales.element_type() == ffi::F8E8M0FNU;
  quant.scale_dtype = is_e8m0 ? ScaleDType::kE8M0 : ScaleDType::kF32;
  checks->True(is_e8m0 || row_scales.element_type() == ffi::F32,
               "row_scales: not a type for scales");
  quant.row_scales = row_scales.untyped_data();
  checks->True(
      shape.hidden_size + shape.hidden_size / std::max(quant.block, 1) * (is_e8m0 ? 1 : 4) <=
          shape.row_bytes(),
      "row_scales: more than the place of a plain row has room for");
  if (Size(scales) == 0) return quant;
  checks->Elements("scales", Size(scales) * quant.block, Rows(x) * shape.hidden_size);
  checks->True(scales.element_type() == row_scales.element_type(),
               "scales: not of the type of row_scales");
  checks->True(x.element_type() == tokens.element_type(), "x: not of the type of tokens");
  quant.scales = scales.untyped_data();
  return quant;
}

// What every dispatch has; with `scaled`, one scalar per row.
DispatchParams ParseRows(const MoEShape& shape, int64_t fill, const ffi::AnyBuffer& x,
                         const Floats& weights, const ffi::AnyBuffer& scales, const Ints& tables,
                         bool scaled, AnyOut tokens, FloatsOut row_scalars, AnyOut row_scales,
                         Checks* checks) {
  const int64_t num_tokens = Rows(x), rows = shape.capacity;
  const RouteTablesLayout layout(shape, num_tokens);
  const QuantParams quant = ParseQuant(shape, x, scales, *tokens, *row_scales, checks);
  if (quant.scales == nullptr) checks->Type("x", x.element_type(), shape.dtype);
  if (quant.block == 0) checks->Type("tokens", tokens->element_type(), shape.dtype);
  checks->Elements("x", Size(x), num_tokens * shape.hidden_size);
  if (Size(weights) > 0) checks->Elements("weights", Size(weights), num_tokens * shape.topk);
  checks->Elements("tables", Size(tables), layout.size);
  checks->Elements("tokens", Size(*tokens), rows * shape.hidden_size);
  if (Size(*row_scalars) > 0 || Size(weights) > 0 || scaled)
    checks->Elements("row_scalars", Size(*row_scalars),
                     rows * (scaled ? 1 : shape.weights_per_row()));
  if (num_tokens > shape.max_tokens_per_rank)
    checks->Elements("tokens", num_tokens, shape.max_tokens_per_rank);
  return {num_tokens,
          x.untyped_data(),
          OrNull(weights),
          layout.At(tables.typed_data()),
          nullptr,
          nullptr,
          tokens->untyped_data(),
          OrNull(*row_scalars),
          fill != 0,
          quant};
}

}  // namespace

ffi::ErrorOr<FreshDispatchParams> ParseDispatch(const MoEShape& shape, int64_t fill, Ints topk_ids,
                                                ffi::AnyBuffer x, Floats weights,
                                                ffi::AnyBuffer scales, IntsOut tables,
                                                IntsOut num_tokens_per_expert, IntsOut offsets,
                                                IntsOut num_dropped, IntsOut recv_topk_ids,
                                                AnyOut tokens, FloatsOut row_scalars,
                                                AnyOut row_scales) {
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  Checks checks;
  const DispatchParams dispatch =
      ParseRows(shape, fill, x, weights, scales, *tables, /*scaled=*/false, tokens, row_scalars,
                row_scales, &checks);
  checks.Elements("topk_ids", Size(topk_ids), dispatch.num_tokens * shape.topk);
  checks.Elements("num_tokens_per_expert", Size(*num_tokens_per_expert), shape.local_experts());
  checks.Elements("offsets", Size(*offsets), shape.num_row_groups() + 1);
  checks.Elements("num_dropped", Size(*num_dropped), 1);
  checks.Elements("recv_topk_ids", Size(*recv_topk_ids),
                  rank_major ? shape.capacity * shape.topk : 0);
  const RouteParams route{dispatch.num_tokens,
                          topk_ids.typed_data(),
                          dispatch.tables,
                          num_tokens_per_expert->typed_data(),
                          offsets->typed_data(),
                          num_dropped->typed_data(),
                          recv_topk_ids->typed_data()};
  return checks.Result(FreshDispatchParams{route, dispatch});
}

ffi::ErrorOr<DispatchParams> ParseDispatchCached(const MoEShape& shape, int64_t fill,
                                                 ffi::AnyBuffer x, Floats weights,
                                                 ffi::AnyBuffer scales, Ints tables,
                                                 ffi::AnyBuffer y, Floats row_weights,
                                                 AnyOut tokens, FloatsOut row_scalars,
                                                 AnyOut row_scales) {
  const bool scaled = Size(row_weights) > 0;
  Checks checks;
  DispatchParams dispatch = ParseRows(shape, fill, x, weights, scales, tables, scaled, tokens,
                                      row_scalars, row_scales, &checks);
  if (scaled) {
    checks.True(dispatch.quant.block == 0, "y: not beside quantised rows");
    checks.Type("y", y.element_type(), shape.dtype);
    checks.Elements("y", Size(y), shape.capacity * shape.hidden_size);
    checks.Elements("row_weights", Size(row_weights), shape.capacity);
    dispatch.y = y.untyped_data();
    dispatch.row_weights = row_weights.typed_data();
  }
  return checks.Result(dispatch);
}

ffi::ErrorOr<CombineParams> ParseCombine(const MoEShape& shape, ffi::AnyBuffer y,
                                         Floats row_weights, Floats row_scalars, Ints tables,
                                         AnyOut out, FloatsOut token_scalars) {
  const int64_t num_tokens = Rows(*out), rows = shape.capacity;
  const RouteTablesLayout layout(shape, num_tokens);
  Checks checks;
  checks.Type("y", y.element_type(), shape.dtype);
  checks.Type("out", out->element_type(), shape.dtype);
  checks.Elements("y", Size(y), rows * shape.hidden_size);
  if (Size(row_weights) > 0) checks.Elements("row_weights", Size(row_weights), rows);
  checks.Elements("tables", Size(tables), layout.size);
  checks.Elements("out", Size(*out), num_tokens * shape.hidden_size);
  if (Size(row_scalars) > 0) {
    checks.Elements("row_scalars", Size(row_scalars), rows * shape.weights_per_row());
    checks.Elements("token_scalars", Size(*token_scalars), num_tokens * shape.topk);
  }
  if (num_tokens > shape.max_tokens_per_rank)
    checks.Elements("tokens", num_tokens, shape.max_tokens_per_rank);
  return checks.Result(CombineParams{num_tokens, y.untyped_data(), OrNull(row_weights),
                                     OrNull(row_scalars), layout.At(tables.typed_data()),
                                     out->untyped_data(), OrNull(*token_scalars)});
}

}  // namespace jax_ep::xla_ffi
