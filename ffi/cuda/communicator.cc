#include "cuda/communicator.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace jax_ep::cuda {
namespace {

// The best of those tried on 2 and 4 H200, with 8 to 132 blocks (docs/performance.md).
// With two ranks a row that is loaded is stored once, with more ranks several times. What quantises
// has more to do than to wait for copies.
Senders DispatchSenders(int num_ranks, bool quantises) {
  if (quantises) return {32, 0.5};
  return {num_ranks == 2 ? 24 : 12, 0.35};
}
Senders CombineSenders(int num_ranks) { return {num_ranks == 2 ? 28 : 56, 0.63}; }
constexpr Senders kTransferSenders{32, 0.35};

// The CUDA device of a scope; handlers run on threads whose device XLA has chosen.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
  }
  ~ScopedDevice() { cudaSetDevice(before_); }
  ScopedDevice(const ScopedDevice&) = delete;

 private:
  int before_ = 0;
};

std::string Failed(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // XLA must not find it later
  return what + ": " + cudaGetErrorString(error);
}

std::string OutOfMemory(int64_t bytes, int32_t ordinal, cudaError_t error) {
  return Failed("cannot allocate " + std::to_string(bytes >> 20) + " MiB for the arena of GPU " +
                    std::to_string(ordinal) +
                    " beside what XLA has reserved (lower XLA_PYTHON_CLIENT_MEM_FRACTION, " +
                    "max_tokens_per_rank, or both)",
                error);
}

}  // namespace

Communicator::Communicator(CommunicatorSpec spec) : spec_(std::move(spec)), layout_(spec_.shape) {
  for (const Group& group : spec_.groups)
    for (const Member& member : group)
      if (member.process == spec_.process)
        devices_[member.ordinal].place = FindPlace(spec_, member.ordinal);
}

Communicator::~Communicator() {
  Disconnect();
  for (auto& [ordinal, device] : devices_) {
    ScopedDevice scope(ordinal);
    cudaFree(device.bases);
    cudaFree(device.arena);
    cudaFreeHost(device.error);
  }
  cudaGetLastError();
}

std::string Communicator::Prepare() {
  for (auto& [ordinal, device] : devices_)
    if (const std::string error = PrepareDevice(ordinal, device); !error.empty()) return error;
  for (auto& [ordinal, device] : devices_) {
    if (const std::string error = ConnectLocal(ordinal, device); !error.empty()) return error;
    if (const std::string error = UploadBases(ordinal, device); !error.empty()) return error;
  }
  return "";
}

std::string Communicator::PrepareDevice(int32_t ordinal, Device& device) {
  ScopedDevice scope(ordinal);
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) return Failed("GPU " + std::to_string(ordinal), error);
  device.num_sms = properties.multiProcessorCount;
  if (spec_.shape.num_ranks > kMaxRanks)
    return "at most " + std::to_string(kMaxRanks) + " ranks can share an axis, got " +
           std::to_string(spec_.shape.num_ranks);
  if (properties.major < 9)
    return "GPU " + std::to_string(ordinal) + " (" + properties.name +
           "): compute capability 9.0 or newer is needed, got " + std::to_string(properties.major) +
           "." + std::to_string(properties.minor);
  for (const auto load : {LoadExchange, LoadPlacement, LoadDispatch, LoadCombine,
                          LoadLatencyDispatch, LoadLatencyCombine, LoadTransfer, LoadCeilings})
    if (error = load(spec_.shape); error != cudaSuccess)
      return Failed("loading kernels on GPU " + std::to_string(ordinal) + " for " +
                        std::to_string(spec_.shape.num_experts) + " experts",
                    error);
  if (error = cudaMalloc(&device.arena, arena_bytes()); error != cudaSuccess)
    return OutOfMemory(arena_bytes(), ordinal, error);
  device.host_bases.assign(num_arenas() * spec_.shape.num_ranks, nullptr);
  if (error = cudaMalloc(&device.bases, device.host_bases.size() * sizeof(std::byte*));
      error != cudaSuccess)
    return OutOfMemory(arena_bytes(), ordinal, error);
  if (error = cudaHostAlloc(&device.error, sizeof(ErrorRecord),
                            cudaHostAllocPortable | cudaHostAllocMapped);
      error != cudaSuccess)
    return Failed("allocating host memory", error);
  *device.error = ErrorRecord{};
  // Flags, headers and ids, which may hold their epoch, start at 0.
  if (error = cudaMemset(device.arena, 0, arena_bytes()); error == cudaSuccess)
    error = cudaDeviceSynchronize();
  return Failed("clearing the arena of GPU " + std::to_string(ordinal), error);
}

std::string Communicator::ConnectLocal(int32_t ordinal, Device& device) {
  ScopedDevice scope(ordinal);
  const Group& group = spec_.groups[device.place.group];
  for (int rank = 0; rank < static_cast<int>(group.size()); ++rank) {
    if (group[rank].process != spec_.process) continue;
    const int32_t peer = group[rank].ordinal;
    SetBase(device, rank, devices_.at(peer).arena);
    if (peer == ordinal) continue;
    const std::string ranks = "ranks " + std::to_string(device.place.rank) + " and " +
                              std::to_string(rank) + " (GPUs " + std::to_string(ordinal) + " and " +
                              std::to_string(peer) + ")";
    int can_access = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&can_access, ordinal, peer);
    if (error == cudaSuccess && can_access == 0)
      return "nothing connects " + ranks + ": no peer access between these GPUs";
    if (error == cudaSuccess) error = cudaDeviceEnablePeerAccess(peer, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess, cudaGetLastError();
    if (error != cudaSuccess) return Failed("nothing connects " + ranks, error);
  }
  return "";
}

void Communicator::SetBase(Device& device, int rank, std::byte* base) const {
  for (int64_t arena = 0; arena < num_arenas(); ++arena)
    device.host_bases.at(arena * spec_.shape.num_ranks + rank) = base + arena * layout_.bytes;
}

std::string Communicator::UploadBases(int32_t ordinal, const Device& device) {
  ScopedDevice scope(ordinal);
  return Failed("uploading peer addresses",
                cudaMemcpy(device.bases, device.host_bases.data(),
                           device.host_bases.size() * sizeof(std::byte*), cudaMemcpyHostToDevice));
}

std::string Communicator::ExportHandles(std::vector<PeerHandle>* handles) const {
  for (const auto& [ordinal, device] : devices_) {
    ScopedDevice scope(ordinal);
    PeerHandle& handle = handles->emplace_back();
    handle.place = device.place;
    const cudaError_t error = cudaIpcGetMemHandle(&handle.arena, device.arena);
    if (error != cudaSuccess)
      return Failed("cudaIpcGetMemHandle on GPU " + std::to_string(ordinal), error);
  }
  return "";
}

std::string Communicator::Connect(const std::vector<PeerHandle>& handles) {
  for (auto& [ordinal, device] : devices_) {
    ScopedDevice scope(ordinal);
    for (const PeerHandle& handle : handles) {
      if (handle.place.group != device.place.group) continue;
      void* base = nullptr;
      const cudaError_t error =
          cudaIpcOpenMemHandle(&base, handle.arena, cudaIpcMemLazyEnablePeerAccess);
      if (error != cudaSuccess)
        return Failed("GPU " + std::to_string(ordinal) + " (rank " +
                          std::to_string(device.place.rank) + ") cannot map the memory of rank " +
                          std::to_string(handle.place.rank),
                      error);
      device.opened.push_back(static_cast<std::byte*>(base));
      SetBase(device, handle.place.rank, device.opened.back());
    }
    if (const std::string error = UploadBases(ordinal, device); !error.empty()) return error;
  }
  return "";
}

void Communicator::Disconnect() {
  for (auto& [ordinal, device] : devices_) {
    ScopedDevice scope(ordinal);
    cudaDeviceSynchronize();
    for (std::byte* base : device.opened) cudaIpcCloseMemHandle(base);
    device.opened.clear();
    cudaGetLastError();
  }
}

Arena Communicator::ArenaOf(const Device& device) const {
  Arena arena;
  arena.layout = layout_;
  arena.bases = device.bases;
  arena.own = device.arena;
  arena.error = device.error;
  arena.timeout_ns = static_cast<uint64_t>(std::min(spec_.timeout_s, kMaxTimeoutSeconds) * 1e9);
  arena.rank = device.place.rank;
  arena.max_requests = spec_.max_requests;
  return arena;
}

Arena Communicator::ArenaOf(const Device& device, const int32_t* ticket) const {
  Arena arena = ArenaOf(device);
  if (ticket == nullptr) return arena;
  arena.half = Half::kReceive;
  arena.ticket = const_cast<int32_t*>(ticket);  // only read by this half
  return arena;
}

Arena Communicator::ArenaOfStart(const Device& device, int32_t* ticket) const {
  Arena arena = ArenaOf(device);
  arena.half = Half::kSend;
  arena.ticket = ticket;
  return arena;
}

int Communicator::SmsOf(const Device& device) const {
  return spec_.num_sms > 0 ? std::min(spec_.num_sms, device.num_sms) : device.num_sms;
}

Blocks Communicator::BlocksOf(const Device& device, const BlockCounts& chosen,
                              const Senders& senders) const {
  if (chosen.senders > 0) return {chosen.senders + chosen.receivers, chosen.senders};
  if (spec_.shape.num_ranks == 1) return {SmsOf(device), 0};
  const int total = std::max(SmsOf(device), 2);
  return {total, std::clamp(static_cast<int>(total * senders.most), 1, senders.wanted)};
}

std::string Communicator::Dispatch(int32_t ordinal, const FreshDispatchParams& params,
                                   cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  const Arena arena = ArenaOf(device, params.dispatch.ticket);
  if (spec_.shape.low_latency)
    return Failed("dispatch", LaunchLatencyDispatch(spec_.shape, arena, &params.route,
                                                    params.dispatch, SmsOf(device), stream));
  cudaError_t error = LaunchExchange(spec_.shape, arena, params.route, stream);
  if (error == cudaSuccess) error = LaunchPlacement(spec_.shape, arena, params.route, stream);
  if (error != cudaSuccess) return Failed("routing", error);
  return Dispatch(device, arena, params.route.topk_ids, params.dispatch, stream);
}

std::string Communicator::DispatchCached(int32_t ordinal, const DispatchParams& params,
                                         cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  const Arena arena = ArenaOf(device, params.ticket);
  if (spec_.shape.low_latency && params.y == nullptr)
    return Failed("cached dispatch", LaunchLatencyDispatch(spec_.shape, arena, nullptr, params,
                                                           SmsOf(device), stream));
  return Dispatch(device, arena, nullptr, params, stream);
}

std::string Communicator::DispatchStart(int32_t ordinal, const DispatchStartParams& params,
                                        cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  const Arena arena = ArenaOfStart(device, params.ticket);
  RouteParams route{};
  route.num_tokens = params.dispatch.num_tokens;
  route.topk_ids = params.topk_ids;
  const bool is_fresh = params.topk_ids != nullptr;
  if (spec_.shape.low_latency)
    return Failed("dispatch start",
                  LaunchLatencyDispatch(spec_.shape, arena, is_fresh ? &route : nullptr,
                                        params.dispatch, SmsOf(device), stream));
  if (is_fresh) {
    const cudaError_t error = LaunchExchange(spec_.shape, arena, route, stream);
    if (error != cudaSuccess) return Failed("routing", error);
  }
  return Dispatch(device, arena, params.topk_ids, params.dispatch, stream);
}

std::string Communicator::Dispatch(const Device& device, const Arena& arena,
                                   const int32_t* topk_ids, const DispatchParams& params,
                                   cudaStream_t stream) const {
  const Blocks blocks = BlocksOf(device, spec_.dispatch_blocks,
                                 DispatchSenders(spec_.shape.num_ranks, params.quantises()));
  return Failed("dispatch", LaunchDispatch(spec_.shape, arena, params, topk_ids, blocks, stream));
}

std::string Communicator::Combine(int32_t ordinal, const CombineParams& params,
                                  cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  return Combine(device, ArenaOf(device, params.ticket), params, stream);
}

std::string Communicator::CombineStart(int32_t ordinal, const CombineStartParams& params,
                                       cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  return Combine(device, ArenaOfStart(device, params.ticket), params.combine, stream);
}

std::string Communicator::Combine(const Device& device, const Arena& arena,
                                  const CombineParams& params, cudaStream_t stream) const {
  if (spec_.shape.low_latency && params.row_scalars == nullptr)
    return Failed("combine",
                  LaunchLatencyCombine(spec_.shape, arena, params, SmsOf(device), stream));
  const Blocks blocks =
      BlocksOf(device, spec_.combine_blocks, CombineSenders(spec_.shape.num_ranks));
  return Failed("combine", LaunchCombine(spec_.shape, arena, params, blocks, stream));
}

std::string Communicator::Transfer(int32_t ordinal, const TransferParams& params,
                                   cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  // Senders wait for receivers here, so all have to run at once. What was chosen is for dispatch.
  const BlockCounts& chosen = spec_.dispatch_blocks;
  const bool fits = chosen.senders + chosen.receivers <= device.num_sms;
  const Blocks blocks = BlocksOf(device, fits ? chosen : BlockCounts{}, kTransferSenders);
  return Failed("transfer", LaunchTransfer(ArenaOf(device), params, blocks, stream));
}

std::string Communicator::Stores(int32_t ordinal, const StoresParams& params, cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  return Failed("stores", LaunchStores(spec_.shape, ArenaOf(devices_.at(ordinal)), params, stream));
}

std::string Communicator::Flags(int32_t ordinal, const FlagsParams& params, cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  return Failed("flags", LaunchFlags(spec_.shape, ArenaOf(devices_.at(ordinal)), params, stream));
}

ErrorRecord Communicator::TakeError() {
  ErrorRecord first;
  for (auto& [ordinal, device] : devices_) {
    volatile ErrorRecord* record = device.error;
    const ErrorCode code = record->code;
    if (code == ErrorCode::kNone) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    const ErrorRecord error{code,          record->rank,     record->peer,
                            record->phase, record->expected, record->got};
    if (first.code == ErrorCode::kNone || code == ErrorCode::kTimeout) first = error;
    if (code != ErrorCode::kTimeout) record->code = ErrorCode::kNone;
  }
  return first;
}

}  // namespace jax_ep::cuda
