// Launchers of the three ops. Kernels only: no allocation, no synchronisation, nothing computed on
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
};

cudaError_t LaunchRoute(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                        cudaStream_t stream);
cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           Blocks blocks, cudaStream_t stream);
cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params,
                          Blocks blocks, cudaStream_t stream);

// Loads the kernels on the current device, so that none is first loaded while a peer waits.
cudaError_t LoadRoute(const MoEShape& shape);
cudaError_t LoadDispatch(const MoEShape& shape);
cudaError_t LoadCombine(const MoEShape& shape);

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_OPS_H_
