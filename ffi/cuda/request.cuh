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
  bool is_refused = false;

  // Moves `arena` on to that of the request, or makes the op a whole one.
  __device__ explicit Request(Arena& arena) {
    if (arena.half == Half::kBoth) return;
    const bool sends = arena.half == Half::kSend;
    const int number =
        sends
            ? static_cast<int>(ptx::ld_volatile(&arena.Header()->num_requests) % arena.max_requests)
            : arena.ticket[0];
    const ArenaHeader* header = arena.Header(1 + max(number, 0));
    const bool in_flight = ptx::ld_volatile(&header->in_flight) != 0;
    is_refused = sends && in_flight;
    const bool is_here = in_flight && number >= 0 &&
                         static_cast<uint32_t>(arena.ticket[1]) == ptx::ld_volatile(&header->epoch);
    if (sends || is_here) {
      index = 1 + number;
      arena.bases += index * arena.layout.num_ranks;
      arena.own += index * arena.layout.bytes;
    } else {
      arena.half = Half::kBoth;
    }
  }

  // To be called by one thread, when all blocks of the op's last kernel have read what it changes.
  __device__ void Leave(const Arena& arena) const {
    if (index == 0) return;
    ArenaHeader* header = arena.Header();
    if (arena.half == Half::kReceive) {
      header->in_flight = 0;
      return;
    }
    arena.ticket[0] = is_refused ? -1 : index - 1;
    arena.ticket[1] = static_cast<int32_t>(header->epoch);
    if (is_refused) return;
    header->in_flight = 1;
    arena.Header(-index)->num_requests += 1;
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
