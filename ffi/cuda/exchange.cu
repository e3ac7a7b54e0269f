// Routing, first kernel: every rank sends its topk_ids to all others, and counts what it gets, a
// histogram per part of the tokens. No counts travel, so there is one exchange, and the same inputs
// give every rank the same totals.
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/route.cuh"

namespace jax_ep::cuda {
namespace {

__device__ void SendIds(const Arena& arena, const Team& team, const Part& part, uint32_t epoch,
                        int topk, const int32_t* ids) {
  for (int distance = 1; distance < arena.layout.num_ranks; ++distance) {
    const int peer = (arena.rank + distance) % arena.layout.num_ranks;
    int32_t* to = arena.Ids(epoch, peer, arena.rank);
    for (int64_t i = part.begin * topk + team.thread; i < part.end * topk; i += kTeamThreads)
      to[i] = ids[i];
  }
  team.Sync();
  for (int peer = team.thread; peer < arena.layout.num_ranks; peer += kTeamThreads)
    if (peer != arena.rank) ptx::st_release_sys(arena.IdsFlag(peer, arena.rank, part.index), epoch);
}

// Sends or awaits the part's ids, as far as the op does; null if there are none to count.
__device__ const int32_t* ExchangeIds(const MoEShape& shape, const Arena& arena, const Team& team,
                                      const Part& part, const RouteParams& params, uint32_t epoch) {
  if (part.source == arena.rank) {
    if (arena.sends()) SendIds(arena, team, part, epoch, shape.topk, params.topk_ids);
    return arena.receives() ? params.topk_ids : nullptr;
  }
  bool arrived = true;
  if (team.thread == 0)
    arrived = Wait(arena, arena.IdsFlag(arena.rank, part.source, part.index), epoch, part.source,
                   Phase::kRoute);
  return team.SyncAnd(arrived) ? arena.Ids(epoch, arena.rank, part.source) : nullptr;
}

// Counts one token into shared memory. Of this rank's own, it also writes where they go.
__device__ void CountToken(const MoEShape& shape, const int32_t* ids, int32_t* counts,
                           int32_t* send_ranks) {
  const HistogramColumns columns(shape);
  ForEachId(ids, shape.topk, [&](int id) {
    if (IsExpert(shape, id))
      atomicAdd(&counts[columns.experts + id], 1);
    else if (id != -1)
      atomicAdd(&counts[columns.bad_ids], 1);
  });
  int num_ranks = 0;
  ForEachRank(shape, ids, [&](int rank) {
    atomicAdd(&counts[columns.ranks + rank], 1);
    if (send_ranks != nullptr) send_ranks[num_ranks++] = rank;
  });
  if (send_ranks != nullptr)
    while (num_ranks < shape.topk) send_ranks[num_ranks++] = -1;
}

__global__ void __launch_bounds__(kMaxTeams* kTeamThreads)
    ExchangeKernel(MoEShape shape, Arena arena, RouteParams params) {
  ptx::griddepcontrol_launch_dependents();
  const Request request(arena);
  if (request.is_refused) return;
  auto* counts_of_teams = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  const Team team;
  const int size = arena.layout.histogram_size, teams = blockDim.x / kTeamThreads;
  int32_t* counts = counts_of_teams + team.index * size;
  const uint32_t epoch = EnterEpoch(arena);
  // This rank's own come first.
  const int parts = (arena.receives() ? shape.num_ranks : 1) * PartsPerSource(params.num_tokens);
  for (int number = blockIdx.x * teams + team.index; number < parts; number += gridDim.x * teams) {
    const Part part(arena, params.num_tokens, number);
    for (int i = team.thread; i < size; i += kTeamThreads) counts[i] = 0;
    const int32_t* ids = ExchangeIds(shape, arena, team, part, params, epoch);
    if (!arena.receives()) continue;
    team.Sync();
    const int64_t token = part.begin + team.thread;
    if (ids != nullptr && token < part.end)
      CountToken(
          shape, ids + token * shape.topk, counts,
          part.source == arena.rank ? params.tables.send_ranks + token * shape.topk : nullptr);
    team.Sync();
    int32_t* histogram = arena.Histogram(part.histogram);
    for (int i = team.thread; i < size; i += kTeamThreads) histogram[i] = counts[i];
    team.Sync();
  }
  if (!arena.receives()) return;
  // The second kernel adds to it.
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e < shape.local_experts(); e += blockDim.x)
      params.num_tokens_per_expert[e] = 0;
}

RouteLaunch LaunchOf(const MoEShape& shape, int64_t num_tokens) {
  return {shape, num_tokens, ArenaLayout(shape).histogram_size * sizeof(int32_t), 0};
}

}  // namespace

cudaError_t LaunchExchange(const MoEShape& shape, const Arena& arena, const RouteParams& params,
                           cudaStream_t stream) {
  const RouteLaunch launch = LaunchOf(shape, params.num_tokens);
  return Launch(ExchangeKernel, launch.GridOf(launch.blocks), stream, shape, arena, params);
}

cudaError_t LoadExchange(const MoEShape& shape) {
  return AllowSharedMemory(ExchangeKernel, LaunchOf(shape, shape.max_tokens_per_rank).shared_bytes);
}

}  // namespace jax_ep::cuda
