// What the links between the GPUs can do at best, for the benchmark: stores to all peers at once,
// and the round trip of a flag. Both are exchanges like any op, so that they may stand beside them.
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kStoreBlocks = 64, kStoreThreads = 1024;

__global__ void __launch_bounds__(kStoreThreads)
    StoresKernel(MoEShape shape, Arena arena, StoresParams p) {
  const Request whole(arena);
  const uint32_t epoch = EnterEpoch(arena);
  const int peers = shape.num_ranks - 1, lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const int64_t warps = int64_t{gridDim.x} * (kStoreThreads / 32);
  const int64_t rows = p.repeats * p.num_tokens * peers;
  for (int64_t i = blockIdx.x * int64_t{kStoreThreads / 32} + threadIdx.x / 32; i < rows;
       i += warps) {
    const int64_t token = i / peers % p.num_tokens;
    const int peer = (arena.rank + 1 + static_cast<int>(i % peers)) % shape.num_ranks;
    const int4* from = static_cast<const int4*>(p.x) + token * vectors;
    int4* to = arena.Row(epoch, peer, arena.rank, token);
    for (int first = lane; first < vectors; first += 32 * kUnroll) {
      int4 v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < vectors) v[u] = ptx::ld_nc_no_allocate(from + first + 32 * u);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < vectors) ptx::st_no_allocate(to + first + 32 * u, v[u]);
    }
  }
  LeaveEpoch(arena, whole, epoch, Phase::kDispatch);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.done = 0;
}

// Ranks 2i and 2i + 1 play ping-pong; an odd one at the end has nobody.
__global__ void FlagsKernel(MoEShape shape, Arena arena, FlagsParams p) {
  const Request whole(arena);
  const uint32_t epoch = EnterEpoch(arena);
  const int partner = arena.rank ^ 1;
  if (threadIdx.x == 0 && partner < shape.num_ranks) {
    const bool serves = arena.rank < partner;
    uint32_t* own = arena.Ping(epoch, arena.rank);
    bool arrived = true;
    for (uint32_t round = 1; round <= p.rounds && arrived; ++round) {
      if (serves) ptx::st_release_sys(arena.Ping(epoch, partner), round);
      arrived = Wait(arena, own, round, partner, Phase::kDispatch);
      if (!serves) ptx::st_release_sys(arena.Ping(epoch, partner), round);
    }
    // The partner writes to this one again in epoch + 2, once it has seen us enter epoch + 1.
    *own = 0;
  }
  LeaveEpoch(arena, whole, epoch, Phase::kDispatch);
  if (threadIdx.x == 0) *p.done = 0;
}

}  // namespace

cudaError_t LaunchStores(const MoEShape& shape, const Arena& arena, const StoresParams& params,
                         cudaStream_t stream) {
  return Launch(StoresKernel, {kStoreBlocks, kStoreThreads}, stream, shape, arena, params);
}

cudaError_t LaunchFlags(const MoEShape& shape, const Arena& arena, const FlagsParams& params,
                        cudaStream_t stream) {
  return Launch(FlagsKernel, {1, 32}, stream, shape, arena, params);
}

cudaError_t LoadCeilings(const MoEShape&) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, StoresKernel);
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, FlagsKernel);
}

}  // namespace jax_ep::cuda
