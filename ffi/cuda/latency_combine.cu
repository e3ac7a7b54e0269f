// Combine in the low-latency mode: teams sum and send one (token, rank) each, with a flag of its
// own; then blocks add up one token each when its ranks' sums have arrived. The sums and their
// order are those of combine.cu.
#include "cuda/combine.cuh"
#include "cuda/latency.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

// A whole block: for the last sums, which nothing hides, and for all where there are enough blocks.
using Block = TeamOf<kLatencyThreads>;

// Vectors of a row that a thread adds up at a time, and how many rows are under way.
template <typename Team>
constexpr int kHeld = Team::kThreads == kLatencyThreads ? 2 : 4;
template <typename Team>
constexpr int kRowsInFlight = 8 / kHeld<Team>;

// Adds up rows in the order of the lanes that hold them, each times its lane's weight, into `out`.
template <typename T, typename Team>
__device__ void AddUp(const Team& team, int vectors, unsigned lanes, const int4* row, float weight,
                      int4* out) {
  constexpr int kVectors = kHeld<Team>, kRows = kRowsInFlight<Team>;
  for (int begin = 0; begin < vectors; begin += kVectors * Team::kThreads) {
    const int first = begin + team.thread;
    Sum<T> sums[kVectors][kPerVector<T>] = {};
    for (unsigned rest = lanes; rest != 0;) {
      int4 v[kRows][kVectors];
      float weights[kRows];
      int count = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (rest == 0) break;
        const int lane = __ffs(rest) - 1;
        const auto* from = reinterpret_cast<const int4*>(
            __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), lane));
        weights[r] = __shfl_sync(kAllLanes, weight, lane);
#pragma unroll
        for (int u = 0; u < kVectors; ++u)
          if (const int at = first + u * Team::kThreads; at < vectors)
            v[r][u] = ptx::ld_no_allocate(from + at);
        rest &= rest - 1;
        ++count;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r == count) break;
#pragma unroll
        for (int u = 0; u < kVectors; ++u)
          if (first + u * Team::kThreads < vectors) AddScaled<T>(sums[u], v[r][u], weights[r]);
      }
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (const int at = first + u * Team::kThreads; at < vectors)
        ptx::st_no_allocate(out + at, Pack<T>(sums[u]));
  }
}

// Sums what a token has here into a row.
template <typename T, typename Team>
__device__ void SumInto(int4* to, const TokenRows& own, const Team& team, const CombineParams& p,
                        int vectors) {
  AddUp<T>(team, vectors, own.lanes, static_cast<const int4*>(p.y) + int64_t{own.row} * vectors,
           own.weight, to);
}

template <typename T, typename Team>
__device__ void SendSum(const MoEShape& shape, const Arena& arena, const Team& team,
                        const CombineParams& p, uint32_t epoch, int source, int64_t token) {
  const TokenRows own(shape, p, source, token);
  if (!own.is_mine) return;
  SumInto<T>(arena.Row(epoch, source, arena.rank, token), own, team, p, NumVectors(shape));
  team.Sync();
  if (team.thread == 0) ptx::st_release_sys(arena.TokenFlag(source, arena.rank, token), epoch);
}

template <typename T>
__device__ void ReceiveSums(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                            uint32_t epoch, int64_t token) {
  const Block block;
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  int4* out = static_cast<int4*>(p.out) + token * vectors;
  // Ascending, then -1.
  const int rank = lane < shape.topk ? p.tables.send_ranks[token * shape.topk + lane] : -1;
  // This rank's sum waits in `out` for the others, rounded as they were to cross. A thread reads
  // again what it wrote itself.
  if (__any_sync(kAllLanes, rank == arena.rank))
    SumInto<T>(out, TokenRows(shape, p, arena.rank, token), block, p, vectors);
  bool arrived = true;
  // The last warp, which had nothing to announce.
  if (block.warp == Block::kWarps - 1 && rank >= 0 && rank != arena.rank)
    arrived =
        WaitClosely(arena, arena.TokenFlag(arena.rank, rank, token), epoch, rank, Phase::kCombine);
  if (__syncthreads_or(!arrived)) {
    if (block.warp == 0) FillRow(out, vectors, NaNs(shape.dtype));
    return;
  }
  const int4* row = rank == arena.rank ? out
                    : rank >= 0        ? arena.Row(epoch, arena.rank, rank, token)
                                       : nullptr;
  AddUp<T>(block, vectors, __ballot_sync(kAllLanes, rank >= 0), row, 1.0f, out);
}

// All sums are sent before any is waited for.
template <typename T, typename Team>
__global__ void __launch_bounds__(kLatencyThreads, 1)
    LatencyCombineKernel(MoEShape shape, Arena arena, CombineParams p) {
  constexpr int kTeams = kLatencyThreads / Team::kThreads;
  const Request request(arena);
  if (request.is_refused) return request.LeaveRefused(arena);
  const uint32_t epoch = LatencyEpoch(arena);
  if (IsLastInGrid() && threadIdx.x / 32 == kLatencyWarps - 1) TellEntered(arena, epoch);
  const int blocks = gridDim.x, peers = shape.num_ranks - 1;
  const int64_t to_send = p.num_tokens * peers;
  // The first to receive has the fewest to send.
  const int64_t first = (blockIdx.x + blocks - to_send % blocks) % blocks;
  if (p.tables.status[kCode] != 0) {
    for (int64_t token = blockIdx.x * kLatencyWarps + threadIdx.x / 32;
         arena.receives() && token < p.num_tokens; token += int64_t{blocks} * kLatencyWarps)
      FillRow(static_cast<int4*>(p.out) + token * NumVectors(shape), NumVectors(shape),
              NaNs(shape.dtype));
  } else {
    const Team team;
    for (int64_t task = int64_t{team.index} * blocks + blockIdx.x; arena.sends() && task < to_send;
         task += int64_t{blocks} * kTeams)
      SendSum<T>(shape, arena, team, p, epoch,
                 static_cast<int>((arena.rank + 1 + task % peers) % shape.num_ranks), task / peers);
    for (int64_t token = first; arena.receives() && token < p.num_tokens; token += blocks)
      ReceiveSums<T>(shape, arena, p, epoch, token);
  }
  LeaveLatencyEpoch(arena, request, epoch, true, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchLatencyCombine(const MoEShape& shape, const Arena& arena,
                                 const CombineParams& params, int sms, cudaStream_t stream) {
  const int64_t sums = params.num_tokens * shape.num_ranks;
  return VisitDType(shape.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const bool has_blocks = sums <= sms;
    const int64_t work = std::max(params.num_tokens, CeilDiv(sums, kSquads));
    return Launch(has_blocks ? LatencyCombineKernel<T, Block> : LatencyCombineKernel<T, Squad>,
                  {LatencyBlocks(sms, has_blocks ? sums : work), kLatencyThreads}, stream, shape,
                  arena, params);
  });
}

cudaError_t LoadLatencyCombine(const MoEShape& shape) {
  return VisitDType(shape.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const cudaError_t error = AllowSharedMemory(LatencyCombineKernel<T, Block>, 0);
    return error != cudaSuccess ? error : AllowSharedMemory(LatencyCombineKernel<T, Squad>, 0);
  });
}

}  // namespace jax_ep::cuda
