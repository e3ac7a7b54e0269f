// Requests: exchanges that are sent by one op and received by another. Each has an arena of its own
// until it has been received. Which one is decided on the device, so that a captured op can be
// replayed: requests use the arenas in turns, and all ranks start theirs in the same order.
//
// A ticket is no more than a hint. The receiving half has all operands, and does the whole op if
// the request was not sent, for all arenas were in use, or has been received before: compilers
// repeat the receiving half where they recompute, and may merge or hoist the sending one.
#ifndef JAX_EP_CUDA_REQUEST_CUH_
#define JAX_EP_CUDA_REQUEST_CUH_

#include <cstdint>

#include "cuda/arena.h"
#include "cuda/ptx.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

// The exchange that a kernel takes part in. All threads of all kernels of an op come to the same
// answer, which changes only when the last of them ends.
struct Request {
  int index = 0;  // of the arena; 0 for whole ops
  // By a sending half, whose arena is in use: it stays away from that, since the half that receives
  // what is in it may run at the same time, on another stream.
  bool is_refused = false;

  // Moves `arena` on to that of the request, or makes the op a whole one. To be called by all
  // threads of all blocks.
  __device__ explicit Request(Arena& arena) {
    if (arena.half == Half::kSend) {
      const uint32_t started = ptx::ld_volatile(&arena.Header()->num_requests);
      const int next = 1 + static_cast<int>(started % arena.max_requests);
      is_refused = !IsFree(arena, next);
      if (!is_refused) MoveTo(arena, next);
    } else if (arena.half == Half::kReceive) {
      const int number = arena.ticket[0];
      const ArenaHeader* header = arena.Header(1 + max(number, 0));
      const bool is_here =
          number >= 0 && ptx::ld_volatile(&header->in_flight) != 0 &&
          static_cast<uint32_t>(arena.ticket[1]) == ptx::ld_volatile(&header->epoch);
      if (is_here)
        MoveTo(arena, 1 + number);
      else
        arena.half = Half::kBoth;
    }
  }

  // To be called by one thread, when all blocks of the op's last kernel have read what it changes.
  __device__ void Leave(const Arena& arena) const {
    if (index == 0) return;
    ArenaHeader* header = arena.Header();
    if (arena.half == Half::kReceive) {
      // Whoever finds the arena free finds the next epoch in it.
      ptx::st_release_sys(&header->in_flight, 0);
      return;
    }
    ArenaHeader* first = arena.Header(-index);
    arena.ticket[0] = index - 1;
    arena.ticket[1] = static_cast<int32_t>(header->epoch);
    header->in_flight = 1;
    first->num_requests += 1;
    first->start_decided = 0;
  }

  // Instead of all else, by all threads of all blocks of a refused half's last kernel: the ticket
  // of nothing.
  __device__ void LeaveRefused(const Arena& arena) const {
    ArenaHeader* first = arena.Header();
    if (!IsLastBlock(&first->blocks_refused) || threadIdx.x != 0) return;
    arena.ticket[0] = -1;
    arena.ticket[1] = 0;
    first->start_decided = 0;
  }

 private:
  __device__ void MoveTo(Arena& arena, int number) {
    index = number;
    arena.bases += index * arena.layout.num_ranks;
    arena.own += index * arena.layout.bytes;
  }

  // Whether a sending half may use an arena. The first block to look decides for all: what is there
  // may be received meanwhile.
  __device__ static bool IsFree(const Arena& arena, int number) {
    constexpr uint32_t kFree = 1, kInFlight = 2;
    __shared__ uint32_t decided;
    if (threadIdx.x == 0) {
      const bool is_free = ptx::ld_acquire_sys(&arena.Header(number)->in_flight) == 0;
      const uint32_t mine = is_free ? kFree : kInFlight;
      // What this thread acquired, all whom it decides for have acquired.
      __threadfence();
      const uint32_t before = atomicCAS(&arena.Header()->start_decided, 0, mine);
      __threadfence();
      decided = before == 0 ? mine : before;
    }
    __syncthreads();
    return decided == kFree;
  }
};

// Waits for all peers, each of which sets one of `flags`; a block.
__device__ inline void AwaitPeers(const Arena& arena, const uint32_t* flags, uint32_t epoch,
                                  Phase phase) {
  for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += blockDim.x)
    Wait(arena, flags + peer, epoch, peer, phase);
  __syncthreads();
}

// Ends a kernel that ends an exchange, or the sending half of one; to be called by all threads of
// all blocks. The last block to come waits until every peer has entered, without which the next
// epoch could overrun a slow one, and moves the epoch on: to `last`, if the exchange went on to use
// the windows of later epochs, and once every peer has read what is there.
__device__ inline void LeaveEpoch(const Arena& arena, const Request& request, uint32_t epoch,
                                  Phase phase, uint32_t last) {
  ArenaHeader* header = arena.Header();
  if (!IsLastBlock(&header->blocks_done)) return;
  if (arena.receives()) AwaitPeers(arena, arena.Ready(arena.rank, 0), epoch, phase);
  if (last != epoch) {
    for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += blockDim.x)
      ptx::st_release_sys(arena.Done(peer, arena.rank), last);
    AwaitPeers(arena, arena.Done(arena.rank, 0), last, phase);
  }
  if (threadIdx.x != 0) return;
  if (arena.receives()) {
    header->send_tasks = header->receive_tasks = 0;
    header->epoch = last;
  }
  request.Leave(arena);
}
__device__ inline void LeaveEpoch(const Arena& arena, const Request& request, uint32_t epoch,
                                  Phase phase) {
  LeaveEpoch(arena, request, epoch, phase, epoch);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_REQUEST_CUH_
