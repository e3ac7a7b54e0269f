// The memory that the GPUs of a group write into, one arena per GPU, and how kernels address it.
#ifndef JAX_EP_CUDA_ARENA_H_
#define JAX_EP_CUDA_ARENA_H_

#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "common/layout.h"

namespace jax_ep::cuda {

// Slots that share one arrival flag: few, so that the last ones are not waited for long, but enough
// to be worth the fence before the flag.
constexpr int kSlotsPerChunk = 8;
// Tokens that one block routes.
constexpr int kTokensPerRouteBlock = 256;

// Several times what one NVLink domain holds.
constexpr int kMaxRanks = 256;

JAX_EP_HOST_DEVICE inline int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Written by this GPU only.
struct ArenaHeader {
  uint32_t epoch;        // exchanges completed; the next one is epoch + 1
  uint32_t blocks_done;  // of the running exchange
  uint32_t failed;       // a peer was lost: no wait lasts any more
};

// Every exchange has the next epoch. Flags hold the epoch of what they announce and are never
// reset. Windows alternate between two halves: a rank enters epoch n + 2 only after every peer
// entered n + 1, and so has read everything of epoch n. All offsets in bytes.
struct ArenaLayout {
  int64_t header;
  int64_t ready;       // [R] flags: the peer entered this epoch
  int64_t ids_flags;   // [R, route blocks] flags: topk_ids of these tokens are here
  int64_t slot_flags;  // [R, chunks] flags: rows of these slots are here
  int64_t histograms;  // [R * route blocks + 1, histogram_size] this GPU's scratch
  int64_t ids;         // [2, R, Tmax, K] int32
  int64_t scalars;     // [2, R, Tmax, K] float32
  int64_t rows;        // [2, R - 1, Tmax, row_bytes]
  int64_t bytes;

  int64_t rank_ids_bytes, rank_rows_bytes, row_bytes;
  int32_t num_ranks, topk, max_route_blocks, max_chunks, histogram_size;

  ArenaLayout() = default;
  explicit ArenaLayout(const MoEShape& shape) {
    const int64_t ranks = shape.num_ranks, tokens = shape.max_tokens_per_rank;
    num_ranks = shape.num_ranks;
    topk = shape.topk;
    row_bytes = shape.row_bytes();
    rank_ids_bytes = tokens * shape.topk * 4;
    rank_rows_bytes = tokens * row_bytes;
    max_route_blocks = static_cast<int32_t>(CeilDiv(tokens, kTokensPerRouteBlock));
    max_chunks = static_cast<int32_t>(CeilDiv(tokens, kSlotsPerChunk));
    // Rows per expert, slots per rank, and ids that are no expert.
    histogram_size = shape.num_experts + shape.num_ranks + 1;
    int64_t at = 0;
    const auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += CeilDiv(size, 256) * 256;
      return begin;
    };
    header = take(sizeof(ArenaHeader));
    ready = take(ranks * 4);
    ids_flags = take(ranks * max_route_blocks * 4);
    slot_flags = take(ranks * max_chunks * 4);
    histograms = take((ranks * max_route_blocks + 1) * histogram_size * 4);
    ids = take(2 * ranks * rank_ids_bytes);
    scalars = take(2 * ranks * rank_ids_bytes);
    rows = take(2 * (ranks - 1) * rank_rows_bytes);
    bytes = at;
  }
};

// One rank's view of all arenas of its group.
struct Arena {
  ArenaLayout layout;
  std::byte* const* bases;  // [R] in device memory, as this GPU maps them
  std::byte* own;           // bases[rank]
  ErrorRecord* error;       // host memory: the first thing that went wrong
  uint64_t timeout_ns;
  int32_t rank;

#ifdef __CUDACC__
  __device__ ArenaHeader* Header() const {
    return reinterpret_cast<ArenaHeader*>(own + layout.header);
  }
  // Below, `owner` is whose memory it is and `source` who writes it.
  __device__ uint32_t* Ready(int owner, int source) const {
    return Flags(owner, layout.ready) + source;
  }
  __device__ uint32_t* IdsFlag(int owner, int source, int block) const {
    return Flags(owner, layout.ids_flags) + source * layout.max_route_blocks + block;
  }
  __device__ uint32_t* SlotFlag(int owner, int source, int64_t slot) const {
    return Flags(owner, layout.slot_flags) + source * layout.max_chunks + slot / kSlotsPerChunk;
  }
  __device__ int32_t* Ids(uint32_t epoch, int owner, int source) const {
    const int64_t part = (epoch & 1) * layout.num_ranks + source;
    return reinterpret_cast<int32_t*>(bases[owner] + layout.ids + part * layout.rank_ids_bytes);
  }
  __device__ float* Scalars(uint32_t epoch, int owner, int source, int64_t slot) const {
    const int64_t part = (epoch & 1) * layout.num_ranks + source;
    return reinterpret_cast<float*>(bases[owner] + layout.scalars + part * layout.rank_ids_bytes) +
           slot * layout.topk;
  }
  // A rank has no window for itself.
  __device__ int4* Row(uint32_t epoch, int owner, int source, int64_t slot) const {
    const int64_t distance = (source - owner + layout.num_ranks) % layout.num_ranks;
    const int64_t part = (epoch & 1) * (layout.num_ranks - 1) + distance - 1;
    return reinterpret_cast<int4*>(bases[owner] + layout.rows + part * layout.rank_rows_bytes +
                                   slot * layout.row_bytes);
  }
  __device__ int32_t* Histogram(int64_t row) const {
    return reinterpret_cast<int32_t*>(own + layout.histograms) + row * layout.histogram_size;
  }

 private:
  __device__ uint32_t* Flags(int owner, int64_t offset) const {
    return reinterpret_cast<uint32_t*>(bases[owner] + offset);
  }
#endif
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_ARENA_H_
