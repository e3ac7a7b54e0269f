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
  if (quantises) return {64, 0.5};
  return {num_ranks == 2 ? 24 : 12, 0.35};
}
Senders CombineSenders(int num_ranks) { return {num_ranks == 2 ? 28 : 56, 0.63}; }

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
                          LoadLatencyDispatch, LoadLatencyCombine, LoadCeilings})
    if (error = load(spec_.shape); error != cudaSuccess)
      return Failed("loading kernels on GPU " + std::to_string(ordinal) + " for " +
                        std::to_string(spec_.shape.num_experts) + " experts",
                    error);
  if (error = cudaMalloc(&device.arena, layout_.bytes); error != cudaSuccess)
    return OutOfMemory(layout_.bytes, ordinal, error);
  if (error = cudaMalloc(&device.bases, spec_.shape.num_ranks * sizeof(std::byte*));
      error != cudaSuccess)
    return OutOfMemory(layout_.bytes, ordinal, error);
  if (error = cudaHostAlloc(&device.error, sizeof(ErrorRecord),
                            cudaHostAllocPortable | cudaHostAllocMapped);
      error != cudaSuccess)
    return Failed("allocating host memory", error);
  *device.error = ErrorRecord{};
  device.host_bases.assign(spec_.shape.num_ranks, nullptr);
  // Flags, header and ids, which may hold their epoch, start at 0; other windows are written before
  // they are read.
  if (error = cudaMemset(device.arena, 0, layout_.scalars); error == cudaSuccess)
    error = cudaDeviceSynchronize();
  return Failed("clearing the arena of GPU " + std::to_string(ordinal), error);
}

std::string Communicator::ConnectLocal(int32_t ordinal, Device& device) {
  ScopedDevice scope(ordinal);
  const Group& group = spec_.groups[device.place.group];
  for (int rank = 0; rank < static_cast<int>(group.size()); ++rank) {
    if (group[rank].process != spec_.process) continue;
    const int32_t peer = group[rank].ordinal;
    device.host_bases[rank] = devices_.at(peer).arena;
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
      device.host_bases.at(handle.place.rank) = device.opened.back();
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
  return {layout_,
          device.bases,
          device.arena,
          device.error,
          static_cast<uint64_t>(std::min(spec_.timeout_s, kMaxTimeoutSeconds) * 1e9),
          device.place.rank};
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
  const Arena arena = ArenaOf(device);
  const MoEShape& shape = spec_.shape;
  if (shape.low_latency)
    return Failed("dispatch", LaunchLatencyDispatch(shape, arena, &params.route, params.dispatch,
                                                    SmsOf(device), stream));
  cudaError_t error = LaunchExchange(shape, arena, params.route, stream);
  if (error == cudaSuccess) error = LaunchPlacement(shape, arena, params.route, stream);
  if (error == cudaSuccess)
    error = LaunchDispatch(
        shape, arena, params.dispatch, params.route.topk_ids,
        BlocksOf(device, spec_.dispatch_blocks,
                 DispatchSenders(spec_.shape.num_ranks, params.dispatch.quantises())),
        stream);
  return Failed("dispatch", error);
}

std::string Communicator::DispatchCached(int32_t ordinal, const DispatchParams& params,
                                         cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  if (spec_.shape.low_latency && params.y == nullptr)
    return Failed("cached dispatch", LaunchLatencyDispatch(spec_.shape, ArenaOf(device), nullptr,
                                                           params, SmsOf(device), stream));
  return Failed("cached dispatch",
                LaunchDispatch(spec_.shape, ArenaOf(device), params, nullptr,
                               BlocksOf(device, spec_.dispatch_blocks,
                                        DispatchSenders(spec_.shape.num_ranks, params.quantises())),
                               stream));
}

std::string Communicator::Combine(int32_t ordinal, const CombineParams& params,
                                  cudaStream_t stream) {
  ScopedDevice scope(ordinal);
  const Device& device = devices_.at(ordinal);
  if (spec_.shape.low_latency && params.row_scalars == nullptr)
    return Failed("combine", LaunchLatencyCombine(spec_.shape, ArenaOf(device), params,
                                                  SmsOf(device), stream));
  return Failed("combine", LaunchCombine(spec_.shape, ArenaOf(device), params,
                                         BlocksOf(device, spec_.combine_blocks,
                                                  CombineSenders(spec_.shape.num_ranks)),
                                         stream));
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
