// Launchers of the ops. Kernels only: no allocation, no synchronisation, nothing computed on
// the host that differs between calls, so that a captured launch can be replayed.
#ifndef JAX_EP_CUDA_OPS_H_
#define JAX_EP_CUDA_OPS_H_

#include <cuda_runtime.h>

#include "common/ops.h"
#include "cuda/arena.h"

namespace jax_ep::cuda {

// Thread blocks of one exchange: some send, the others receive.
struct Blocks {
  int total;
  int senders;

  // Of a kernel that does `half` of it. A receiving half has all: it may have to do the whole.
  int of(Half half) const { return half == Half::kSend && senders > 0 ? senders : total; }
};

// The two kernels of routing, which belong to the exchange of the dispatch that has to follow them.
cudaError_t LaunchExchange(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                           cudaStream_t stream);
cudaError_t LaunchPlacement(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                            cudaStream_t stream);
// With `topk_ids`, overlaps the routing launched before it; without, its tables are there already.
cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           const int32_t* topk_ids, Blocks blocks, cudaStream_t stream);
cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params,
                          Blocks blocks, cudaStream_t stream);

// The ops of the low-latency mode, a kernel each; for the gradients of combine and of weights there
// are those above. Without `route`, the tables are there already.
cudaError_t LaunchLatencyDispatch(const MoEShape& shape, const Arena& arena,
                                  const RouteParams* route, const DispatchParams& params, int sms,
                                  cudaStream_t stream);
cudaError_t LaunchLatencyCombine(const MoEShape& shape, const Arena& arena,
                                 const CombineParams& params, int sms, cudaStream_t stream);

// A kernel, which fills the windows as often as it takes.
cudaError_t LaunchTransfer(const Arena& arena, const TransferParams& params, Blocks blocks,
                           cudaStream_t stream);

// The ceilings that the benchmark measures. `done` is written so that XLA has a result.
struct StoresParams {
  int64_t num_tokens, repeats;  // rows of x that go to each peer, and how often
  const void* x;                // [T, H]
  int32_t* done;                // [1]
};
struct FlagsParams {
  uint32_t rounds;
  int32_t* done;  // [1]
};
cudaError_t LaunchStores(const MoEShape& shape, const Arena& arena, const StoresParams& params,
                         cudaStream_t stream);
cudaError_t LaunchFlags(const MoEShape& shape, const Arena& arena, const FlagsParams& params,
                        cudaStream_t stream);

// Loads the kernels on the current device, so that none is first loaded while a peer waits.
cudaError_t LoadExchange(const MoEShape& shape);
cudaError_t LoadPlacement(const MoEShape& shape);
cudaError_t LoadDispatch(const MoEShape& shape);
cudaError_t LoadCombine(const MoEShape& shape);
cudaError_t LoadLatencyDispatch(const MoEShape& shape);
cudaError_t LoadLatencyCombine(const MoEShape& shape);
cudaError_t LoadTransfer(const MoEShape& shape);
cudaError_t LoadCeilings(const MoEShape& shape);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_OPS_H_
