// How GPUs of a group wait for each other.
#ifndef JAX_EP_CUDA_SYNC_CUH_
#define JAX_EP_CUDA_SYNC_CUH_

#include <cstdint>

#include "cuda/arena.h"
#include "cuda/ptx.cuh"

namespace jax_ep::cuda {

// Whether a flag has reached an epoch. Epochs wrap around, and a flag may not have been written for
// billions of them: it counts only if it is ahead by no more than a peer can be.
__device__ __forceinline__ constexpr bool Reached(uint32_t flag, uint32_t epoch) {
  constexpr uint32_t kMostAhead = 2;
  return flag - epoch <= kMostAhead;
}
static_assert(Reached(1, UINT32_MAX) && !Reached(UINT32_MAX, 1), "");
static_assert(!Reached(7, 7u + (1u << 31)) && !Reached(7, 7u + (3u << 30)), "");

// Tells the host. The first report stays until the host has taken it, but for a timeout, which
// takes the place of what a program can go on after; `code` is written last, so that a host that
// sees it sees the rest.
__device__ inline void Report(const Arena& arena, const ErrorRecord& error) {
  volatile ErrorRecord* record = arena.error;
  if (record->code != ErrorCode::kNone &&
      (error.code != ErrorCode::kTimeout || record->code == ErrorCode::kTimeout))
    return;
  record->rank = error.rank;
  record->peer = error.peer;
  record->phase = error.phase;
  record->expected = error.expected;
  record->got = error.got;
  ptx::fence_acq_rel_sys();
  record->code = error.code;
  ptx::fence_acq_rel_sys();
}

// Waits until what `look` sees of `peer` has reached `epoch`. False if the peer did not come in
// time, now or earlier.
template <typename Look>
__device__ bool Poll(const Arena& arena, uint32_t epoch, int peer, Phase phase, const Look& look) {
  constexpr uint32_t kSpinsPerClock = 256;
  const uint64_t start = ptx::globaltimer();
  uint32_t seen;
  for (uint32_t spin = 1;; ++spin) {
    seen = look();
    if (Reached(seen, epoch)) return true;
    if (spin % kSpinsPerClock != 0) continue;
    if (ptx::ld_volatile(&arena.Header()->failed) != 0) return false;
    if (ptx::globaltimer() - start > arena.timeout_ns) break;
  }
  if (atomicExch(&arena.Header()->failed, 1) == 0)
    Report(arena, {ErrorCode::kTimeout, arena.rank, peer, phase, epoch, seen});
  return false;
}

// Waits until `flag`, set by `peer`, has reached `epoch`. Then this thread, and threads it
// synchronises with, see what the peer wrote before.
__device__ inline bool Wait(const Arena& arena, const uint32_t* flag, uint32_t epoch, int peer,
                            Phase phase) {
  if (Reached(ptx::ld_acquire_sys(flag), epoch)) return true;
  // An acquire empties the first-level cache: one, once there is something to acquire.
  if (!Poll(arena, epoch, peer, phase, [&] { return ptx::ld_relaxed_sys(flag); })) return false;
  ptx::ld_acquire_sys(flag);
  return true;
}

// Warps of a block that work on a task of their own: while one team waits for a flag, or for its
// writes to reach a peer, the others of the block go on.
constexpr int kTeamThreads = 256;
constexpr int kTeamWarps = kTeamThreads / 32;
constexpr int kMaxTeams = 1024 / kTeamThreads;

template <int kSize>
struct TeamOf {
  static constexpr int kThreads = kSize, kWarps = kSize / 32;

  int index;   // in the block
  int thread;  // in the team
  int warp;    // in the team

  __device__ TeamOf()
      : index(threadIdx.x / kThreads),
        thread(threadIdx.x % kThreads),
        warp(threadIdx.x % kThreads / 32) {}
  // Makes the team's earlier writes visible to all of the team. Barrier 0 is the block's.
  __device__ void Sync() const { ptx::barrier_sync(index + 1, kThreads); }
  __device__ bool SyncAnd(bool value) const {
    return ptx::barrier_red_and(index + 1, kThreads, value);
  }
};
using Team = TeamOf<kTeamThreads>;

// Deals tasks 0, 1, 2, ... out to the teams of all blocks: who is done first gets the next, so that
// all end together. The next task is asked for while the present one is worked on.
class Tasks {
 public:
  __device__ Tasks(const Team& team, uint32_t* counter) : team_(team), counter_(counter) {
    Ask();
    team.Sync();  // earlier tasks may still be read
    Advance();
  }
  __device__ uint32_t current() const { return current_; }
  // To be called early in a task.
  __device__ void Ask() {
    if (team_.thread == 0) asked_ = atomicAdd(counter_, 1);
  }
  // Synchronises the team, and moves on to the task that was asked for. True if `value` was true
  // for all.
  __device__ bool Advance(bool value = true) {
    __shared__ uint32_t next[2][kMaxTeams];
    // In turns: a slow thread may still read the last one.
    turn_ ^= 1;
    if (team_.thread == 0) next[turn_][team_.index] = asked_;
    const bool all = team_.SyncAnd(value);
    current_ = next[turn_][team_.index];
    return all;
  }

 private:
  const Team& team_;
  uint32_t* const counter_;
  uint32_t current_, asked_;
  int turn_ = 0;
};

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

// True in the last block of the grid to come, which then sees what all others wrote. `counter`
// starts at 0, and is set back to it.
__device__ inline bool IsLastBlock(uint32_t* counter) {
  bool is_last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, 1) == gridDim.x - 1;
    __threadfence();
    if (is_last) *counter = 0;
  }
  return __syncthreads_or(is_last);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_SYNC_CUH_
