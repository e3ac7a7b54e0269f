// The CUDA handlers and the Python module that carries them.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>

#include "common/registry.h"
#include "cuda/communicator.h"
#include "cuda/nvtx.h"
#include "xla/args.h"
#include "xla/module.h"

namespace jax_ep::xla_ffi {
namespace {

using Communicators = Registry<cuda::Communicator>;

auto BindCall() {
  return ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::PlatformStream<cudaStream_t>>();
}

// The name of an op's launch, or of its receiving half's if it has a ticket.
const char* NameOf(const Ints& ticket, const char* whole, const char* receiving_half) {
  return ticket.dimensions().size() > 0 ? receiving_half : whole;
}

template <typename Params, typename... Buffers>
ffi::Error Launch(const char* name, ffi::ErrorOr<Params> (*parse)(const MoEShape&, Buffers...),
                  std::string (cuda::Communicator::*op)(int32_t, const Params&, cudaStream_t),
                  int32_t ordinal, cudaStream_t stream, int64_t comm, Buffers... buffers) {
  const cuda::NvtxRange range(name);
  const auto communicator = Communicators::Get().Find(comm);
  if (communicator == nullptr) return Destroyed();
  if (FindPlace(communicator->spec(), ordinal).rank < 0) return NotAMember(ordinal);
  const ffi::ErrorOr<Params> params = parse(communicator->spec().shape, buffers...);
  if (params.has_error()) return params.error();
  const std::string error = (communicator.get()->*op)(ordinal, params.value(), stream);
  return error.empty() ? ffi::Error::Success() : ffi::Error::Internal("jax_ep: " + error);
}

ffi::Error Dispatch(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t fill, Ints topk_ids,
                    ffi::AnyBuffer x, Floats weights, ffi::AnyBuffer scales, Ints ticket,
                    IntsOut tables, IntsOut num_tokens_per_expert, IntsOut offsets,
                    IntsOut num_dropped, IntsOut recv_topk_ids, AnyOut tokens,
                    FloatsOut row_scalars, AnyOut row_scales) {
  return Launch(NameOf(ticket, "jax_ep_dispatch", "jax_ep_dispatch (receive)"), ParseDispatch,
                &cuda::Communicator::Dispatch, ordinal, stream, comm, fill, topk_ids, x, weights,
                scales, ticket, tables, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids,
                tokens, row_scalars, row_scales);
}

ffi::Error DispatchCached(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t fill,
                          ffi::AnyBuffer x, Floats weights, ffi::AnyBuffer scales, Ints tables,
                          ffi::AnyBuffer y, Floats row_weights, Ints ticket, AnyOut tokens,
                          FloatsOut row_scalars, AnyOut row_scales) {
  return Launch(NameOf(ticket, "jax_ep_dispatch_cached", "jax_ep_dispatch_cached (receive)"),
                ParseDispatchCached, &cuda::Communicator::DispatchCached, ordinal, stream, comm,
                fill, x, weights, scales, tables, y, row_weights, ticket, tokens, row_scalars,
                row_scales);
}

ffi::Error Combine(int32_t ordinal, cudaStream_t stream, int64_t comm, ffi::AnyBuffer y,
                   Floats row_weights, Floats row_scalars, Ints tables, Ints ticket, AnyOut out,
                   FloatsOut token_scalars) {
  return Launch<CombineParams>(NameOf(ticket, "jax_ep_combine", "jax_ep_combine (receive)"),
                               ParseCombine, &cuda::Communicator::Combine, ordinal, stream, comm, y,
                               row_weights, row_scalars, tables, ticket, out, token_scalars);
}

ffi::Error DispatchStart(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t block,
                         int64_t quant_dtype, int64_t scale_dtype, Ints topk_ids, ffi::AnyBuffer x,
                         Floats weights, ffi::AnyBuffer scales, Ints tables, IntsOut ticket) {
  return Launch(
      topk_ids.dimensions().size() > 0 ? "jax_ep_dispatch (send)" : "jax_ep_dispatch_cached (send)",
      ParseDispatchStart, &cuda::Communicator::DispatchStart, ordinal, stream, comm, block,
      quant_dtype, scale_dtype, topk_ids, x, weights, scales, tables, ticket);
}

ffi::Error CombineStart(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t num_tokens,
                        ffi::AnyBuffer y, Floats row_weights, Ints tables, IntsOut ticket) {
  return Launch("jax_ep_combine (send)", ParseCombineStart, &cuda::Communicator::CombineStart,
                ordinal, stream, comm, num_tokens, y, row_weights, tables, ticket);
}

ffi::Error Transfer(int32_t ordinal, cudaStream_t stream, int64_t comm, ffi::AnyBuffer source,
                    Ints tables, AnyOut dest) {
  return Launch("jax_ep_transfer", ParseTransfer, &cuda::Communicator::Transfer, ordinal, stream,
                comm, source, tables, dest);
}

ffi::Error TooFewRanks() {
  return ffi::Error::InvalidArgument("jax_ep: a ceiling of the link needs 2 ranks or more");
}

ffi::Error CeilingStores(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t repeats,
                         ffi::AnyBuffer x, IntsOut done) {
  const auto parse = +[](const MoEShape& shape, int64_t repeats, ffi::AnyBuffer x,
                         IntsOut done) -> ffi::ErrorOr<cuda::StoresParams> {
    const auto rows = static_cast<int64_t>(x.size_bytes()) / shape.row_bytes();
    if (shape.num_ranks < 2) return ffi::Unexpected(TooFewRanks());
    if (rows < 1 || rows > shape.max_tokens_per_rank || done->element_count() != 1)
      return ffi::Unexpected(ffi::Error::InvalidArgument("jax_ep: x: expected 1 to " +
                                                         std::to_string(shape.max_tokens_per_rank) +
                                                         " rows, got " + std::to_string(rows)));
    return cuda::StoresParams{rows, repeats, x.untyped_data(), done->typed_data()};
  };
  return Launch("jax_ep_ceiling_stores", parse, &cuda::Communicator::Stores, ordinal, stream, comm,
                repeats, x, done);
}

ffi::Error CeilingFlags(int32_t ordinal, cudaStream_t stream, int64_t comm, int64_t rounds,
                        Ints /*after*/, IntsOut done) {
  const auto parse =
      +[](const MoEShape& shape, int64_t rounds, IntsOut done) -> ffi::ErrorOr<cuda::FlagsParams> {
    if (shape.num_ranks < 2) return ffi::Unexpected(TooFewRanks());
    return cuda::FlagsParams{static_cast<uint32_t>(rounds), done->typed_data()};
  };
  return Launch("jax_ep_ceiling_flags", parse, &cuda::Communicator::Flags, ordinal, stream, comm,
                rounds, done);
}

// A launch depends on nothing that the host computes per call, so it may be captured and replayed.
XLA_FFI_DEFINE_HANDLER(kDispatch, Dispatch, BindDispatch(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDispatchCached, DispatchCached, BindDispatchCached(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, Combine, BindCombine(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDispatchStart, DispatchStart, BindDispatchStart(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineStart, CombineStart, BindCombineStart(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kTransfer, Transfer, BindTransfer(BindCall()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCeilingStores, CeilingStores,
                       BindCall()
                           .Attr<int64_t>("comm")
                           .Attr<int64_t>("repeats")
                           .Arg<ffi::AnyBuffer>()  // x
                           .Ret<Ints>(),           // done
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCeilingFlags, CeilingFlags,
                       BindCall()
                           .Attr<int64_t>("comm")
                           .Attr<int64_t>("rounds")
                           .Arg<Ints>()   // what it comes after
                           .Ret<Ints>(),  // done
                       {ffi::Traits::kCmdBufferCompatible});

// The communicator as Python holds it; the registry holds it for the handlers.
class PyCommunicator {
 public:
  using Handle = cuda::Communicator::PeerHandle;

  PyCommunicator(const CommunicatorSpec& spec, bool /*across_processes*/)
      : communicator_(std::make_shared<cuda::Communicator>(spec)) {
    ThrowIfError(communicator_->Prepare());
    Communicators::Get().Add(communicator_);
  }
  ~PyCommunicator() { Destroy(); }

  nb::bytes handle() const {
    std::vector<Handle> handles;
    ThrowIfError(communicator_->ExportHandles(&handles));
    return nb::bytes(handles.data(), handles.size() * sizeof(Handle));
  }
  void Connect(int32_t /*process*/, nb::bytes handle) {
    std::vector<Handle> handles(handle.size() / sizeof(Handle));
    std::memcpy(handles.data(), handle.data(), handles.size() * sizeof(Handle));
    ThrowIfError(communicator_->Connect(handles));
  }
  void Disconnect() {
    if (communicator_ != nullptr) communicator_->Disconnect();
  }
  int64_t arena_bytes() const { return communicator_->arena_bytes(); }
  PyError TakeError() { return ToPython(communicator_->TakeError(), communicator_->spec()); }
  void Destroy() {
    if (communicator_ == nullptr) return;
    Communicators::Get().Remove(communicator_->spec().id);
    communicator_.reset();
  }

 private:
  std::shared_ptr<cuda::Communicator> communicator_;
};

nb::dict Registrations() {
  nb::dict targets;
  targets["jax_ep_dispatch"] = Capsule(+kDispatch);
  targets["jax_ep_dispatch_cached"] = Capsule(+kDispatchCached);
  targets["jax_ep_combine"] = Capsule(+kCombine);
  targets["jax_ep_dispatch_start"] = Capsule(+kDispatchStart);
  targets["jax_ep_combine_start"] = Capsule(+kCombineStart);
  targets["jax_ep_transfer"] = Capsule(+kTransfer);
  targets["jax_ep_ceiling_stores"] = Capsule(+kCeilingStores);
  targets["jax_ep_ceiling_flags"] = Capsule(+kCeilingFlags);
  return targets;
}

}  // namespace

NB_MODULE(_cuda, m) {
  BindSpecs(m);
  m.def("registrations", &Registrations);
  m.def("types", [] { return nb::dict(); });
  BindCommunicator<PyCommunicator>(m);
}

}  // namespace jax_ep::xla_ffi
