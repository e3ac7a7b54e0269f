#include "xla/args.h"

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
  void Type(const char* name, ffi::DataType got, ffi::DataType expected) {
    if (got != expected && error_.empty())
      error_ = std::string("jax_ep: ") + name + ": expected XLA type " +
               std::to_string(static_cast<int>(expected)) + ", got " +
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

ffi::DataType XlaType(DType dtype) {
  static constexpr ffi::DataType kTypes[] = {ffi::F16, ffi::BF16, ffi::F32, ffi::F64};
  return kTypes[static_cast<int>(dtype)];
}
ffi::DataType XlaType(QuantDType dtype) {
  static constexpr ffi::DataType kTypes[] = {ffi::F8E4M3FN, ffi::F8E5M2, ffi::S8};
  return kTypes[static_cast<int>(dtype)];
}
ffi::DataType XlaType(ScaleDType dtype) {
  return dtype == ScaleDType::kE8M0 ? ffi::F8E8M0FNU : ffi::F32;
}

template <typename Buffer>
int64_t Size(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

template <typename Buffer>
bool IsGiven(const Buffer& operand) {
  return operand.dimensions().size() > 0;
}

const float* OrNull(const Floats& operand) {
  return IsGiven(operand) ? operand.typed_data() : nullptr;
}

// [T, H] or [C, H]; T may be 0.
int64_t Rows(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() == 0 ? 0 : buffer.dimensions()[0];
}

void CheckNumTokens(const MoEShape& shape, int64_t num_tokens, Checks* checks) {
  if (num_tokens < 0 || num_tokens > shape.max_tokens_per_rank)
    checks->Elements("tokens", num_tokens, shape.max_tokens_per_rank);
}

RouteTables ParseTables(const MoEShape& shape, const Ints& tables, int64_t num_tokens,
                        Checks* checks) {
  const RouteTablesLayout layout(shape, num_tokens);
  checks->Elements("tables", Size(tables), layout.size);
  return layout.At(tables.typed_data());
}

// Of the request that an op is the receiving half of; null if it is whole.
const int32_t* ParseTicket(const Ints& ticket, Checks* checks) {
  if (!IsGiven(ticket)) return nullptr;
  checks->Elements("ticket", Size(ticket), kTicketSize);
  return ticket.typed_data();
}

// How rows travel, by what is asked for: rows with scales are quantised.
QuantParams QuantOf(const MoEShape& shape, const ffi::AnyBuffer& tokens,
                    const ffi::AnyBuffer& row_scales, Checks* checks) {
  QuantParams quant;
  if (Size(row_scales) == 0) {
    checks->Type("tokens", tokens.element_type(), XlaType(shape.dtype));
    return quant;
  }
  quant.block = static_cast<int32_t>(shape.capacity * shape.hidden_size / Size(row_scales));
  checks->Elements("row_scales", Size(row_scales) * quant.block,
                   shape.capacity * shape.hidden_size);
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
  return quant;
}

// How rows travel, by what a sending half is told.
QuantParams QuantOf(const MoEShape& shape, int64_t block, int64_t dtype, int64_t scale_dtype,
                    Checks* checks) {
  QuantParams quant;
  const bool is_known = block >= 0 && block <= shape.hidden_size && dtype >= 0 &&
                        dtype <= static_cast<int64_t>(QuantDType::kInt8) && scale_dtype >= 0 &&
                        scale_dtype <= static_cast<int64_t>(ScaleDType::kE8M0);
  checks->True(is_known, "block, quant_dtype, scale_dtype: no way to quantise a row");
  if (!is_known) return quant;
  quant.block = static_cast<int32_t>(block);
  quant.dtype = static_cast<QuantDType>(dtype);
  quant.scale_dtype = static_cast<ScaleDType>(scale_dtype);
  return quant;
}

// What every dispatch sends, as `quant` says: rows are quantised by us unless scales come with
// them.
DispatchParams ParseSent(const MoEShape& shape, const ffi::AnyBuffer& x, const Floats& weights,
                         const ffi::AnyBuffer& scales, const QuantParams& quant, Checks* checks) {
  DispatchParams params{};
  params.num_tokens = Rows(x);
  params.x = x.untyped_data();
  params.weights = OrNull(weights);
  params.quant = quant;
  CheckNumTokens(shape, params.num_tokens, checks);
  checks->Elements("x", Size(x), params.num_tokens * shape.hidden_size);
  if (IsGiven(weights)) checks->Elements("weights", Size(weights), params.num_tokens * shape.topk);
  if (quant.block != 0) {
    const bool divides = shape.hidden_size % quant.block == 0;
    checks->True(divides, "scales: not a whole number for each row");
    checks->True(!divides || shape.hidden_size + params.scale_row_bytes(shape) <= shape.row_bytes(),
                 "scales: more than the place of a plain row has room for");
  }
  if (quant.block == 0 || !IsGiven(scales)) {
    checks->Type("x", x.element_type(), XlaType(shape.dtype));
    return params;
  }
  checks->Elements("scales", Size(scales) * quant.block, params.num_tokens * shape.hidden_size);
  checks->Type("scales", scales.element_type(), XlaType(quant.scale_dtype));
  checks->Type("x", x.element_type(), XlaType(quant.dtype));
  params.quant.scales = scales.untyped_data();
  return params;
}

// What every dispatch has that receives; with `scaled`, one scalar per row.
DispatchParams ParseRows(const MoEShape& shape, int64_t fill, const ffi::AnyBuffer& x,
                         const Floats& weights, const ffi::AnyBuffer& scales, const Ints& tables,
                         const Ints& ticket, bool scaled, AnyOut tokens, FloatsOut row_scalars,
                         AnyOut row_scales, Checks* checks) {
  const int64_t rows = shape.capacity;
  const QuantParams quant = QuantOf(shape, *tokens, *row_scales, checks);
  DispatchParams params = ParseSent(shape, x, weights, scales, quant, checks);
  params.tables = ParseTables(shape, tables, params.num_tokens, checks);
  params.ticket = ParseTicket(ticket, checks);
  checks->Elements("tokens", Size(*tokens), rows * shape.hidden_size);
  params.tokens = tokens->untyped_data();
  if (Size(*row_scalars) > 0 || IsGiven(weights) || scaled)
    checks->Elements("row_scalars", Size(*row_scalars),
                     rows * (scaled ? 1 : shape.weights_per_row()));
  params.row_scalars = Size(*row_scalars) > 0 ? row_scalars->typed_data() : nullptr;
  params.fill = fill != 0;
  return params;
}

// What every combine sends.
CombineParams ParseSums(const MoEShape& shape, int64_t num_tokens, const ffi::AnyBuffer& y,
                        const Floats& row_weights, const Ints& tables, Checks* checks) {
  CombineParams params{};
  params.num_tokens = num_tokens;
  params.y = y.untyped_data();
  params.row_weights = OrNull(row_weights);
  CheckNumTokens(shape, num_tokens, checks);
  checks->Type("y", y.element_type(), XlaType(shape.dtype));
  checks->Elements("y", Size(y), shape.capacity * shape.hidden_size);
  if (IsGiven(row_weights)) checks->Elements("row_weights", Size(row_weights), shape.capacity);
  params.tables = ParseTables(shape, tables, num_tokens, checks);
  return params;
}

}  // namespace

ffi::ErrorOr<FreshDispatchParams> ParseDispatch(const MoEShape& shape, int64_t fill, Ints topk_ids,
                                                ffi::AnyBuffer x, Floats weights,
                                                ffi::AnyBuffer scales, Ints ticket, IntsOut tables,
                                                IntsOut num_tokens_per_expert, IntsOut offsets,
                                                IntsOut num_dropped, IntsOut recv_topk_ids,
                                                AnyOut tokens, FloatsOut row_scalars,
                                                AnyOut row_scales) {
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  Checks checks;
  const DispatchParams dispatch =
      ParseRows(shape, fill, x, weights, scales, *tables, ticket, /*scaled=*/false, tokens,
                row_scalars, row_scales, &checks);
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
                                                 ffi::AnyBuffer y, Floats row_weights, Ints ticket,
                                                 AnyOut tokens, FloatsOut row_scalars,
                                                 AnyOut row_scales) {
  const bool scaled = IsGiven(row_weights);
  Checks checks;
  DispatchParams dispatch = ParseRows(shape, fill, x, weights, scales, tables, ticket, scaled,
                                      tokens, row_scalars, row_scales, &checks);
  if (scaled) {
    checks.True(dispatch.quant.block == 0, "y: not beside quantised rows");
    checks.True(dispatch.ticket == nullptr, "y: not beside a ticket");
    checks.Type("y", y.element_type(), XlaType(shape.dtype));
    checks.Elements("y", Size(y), shape.capacity * shape.hidden_size);
    checks.Elements("row_weights", Size(row_weights), shape.capacity);
    dispatch.y = y.untyped_data();
    dispatch.row_weights = row_weights.typed_data();
  }
  return checks.Result(dispatch);
}

ffi::ErrorOr<CombineParams> ParseCombine(const MoEShape& shape, ffi::AnyBuffer y,
                                         Floats row_weights, Floats row_scalars, Ints tables,
                                         Ints ticket, AnyOut out, FloatsOut token_scalars) {
  Checks checks;
  CombineParams combine = ParseSums(shape, Rows(*out), y, row_weights, tables, &checks);
  combine.ticket = ParseTicket(ticket, &checks);
  checks.Type("out", out->element_type(), XlaType(shape.dtype));
  checks.Elements("out", Size(*out), combine.num_tokens * shape.hidden_size);
  combine.out = out->untyped_data();
  if (IsGiven(row_scalars)) {
    checks.True(combine.ticket == nullptr, "row_scalars: not beside a ticket");
    checks.Elements("row_scalars", Size(row_scalars), shape.capacity * shape.weights_per_row());
    checks.Elements("token_scalars", Size(*token_scalars), combine.num_tokens * shape.topk);
    combine.row_scalars = row_scalars.typed_data();
    combine.token_scalars = token_scalars->typed_data();
  }
  return checks.Result(combine);
}

ffi::ErrorOr<DispatchStartParams> ParseDispatchStart(const MoEShape& shape, int64_t block,
                                                     int64_t quant_dtype, int64_t scale_dtype,
                                                     Ints topk_ids, ffi::AnyBuffer x,
                                                     Floats weights, ffi::AnyBuffer scales,
                                                     Ints tables, IntsOut ticket) {
  Checks checks;
  const QuantParams quant = QuantOf(shape, block, quant_dtype, scale_dtype, &checks);
  DispatchParams dispatch = ParseSent(shape, x, weights, scales, quant, &checks);
  const bool is_fresh = IsGiven(topk_ids);
  if (is_fresh)
    checks.Elements("topk_ids", Size(topk_ids), dispatch.num_tokens * shape.topk);
  else
    dispatch.tables = ParseTables(shape, tables, dispatch.num_tokens, &checks);
  checks.Elements("ticket", Size(*ticket), kTicketSize);
  return checks.Result(DispatchStartParams{is_fresh ? topk_ids.typed_data() : nullptr, dispatch,
                                           ticket->typed_data()});
}

ffi::ErrorOr<CombineStartParams> ParseCombineStart(const MoEShape& shape, int64_t num_tokens,
                                                   ffi::AnyBuffer y, Floats row_weights,
                                                   Ints tables, IntsOut ticket) {
  Checks checks;
  const CombineParams combine = ParseSums(shape, num_tokens, y, row_weights, tables, &checks);
  checks.Elements("ticket", Size(*ticket), kTicketSize);
  return checks.Result(CombineStartParams{combine, ticket->typed_data()});
}

ffi::ErrorOr<TransferParams> ParseTransfer(const MoEShape& shape, ffi::AnyBuffer source,
                                           Ints tables, AnyOut dest) {
  Checks checks;
  checks.Type("dest", dest->element_type(), source.element_type());
  checks.True(source.dimensions().size() == 2 && dest->dimensions().size() == 2 &&
                  source.dimensions()[1] == dest->dimensions()[1] && Size(source) > 0 &&
                  Size(*dest) > 0,
              "source, dest: expected [S, W] and [D, W], and neither empty");
  const int64_t num_slots = Rows(*dest),
                rest = Size(tables) - TransferTablesLayout(shape.num_ranks, num_slots, 0).size;
  checks.True(rest >= 0 && rest % 2 == 0, "tables: not of this number of slots");
  if (auto error = checks.Result(0); error.has_error()) return ffi::Unexpected(error.error());
  const TransferTablesLayout layout(shape.num_ranks, num_slots, rest / 2);
  return TransferParams{source.untyped_data(), dest->untyped_data(),
                        static_cast<int64_t>(dest->size_bytes()) / num_slots, num_slots,
                        layout.At(tables.typed_data())};
}

}  // namespace jax_ep::xla_ffi
