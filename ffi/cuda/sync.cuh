// How GPUs of a group wait for each other.
#ifndef JAX_EP_CUDA_SYNC_CUH_
#define JAX_EP_CUDA_SYNC_CUH_

#include <cstdint>

#include "cuda/arena.h"
#include "cuda/ptx.cuh"

namespace jax_ep::cuda {

// Epochs wrap around; what is compared is at most a few apart.
__device__ __forceinline__ bool Reached(uint32_t flag, uint32_t epoch) {
  return static_cast<int32_t>(flag - epoch) >= 0;
}

// Tells the host. The first report stays until the host has taken it; `code` is written last, so
// that a host that sees it sees the rest.
__device__ inline void Report(const Arena& arena, const ErrorRecord& error) {
  volatile ErrorRecord* record = arena.error;
  if (record->code != ErrorCode::kNone && error.code != ErrorCode::kTimeout) return;
  record->rank = error.rank;
  record->peer = error.peer;
  record->phase = error.phase;
  record->expected = error.expected;
  record->got = error.got;
  ptx::fence_acq_rel_sys();
  record->code = error.code;
  ptx::fence_acq_rel_sys();
}

// Waits until `flag`, set by `peer`, has reached `epoch`. Then this thread, and threads it
// synchronises with, see what the peer wrote before. False if the peer did not come in time, now or
// earlier.
__device__ inline bool Wait(const Arena& arena, const uint32_t* flag, uint32_t epoch, int peer,
                            Phase phase) {
  constexpr uint32_t kSpinsPerClock = 256;
  uint32_t seen = ptx::ld_acquire_sys(flag);
  if (Reached(seen, epoch)) return true;
  const uint64_t start = ptx::globaltimer();
  for (uint32_t spin = 1;; ++spin) {
    seen = ptx::ld_acquire_sys(flag);
    if (Reached(seen, epoch)) return true;
    if (spin % kSpinsPerClock != 0) continue;
    if (ptx::ld_volatile(&arena.Header()->failed) != 0) return false;
    if (ptx::globaltimer() - start > arena.timeout_ns) break;
  }
  if (atomicExch(&arena.Header()->failed, 1) == 0)
    Report(arena, {ErrorCode::kTimeout, arena.rank, peer, phase, epoch, seen});
  return false;
}

// Starts an exchange; to be called by all threads of all blocks. Returns its epoch.
__device__ inline uint32_t EnterEpoch(const Arena& arena) {
  __shared__ uint32_t epoch;
  if (threadIdx.x == 0) epoch = ptx::ld_volatile(&arena.Header()->epoch) + 1;
  __syncthreads();
  if (blockIdx.x == 0)
    for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += blockDim.x)
      ptx::st_release_sys(arena.Ready(peer, arena.rank), epoch);
  return epoch;
}

// Ends an exchange; to be called by all threads of all blocks. The last block to come waits until
// every peer has entered, without which the next epoch could overrun a slow one, and moves the
// epoch on. True in that block, which then sees what all others wrote.
__device__ inline bool LeaveEpoch(const Arena& arena, uint32_t epoch, Phase phase) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&arena.Header()->blocks_done, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return false;
  for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += blockDim.x)
    Wait(arena, arena.Ready(arena.rank, peer), epoch, peer, phase);
  __syncthreads();
  if (threadIdx.x == 0) {
    arena.Header()->blocks_done = 0;
    arena.Header()->epoch = epoch;
  }
  return true;
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_SYNC_CUH_
