// Routing in the low-latency mode, within the dispatch: ids travel in words that also hold the
// epoch, every receiving block reads and counts all of them in its own shared memory, and finds the
// rows that it asks for by counting.
#ifndef JAX_EP_CUDA_LATENCY_ROUTE_CUH_
#define JAX_EP_CUDA_LATENCY_ROUTE_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/ops.h"
#include "cuda/dispatch.cuh"
#include "cuda/latency.cuh"

namespace jax_ep::cuda {

// Everybody's ids, and what follows from counting them; in shared memory.
struct Routing {
  int32_t* experts;  // [E] (token, k) that name each expert
  int32_t* ranks;    // [R] tokens that go to each rank
  int32_t* mine;     // [R] tokens of each source that come here
  int32_t* bad_ids;  // [R] entries of each source that are no experts
  int32_t* needed;   // [R] rows that each rank needs, or its fullest expert
  int32_t* lost;     // [1] whether some ids did not come
  int32_t* starts;   // [groups + 1] first row of each group here, if capacity had no end
  int16_t* ids;      // [R, T, K] experts, or -1
  int num_ids;
  int local_experts, slots;  // divisions, done once

  static __host__ __device__ size_t SharedBytes(const MoEShape& shape, int64_t num_tokens) {
    const int64_t counters = shape.num_experts + 4 * shape.num_ranks + shape.num_row_groups() + 2;
    return CeilDiv(counters * 4, 16) * 16 +
           CeilDiv(shape.num_ranks * num_tokens * shape.topk, 8) * 16;
  }

  __device__ Routing(const MoEShape& shape, int64_t num_tokens, std::byte* shared) {
    experts = reinterpret_cast<int32_t*>(shared);
    ranks = experts + shape.num_experts;
    mine = ranks + shape.num_ranks;
    bad_ids = mine + shape.num_ranks;
    needed = bad_ids + shape.num_ranks;
    lost = needed + shape.num_ranks;
    starts = lost + 1;
    const int counters = static_cast<int>(starts + shape.num_row_groups() + 1 - experts);
    ids = reinterpret_cast<int16_t*>(shared + CeilDiv(counters * 4, 16) * 16);
    num_ids = static_cast<int>(shape.num_ranks * num_tokens * shape.topk);
    local_experts = shape.local_experts();
    slots = static_cast<int>(shape.capacity) / local_experts;
  }
};

// What all of a block know once the ids are counted.
struct Verdict {
  int32_t code, rank, got;
};

// The first `blocks` blocks send this rank's ids to all others.
__device__ inline void SendIds(const MoEShape& shape, const Arena& arena, const int32_t* topk_ids,
                               int64_t num_tokens, uint32_t epoch, int blocks) {
  const int per_rank = static_cast<int>(num_tokens) * shape.topk, ranks = shape.num_ranks;
  for (int at = blockIdx.x * kLatencyThreads + threadIdx.x; at < per_rank;
       at += blocks * kLatencyThreads) {
    const uint64_t word = uint64_t{epoch} << 32 | static_cast<uint32_t>(topk_ids[at]);
    for (int peer = arena.rank + 1; peer < arena.rank + ranks; ++peer)
      ptx::st_relaxed_sys(arena.IdWord(epoch, peer < ranks ? peer : peer - ranks, arena.rank, at),
                          word);
  }
}

// The id in a word that was `seen` once; waits for it if it was not there yet. -1 if it never came.
__device__ inline int AwaitId(const Arena& arena, const uint64_t* word, uint64_t seen,
                              uint32_t epoch, int source, bool& arrived) {
  const auto epoch_of = [&] { return static_cast<uint32_t>(seen >> 32); };
  const auto look = [&] {
    seen = ptx::ld_relaxed_sys(word);
    return epoch_of();
  };
  if (epoch_of() == epoch || Poll(arena, epoch, source, Phase::kRoute, look))
    return static_cast<int>(seen);
  arrived = false;
  return -1;
}

// Reads all ids, each thread its own, and counts experts.
__device__ inline void ReceiveIds(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                                  uint32_t epoch, const Routing& routing) {
  constexpr int kBatch = 8;  // loads in flight
  const int per_rank = static_cast<int>(p.num_tokens) * shape.topk;
  bool arrived = true;
  // Moved along rather than divided out: a division takes as long as all the rest.
  int source = 0, at = threadIdx.x;
  const auto settle = [&] {
    for (; at >= per_rank; at -= per_rank) ++source;
  };
  for (int begin = threadIdx.x; begin < routing.num_ids; begin += kBatch * kLatencyThreads) {
    uint64_t seen[kBatch];
    const uint64_t* words[kBatch];
    int sources[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (begin + u * kLatencyThreads >= routing.num_ids) break;
      settle();
      sources[u] = source;
      words[u] = arena.IdWord(epoch, arena.rank, source, at);
      seen[u] = source == arena.rank ? uint64_t{epoch} << 32 | static_cast<uint32_t>(p.topk_ids[at])
                                     : ptx::ld_relaxed_sys(words[u]);
      at += kLatencyThreads;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = begin + u * kLatencyThreads;
      if (i >= routing.num_ids) break;
      const int id = AwaitId(arena, words[u], seen[u], epoch, sources[u], arrived);
      const bool is_expert = IsExpert(shape, id);
      routing.ids[i] = static_cast<int16_t>(is_expert ? id : -1);
      if (is_expert)
        atomicAdd(&routing.experts[id], 1);
      else if (id != -1)
        atomicAdd(&routing.bad_ids[sources[u]], 1);
    }
  }
  if (!arrived) *routing.lost = 1;
}

// Counts tokens by rank, where rows are of tokens: a thread for each.
__device__ inline void CountTokens(const MoEShape& shape, int me, int64_t num_tokens,
                                   const Routing& routing) {
  const int local = routing.local_experts, tokens = static_cast<int>(num_tokens);
  for (int token = threadIdx.x; token < shape.num_ranks * tokens; token += kLatencyThreads) {
    const int16_t* ids = routing.ids + token * shape.topk;
    for (int k = 0; k < shape.topk; ++k) {
      const int rank = ids[k] < 0 ? -1 : ids[k] / local;
      bool is_first = rank >= 0;
      for (int earlier = 0; earlier < k; ++earlier)
        is_first &= ids[earlier] < 0 || ids[earlier] / local != rank;
      if (!is_first) continue;
      atomicAdd(&routing.ranks[rank], 1);
      if (rank == me) atomicAdd(&routing.mine[token / tokens], 1);
    }
  }
}

__device__ inline int AlignUp(int n, int alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

// Rows of a group, padding included.
__device__ inline int GroupSize(const MoEShape& shape, int me, const Routing& routing, int group) {
  if (shape.layout == OutputLayout::kRankMajor) return routing.mine[group];
  if (shape.layout == OutputLayout::kExpertMajor) return routing.slots;
  return AlignUp(routing.experts[me * routing.local_experts + group], shape.expert_alignment);
}

// Where the groups start: one warp, 32 groups at a time.
__device__ inline void FindStarts(const MoEShape& shape, int me, const Routing& routing) {
  const int lane = threadIdx.x % 32, groups = shape.num_row_groups();
  int base = 0;
  for (int begin = 0; begin < groups; begin += 32) {
    const int group = begin + lane,
              size = group < groups ? GroupSize(shape, me, routing, group) : 0;
    int end = size;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_sync(kAllLanes, end, max(lane - step, 0));
      if (lane >= step) end += before;
    }
    if (group < groups) routing.starts[group] = base + end - size;
    base += __shfl_sync(kAllLanes, end, 31);
  }
  if (lane == 0) routing.starts[groups] = base;
}

// What each rank needs of its capacity: a warp per rank.
__device__ inline void CountNeeded(const MoEShape& shape, const Routing& routing) {
  const int lane = threadIdx.x % 32;
  for (int rank = threadIdx.x / 32; rank < shape.num_ranks; rank += kLatencyWarps) {
    int needed = shape.layout == OutputLayout::kRankMajor && lane == 0 ? routing.ranks[rank] : 0;
    if (shape.layout != OutputLayout::kRankMajor)
      for (int e = lane; e < routing.local_experts; e += 32) {
        const int rows = routing.experts[rank * routing.local_experts + e];
        needed = shape.layout == OutputLayout::kExpertMajor
                     ? max(needed, rows)
                     : needed + AlignUp(rows, shape.expert_alignment);
      }
    for (int step = 16; step > 0; step /= 2) {
      const int other = __shfl_xor_sync(kAllLanes, needed, step);
      needed = shape.layout == OutputLayout::kExpertMajor ? max(needed, other) : needed + other;
    }
    if (lane == 0) routing.needed[rank] = needed;
  }
}

__device__ inline int64_t Limit(const MoEShape& shape, const Routing& routing) {
  return shape.layout == OutputLayout::kExpertMajor ? routing.slots : shape.capacity;
}

// The first rank whose routing cannot be honoured; all ranks come to the same answer. A warp.
__device__ inline Verdict FindError(const MoEShape& shape, const Arena& arena,
                                    const Routing& routing) {
  const int lane = threadIdx.x % 32;
  if (*routing.lost != 0) return {static_cast<int32_t>(ErrorCode::kTimeout), arena.rank, 0};
  for (int begin = 0; begin < shape.num_ranks; begin += 32) {
    const int rank = begin + lane;
    const unsigned bad =
        __ballot_sync(kAllLanes, rank < shape.num_ranks && routing.bad_ids[rank] > 0);
    if (bad == 0) continue;
    const int first = begin + __ffs(bad) - 1;
    return {static_cast<int32_t>(ErrorCode::kBadExpertId), first, routing.bad_ids[first]};
  }
  for (int begin = 0; begin < shape.num_ranks && !shape.drop_overflow; begin += 32) {
    const int rank = begin + lane;
    const unsigned over = __ballot_sync(
        kAllLanes, rank < shape.num_ranks && routing.needed[rank] > Limit(shape, routing));
    if (over == 0) continue;
    const int first = begin + __ffs(over) - 1;
    return {static_cast<int32_t>(ErrorCode::kOverflow), first, routing.needed[first]};
  }
  return {static_cast<int32_t>(ErrorCode::kNone), -1, 0};
}

// Where group `group` ends and what it holds, cut off at the capacity.
__device__ inline int64_t Offset(const MoEShape& shape, const Routing& routing, int group) {
  return min(static_cast<int64_t>(routing.starts[group]), shape.capacity);
}
__device__ inline int Total(const MoEShape& shape, int me, const Routing& routing, int group) {
  return shape.layout == OutputLayout::kRankMajor
             ? routing.mine[group]
             : routing.experts[me * routing.local_experts + group];
}
__device__ inline int Kept(const MoEShape& shape, int me, const Routing& routing, int group) {
  const int64_t room = shape.layout == OutputLayout::kExpertMajor
                           ? routing.slots
                           : max(shape.capacity - routing.starts[group], int64_t{0});
  return static_cast<int>(min(static_cast<int64_t>(Total(shape, me, routing, group)), room));
}

// How many of ids[0, end) equal `id`: a warp, 8 ids per lane at a time.
__device__ inline int CountEqual(const Routing& routing, int end, int id) {
  const int lane = threadIdx.x % 32;
  const auto* vectors = reinterpret_cast<const int4*>(routing.ids);
  const uint32_t pair = static_cast<uint32_t>(id) << 16 | static_cast<uint32_t>(id);
  // Those that differ, of two ids at a time: a half is 0 or 1.
  const auto differ = [pair](const int4& v) {
    const auto one = [pair](int word) {
      return ptx::min_u16x2(static_cast<uint32_t>(word) ^ pair, 0x00010001u);
    };
    return one(v.x) + one(v.y) + one(v.z) + one(v.w);
  };
  uint32_t different = 0;
  for (int v = lane; v < end / 8; v += 32) different += differ(vectors[v]);
  int count = -static_cast<int>((different & 0xffff) + (different >> 16));
  if (lane < end % 8) count -= routing.ids[end / 8 * 8 + lane] != id;
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  return end + count;
}

// How many of the first `end` tokens come here: a warp.
__device__ inline int CountMine(const MoEShape& shape, int me, const Routing& routing, int end) {
  const int lane = threadIdx.x % 32, first = me * routing.local_experts,
            last = first + routing.local_experts;
  int count = 0;
  for (int token = lane; token < end; token += 32) {
    bool hit = false;
    for (int k = 0; k < shape.topk; ++k) {
      const int id = routing.ids[token * shape.topk + k];
      hit |= id >= first && id < last;
    }
    count += hit;
  }
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  return count;
}

// The row of (source, token, k), or of (source, token): a warp.
__device__ inline int32_t RowOf(const MoEShape& shape, int me, const Routing& routing, int token,
                                int k) {
  const int first = me * routing.local_experts, last = first + routing.local_experts;
  if (shape.layout == OutputLayout::kRankMajor) {
    bool is_mine = false;
    for (int i = 0; i < shape.topk; ++i) {
      const int id = routing.ids[token * shape.topk + i];
      is_mine |= id >= first && id < last;
    }
    if (!is_mine) return kNotMine;
    const int row = CountMine(shape, me, routing, token);
    return row < shape.capacity ? row : static_cast<int32_t>(kDropped);
  }
  const int at = token * shape.topk + k, id = routing.ids[at];
  if (id < first || id >= last) return kNotMine;
  const int before = CountEqual(routing, at, id);
  const int64_t row = int64_t{routing.starts[id - first]} + before;
  const bool fits =
      shape.layout == OutputLayout::kExpertMajor ? before < routing.slots : row < shape.capacity;
  return fits ? static_cast<int32_t>(row) : static_cast<int32_t>(kDropped);
}

// Tables and counts that are no row's. One block.
__device__ inline void FillTables(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                                  const Routing& routing, const Verdict& verdict) {
  const int groups = shape.num_row_groups(), me = arena.rank;
  for (int group = threadIdx.x; group <= groups; group += kLatencyThreads) {
    p.tables.group_offsets[group] = p.offsets[group] =
        static_cast<int32_t>(Offset(shape, routing, group));
    if (group == groups) continue;
    const int kept = Kept(shape, me, routing, group);
    p.tables.group_counts[group] = kept;
    if (shape.layout != OutputLayout::kRankMajor) p.num_tokens_per_expert[group] = kept;
  }
  if (threadIdx.x >= 32) return;
  int dropped = 0;
  for (int group = threadIdx.x; group < groups; group += 32)
    dropped += Total(shape, me, routing, group) - Kept(shape, me, routing, group);
  for (int step = 16; step > 0; step /= 2) dropped += __shfl_xor_sync(kAllLanes, dropped, step);
  if (threadIdx.x != 0) return;
  *p.num_dropped = p.tables.status[kNumDropped] = dropped;
  p.tables.status[kCode] = verdict.code;
  p.tables.status[kRank] = verdict.rank;
  p.tables.status[kDetail] = verdict.got;
  const auto code = static_cast<ErrorCode>(verdict.code);
  // A timeout has been reported by who waited.
  if (code == ErrorCode::kBadExpertId)
    Report(arena, {code, verdict.rank, -1, Phase::kRoute, shape.num_experts, verdict.got});
  if (code == ErrorCode::kOverflow)
    Report(arena, {code, verdict.rank, -1, Phase::kRoute, Limit(shape, routing), verdict.got});
}

// Tokens per expert of the rows that are kept of kRankMajor. One block; `counts` is shared.
__device__ inline void CountKeptIds(const MoEShape& shape, int me, const RouteParams& p,
                                    const Routing& routing, int32_t* counts) {
  const int first = me * shape.local_experts(),
            tokens = shape.num_ranks * static_cast<int>(p.num_tokens);
  __syncthreads();
  for (int e = threadIdx.x; e < shape.local_experts(); e += kLatencyThreads) counts[e] = 0;
  __syncthreads();
  for (int token = threadIdx.x / 32; token < tokens; token += kLatencyWarps) {
    // All are kept, unless not all have room.
    const bool kept = routing.ranks[me] <= shape.capacity ||
                      CountMine(shape, me, routing, token) < shape.capacity;
    for (int k = threadIdx.x % 32; k < shape.topk && kept; k += 32) {
      const int e = routing.ids[token * shape.topk + k] - first;
      if (e >= 0 && e < shape.local_experts()) atomicAdd(&counts[e], 1);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < shape.local_experts(); e += kLatencyThreads)
    p.num_tokens_per_expert[e] = counts[e];
}

// The table of a token's ranks, ascending, then -1: a warp.
__device__ inline void FillSendRanks(const MoEShape& shape, const RouteParams& p, int64_t token) {
  const int lane = threadIdx.x % 32;
  const int entry = lane < shape.topk ? p.topk_ids[token * shape.topk + lane] : -1;
  const int rank = DestinationOfLane(shape, p.topk_ids, entry);
  int place = 0;
  for (int other = 0; other < shape.topk; ++other) {
    const int theirs = __shfl_sync(kAllLanes, rank, other);
    place += theirs >= 0 && theirs < rank;
  }
  int32_t* ranks = p.tables.send_ranks + token * shape.topk;
  const int count = __popc(__ballot_sync(kAllLanes, rank >= 0));
  if (rank >= 0) ranks[place] = rank;
  if (lane >= count && lane < shape.topk) ranks[lane] = -1;
}

// Counts everybody's ids. Returns what all threads of all blocks agree on, unless a peer is so late
// that some have heard of it and some have not: that is reported in any case.
__device__ inline Verdict Count(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                                uint32_t epoch, const Routing& routing) {
  const int counters = static_cast<int>(routing.starts - routing.experts);
  for (int i = threadIdx.x; i < counters; i += kLatencyThreads) routing.experts[i] = 0;
  __syncthreads();
  ReceiveIds(shape, arena, p, epoch, routing);
  __syncthreads();
  if (shape.layout == OutputLayout::kRankMajor) {
    CountTokens(shape, arena.rank, p.num_tokens, routing);
    __syncthreads();
  }
  CountNeeded(shape, routing);
  if (threadIdx.x / 32 == kLatencyWarps - 1) FindStarts(shape, arena.rank, routing);
  __syncthreads();
  return FindError(shape, arena, routing);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_LATENCY_ROUTE_CUH_
