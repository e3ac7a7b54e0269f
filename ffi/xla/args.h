// Turns the buffers of an FFI call into the params struct of its op, with the checks that memory
// safety needs. What users get wrong is refused in Python, with the argument's name, before it
// comes here.
#ifndef JAX_EP_XLA_ARGS_H_
#define JAX_EP_XLA_ARGS_H_

#include <string>
#include <utility>

#include "common/ops.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep::xla_ffi {

namespace ffi = ::xla::ffi;

using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
using IntsOut = ffi::Result<Ints>;
using FloatsOut = ffi::Result<Floats>;
using AnyOut = ffi::Result<ffi::AnyBuffer>;

constexpr int64_t kTicketSize = 2;

// The operands and results of each op, in the order of its handlers' parameters. `begin` binds what
// the backend needs before them. With a ticket an op is the receiving half of the request that gave
// it: its other operands are those of the sending half. A scalar stands for an operand that is
// absent, an empty buffer for a result that is.
template <typename Binding>
auto BindDispatch(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Attr<int64_t>("fill")
      .template Arg<Ints>()             // topk_ids
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<Floats>()           // weights, or a scalar
      .template Arg<ffi::AnyBuffer>()   // scales, or a scalar
      .template Arg<Ints>()             // ticket, or a scalar
      .template Ret<Ints>()             // tables
      .template Ret<Ints>()             // num_tokens_per_expert
      .template Ret<Ints>()             // offsets
      .template Ret<Ints>()             // num_dropped
      .template Ret<Ints>()             // recv_topk_ids
      .template Ret<ffi::AnyBuffer>()   // tokens
      .template Ret<Floats>()           // row_scalars, or empty
      .template Ret<ffi::AnyBuffer>();  // row_scales, or empty
}
template <typename Binding>
auto BindDispatchCached(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Attr<int64_t>("fill")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<Floats>()           // weights, or a scalar
      .template Arg<ffi::AnyBuffer>()   // scales, or a scalar
      .template Arg<Ints>()             // tables
      .template Arg<ffi::AnyBuffer>()   // y, or a scalar
      .template Arg<Floats>()           // row_weights, or a scalar
      .template Arg<Ints>()             // ticket, or a scalar
      .template Ret<ffi::AnyBuffer>()   // tokens
      .template Ret<Floats>()           // row_scalars, or empty
      .template Ret<ffi::AnyBuffer>();  // row_scales, or empty
}
template <typename Binding>
auto BindCombine(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Arg<ffi::AnyBuffer>()  // y
      .template Arg<Floats>()          // row_weights, or a scalar
      .template Arg<Floats>()          // row_scalars, or a scalar
      .template Arg<Ints>()            // tables
      .template Arg<Ints>()            // ticket, or a scalar
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<Floats>();         // token_scalars, or empty
}
template <typename Binding>
auto BindDispatchStart(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Attr<int64_t>("block")
      .template Attr<int64_t>("quant_dtype")
      .template Attr<int64_t>("scale_dtype")
      .template Arg<Ints>()            // topk_ids, or a scalar
      .template Arg<ffi::AnyBuffer>()  // x
      .template Arg<Floats>()          // weights, or a scalar
      .template Arg<ffi::AnyBuffer>()  // scales, or a scalar
      .template Arg<Ints>()            // tables, or a scalar
      .template Ret<Ints>();           // ticket
}
template <typename Binding>
auto BindCombineStart(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Attr<int64_t>("num_tokens")
      .template Arg<ffi::AnyBuffer>()  // y
      .template Arg<Floats>()          // row_weights, or a scalar
      .template Arg<Ints>()            // tables
      .template Ret<Ints>();           // ticket
}
template <typename Binding>
auto BindTransfer(Binding begin) {
  return std::move(begin)
      .template Attr<int64_t>("comm")
      .template Arg<ffi::AnyBuffer>()   // source
      .template Arg<Ints>()             // tables
      .template Ret<ffi::AnyBuffer>();  // dest
}

ffi::ErrorOr<FreshDispatchParams> ParseDispatch(const MoEShape& shape, int64_t fill, Ints topk_ids,
                                                ffi::AnyBuffer x, Floats weights,
                                                ffi::AnyBuffer scales, Ints ticket, IntsOut tables,
                                                IntsOut num_tokens_per_expert, IntsOut offsets,
                                                IntsOut num_dropped, IntsOut recv_topk_ids,
                                                AnyOut tokens, FloatsOut row_scalars,
                                                AnyOut row_scales);
ffi::ErrorOr<DispatchParams> ParseDispatchCached(const MoEShape& shape, int64_t fill,
                                                 ffi::AnyBuffer x, Floats weights,
                                                 ffi::AnyBuffer scales, Ints tables,
                                                 ffi::AnyBuffer y, Floats row_weights, Ints ticket,
                                                 AnyOut tokens, FloatsOut row_scalars,
                                                 AnyOut row_scales);
ffi::ErrorOr<CombineParams> ParseCombine(const MoEShape& shape, ffi::AnyBuffer y,
                                         Floats row_weights, Floats row_scalars, Ints tables,
                                         Ints ticket, AnyOut out, FloatsOut token_scalars);
ffi::ErrorOr<DispatchStartParams> ParseDispatchStart(const MoEShape& shape, int64_t block,
                                                     int64_t quant_dtype, int64_t scale_dtype,
                                                     Ints topk_ids, ffi::AnyBuffer x,
                                                     Floats weights, ffi::AnyBuffer scales,
                                                     Ints tables, IntsOut ticket);
ffi::ErrorOr<CombineStartParams> ParseCombineStart(const MoEShape& shape, int64_t num_tokens,
                                                   ffi::AnyBuffer y, Floats row_weights,
                                                   Ints tables, IntsOut ticket);
ffi::ErrorOr<TransferParams> ParseTransfer(const MoEShape& shape, ffi::AnyBuffer source,
                                           Ints tables, AnyOut dest);

inline ffi::Error Destroyed() {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    "jax_ep: the MoECommunicator of this program was destroyed");
}

inline ffi::Error NotAMember(int32_t ordinal) {
  return ffi::Error::InvalidArgument("jax_ep: device " + std::to_string(ordinal) +
                                     " is not part of the communicator's mesh");
}

}  // namespace jax_ep::xla_ffi

#endif  // JAX_EP_XLA_ARGS_H_
