// What the kernels of the low-latency mode share. An op is one kernel: with few tokens, launches
// and the waits between kernels would take longer than the payload. Every block learns on its own
// what it needs of the routing, and a token is announced by itself.
#ifndef JAX_EP_CUDA_LATENCY_CUH_
#define JAX_EP_CUDA_LATENCY_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/layout.h"
#include "cuda/arena.h"
#include "cuda/ptx.cuh"
#include "cuda/request.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

constexpr int kLatencyThreads = 512;
constexpr int kLatencyWarps = kLatencyThreads / 32;

// Four warps of a block that work on a token of their own.
using Squad = TeamOf<128>;
constexpr int kSquads = kLatencyThreads / Squad::kThreads;

// The epoch of the exchange that starts with this kernel. Each thread reads it for itself, beside
// its first loads; what this rank read in earlier epochs was over when the kernel started.
__device__ inline uint32_t LatencyEpoch(const Arena& arena) {
  return ptx::ld_volatile(&arena.Header()->epoch) + 1;
}

// Where nothing else tells that a rank has entered: tells all peers, if the kernel begins an
// exchange. To be called by one warp.
__device__ inline void TellEntered(const Arena& arena, uint32_t epoch) {
  if (!arena.sends()) return;
  for (int peer = threadIdx.x % 32; peer < arena.layout.num_ranks; peer += 32)
    ptx::st_relaxed_sys(arena.Ready(peer, arena.rank), epoch);
}

__device__ __forceinline__ bool IsLastInGrid() { return blockIdx.x == gridDim.x - 1; }

// Ends a kernel that ends an exchange, or the sending half of one; to be called by all threads of
// all blocks. The last block moves the epoch on, once all others have been counted, which came
// before it and wait for nothing of it; and not before every peer has entered, see LeaveEpoch, for
// which it waits if nothing else did.
__device__ inline void LeaveLatencyEpoch(const Arena& arena, const Request& request, uint32_t epoch,
                                         bool waits, Phase phase) {
  ArenaHeader* header = arena.Header();
  __syncthreads();
  if (!IsLastInGrid()) {
    if (threadIdx.x == 0) atomicAdd(&header->blocks_done, 1);
    return;
  }
  if (arena.receives() && waits && threadIdx.x < 32)
    for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += 32)
      Wait(arena, arena.Ready(arena.rank, peer), epoch, peer, phase);
  __syncthreads();
  if (threadIdx.x != 0) return;
  while (ptx::ld_relaxed_sys(&header->blocks_done) != gridDim.x - 1) {
  }
  header->blocks_done = 0;
  if (arena.receives()) header->epoch = epoch;
  request.Leave(arena);
}

// Waits like Wait, for few flags, each polled by few threads: acquires at every look, which saves
// the one after the last.
__device__ inline bool WaitClosely(const Arena& arena, const uint32_t* flag, uint32_t epoch,
                                   int peer, Phase phase) {
  return Poll(arena, epoch, peer, phase, [&] { return ptx::ld_acquire_sys(flag); });
}

// Blocks that have something to do for this many tokens: an idle one would still have to start,
// to read the routing, and to be waited for.
inline int LatencyBlocks(int sms, int64_t work) {
  return static_cast<int>(std::clamp<int64_t>(work, 1, sms));
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_LATENCY_CUH_
