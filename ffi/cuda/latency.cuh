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
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

constexpr int kLatencyThreads = 512;
constexpr int kLatencyWarps = kLatencyThreads / 32;

// Four warps of a block that work on a token of their own.
using Squad = TeamOf<128>;
constexpr int kSquads = kLatencyThreads / Squad::kThreads;

// Starts an exchange, like EnterEpoch: each thread reads the epoch for itself, beside its first
// loads. All blocks' threads call it, and then CountBlock.
__device__ inline uint32_t EnterLatencyEpoch(const Arena& arena) {
  const uint32_t epoch = ptx::ld_volatile(&arena.Header()->epoch) + 1;
  // What this rank read in earlier epochs was over when this kernel started.
  if (blockIdx.x == 0)
    for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += blockDim.x)
      ptx::st_relaxed_sys(arena.Ready(peer, arena.rank), epoch);
  return epoch;
}

// To be called by one thread once all of its block have entered. Who is last moves the epoch on,
// for by then all have read it: nobody has to do so at the end, when all wait for it.
__device__ inline void CountBlock(const Arena& arena, uint32_t epoch) {
  ArenaHeader* header = arena.Header();
  if (atomicAdd(&header->blocks_done, 1) != gridDim.x - 1) return;
  header->blocks_done = 0;
  header->epoch = epoch;
}

// Ends an exchange: not before every peer has entered, see LeaveEpoch. All threads of all blocks.
// The last warp of the first block waits, which has less to do than the others.
__device__ inline void LeaveLatencyEpoch(const Arena& arena, uint32_t epoch, Phase phase) {
  if (blockIdx.x != 0 || threadIdx.x / 32 != kLatencyWarps - 1) return;
  for (int peer = threadIdx.x % 32; peer < arena.layout.num_ranks; peer += 32)
    Wait(arena, arena.Ready(arena.rank, peer), epoch, peer, phase);
}

// Blocks that have something to do for this many tokens: an idle one would still have to start,
// to read the routing, and to be waited for.
inline int LatencyBlocks(int sms, int64_t work) {
  return static_cast<int>(std::clamp<int64_t>(work, 1, sms));
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_LATENCY_CUH_
