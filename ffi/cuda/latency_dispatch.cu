// Dispatch in the low-latency mode: one kernel routes, sends, receives and expands.
//
// A block sends its tokens first, each with a flag of its own. Ids travel in words that also hold
// the epoch, so that they need no flag. Then every block counts all ids by itself, which takes less
// time than to wait for a block that does it for all; finds the rows of a few (source, token)s; and
// copies those when they have arrived.
#include <algorithm>
#include <type_traits>

#include "cuda/dispatch.cuh"
#include "cuda/latency.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

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
  }
};

// The last warp of a block announces what was sent, for which it has to wait; the others count.
constexpr int kCountThreads = kLatencyThreads - 32;
__device__ __forceinline__ void SyncCounting() { ptx::barrier_sync(kSquads + 1, kCountThreads); }

// Where only some warps came to the barrier before, racecheck was seen to overlook __syncthreads.
__device__ __forceinline__ void SyncBlock() { ptx::barrier_sync(kSquads + 2, kLatencyThreads); }

// What all of a block know once the ids are counted.
struct Verdict {
  int32_t code, rank, got;
};

__device__ void SendIds(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                        uint32_t epoch) {
  const int per_rank = static_cast<int>(p.num_tokens) * shape.topk, ranks = shape.num_ranks;
  const int stride = gridDim.x * kLatencyThreads;
  for (int i = blockIdx.x * kLatencyThreads + threadIdx.x; i < per_rank * (ranks - 1);
       i += stride) {
    const int peer = (arena.rank + 1 + i / per_rank) % ranks, at = i % per_rank;
    const uint64_t word = uint64_t{epoch} << 32 | static_cast<uint32_t>(p.topk_ids[at]);
    ptx::st_relaxed_sys(arena.IdWord(epoch, peer, arena.rank, at), word);
  }
}

// One id of another rank; waits until it is there.
__device__ int AwaitId(const Arena& arena, const uint64_t* word, uint64_t seen, uint32_t epoch,
                       int source, bool& arrived) {
  if (static_cast<uint32_t>(seen >> 32) == epoch) return static_cast<int>(seen);
  constexpr uint32_t kSpinsPerClock = 256;
  const uint64_t start = ptx::globaltimer();
  for (uint32_t spin = 1;; ++spin) {
    seen = ptx::ld_relaxed_sys(word);
    if (static_cast<uint32_t>(seen >> 32) == epoch) return static_cast<int>(seen);
    if (spin % kSpinsPerClock != 0) continue;
    if (ptx::ld_volatile(&arena.Header()->failed) != 0) break;
    if (ptx::globaltimer() - start <= arena.timeout_ns) continue;
    if (atomicExch(&arena.Header()->failed, 1) == 0)
      Report(arena, {ErrorCode::kTimeout, arena.rank, source, Phase::kRoute, epoch,
                     static_cast<uint32_t>(seen >> 32)});
    break;
  }
  arrived = false;
  return -1;
}

// Reads all ids, each thread its own, and counts experts.
__device__ void ReceiveIds(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                           uint32_t epoch, const Routing& routing) {
  constexpr int kBatch = 9;  // loads in flight
  const int per_rank = static_cast<int>(p.num_tokens) * shape.topk;
  bool arrived = true;
  for (int begin = threadIdx.x; begin < routing.num_ids; begin += kBatch * kCountThreads) {
    uint64_t seen[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = begin + u * kCountThreads, source = i / per_rank, at = i % per_rank;
      if (i >= routing.num_ids) break;
      seen[u] = source == arena.rank
                    ? uint64_t{epoch} << 32 | static_cast<uint32_t>(p.topk_ids[at])
                    : ptx::ld_relaxed_sys(arena.IdWord(epoch, arena.rank, source, at));
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = begin + u * kCountThreads, source = i / per_rank, at = i % per_rank;
      if (i >= routing.num_ids) break;
      const int id = AwaitId(arena, arena.IdWord(epoch, arena.rank, source, at), seen[u], epoch,
                             source, arrived);
      const bool is_expert = IsExpert(shape, id);
      routing.ids[i] = static_cast<int16_t>(is_expert ? id : -1);
      if (is_expert)
        atomicAdd(&routing.experts[id], 1);
      else if (id != -1)
        atomicAdd(&routing.bad_ids[source], 1);
    }
  }
  if (!arrived) *routing.lost = 1;
}

// Counts tokens by rank, where rows are of tokens: a thread for each.
__device__ void CountTokens(const MoEShape& shape, int me, int64_t num_tokens,
                            const Routing& routing) {
  const int local = shape.local_experts(), tokens = static_cast<int>(num_tokens);
  for (int token = threadIdx.x; token < shape.num_ranks * tokens; token += kCountThreads) {
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

__device__ int AlignUp(int n, int alignment) { return (n + alignment - 1) / alignment * alignment; }

// Rows of a group, padding included.
__device__ int GroupSize(const MoEShape& shape, int me, const Routing& routing, int group) {
  if (shape.layout == OutputLayout::kRankMajor) return routing.mine[group];
  if (shape.layout == OutputLayout::kExpertMajor) return static_cast<int>(shape.slots_per_expert());
  return AlignUp(routing.experts[me * shape.local_experts() + group], shape.expert_alignment);
}

// Where the groups start: one warp, 32 groups at a time.
__device__ void FindStarts(const MoEShape& shape, int me, const Routing& routing) {
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
__device__ void CountNeeded(const MoEShape& shape, const Routing& routing) {
  const int lane = threadIdx.x % 32;
  for (int rank = threadIdx.x / 32; rank < shape.num_ranks; rank += kCountThreads / 32) {
    int needed = shape.layout == OutputLayout::kRankMajor && lane == 0 ? routing.ranks[rank] : 0;
    if (shape.layout != OutputLayout::kRankMajor)
      for (int e = lane; e < shape.local_experts(); e += 32) {
        const int rows = routing.experts[rank * shape.local_experts() + e];
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

__device__ int64_t Limit(const MoEShape& shape) {
  return shape.layout == OutputLayout::kExpertMajor ? shape.slots_per_expert() : shape.capacity;
}

// The first rank whose routing cannot be honoured; all ranks come to the same answer. A warp.
__device__ Verdict FindError(const MoEShape& shape, const Arena& arena, const Routing& routing) {
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
    const unsigned over =
        __ballot_sync(kAllLanes, rank < shape.num_ranks && routing.needed[rank] > Limit(shape));
    if (over == 0) continue;
    const int first = begin + __ffs(over) - 1;
    return {static_cast<int32_t>(ErrorCode::kOverflow), first, routing.needed[first]};
  }
  return {static_cast<int32_t>(ErrorCode::kNone), -1, 0};
}

// Where group `group` ends and what it holds, cut off at the capacity.
__device__ int64_t Offset(const MoEShape& shape, const Routing& routing, int group) {
  return min(static_cast<int64_t>(routing.starts[group]), shape.capacity);
}
__device__ int Total(const MoEShape& shape, int me, const Routing& routing, int group) {
  return shape.layout == OutputLayout::kRankMajor
             ? routing.mine[group]
             : routing.experts[me * shape.local_experts() + group];
}
__device__ int Kept(const MoEShape& shape, int me, const Routing& routing, int group) {
  const int64_t room = shape.layout == OutputLayout::kExpertMajor
                           ? shape.slots_per_expert()
                           : max(shape.capacity - routing.starts[group], int64_t{0});
  return static_cast<int>(min(static_cast<int64_t>(Total(shape, me, routing, group)), room));
}

// How many of ids[0, end) equal `id`: a warp, 8 ids per lane at a time.
__device__ int CountEqual(const Routing& routing, int end, int id) {
  const int lane = threadIdx.x % 32;
  const auto* vectors = reinterpret_cast<const int4*>(routing.ids);
  int count = 0;
  for (int v = lane; v < (end + 7) / 8; v += 32) {
    const int4 eight = vectors[v];
    const uint32_t words[] = {static_cast<uint32_t>(eight.x), static_cast<uint32_t>(eight.y),
                              static_cast<uint32_t>(eight.z), static_cast<uint32_t>(eight.w)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int other = static_cast<int16_t>(words[i / 2] >> 16 * (i % 2));
      count += other == id && 8 * v + i < end;
    }
  }
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  return count;
}

// How many of the first `end` tokens come here: a warp.
__device__ int CountMine(const MoEShape& shape, int me, const Routing& routing, int end) {
  const int lane = threadIdx.x % 32, first = me * shape.local_experts(),
            last = first + shape.local_experts();
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
__device__ int32_t RowOf(const MoEShape& shape, int me, const Routing& routing, int token, int k) {
  const int first = me * shape.local_experts();
  if (shape.layout == OutputLayout::kRankMajor) {
    bool is_mine = false;
    for (int i = 0; i < shape.topk; ++i) {
      const int id = routing.ids[token * shape.topk + i];
      is_mine |= id >= first && id < first + shape.local_experts();
    }
    if (!is_mine) return kNotMine;
    const int row = CountMine(shape, me, routing, token);
    return row < shape.capacity ? row : static_cast<int32_t>(kDropped);
  }
  const int at = token * shape.topk + k, id = routing.ids[at];
  if (id < first || id >= first + shape.local_experts()) return kNotMine;
  const int before = CountEqual(routing, at, id);
  const int64_t row = int64_t{routing.starts[id - first]} + before;
  const bool fits = shape.layout == OutputLayout::kExpertMajor ? before < shape.slots_per_expert()
                                                               : row < shape.capacity;
  return fits ? static_cast<int32_t>(row) : static_cast<int32_t>(kDropped);
}

// Tables and counts that are no row's. One block.
__device__ void FillTables(const MoEShape& shape, const Arena& arena, const RouteParams& p,
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
    Report(arena, {code, verdict.rank, -1, Phase::kRoute, Limit(shape), verdict.got});
}

// Tokens per expert of the rows that are kept of kRankMajor. One block; `counts` is shared.
__device__ void CountKeptIds(const MoEShape& shape, int me, const RouteParams& p,
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

// The table of a token's ranks, ascending, then -1.
__device__ void FillSendRanks(const MoEShape& shape, const RouteParams& p, int64_t token,
                              int rank) {
  const int lane = threadIdx.x % 32;
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

// One block sends one token to all ranks it goes to, and tells them. X is the type of elements that
// are quantised on the way, or void.
template <typename X>
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                          uint32_t epoch, int64_t token, int rank) {
  const bool sends = rank >= 0 && rank != arena.rank;
  const unsigned lanes = __ballot_sync(kAllLanes, sends);
  if (lanes == 0) return;  // the same in all warps
  const auto window =
      reinterpret_cast<uint64_t>(sends ? arena.Row(epoch, rank, arena.rank, token) : nullptr);
  const TokenSource from(shape, arena, p, epoch, arena.rank, token);
  const float weight = WeightOfLane(shape, p, from);
  if constexpr (!std::is_void_v<X>) {
    int4* windows[kMaxTopk];
    int count = 0;
    ForEachLane(lanes, window,
                [&](uint64_t to) { windows[count++] = reinterpret_cast<int4*>(to); });
    QuantiseInto<X>(shape, p, from.row, threadIdx.x / 32, kLatencyWarps, count,
                    [&](int i) { return InWindow(shape, windows[i]); });
  } else {
    const int vectors = NumRowVectors(shape, p);
    constexpr int kInFlight = 2;
    // All lanes take part in every round.
    for (int begin = 0; begin < vectors; begin += kInFlight * kLatencyThreads) {
      int4 v[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (const int at = begin + u * kLatencyThreads + threadIdx.x; at < vectors)
          v[u] = ptx::ld_nc_no_allocate(from.row + at);
      ForEachLane(lanes, window, [&](uint64_t to) {
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (const int at = begin + u * kLatencyThreads + threadIdx.x; at < vectors)
            ptx::st_no_allocate(reinterpret_cast<int4*>(to) + at, v[u]);
      });
    }
    if (p.quant.block != 0)
      ForEachLane(lanes, window, [&](uint64_t to) {
        CopyScales(InWindow(shape, reinterpret_cast<int4*>(to)).scales, from.scales,
                   p.scale_row_bytes(shape), threadIdx.x, kLatencyThreads);
      });
  }
  const int warp = threadIdx.x / 32;
  if (warp == 0) SendWeights(shape, arena, p, epoch, token, lanes, rank, weight);
  __syncthreads();
  if (warp == kLatencyWarps - 1 && sends)
    ptx::st_release_sys(arena.TokenFlag(rank, arena.rank, token), epoch);
}

// Gives one token to its rows; lane k of every warp of the squad holds the k-th.
template <typename X>
__device__ void ExpandToken(const MoEShape& shape, const Squad& squad, const DispatchParams& p,
                            const TokenSource& from, int32_t row) {
  const float weight = WeightOfLane(shape, p, from);
  const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
  if (!std::is_void_v<X> && from.is_own) {
    if constexpr (!std::is_void_v<X>) {
      int32_t rows[kMaxTopk];
      int count = 0;
      ForEachLane(lanes, row, [&](int32_t to) { rows[count++] = to; });
      QuantiseInto<X>(shape, p, from.row, squad.warp, Squad::kWarps, count,
                      [&](int i) { return InOutput(shape, p, rows[i]); });
    }
  } else {
    const int vectors = NumRowVectors(shape, p);
    constexpr int kInFlight = 7;  // a row of 7168 16-bit elements
    for (int begin = 0; begin < vectors; begin += kInFlight * Squad::kThreads) {
      int4 v[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (const int at = begin + u * Squad::kThreads + squad.thread; at < vectors)
          v[u] = ptx::ld_no_allocate(from.row + at);
      ForEachLane(lanes, row, [&](int64_t to) {
        int4* out = OutputRow(shape, p, to);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (const int at = begin + u * Squad::kThreads + squad.thread; at < vectors)
            ptx::st_no_allocate(out + at, v[u]);
      });
    }
    if (p.quant.block != 0)
      ForEachLane(lanes, row, [&](int64_t to) {
        CopyScales(InOutput(shape, p, to).scales, from.scales, p.scale_row_bytes(shape),
                   squad.thread, Squad::kThreads);
      });
  }
  if (squad.warp == 0) PlaceWeights(shape, p, weight, row);
}

// A row that holds no token, or one that cannot be had, and what belongs to it: a warp.
__device__ void FillOne(const MoEShape& shape, const DispatchParams& p, int64_t row, bool poison) {
  FillRow(OutputRow(shape, p, row), NumRowVectors(shape, p), RowFilling(shape, p, poison));
  FillBesideRow(shape, p, row, poison);
}

template <typename F>
__device__ void ForEachRow(int64_t begin, int64_t end, const F& f) {
  const int64_t stride = int64_t{gridDim.x} * kLatencyWarps;
  for (int64_t row = begin + blockIdx.x * kLatencyWarps + threadIdx.x / 32; row < end;
       row += stride)
    f(row);
}

// Rows that hold no token, and what they are given beside.
template <typename Offsets, typename Counts>
__device__ void FillPadding(const MoEShape& shape, const DispatchParams& p, const Offsets& offset,
                            const Counts& count) {
  const int groups = shape.num_row_groups();
  const auto fill = [&](int64_t row) { FillOne(shape, p, row, false); };
  const bool has_gaps = shape.layout == OutputLayout::kExpertMajor
                            ? p.fill
                            : shape.layout == OutputLayout::kFlat && shape.expert_alignment > 1;
  if (has_gaps)
    for (int group = 0; group < groups; ++group)
      ForEachRow(offset(group) + count(group), offset(group + 1), fill);
  ForEachRow(offset(groups), shape.capacity, fill);
}

// The (source, token)s of a block, a few at a time: finds their rows and receives them. Those that
// are sent first go to blocks that do not send.
template <typename X, bool kFresh>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const RouteParams& route,
                        const DispatchParams& p, uint32_t epoch, const Routing& routing,
                        bool is_poisoned, int senders) {
  __shared__ int32_t rows_of_squads[kSquads][kMaxTopk];
  const Squad squad;
  const int lane = threadIdx.x % 32, per_token = shape.rows_per_token(), ranks = shape.num_ranks;
  const int num_items = ranks * static_cast<int>(p.num_tokens), warp = threadIdx.x / 32;
  // Own tokens are spread over the blocks as all others are.
  const auto source_of = [&](int item) { return (arena.rank + item) % ranks; };
  const int first = (blockIdx.x + gridDim.x - senders) % gridDim.x;
  for (int begin = first; begin < num_items; begin += kSquads * gridDim.x) {
    if constexpr (kFresh) {
      for (int i = warp; i < kSquads * per_token; i += kLatencyWarps) {
        const int item = begin + i / per_token * gridDim.x, k = i % per_token;
        if (item >= num_items) break;
        const int token = source_of(item) * static_cast<int>(p.num_tokens) + item / ranks;
        const int32_t row = RowOf(shape, arena.rank, routing, token, k);
        if (lane != 0) continue;
        rows_of_squads[i / per_token][k] = row;
        route.tables.recv_rows[token * per_token + k] = row;
      }
      __syncthreads();
    }
    const int item = begin + squad.index * gridDim.x;
    if (item < num_items) {
      const int source = source_of(item);
      const int64_t token = item / ranks;
      int32_t row = kNotMine;
      if (lane < per_token)
        row = kFresh ? rows_of_squads[squad.index][lane]
                     : p.tables.recv_rows[(source * p.num_tokens + token) * per_token + lane];
      if (__any_sync(kAllLanes, row >= 0)) {
        if (kFresh && shape.layout == OutputLayout::kRankMajor && squad.warp == 0) {
          const int first_expert = arena.rank * shape.local_experts();
          const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
          if (lane < shape.topk) {
            const int e =
                routing.ids[(source * p.num_tokens + token) * shape.topk + lane] - first_expert;
            route.recv_topk_ids[only_row * shape.topk + lane] =
                e >= 0 && e < shape.local_experts() ? e : -1;
          }
        }
        if (!is_poisoned) {
          bool arrived = true;
          if (squad.thread == 0 && source != arena.rank)
            arrived = Wait(arena, arena.TokenFlag(arena.rank, source, token), epoch, source,
                           Phase::kDispatch);
          if (squad.SyncAnd(arrived))
            ExpandToken<X>(shape, squad, p, TokenSource(shape, arena, p, epoch, source, token),
                           row);
          else if (squad.warp == 0)
            PoisonRows(shape, p, row);
        }
      }
    }
    if constexpr (kFresh) __syncthreads();
  }
}

// Counts everybody's ids. Returns what all threads of all blocks agree on.
__device__ Verdict Count(const MoEShape& shape, const Arena& arena, const RouteParams& p,
                         uint32_t epoch, const Routing& routing) {
  if (threadIdx.x < kCountThreads) {
    const int counters = static_cast<int>(routing.starts - routing.experts);
    for (int i = threadIdx.x; i < counters; i += kCountThreads) routing.experts[i] = 0;
    SyncCounting();
    ReceiveIds(shape, arena, p, epoch, routing);
    SyncCounting();
    if (shape.layout == OutputLayout::kRankMajor) {
      CountTokens(shape, arena.rank, p.num_tokens, routing);
      SyncCounting();
    }
    CountNeeded(shape, routing);
    if (threadIdx.x / 32 == kCountThreads / 32 - 1) FindStarts(shape, arena.rank, routing);
  }
  SyncBlock();
  return FindError(shape, arena, routing);
}

template <typename X, bool kFresh>
__global__ void __launch_bounds__(kLatencyThreads, 1)
    LatencyDispatchKernel(MoEShape shape, Arena arena, RouteParams route, DispatchParams p,
                          int senders) {
  const uint32_t epoch = EnterLatencyEpoch(arena);
  const int32_t* topk_ids = kFresh ? route.topk_ids : nullptr;
  if (kFresh) SendIds(shape, arena, route, epoch);
  const bool sends = static_cast<int>(blockIdx.x) < senders;
  for (int64_t token = blockIdx.x; sends && token < p.num_tokens; token += senders) {
    const int rank = DestinationOfLane(shape, p, topk_ids, token);
    SendToken<X>(shape, arena, p, epoch, token, rank);
    if (kFresh && threadIdx.x < 32) FillSendRanks(shape, route, token, rank);
  }
  __syncthreads();
  if (threadIdx.x == 0) CountBlock(arena, epoch);
  const Routing routing(shape, p.num_tokens, ptx::dynamic_shared());
  int code = kFresh ? 0 : p.tables.status[kCode];
  if constexpr (kFresh) {
    const Verdict verdict = Count(shape, arena, route, epoch, routing);
    code = verdict.code;
    if (blockIdx.x == gridDim.x - 1) {
      FillTables(shape, arena, route, routing, verdict);
      if (shape.layout == OutputLayout::kRankMajor)
        CountKeptIds(shape, arena.rank, route, routing, routing.experts);
    }
    if (shape.layout == OutputLayout::kRankMajor)
      ForEachRow(Offset(shape, routing, shape.num_ranks), shape.capacity, [&](int64_t row) {
        if (const int lane = threadIdx.x % 32; lane < shape.topk)
          route.recv_topk_ids[row * shape.topk + lane] = -1;
      });
  }
  if (code != 0)
    ForEachRow(0, shape.capacity, [&](int64_t row) { FillOne(shape, p, row, true); });
  else if (kFresh)
    FillPadding(
        shape, p, [&](int group) { return Offset(shape, routing, group); },
        [&](int group) { return Kept(shape, arena.rank, routing, group); });
  else
    FillPadding(
        shape, p, [&](int group) { return int64_t{p.tables.group_offsets[group]}; },
        [&](int group) { return p.tables.group_counts[group]; });
  Receive<X, kFresh>(shape, arena, route, p, epoch, routing, code != 0, senders);
  // Whoever sent its ids has entered.
  if (!kFresh) LeaveLatencyEpoch(arena, epoch, Phase::kDispatch);
}

// Calls `visit` with the kernel for these parameters.
template <bool kFresh, typename F>
cudaError_t VisitKernel(const MoEShape& shape, bool quantises, const F& visit) {
  if (!quantises) return visit(LatencyDispatchKernel<void, kFresh>);
  return VisitDType(shape.dtype, [&](auto* t) {
    return visit(LatencyDispatchKernel<std::remove_pointer_t<decltype(t)>, kFresh>);
  });
}

// Blocks that send: enough to fill the link, and no more. If all tokens were under way at once, all
// would arrive at the end, and nothing could be expanded meanwhile.
constexpr int kSenders = 32, kQuantisers = 64;

// Blocks that the rows to be filled keep busy, too.
int64_t Work(const MoEShape& shape, const DispatchParams& p) {
  const bool fills = shape.layout != OutputLayout::kExpertMajor || p.fill;
  return std::max({p.num_tokens, CeilDiv(p.num_tokens * shape.num_ranks, kSquads),
                   fills ? CeilDiv(shape.capacity, kLatencyWarps) : 0});
}

}  // namespace

cudaError_t LaunchLatencyDispatch(const MoEShape& shape, const Arena& arena,
                                  const RouteParams* route, const DispatchParams& params, int sms,
                                  cudaStream_t stream) {
  const int blocks = LatencyBlocks(sms, Work(shape, params)),
            senders = std::min(blocks, params.quantises() ? kQuantisers : kSenders);
  if (route == nullptr)
    return VisitKernel<false>(shape, params.quantises(), [&](auto* kernel) {
      return Launch(kernel, {blocks, kLatencyThreads}, stream, shape, arena, RouteParams{}, params,
                    senders);
    });
  const Grid grid{blocks, kLatencyThreads, Routing::SharedBytes(shape, params.num_tokens)};
  return VisitKernel<true>(shape, params.quantises(), [&](auto* kernel) {
    return Launch(kernel, grid, stream, shape, arena, *route, params, senders);
  });
}

cudaError_t LoadLatencyDispatch(const MoEShape& shape) {
  const size_t bytes =
      shape.low_latency ? Routing::SharedBytes(shape, shape.max_tokens_per_rank) : 0;
  const auto allow = [&](auto* kernel) { return AllowSharedMemory(kernel, bytes); };
  for (const bool quantises : {false, true}) {
    cudaError_t error = VisitKernel<true>(shape, quantises, allow);
    if (error == cudaSuccess) error = VisitKernel<false>(shape, quantises, allow);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::cuda
