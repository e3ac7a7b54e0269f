#ifndef JAX_EP_CUDA_COMMUNICATOR_H_
#define JAX_EP_CUDA_COMMUNICATOR_H_

#include <cuda_runtime.h>

#include <map>
#include <string>
#include <vector>

#include "common/error.h"
#include "common/ops.h"
#include "common/peers.h"
#include "cuda/arena.h"
#include "cuda/ops.h"

namespace jax_ep::cuda {

// How many of an exchange's blocks send: as many as fill the link, and of few blocks no more than a
// share.
struct Senders {
  int wanted;
  double most;
};

// The arenas of this process's GPUs, connected to those of their groups. Methods that can fail
// return an error text, empty on success.
class Communicator {
 public:
  explicit Communicator(CommunicatorSpec spec);
  ~Communicator();

  // Allocates the arenas, loads all kernels, and connects the ranks that live in this process.
  std::string Prepare();
  // How another process reaches the arena of the device at `place`.
  struct PeerHandle {
    Place place;
    cudaIpcMemHandle_t arena;
  };
  std::string ExportHandles(std::vector<PeerHandle>* handles) const;
  std::string Connect(const std::vector<PeerHandle>& handles);
  // Waits for this process's GPUs and lets go of others' memory. Then theirs may be freed.
  void Disconnect();

  std::string Dispatch(int32_t ordinal, const FreshDispatchParams& params, cudaStream_t stream);
  std::string DispatchCached(int32_t ordinal, const DispatchParams& params, cudaStream_t stream);
  std::string Combine(int32_t ordinal, const CombineParams& params, cudaStream_t stream);
  std::string DispatchStart(int32_t ordinal, const DispatchStartParams& params,
                            cudaStream_t stream);
  std::string CombineStart(int32_t ordinal, const CombineStartParams& params, cudaStream_t stream);
  std::string Transfer(int32_t ordinal, const TransferParams& params, cudaStream_t stream);
  // Ceilings, for the benchmark; with two ranks or more.
  std::string Stores(int32_t ordinal, const StoresParams& params, cudaStream_t stream);
  std::string Flags(int32_t ordinal, const FlagsParams& params, cudaStream_t stream);

  // Returns the first error since the last call, and forgets it unless a peer was lost.
  ErrorRecord TakeError();
  // Of all arenas of a GPU.
  int64_t arena_bytes() const { return num_arenas() * layout_.bytes; }
  const CommunicatorSpec& spec() const { return spec_; }

 private:
  struct Device {
    Place place;
    std::byte* arena = nullptr;
    std::byte** bases = nullptr;         // device memory, [num_arenas, R]
    std::vector<std::byte*> host_bases;  // what `bases` holds
    std::vector<std::byte*> opened;      // to be closed
    ErrorRecord* error = nullptr;        // host memory
    int num_sms = 0;
  };

  std::string PrepareDevice(int32_t ordinal, Device& device);
  std::string ConnectLocal(int32_t ordinal, Device& device);
  std::string UploadBases(int32_t ordinal, const Device& device);
  // One for whole ops, and one for each request in flight.
  int64_t num_arenas() const { return 1 + spec_.max_requests; }
  void SetBase(Device& device, int rank, std::byte* base) const;
  Arena ArenaOf(const Device& device) const;
  // For the receiving half of a request, if there is a ticket, or for a whole op.
  Arena ArenaOf(const Device& device, const int32_t* ticket) const;
  // For the sending half of one.
  Arena ArenaOfStart(const Device& device, int32_t* ticket) const;
  std::string Dispatch(const Device& device, const Arena& arena, const int32_t* topk_ids,
                       const DispatchParams& params, cudaStream_t stream) const;
  std::string Combine(const Device& device, const Arena& arena, const CombineParams& params,
                      cudaStream_t stream) const;
  int SmsOf(const Device& device) const;
  // What was chosen, or as many blocks as there are SMs.
  Blocks BlocksOf(const Device& device, const BlockCounts& chosen, const Senders& senders) const;

  const CommunicatorSpec spec_;
  const ArenaLayout layout_;
  std::map<int32_t, Device> devices_;  // by ordinal
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_COMMUNICATOR_H_
