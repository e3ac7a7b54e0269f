// The memory that the GPUs of a group write into, one arena per GPU, and how kernels address it.
#ifndef JAX_EP_CUDA_ARENA_H_
#define JAX_EP_CUDA_ARENA_H_

#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "common/layout.h"

namespace jax_ep::cuda {

// Tokens that share one arrival flag: few, so that the last ones are not waited for long. With more
// ranks, fewer of them go to any one.
JAX_EP_HOST_DEVICE inline int TokensPerChunk(int num_ranks) {
  constexpr int kLeast = 8;
  return kLeast * (1 + (num_ranks - 1) / kLeast);
}
// Tokens that one team routes.
constexpr int kTokensPerRoutePart = 256;

// Several times what one NVLink domain holds.
constexpr int kMaxRanks = 256;

JAX_EP_HOST_DEVICE inline int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Written by this GPU only.
struct ArenaHeader {
  uint32_t epoch;        // exchanges completed; the next one is epoch + 1
  uint32_t failed;       // a peer was lost: no wait lasts any more
  uint32_t blocks_done;  // of the running exchange
  uint32_t send_tasks;   // dealt out in the running exchange
  uint32_t receive_tasks;
  uint32_t in_flight;  // whether a request that uses this arena is to be received
  // Of the first arena, for sending halves, which all run on one stream:
  uint32_t num_requests;   // started so far
  uint32_t start_decided;  // whether the running one may use its arena: 0 before anybody looked
  uint32_t blocks_refused;
};

// What a kernel does of its op. The halves of a request are an exchange of their own arena, cut in
// two: the first sends, the second receives and ends it. So any number of other exchanges may come
// between them.
enum class Half : int32_t { kBoth, kSend, kReceive };

// Every exchange has the next epoch, a transfer one for each time that it fills the windows. Flags
// hold the epoch of what they announce and are never reset. Windows alternate between two halves: a
// rank enters epoch n + 2 only after every peer entered n + 1, and so has read everything of epoch
// n. All offsets in bytes.
struct ArenaLayout {
  int64_t header;
  int64_t ready;        // [R] flags: the peer entered this epoch
  int64_t done;         // [R] flags: the peer has read all that was sent up to this epoch
  int64_t ids_flags;    // [R, route parts] flags: topk_ids of these tokens are here
  int64_t chunk_flags;  // [R, chunks] flags: what these tokens send is here
  int64_t token_flags;  // [R, Tmax] flags: what this token sends is here; low-latency mode
  int64_t lap_flags;    // [2, R, chunks] flags: these rows of a transfer are here
  int64_t lap_room;     // [2, R, chunks] flags: the peer has read the rows that this GPU sent there
  int64_t pings;        // [2] flags of the benchmark
  int64_t histograms;   // [R * route parts, histogram_size] this GPU's scratch
  int64_t ids;          // [2, R, Tmax, K] int32; in the low-latency mode with the epoch, 64 bits
  int64_t scalars;      // [2, R, Tmax, K] float32
  int64_t rows;         // [2, R - 1, Tmax, row_bytes]
  int64_t bytes;

  int64_t rank_ids_bytes, rank_scalars_bytes, rank_rows_bytes, row_bytes;
  int32_t num_ranks, topk, max_tokens, tokens_per_chunk, max_route_parts, max_chunks,
      histogram_size;

  ArenaLayout() = default;
  explicit ArenaLayout(const MoEShape& shape) {
    const int64_t ranks = shape.num_ranks, tokens = shape.max_tokens_per_rank;
    num_ranks = shape.num_ranks;
    topk = shape.topk;
    max_tokens = shape.max_tokens_per_rank;
    row_bytes = shape.row_bytes();
    rank_ids_bytes = tokens * shape.topk * (shape.low_latency ? 8 : 4);
    rank_scalars_bytes = tokens * shape.topk * 4;
    rank_rows_bytes = tokens * row_bytes;
    tokens_per_chunk = TokensPerChunk(shape.num_ranks);
    max_route_parts = static_cast<int32_t>(CeilDiv(tokens, kTokensPerRoutePart));
    max_chunks = static_cast<int32_t>(CeilDiv(tokens, tokens_per_chunk));
    // Rows per expert, tokens per rank, and ids that are no expert.
    histogram_size = shape.num_experts + shape.num_ranks + 1;
    int64_t at = 0;
    const auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += CeilDiv(size, 256) * 256;
      return begin;
    };
    header = take(sizeof(ArenaHeader));
    ready = take(ranks * 4);
    done = take(ranks * 4);
    ids_flags = take(ranks * max_route_parts * 4);
    chunk_flags = take(ranks * max_chunks * 4);
    token_flags = take(shape.low_latency ? ranks * tokens * 4 : 0);
    lap_flags = take(2 * ranks * max_chunks * 4);
    lap_room = take(2 * ranks * max_chunks * 4);
    pings = take(2 * 4);
    histograms = take(ranks * max_route_parts * histogram_size * 4);
    ids = take(2 * ranks * rank_ids_bytes);
    scalars = take(2 * ranks * rank_scalars_bytes);
    rows = take(2 * (ranks - 1) * rank_rows_bytes);
    bytes = at;
  }
};

// One rank's view of all arenas of its group, for one kernel. Behind the first, which whole ops
// use, every rank has as many more as requests may be in flight; see request.cuh.
struct Arena {
  ArenaLayout layout;
  std::byte* const* bases;  // [1 + max_requests, R] in device memory, as this GPU maps them
  std::byte* own;           // bases[rank]
  ErrorRecord* error;       // host memory: the first thing that went wrong
  uint64_t timeout_ns;
  int32_t rank;
  int32_t max_requests = 0;
  Half half = Half::kBoth;
  int32_t* ticket = nullptr;  // [2] written by kSend, read by kReceive

#ifdef __CUDACC__
  __device__ bool sends() const { return half != Half::kReceive; }
  __device__ bool receives() const { return half != Half::kSend; }
  __device__ ArenaHeader* Header(int arenas_behind = 0) const {
    return reinterpret_cast<ArenaHeader*>(own + arenas_behind * layout.bytes + layout.header);
  }
  // Below, `owner` is whose memory it is and `source` who writes it.
  __device__ uint32_t* Ready(int owner, int source) const {
    return Flags(owner, layout.ready) + source;
  }
  __device__ uint32_t* Done(int owner, int source) const {
    return Flags(owner, layout.done) + source;
  }
  __device__ uint32_t* IdsFlag(int owner, int source, int part) const {
    return Flags(owner, layout.ids_flags) + source * layout.max_route_parts + part;
  }
  __device__ uint32_t* ChunkFlag(int owner, int source, int64_t chunk) const {
    return Flags(owner, layout.chunk_flags) + source * layout.max_chunks + chunk;
  }
  __device__ uint32_t* TokenFlag(int owner, int source, int64_t token) const {
    return Flags(owner, layout.token_flags) + int64_t{source} * layout.max_tokens + token;
  }
  __device__ uint32_t* LapFlag(uint32_t epoch, int owner, int source, int64_t chunk) const {
    return Flags(owner, layout.lap_flags) + LapChunk(epoch, source, chunk);
  }
  __device__ uint32_t* LapRoom(uint32_t epoch, int owner, int source, int64_t chunk) const {
    return Flags(owner, layout.lap_room) + LapChunk(epoch, source, chunk);
  }
  __device__ uint32_t* Ping(uint32_t epoch, int owner) const {
    return Flags(owner, layout.pings) + (epoch & 1);
  }
  __device__ int32_t* Ids(uint32_t epoch, int owner, int source) const {
    const int64_t part = (epoch & 1) * layout.num_ranks + source;
    return reinterpret_cast<int32_t*>(bases[owner] + layout.ids + part * layout.rank_ids_bytes);
  }
  __device__ uint64_t* IdWord(uint32_t epoch, int owner, int source, int64_t at) const {
    const int64_t part = (epoch & 1) * layout.num_ranks + source;
    return reinterpret_cast<uint64_t*>(bases[owner] + layout.ids + part * layout.rank_ids_bytes) +
           at;
  }
  __device__ float* Scalars(uint32_t epoch, int owner, int source, int64_t token) const {
    const int64_t part = (epoch & 1) * layout.num_ranks + source;
    return reinterpret_cast<float*>(bases[owner] + layout.scalars +
                                    part * layout.rank_scalars_bytes) +
           token * layout.topk;
  }
  // What `source` sends of its `token`, or returns for the owner's. A rank has no window for
  // itself.
  __device__ int4* Row(uint32_t epoch, int owner, int source, int64_t token) const {
    const int64_t distance = (source - owner + layout.num_ranks) % layout.num_ranks;
    const int64_t part = (epoch & 1) * (layout.num_ranks - 1) + distance - 1;
    return reinterpret_cast<int4*>(bases[owner] + layout.rows + part * layout.rank_rows_bytes +
                                   token * layout.row_bytes);
  }
  __device__ int32_t* Histogram(int64_t row) const {
    return reinterpret_cast<int32_t*>(own + layout.histograms) + row * layout.histogram_size;
  }

 private:
  __device__ int64_t LapChunk(uint32_t epoch, int source, int64_t chunk) const {
    return ((epoch & 1) * layout.num_ranks + source) * layout.max_chunks + chunk;
  }
  __device__ uint32_t* Flags(int owner, int64_t offset) const {
    return reinterpret_cast<uint32_t*>(bases[owner] + offset);
  }
#endif
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_ARENA_H_
