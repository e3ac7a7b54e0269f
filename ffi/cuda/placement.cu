// Routing, second kernel: turns the counts before a part into the first row of each of its groups,
// and places the part's rows in order of (token, k). One block more than the parts need sums up.
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/route.cuh"

namespace jax_ep::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// Rows of a group with the padding behind them. In 32 bits: 64 take several times as long to
// divide.
__device__ __forceinline__ int64_t Aligned(int32_t rows, int32_t alignment) {
  const unsigned n = rows, step = alignment;
  return int64_t{(n + step - 1) / step * step};
}

// values[i] becomes the sum of the aligned values before it. One warp.
__device__ void ExclusiveScan(int32_t* values, int n, int alignment) {
  const int lane = threadIdx.x % 32;
  int64_t total = 0;
  for (int begin = 0; begin < n; begin += 32) {
    const int i = begin + lane;
    const int64_t value = i < n ? Aligned(values[i], alignment) : 0;
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
}

// What a block knows of this rank's groups, in shared memory.
struct Groups {
  int32_t* totals;  // [G] rows of each group
  int32_t* starts;  // [G] first row of each, as if capacity had no end

  __device__ Groups(const MoEShape& shape, int32_t* shared)
      : totals(shared), starts(shared + shape.num_row_groups()) {}
  static size_t Bytes(const MoEShape& shape) {
    return sizeof(int32_t) * 2 * shape.num_row_groups();
  }
};

// What the warps of a team count before they place: rows of each group, or of one source's tokens.
struct WarpCounts {
  int32_t* next;  // [kTeamWarps, G] next row of each group for each warp

  __device__ WarpCounts(const MoEShape& shape, int32_t* shared, int team)
      : next(shared + 2 * shape.num_row_groups() + team * kTeamWarps * shape.num_row_groups()) {}
  static size_t Bytes(const MoEShape& shape) {
    return sizeof(int32_t) * kTeamWarps * shape.num_row_groups();
  }
};

__device__ void FillGroups(const MoEShape& shape, const Arena& arena, int parts_per_source,
                           const Groups& groups) {
  const HistogramColumns columns(shape);
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  for (int group = threadIdx.x; group < shape.num_row_groups(); group += blockDim.x) {
    const int column = rank_major ? columns.ranks + arena.rank
                                  : columns.experts + arena.rank * shape.local_experts() + group;
    const int begin = rank_major ? group * parts_per_source : 0;
    const int end = rank_major ? begin + parts_per_source : shape.num_ranks * parts_per_source;
    groups.totals[group] = groups.starts[group] = CountRange(arena, column, begin, end);
  }
  __syncthreads();
  if (threadIdx.x < 32)
    ExclusiveScan(groups.starts, shape.num_row_groups(), rank_major ? 1 : shape.expert_alignment);
  __syncthreads();
}

// The local expert that an id names, or -1.
__device__ __forceinline__ int LocalExpert(const MoEShape& shape, int me, int id) {
  const unsigned local = shape.local_experts(), expert = static_cast<unsigned>(id) - me * local;
  return expert < local ? static_cast<int>(expert) : -1;
}

__device__ __forceinline__ int32_t KeptRow(const MoEShape& shape, int64_t row) {
  return row < shape.capacity ? static_cast<int32_t>(row) : static_cast<int32_t>(kDropped);
}

// Rows of kRankMajor: a thread per token, which has one row or none. It holds the ids of its local
// experts.
__device__ void PlaceTokenRows(const MoEShape& shape, const Arena& arena, const Team& team,
                               const RouteParams& params, const Part& part, const Groups& groups,
                               int32_t* hits_of_warps, const int32_t* ids) {
  const int lane = threadIdx.x % 32, column = HistogramColumns(shape).ranks + arena.rank;
  const int64_t token = part.begin + team.thread;
  const int32_t* mine = ids + token * shape.topk;
  bool hit = false;
  if (token < part.end)
    ForEachId(mine, shape.topk, [&](int id) { hit |= LocalExpert(shape, arena.rank, id) >= 0; });
  const unsigned hits = __ballot_sync(kAll, hit);
  if (lane == 0) hits_of_warps[team.warp] = __popc(hits);
  team.Sync();
  int64_t row = static_cast<int64_t>(groups.starts[part.source]) +
                CountRange(arena, column, part.histogram - part.index, part.histogram) +
                __popc(hits & ((1u << lane) - 1));
  for (int warp = 0; warp < team.warp; ++warp) row += hits_of_warps[warp];
  team.Sync();  // before the next part's
  if (token >= part.end) return;
  const int32_t kept = hit ? KeptRow(shape, row) : static_cast<int32_t>(kNotMine);
  params.tables.recv_rows[part.source * params.num_tokens + token] = kept;
  if (kept < 0) return;
  for (int k = 0; k < shape.topk; ++k) {
    const int expert = LocalExpert(shape, arena.rank, mine[k]);
    params.recv_topk_ids[row * shape.topk + k] = expert;
    if (expert >= 0) atomicAdd(&params.num_tokens_per_expert[expert], 1);
  }
}

// Calls f with the group of each (token, k) from `begin` on, 32 at a time, in order: a warp. Ids of
// several turns are loaded at a time, since loads take longer than all that is done with them.
template <typename F>
__device__ __forceinline__ void ForEachGroup(const MoEShape& shape, int me, const int32_t* ids,
                                             int64_t begin, int64_t end, const F& f) {
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32;
  for (int64_t first = begin; first < end; first += 32 * kBatch) {
    int groups[kBatch];
#pragma unroll
    for (int turn = 0; turn < kBatch; ++turn) {
      const int64_t i = first + 32 * turn + lane;
      groups[turn] = i < end ? LocalExpert(shape, me, ids[i]) : -1;
    }
#pragma unroll
    for (int turn = 0; turn < kBatch; ++turn)
      if (first + 32 * turn < end) f(first + 32 * turn + lane, groups[turn]);
  }
}

// Rows of kFlat: a warp takes 32 (token, k) at a time, in order; equal groups among them are told
// apart by lane, and the next 32 continue where these end.
__device__ void PlaceExpertRows(const MoEShape& shape, const Arena& arena, const Team& team,
                                const RouteParams& params, const Part& part, const Groups& groups,
                                int32_t* next_of_warps, const int32_t* ids) {
  const int lane = threadIdx.x % 32, topk = shape.topk, num_groups = shape.num_row_groups();
  int32_t* next = next_of_warps + team.warp * num_groups;
  const int64_t first = part.begin + team.warp * 32;
  const int64_t begin = min(first, part.end) * topk, end = min(first + 32, part.end) * topk;
  for (int group = lane; group < num_groups; group += 32) next[group] = 0;
  __syncwarp();
  ForEachGroup(shape, arena.rank, ids, begin, end, [&](int64_t, int group) {
    if (group >= 0) atomicAdd(&next[group], 1);
  });
  team.Sync();
  for (int group = team.thread; group < num_groups; group += kTeamThreads) {
    const int column = HistogramColumns(shape).experts + arena.rank * shape.local_experts() + group;
    int64_t row =
        static_cast<int64_t>(groups.starts[group]) + CountRange(arena, column, 0, part.histogram);
    int counts[kTeamWarps];
#pragma unroll
    for (int warp = 0; warp < kTeamWarps; ++warp)
      counts[warp] = next_of_warps[warp * num_groups + group];
#pragma unroll
    for (int warp = 0; warp < kTeamWarps; ++warp) {
      // Far enough from the end that what is added does not wrap around.
      next_of_warps[warp * num_groups + group] =
          static_cast<int32_t>(min(row, static_cast<int64_t>(INT32_MAX - 32 * 32)));
      row += counts[warp];
    }
  }
  team.Sync();
  int32_t* rows = params.tables.recv_rows + part.source * params.num_tokens * topk;
  ForEachGroup(shape, arena.rank, ids, begin, end, [&](int64_t i, int group) {
    const unsigned same = __match_any_sync(kAll, group);
    const int64_t row = group >= 0 ? next[group] + __popc(same & ((1u << lane) - 1)) : 0;
    __syncwarp();
    if (group >= 0 && lane == __ffs(same) - 1) next[group] += __popc(same);
    __syncwarp();
    if (i < end) rows[i] = group >= 0 ? KeptRow(shape, row) : static_cast<int32_t>(kNotMine);
  });
  team.Sync();  // before the next part's
}

// Rows that each rank needs, padding included, into shared needed[R]: a warp per rank.
__device__ void CountNeeded(const MoEShape& shape, const Arena& arena, int parts,
                            long long* needed) {
  const HistogramColumns columns(shape);
  const int lane = threadIdx.x % 32;
  for (int rank = threadIdx.x / 32; rank < shape.num_ranks; rank += blockDim.x / 32) {
    long long rows = 0;
    if (shape.layout == OutputLayout::kRankMajor) {
      if (lane == 0) rows = CountRange(arena, columns.ranks + rank, 0, parts);
    } else {
      for (int e = lane; e < shape.local_experts(); e += 32) {
        const int column = columns.experts + rank * shape.local_experts() + e;
        rows += Aligned(CountRange(arena, column, 0, parts), shape.expert_alignment);
      }
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

// Counts and offsets of all groups; returns how many rows are dropped. One block.
__device__ int FillGroupTables(const MoEShape& shape, const RouteParams& params,
                               const Groups& groups) {
  __shared__ int dropped;
  const int num_groups = shape.num_row_groups();
  const RouteTables& out = params.tables;
  if (threadIdx.x == 0) dropped = 0;
  __syncthreads();
  for (int group = threadIdx.x; group < num_groups; group += blockDim.x) {
    const int64_t start = groups.starts[group], total = groups.totals[group];
    const int64_t kept = max(min(shape.capacity - start, total), int64_t{0});
    out.group_counts[group] = static_cast<int32_t>(kept);
    out.group_offsets[group] = params.offsets[group] =
        static_cast<int32_t>(min(start, shape.capacity));
    if (shape.layout == OutputLayout::kFlat)
      params.num_tokens_per_expert[group] = static_cast<int32_t>(kept);
    atomicAdd(&dropped, static_cast<int>(total - kept));
    if (group == num_groups - 1) {
      const int alignment = shape.layout == OutputLayout::kRankMajor ? 1 : shape.expert_alignment;
      const int64_t end = start + Aligned(groups.totals[group], alignment);
      out.group_offsets[num_groups] = params.offsets[num_groups] =
          static_cast<int32_t>(min(end, shape.capacity));
    }
  }
  __syncthreads();
  return dropped;
}

__device__ void FillSummary(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                            int parts_per_source, const Groups& groups) {
  __shared__ int bad_ids[kMaxRanks];
  __shared__ long long needed[kMaxRanks];
  for (int rank = threadIdx.x; rank < shape.num_ranks; rank += blockDim.x)
    bad_ids[rank] = CountRange(arena, HistogramColumns(shape).bad_ids, rank * parts_per_source,
                               (rank + 1) * parts_per_source);
  CountNeeded(shape, arena, shape.num_ranks * parts_per_source, needed);
  const int dropped = FillGroupTables(shape, params, groups);
  if (threadIdx.x != 0) return;
  const ErrorRecord error = FindError(shape, arena, bad_ids, needed);
  int32_t* status = params.tables.status;
  *params.num_dropped = status[kNumDropped] = dropped;
  status[kCode] = static_cast<int32_t>(error.code);
  status[kRank] = error.rank;
  status[kDetail] = static_cast<int32_t>(error.got);
  // A timeout has been reported by who waited.
  if (error.code == ErrorCode::kBadExpertId || error.code == ErrorCode::kOverflow)
    Report(arena, error);
}

// Rows of recv_topk_ids that hold no token.
__device__ void FillIdTail(const MoEShape& shape, const RouteParams& params, const Groups& groups) {
  const int last = shape.num_ranks - 1;
  const int64_t end = static_cast<int64_t>(groups.starts[last]) + groups.totals[last];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = end * shape.topk + blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
       i < shape.capacity * shape.topk; i += stride)
    params.recv_topk_ids[i] = -1;
}

__global__ void __launch_bounds__(kMaxTeams* kTeamThreads)
    PlacementKernel(MoEShape shape, Arena arena, RouteParams params) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  Request{arena};
  auto* shared = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  const Team team;
  const Groups groups(shape, shared);
  const WarpCounts counts(shape, shared, team.index);
  const int parts_per_source = PartsPerSource(params.num_tokens);
  const int teams = blockDim.x / kTeamThreads, blocks = gridDim.x - 1;
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  FillGroups(shape, arena, parts_per_source, groups);
  if (rank_major) FillIdTail(shape, params, groups);
  if (blockIdx.x == blocks) return FillSummary(shape, arena, params, parts_per_source, groups);
  // The exchange is not over: the dispatch that follows ends it.
  const uint32_t epoch = ptx::ld_volatile(&arena.Header()->epoch) + 1;
  for (int number = blockIdx.x * teams + team.index; number < shape.num_ranks * parts_per_source;
       number += blocks * teams) {
    const Part part(arena, params.num_tokens, number);
    const bool mine = part.source == arena.rank;
    const int32_t* ids = mine ? params.topk_ids : arena.Ids(epoch, arena.rank, part.source);
    if (rank_major)
      PlaceTokenRows(shape, arena, team, params, part, groups, counts.next, ids);
    else
      PlaceExpertRows(shape, arena, team, params, part, groups, counts.next, ids);
  }
}

RouteLaunch LaunchOf(const MoEShape& shape, int64_t num_tokens) {
  return {shape, num_tokens, WarpCounts::Bytes(shape), Groups::Bytes(shape)};
}

}  // namespace

cudaError_t LaunchPlacement(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                            cudaStream_t stream) {
  const RouteLaunch launch = LaunchOf(shape, params.num_tokens);
  return LaunchOverlapping(PlacementKernel, launch.GridOf(launch.blocks + 1), stream, shape, arena,
                           params);
}

cudaError_t LoadPlacement(const MoEShape& shape) {
  return AllowSharedMemory(PlacementKernel,
                           LaunchOf(shape, shape.max_tokens_per_rank).shared_bytes);
}

}  // namespace jax_ep::cuda
