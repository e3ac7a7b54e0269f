// Routing: every rank sends its topk_ids to all others, and each then lays out its own rows from
// all of them. One exchange, no counts to wait for; the same inputs give every rank the same
// totals.
//
// Kernel 1 exchanges and counts, per block of tokens; its last block adds the counts up over the
// blocks. Kernel 2 turns the counts before a block into the first row of each of its groups, and
// places the block's rows in order of (token, k).
#include "cuda/ops.h"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = kTokensPerRouteBlock;  // a thread per token
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

JAX_EP_HOST_DEVICE int BlocksPerSource(int64_t num_tokens) {
  return num_tokens == 0 ? 1 : static_cast<int>(CeilDiv(num_tokens, kTokensPerRouteBlock));
}

// Which tokens a block works on.
struct Part {
  int source;
  int block;  // of the source's
  int blocks_per_source;
  int64_t begin, end;  // tokens

  __device__ Part(const Arena& arena, int64_t num_tokens) {
    blocks_per_source = BlocksPerSource(num_tokens);
    // Own tokens first: their blocks wait for nobody, and the others wait for their peers' like
    // them.
    source = (arena.rank + blockIdx.x / blocks_per_source) % arena.layout.num_ranks;
    block = blockIdx.x % blocks_per_source;
    begin = static_cast<int64_t>(block) * kTokensPerRouteBlock;
    end = min(begin + kTokensPerRouteBlock, num_tokens);
  }
  __device__ int64_t size() const { return end > begin ? end - begin : 0; }
};

__device__ __forceinline__ bool IsExpert(const MoEShape& shape, int id) {
  return id >= 0 && id < shape.num_experts;
}

// Whether one of a token's experts lives on the rank whose first expert is `first`.
__device__ __forceinline__ bool Hits(const int32_t* ids, int topk, int first, int local_experts) {
  bool hit = false;
  for (int k = 0; k < topk; ++k)
    hit |= static_cast<unsigned>(ids[k] - first) < static_cast<unsigned>(local_experts);
  return hit;
}

__device__ void SendIds(const Arena& arena, const Part& part, uint32_t epoch, int topk,
                        const int32_t* ids) {
  for (int distance = 1; distance < arena.layout.num_ranks; ++distance) {
    const int peer = (arena.rank + distance) % arena.layout.num_ranks;
    int32_t* to = arena.Ids(epoch, peer, arena.rank);
    for (int64_t i = part.begin * topk + threadIdx.x; i < part.end * topk; i += kThreads)
      to[i] = ids[i];
  }
  __syncthreads();
  ptx::fence_acq_rel_sys();
  for (int peer = threadIdx.x; peer < arena.layout.num_ranks; peer += kThreads)
    if (peer != arena.rank) ptx::st_release_sys(arena.IdsFlag(peer, arena.rank, part.block), epoch);
}

// Turns the blocks' histograms, in order of (source, block), into the sums before each and, in one
// more row, over all. One block: two columns per thread, with many loads in flight.
__device__ void ScanHistograms(const Arena& arena) {
  constexpr int kBatch = 16, kColumns = 2;
  const int rows = gridDim.x, columns = arena.layout.histogram_size;
  for (int first = threadIdx.x; first < columns; first += kColumns * kThreads) {
    int sum[kColumns] = {};
    for (int begin = 0; begin < rows; begin += kBatch) {
      int counts[kBatch][kColumns];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = first + c * kThreads;
          counts[i][c] = begin + i < rows && column < columns
                             ? __ldcg(&arena.Histogram(begin + i)[column])
                             : 0;
        }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = first + c * kThreads;
          if (begin + i < rows && column < columns) arena.Histogram(begin + i)[column] = sum[c];
          sum[c] += counts[i][c];
        }
    }
    for (int c = 0; c < kColumns; ++c)
      if (first + c * kThreads < columns) arena.Histogram(rows)[first + c * kThreads] = sum[c];
  }
}

__global__ void __launch_bounds__(kThreads)
    ExchangeAndCount(MoEShape shape, Arena arena, RouteParams params) {
  extern __shared__ int32_t counts[];  // [E] rows, [R] slots, [1] bad ids
  const Part part(arena, params.num_tokens);
  const uint32_t epoch = EnterEpoch(arena);
  const int32_t* ids = params.topk_ids;
  bool arrived = true;
  if (part.source == arena.rank) {
    SendIds(arena, part, epoch, shape.topk, ids);
  } else {
    __shared__ bool flag;
    if (threadIdx.x == 0)
      flag = Wait(arena, arena.IdsFlag(arena.rank, part.source, part.block), epoch, part.source,
                  Phase::kRoute);
    __syncthreads();
    arrived = flag;
    ids = arena.Ids(epoch, arena.rank, part.source);
  }
  for (int i = threadIdx.x; i < arena.layout.histogram_size; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int64_t token = part.begin + threadIdx.x;
  if (arrived && token < part.end) {
    const int32_t* mine = ids + token * shape.topk;
    for (int k = 0; k < shape.topk; ++k) {
      const int id = mine[k];
      if (IsExpert(shape, id))
        atomicAdd(&counts[id], 1);
      else if (id != -1)
        atomicAdd(&counts[shape.num_experts + shape.num_ranks], 1);
    }
    const int local = shape.local_experts();
    for (int rank = 0; rank < shape.num_ranks; ++rank)
      if (Hits(mine, shape.topk, rank * local, local))
        atomicAdd(&counts[shape.num_experts + rank], 1);
  }
  __syncthreads();
  int32_t* histogram = arena.Histogram(part.source * part.blocks_per_source + part.block);
  for (int i = threadIdx.x; i < arena.layout.histogram_size; i += kThreads)
    histogram[i] = counts[i];
  // Kernel 2 adds to it.
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e < shape.local_experts(); e += kThreads)
      params.num_tokens_per_expert[e] = 0;
  if (LeaveEpoch(arena, epoch, Phase::kRoute)) ScanHistograms(arena);
}

// The entries of `column` in the histograms of blocks [begin, end), by (source, block), after the
// scan.
__device__ __forceinline__ int CountRange(const Arena& arena, int column, int begin, int end) {
  return arena.Histogram(end)[column] - arena.Histogram(begin)[column];
}

// values[i] becomes the sum of the aligned values before it; returns the sum of all. One warp.
__device__ int64_t ExclusiveScan(int32_t* values, int n, int alignment) {
  const int lane = threadIdx.x % 32;
  int64_t total = 0;
  for (int begin = 0; begin < n; begin += 32) {
    const int i = begin + lane;
    const int64_t value = i < n ? CeilDiv(values[i], alignment) * alignment : 0;
    int64_t sum = value;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t below = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += below;
    }
    // A start past 2^31 is past any capacity: kept there, so that no row of it looks valid.
    if (i < n)
      values[i] = static_cast<int32_t>(min(total + sum - value, static_cast<int64_t>(INT32_MAX)));
    total += __shfl_sync(kAll, sum, 31);
  }
  return total;
}

// Shared memory of kernel 2.
struct Tables {
  int32_t* totals;       // [G] rows of each of my groups
  int32_t* starts;       // [G] first row of each group, as if capacity had no end
  int32_t* warp_rows;    // [kWarps, G] next row of each group for each warp
  int32_t* warp_slots;   // [kWarps, R] next slot at each rank for each warp
  int32_t* token_slots;  // [kThreads] slot of each token at my rank, or -1

  __device__ Tables(const MoEShape& shape, int32_t* at) {
    const int groups = shape.num_row_groups();
    totals = at, at += groups;
    starts = at, at += groups;
    warp_rows = at, at += kWarps * groups;
    warp_slots = at, at += kWarps * shape.num_ranks;
    token_slots = at;
  }
  static size_t Bytes(const MoEShape& shape) {
    return sizeof(int32_t) *
           ((2 + kWarps) * shape.num_row_groups() + kWarps * shape.num_ranks + kThreads);
  }
};

// The row group of one (token, k) of the part, or -1.
__device__ __forceinline__ int GroupOf(const MoEShape& shape, int me, int id) {
  const int local = id - me * shape.local_experts();
  return IsExpert(shape, id) && local >= 0 && local < shape.local_experts() ? local : -1;
}

__device__ void FillTotals(const MoEShape& shape, const Arena& arena, int blocks,
                           const Tables& tables) {
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  for (int group = threadIdx.x; group < shape.num_row_groups(); group += kThreads) {
    const int column =
        rank_major ? shape.num_experts + arena.rank : arena.rank * shape.local_experts() + group;
    const int begin = rank_major ? group * blocks : 0;
    const int end = rank_major ? begin + blocks : shape.num_ranks * blocks;
    tables.totals[group] = tables.starts[group] = CountRange(arena, column, begin, end);
  }
  __syncthreads();
  const int alignment = rank_major ? 1 : shape.expert_alignment;
  if (threadIdx.x < 32) ExclusiveScan(tables.starts, shape.num_row_groups(), alignment);
  __syncthreads();
}

// Gives this block's tokens their slots at `rank`, in token order. With `send`, the tables of the
// sending side; else the slots at my own rank go to token_slots.
__device__ void PlaceSlots(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                           const Part& part, const Tables& tables, const int32_t* ids, bool send) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ranks = shape.num_ranks;
  const int first_rank = send ? 0 : arena.rank, last_rank = send ? ranks : arena.rank + 1;
  const int64_t token = part.begin + threadIdx.x;
  const bool in_range = token < part.end;
  const int local = shape.local_experts();
  const auto hits_rank = [&](int rank) {
    return in_range && Hits(ids + token * shape.topk, shape.topk, rank * local, local);
  };
  for (int rank = first_rank; rank < last_rank; ++rank) {
    const unsigned hits = __ballot_sync(kAll, hits_rank(rank));
    if (lane == 0) tables.warp_slots[warp * ranks + rank] = __popc(hits);
  }
  __syncthreads();
  for (int rank = first_rank + threadIdx.x; rank < last_rank; rank += kThreads) {
    const int first = part.source * part.blocks_per_source;
    int slot = CountRange(arena, shape.num_experts + rank, first, first + part.block);
    for (int w = 0; w < kWarps; ++w) {
      const int count = tables.warp_slots[w * ranks + rank];
      tables.warp_slots[w * ranks + rank] = slot;
      slot += count;
    }
  }
  __syncthreads();
  for (int rank = first_rank; rank < last_rank; ++rank) {
    const bool hit = hits_rank(rank);
    const unsigned hits = __ballot_sync(kAll, hit);
    const int slot =
        hit ? tables.warp_slots[warp * ranks + rank] + __popc(hits & ((1u << lane) - 1)) : -1;
    if (rank == arena.rank) tables.token_slots[threadIdx.x] = slot;
    if (!send || !in_range) continue;
    params.tables.send_slots[token * ranks + rank] = slot;
    if (hit)
      params.tables.send_tokens[rank * params.num_tokens + slot] = static_cast<int32_t>(token);
  }
  __syncthreads();
}

// Rows of a kRankMajor token: one, holding the ids of its local experts.
__device__ void PlaceTokenRows(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                               const Part& part, const Tables& tables, const int32_t* ids) {
  const int slot = tables.token_slots[threadIdx.x];
  if (slot < 0) return;
  const int64_t row = static_cast<int64_t>(tables.starts[part.source]) + slot;
  const bool kept = row < shape.capacity;
  params.tables.recv_rows[part.source * params.num_tokens + slot] =
      kept ? static_cast<int32_t>(row) : -1;
  if (!kept) return;
  for (int k = 0; k < shape.topk; ++k) {
    const int expert = GroupOf(shape, arena.rank, ids[(part.begin + threadIdx.x) * shape.topk + k]);
    params.recv_topk_ids[row * shape.topk + k] = expert;
    if (expert >= 0) atomicAdd(&params.num_tokens_per_expert[expert], 1);
  }
}

// Rows of kFlat: a warp takes 32 (token, k) at a time, in order; equal groups among them are told
// apart by lane, and the next 32 continue where these end.
__device__ void PlaceExpertRows(const MoEShape& shape, const Arena& arena,
                                const RouteParams& params, const Part& part, const Tables& tables,
                                const int32_t* ids) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, topk = shape.topk,
            groups = shape.num_row_groups();
  int32_t* next = tables.warp_rows + warp * groups;
  const int64_t begin = min(part.begin + warp * 32, part.begin + part.size()) * topk;
  const int64_t end = min(part.begin + warp * 32 + 32, part.begin + part.size()) * topk;
  const auto group_at = [&](int64_t i) {
    return i < end ? GroupOf(shape, arena.rank, ids[i]) : -1;
  };

  for (int group = lane; group < groups; group += 32) next[group] = 0;
  __syncwarp();
  for (int64_t i = begin + lane; i < end; i += 32)
    if (const int group = group_at(i); group >= 0) atomicAdd(&next[group], 1);
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    const int column = arena.rank * shape.local_experts() + group;
    const int before = part.source * part.blocks_per_source + part.block;
    int64_t row = static_cast<int64_t>(tables.starts[group]) + CountRange(arena, column, 0, before);
    for (int w = 0; w < kWarps; ++w) {
      const int count = tables.warp_rows[w * groups + group];
      tables.warp_rows[w * groups + group] =
          static_cast<int32_t>(min(row, static_cast<int64_t>(INT32_MAX - kThreads * 32)));
      row += count;
    }
  }
  __syncthreads();
  for (int64_t wave = begin; wave < end; wave += 32) {
    const int64_t i = wave + lane;
    const int group = group_at(i);
    const unsigned same = __match_any_sync(kAll, group);
    const int row = group >= 0 ? next[group] + __popc(same & ((1u << lane) - 1)) : -1;
    __syncwarp();
    if (group >= 0 && lane == __ffs(same) - 1) next[group] += __popc(same);
    __syncwarp();
    if (i >= end) continue;
    const int slot = tables.token_slots[i / topk - part.begin];
    if (slot < 0) continue;
    params.tables.recv_rows[(part.source * params.num_tokens + slot) * topk + i % topk] =
        row >= 0 && row < shape.capacity ? row : -1;
  }
}

// What the part's own indices stand for past the end of a table.
__device__ void FillTails(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                          const Part& part) {
  const int first = part.source * part.blocks_per_source, last = first + part.blocks_per_source;
  const int per_slot = shape.rows_per_slot();
  const auto slots_at = [&](int rank) {
    return CountRange(arena, shape.num_experts + rank, first, last);
  };
  const int64_t slot = part.begin + threadIdx.x;
  if (slot >= part.end) return;
  if (slot >= slots_at(arena.rank))
    for (int k = 0; k < per_slot; ++k)
      params.tables.recv_rows[(part.source * params.num_tokens + slot) * per_slot + k] = -1;
  if (part.source != arena.rank) return;
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    if (slot >= slots_at(rank)) params.tables.send_tokens[rank * params.num_tokens + slot] = -1;
}

// Rows that each rank needs, padding included, into shared needed[R]: a warp per rank.
__device__ void CountNeeded(const MoEShape& shape, const Arena& arena, int blocks_per_source,
                            long long* needed) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32,
            all = shape.num_ranks * blocks_per_source;
  for (int rank = warp; rank < shape.num_ranks; rank += kWarps) {
    long long rows = 0;
    if (shape.layout == OutputLayout::kRankMajor) {
      if (lane == 0) rows = CountRange(arena, shape.num_experts + rank, 0, all);
    } else {
      for (int e = lane; e < shape.local_experts(); e += 32)
        rows += CeilDiv(CountRange(arena, rank * shape.local_experts() + e, 0, all),
                        shape.expert_alignment) *
                shape.expert_alignment;
    }
    for (int step = 16; step > 0; step /= 2) rows += __shfl_xor_sync(kAll, rows, step);
    if (lane == 0) needed[rank] = rows;
  }
}

// The first rank whose routing cannot be honoured. All ranks see the same and come to the same
// answer.
__device__ ErrorRecord FindError(const MoEShape& shape, const Arena& arena, const int* bad_ids,
                                 const long long* needed) {
  if (ptx::ld_volatile(&arena.Header()->failed) != 0)
    return {ErrorCode::kTimeout, arena.rank, -1, Phase::kRoute, 0, 0};
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    if (bad_ids[rank] > 0)
      return {ErrorCode::kBadExpertId, rank, -1, Phase::kRoute, shape.num_experts, bad_ids[rank]};
  for (int rank = 0; rank < shape.num_ranks && !shape.drop_overflow; ++rank)
    if (needed[rank] > shape.capacity)
      return {ErrorCode::kOverflow, rank, -1, Phase::kRoute, shape.capacity, needed[rank]};
  return {ErrorCode::kNone, -1, -1, Phase::kRoute, 0, 0};
}

// Counts, offsets and status: one block.
__device__ void FillSummary(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                            int blocks_per_source, const Tables& tables) {
  const int blocks = blocks_per_source, groups = shape.num_row_groups();
  const int64_t capacity = shape.capacity;
  const RouteTables& out = params.tables;
  __shared__ int dropped, bad_ids[kMaxRanks];
  __shared__ long long needed[kMaxRanks];
  if (threadIdx.x == 0) dropped = 0;
  __syncthreads();
  for (int rank = threadIdx.x; rank < shape.num_ranks; rank += kThreads) {
    const int mine = arena.rank * blocks, theirs = rank * blocks, slots = shape.num_experts;
    out.send_counts[rank] = CountRange(arena, slots + rank, mine, mine + blocks);
    out.recv_counts[rank] = CountRange(arena, slots + arena.rank, theirs, theirs + blocks);
    bad_ids[rank] = CountRange(arena, slots + shape.num_ranks, theirs, theirs + blocks);
  }
  CountNeeded(shape, arena, blocks, needed);
  for (int group = threadIdx.x; group < groups; group += kThreads) {
    const int64_t start = tables.starts[group], total = tables.totals[group];
    const int64_t kept = max(min(capacity - start, total), int64_t{0});
    out.group_counts[group] = static_cast<int32_t>(kept);
    out.group_offsets[group] = params.offsets[group] = static_cast<int32_t>(min(start, capacity));
    if (shape.layout == OutputLayout::kFlat)
      params.num_tokens_per_expert[group] = static_cast<int32_t>(kept);
    atomicAdd(&dropped, static_cast<int>(total - kept));
    if (group == groups - 1) {
      const int alignment = shape.layout == OutputLayout::kRankMajor ? 1 : shape.expert_alignment;
      const int64_t end = start + CeilDiv(total, alignment) * alignment;
      out.group_offsets[groups] = params.offsets[groups] = static_cast<int32_t>(min(end, capacity));
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const ErrorRecord error = FindError(shape, arena, bad_ids, needed);
  *params.num_dropped = out.status[kNumDropped] = dropped;
  out.status[kCode] = static_cast<int32_t>(error.code);
  out.status[kRank] = error.rank;
  out.status[kDetail] = static_cast<int32_t>(error.got);
  // A timeout has been reported by who waited.
  if (error.code == ErrorCode::kBadExpertId || error.code == ErrorCode::kOverflow)
    Report(arena, error);
}

// The last block only sums up, beside the others.
__global__ void __launch_bounds__(kThreads)
    PlaceRows(MoEShape shape, Arena arena, RouteParams params) {
  extern __shared__ int32_t shared[];
  const Tables tables(shape, shared);
  const Part part(arena, params.num_tokens);
  const bool mine = part.source == arena.rank;
  // The exchange has moved the epoch on; its ids stay until the peers have seen our next one.
  const uint32_t epoch = ptx::ld_volatile(&arena.Header()->epoch);
  const int32_t* ids = mine ? params.topk_ids : arena.Ids(epoch, arena.rank, part.source);
  FillTotals(shape, arena, part.blocks_per_source, tables);
  if (blockIdx.x == gridDim.x - 1)
    return FillSummary(shape, arena, params, part.blocks_per_source, tables);
  PlaceSlots(shape, arena, params, part, tables, ids, mine);
  if (shape.layout == OutputLayout::kRankMajor) {
    PlaceTokenRows(shape, arena, params, part, tables, ids);
    const int last = shape.num_ranks - 1;
    const int64_t end =
        (static_cast<int64_t>(tables.starts[last]) + tables.totals[last]) * shape.topk;
    const int64_t stride = static_cast<int64_t>(gridDim.x - 1) * kThreads;
    for (int64_t i = end + blockIdx.x * int64_t{kThreads} + threadIdx.x;
         i < shape.capacity * shape.topk; i += stride)
      params.recv_topk_ids[i] = -1;
  } else {
    PlaceExpertRows(shape, arena, params, part, tables, ids);
  }
  FillTails(shape, arena, params, part);
}

int CountBytes(const MoEShape& shape) {
  return static_cast<int>(ArenaLayout(shape).histogram_size * sizeof(int32_t));
}

}  // namespace

cudaError_t LaunchRoute(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                        cudaStream_t stream) {
  const int blocks = shape.num_ranks * BlocksPerSource(params.num_tokens);
  ExchangeAndCount<<<blocks, kThreads, CountBytes(shape), stream>>>(shape, arena, params);
  PlaceRows<<<blocks + 1, kThreads, Tables::Bytes(shape), stream>>>(shape, arena, params);
  return cudaGetLastError();
}

// Communicators of several shapes share the kernels: the limit only ever rises.
template <typename Kernel>
cudaError_t AllowSharedMemory(Kernel* kernel, int bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.maxDynamicSharedSizeBytes >= bytes) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaError_t LoadRoute(const MoEShape& shape) {
  const cudaError_t error = AllowSharedMemory(ExchangeAndCount, CountBytes(shape));
  return error != cudaSuccess
             ? error
             : AllowSharedMemory(PlaceRows, static_cast<int>(Tables::Bytes(shape)));
}

}  // namespace jax_ep::cuda
