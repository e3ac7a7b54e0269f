// The CPU handlers and the Python module that carries them.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "common/registry.h"
#include "cpu/communicator.h"
#include "xla/args.h"
#include "xla/module.h"

namespace jax_ep::xla_ffi {
namespace {

using Communicators = Registry<cpu::Communicator>;

// One call site of an op in one loaded program: XLA makes it once and shares it between the
// devices. Devices reach their call sites in different orders, so arrivals are matched by (site,
// run, occurrence).
class CallSite {
 public:
  static ffi::TypeId id;
  static ffi::TypeInfo info;

  explicit CallSite(int64_t number) : number_(number) {}

  cpu::OpKey NextKey(int64_t run_id, int32_t ordinal) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (runs_.find(run_id) == runs_.end()) {
      order_.push_back(run_id);
      if (order_.size() > kMaxRunsInFlight) runs_.erase(order_.front()), order_.pop_front();
    }
    return {0, number_, run_id, runs_[run_id][ordinal]++};
  }

 private:
  static constexpr size_t kMaxRunsInFlight = 4096;

  const int64_t number_;
  std::mutex mutex_;
  std::map<int64_t, std::map<int32_t, int64_t>> runs_;
  std::deque<int64_t> order_;
};

ffi::TypeId CallSite::id = {};
ffi::TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

// Ops differ in their other attributes.
ffi::ErrorOr<std::unique_ptr<CallSite>> MakeCallSite(ffi::Dictionary attributes) {
  const auto comm = attributes.get<int64_t>("comm");
  if (comm.has_error()) return ffi::Unexpected(comm.error());
  const auto communicator = Communicators::Get().Find(comm.value());
  return std::make_unique<CallSite>(communicator == nullptr ? -1 : communicator->NextSite());
}
XLA_FFI_DEFINE_HANDLER(kMakeCallSite, MakeCallSite, ffi::Ffi::BindInstantiate().Attrs());

auto BindCall() {
  return ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::RunId>().Ctx<ffi::State<CallSite>>();
}

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

// The steps of an op, one after the other.
using Steps = std::deque<cpu::OpParams>;
Steps StepsOf(const MoEShape&, const FreshDispatchParams& params) {
  return {params.route, params.dispatch};
}
Steps StepsOf(const MoEShape&, const DispatchParams& params) { return {params}; }
Steps StepsOf(const MoEShape&, const CombineParams& params) { return {params}; }
Steps StepsOf(const MoEShape& shape, const TransferParams& params) {
  Steps steps;
  const int64_t laps = cpu::NumLaps(shape, params);
  for (int64_t lap = 0; lap < laps; ++lap) steps.push_back(cpu::TransferLap{params, lap});
  return steps;
}

// Submits the first step, and the others once that is done. They share a key: by then no rank waits
// for the step before, and processes tell steps apart by what a lane says of its content.
void SubmitSteps(int64_t comm, int32_t ordinal, const cpu::OpKey& key, std::shared_ptr<Steps> steps,
                 std::shared_ptr<ffi::Promise> promise) {
  const auto communicator = Communicators::Get().Find(comm);
  if (communicator == nullptr) return promise->SetError(Destroyed());
  const double timeout_s = communicator->spec().timeout_s;
  const cpu::OpParams step = steps->front();
  steps->pop_front();
  communicator->Submit(ordinal, key, step, [=](const ErrorRecord& error) {
    if (error.code == ErrorCode::kTimeout)
      promise->SetError(ffi::Error(ffi::ErrorCode::kDeadlineExceeded,
                                   "jax_ep: " + DescribeTimeout(error, timeout_s)));
    else if (!steps->empty())
      SubmitSteps(comm, ordinal, key, steps, promise);
    else
      promise->SetAvailable();
  });
}

template <typename Params, typename... Buffers>
ffi::Future Submit(ffi::ErrorOr<Params> (*parse)(const MoEShape&, Buffers...), int32_t ordinal,
                   ffi::RunId run, CallSite* site, int64_t comm, Buffers... buffers) {
  const auto communicator = Communicators::Get().Find(comm);
  if (communicator == nullptr) return Failed(Destroyed());
  if (FindPlace(communicator->spec(), ordinal).rank < 0) return Failed(NotAMember(ordinal));
  const MoEShape& shape = communicator->spec().shape;
  ffi::ErrorOr<Params> params = parse(shape, buffers...);
  if (params.has_error()) return Failed(params.error());
  const auto promise = std::make_shared<ffi::Promise>();
  ffi::Future future(*promise);
  SubmitSteps(comm, ordinal, site->NextKey(run.run_id, ordinal),
              std::make_shared<Steps>(StepsOf(shape, params.value())), promise);
  return future;
}

ffi::Future Dispatch(int32_t ordinal, ffi::RunId run, CallSite* site, int64_t comm, int64_t fill,
                     Ints topk_ids, ffi::AnyBuffer x, Floats weights, ffi::AnyBuffer scales,
                     Ints ticket, IntsOut tables, IntsOut num_tokens_per_expert, IntsOut offsets,
                     IntsOut num_dropped, IntsOut recv_topk_ids, AnyOut tokens,
                     FloatsOut row_scalars, AnyOut row_scales) {
  return Submit(ParseDispatch, ordinal, run, site, comm, fill, topk_ids, x, weights, scales, ticket,
                tables, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids, tokens,
                row_scalars, row_scales);
}
XLA_FFI_DEFINE_HANDLER(kDispatch, Dispatch, BindDispatch(BindCall()));

ffi::Future DispatchCached(int32_t ordinal, ffi::RunId run, CallSite* site, int64_t comm,
                           int64_t fill, ffi::AnyBuffer x, Floats weights, ffi::AnyBuffer scales,
                           Ints tables, ffi::AnyBuffer y, Floats row_weights, Ints ticket,
                           AnyOut tokens, FloatsOut row_scalars, AnyOut row_scales) {
  return Submit(ParseDispatchCached, ordinal, run, site, comm, fill, x, weights, scales, tables, y,
                row_weights, ticket, tokens, row_scalars, row_scales);
}
XLA_FFI_DEFINE_HANDLER(kDispatchCached, DispatchCached, BindDispatchCached(BindCall()));

ffi::Future Combine(int32_t ordinal, ffi::RunId run, CallSite* site, int64_t comm, ffi::AnyBuffer y,
                    Floats row_weights, Floats row_scalars, Ints tables, Ints ticket, AnyOut out,
                    FloatsOut token_scalars) {
  return Submit(ParseCombine, ordinal, run, site, comm, y, row_weights, row_scalars, tables, ticket,
                out, token_scalars);
}
XLA_FFI_DEFINE_HANDLER(kCombine, Combine, BindCombine(BindCall()));

ffi::Future Transfer(int32_t ordinal, ffi::RunId run, CallSite* site, int64_t comm,
                     ffi::AnyBuffer source, Ints tables, AnyOut dest) {
  return Submit(ParseTransfer, ordinal, run, site, comm, source, tables, dest);
}
XLA_FFI_DEFINE_HANDLER(kTransfer, Transfer, BindTransfer(BindCall()));

// A sending half, which here sends nothing: the receiving half does all of the op. So it only
// checks what it is given.
template <typename Params, typename... Buffers>
ffi::Error Start(ffi::ErrorOr<Params> (*parse)(const MoEShape&, Buffers...), int32_t ordinal,
                 int64_t comm, Buffers... buffers) {
  const auto communicator = Communicators::Get().Find(comm);
  if (communicator == nullptr) return Destroyed();
  if (FindPlace(communicator->spec(), ordinal).rank < 0) return NotAMember(ordinal);
  const ffi::ErrorOr<Params> params = parse(communicator->spec().shape, buffers...);
  if (params.has_error()) return params.error();
  std::fill_n(params.value().ticket, kTicketSize, 0);
  return ffi::Error::Success();
}

ffi::Error DispatchStart(int32_t ordinal, int64_t comm, int64_t block, int64_t quant_dtype,
                         int64_t scale_dtype, Ints topk_ids, ffi::AnyBuffer x, Floats weights,
                         ffi::AnyBuffer scales, Ints tables, IntsOut ticket) {
  return Start(ParseDispatchStart, ordinal, comm, block, quant_dtype, scale_dtype, topk_ids, x,
               weights, scales, tables, ticket);
}
XLA_FFI_DEFINE_HANDLER(kDispatchStart, DispatchStart,
                       BindDispatchStart(ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>()));

ffi::Error CombineStart(int32_t ordinal, int64_t comm, int64_t num_tokens, ffi::AnyBuffer y,
                        Floats row_weights, Ints tables, IntsOut ticket) {
  return Start(ParseCombineStart, ordinal, comm, num_tokens, y, row_weights, tables, ticket);
}
XLA_FFI_DEFINE_HANDLER(kCombineStart, CombineStart,
                       BindCombineStart(ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>()));

// The communicator as Python holds it; the registry holds it for the handlers.
class PyCommunicator {
 public:
  PyCommunicator(const CommunicatorSpec& spec, bool across_processes)
      : communicator_(std::make_shared<cpu::Communicator>(spec)) {
    if (across_processes) ThrowIfError(communicator_->Prepare());
    Communicators::Get().Add(communicator_);
  }
  ~PyCommunicator() { Destroy(); }

  // What other processes need to reach this one's memory.
  nb::bytes handle() const {
    const cpu::Communicator::PeerSegment segment{static_cast<int32_t>(getpid()),
                                                 communicator_->segment_fd()};
    return nb::bytes(&segment, sizeof segment);
  }
  void Connect(int32_t process, nb::bytes handle) {
    cpu::Communicator::PeerSegment segment;
    if (handle.size() != sizeof segment) throw std::runtime_error("malformed handle");
    std::memcpy(&segment, handle.data(), sizeof segment);
    ThrowIfError(communicator_->Connect(process, segment));
  }
  void Disconnect() {}
  int64_t arena_bytes() const { return communicator_->arena_bytes(); }
  PyError TakeError() { return ToPython(communicator_->TakeError(), communicator_->spec()); }
  void Destroy() {
    if (communicator_ == nullptr) return;
    Communicators::Get().Remove(communicator_->spec().id);
    communicator_.reset();
  }

 private:
  std::shared_ptr<cpu::Communicator> communicator_;
};

nb::dict Registrations() {
  nb::dict targets;
  const auto add = [&](const char* name, auto* execute) {
    nb::dict stages;
    stages["instantiate"] = Capsule(kMakeCallSite);
    stages["execute"] = Capsule(execute);
    targets[name] = stages;
  };
  add("jax_ep_dispatch", +kDispatch);
  add("jax_ep_dispatch_cached", +kDispatchCached);
  add("jax_ep_combine", +kCombine);
  add("jax_ep_transfer", +kTransfer);
  // These wait for nobody.
  targets["jax_ep_dispatch_start"] = Capsule(+kDispatchStart);
  targets["jax_ep_combine_start"] = Capsule(+kCombineStart);
  return targets;
}

nb::dict Types() {
  nb::dict type;
  type["type_id"] = nb::capsule(&CallSite::id, "xla.ffi.type_id");
  type["type_info"] = nb::capsule(&CallSite::info, "xla.ffi.type_info");
  nb::dict types;
  types["jax_ep_cpu_call_site"] = type;
  return types;
}

}  // namespace

NB_MODULE(_cpu, m) {
  BindSpecs(m);
  m.def("registrations", &Registrations);
  m.def("types", &Types);
  BindCommunicator<PyCommunicator>(m);
}

}  // namespace jax_ep::xla_ffi
