// Combine in the low-latency mode: squads sum and send one (token, rank) each, with a flag of its
// own, and then add up one token each when its ranks' sums have arrived. The sums and their order
// are those of combine.cu.
#include "cuda/combine.cuh"
#include "cuda/latency.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

// Vectors of a row that a thread holds at a time.
constexpr int kHeld = 4;
constexpr int kStretch = kHeld * Squad::kThreads;

template <typename T>
using Sums = Sum<T>[kHeld][kPerVector<T>];

// A stretch of a row, from vector `begin` on: this thread's part.
struct Stretch {
  int first, left;  // vectors to the end of the row, from this thread's first

  __device__ Stretch(const Squad& squad, int begin, int vectors)
      : first(begin + squad.thread), left(vectors - first) {}

  __device__ void Load(const int4* row, int4 (&v)[kHeld]) const {
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      v[u] = u * Squad::kThreads < left ? ptx::ld_no_allocate(row + first + u * Squad::kThreads)
                                        : make_int4(0, 0, 0, 0);
  }
  template <typename T>
  __device__ void Store(int4* row, const Sums<T>& sums) const {
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (u * Squad::kThreads < left)
        ptx::st_no_allocate(row + first + u * Squad::kThreads, Pack<T>(sums[u]));
  }
};

template <typename T>
__device__ void AddAll(Sums<T>& sums, const int4 (&v)[kHeld], Sum<T> weight) {
#pragma unroll
  for (int u = 0; u < kHeld; ++u) AddScaled<T>(sums[u], v[u], weight);
}

// Adds the rows that a token has here up in order, the next one under way while one is added.
template <typename T>
__device__ void AddRows(Sums<T>& sums, const TokenRows& rows, const CombineParams& p, int vectors,
                        const Stretch& stretch) {
  const auto row_of = [&](unsigned rest) {
    return static_cast<const int4*>(p.y) +
           int64_t{__shfl_sync(kAllLanes, rows.row, __ffs(rest) - 1)} * vectors;
  };
  int4 v[kHeld], next[kHeld];
  unsigned rest = rows.lanes;
  if (rest != 0) stretch.Load(row_of(rest), v);
  while (rest != 0) {
    const float weight = __shfl_sync(kAllLanes, rows.weight, __ffs(rest) - 1);
    rest &= rest - 1;
    if (rest != 0) stretch.Load(row_of(rest), next);
    AddAll<T>(sums, v, weight);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) v[u] = next[u];
  }
}

// Sums what a token has here into a row.
template <typename T>
__device__ void SumInto(int4* to, const TokenRows& own, const Squad& squad, const CombineParams& p,
                        int vectors) {
  for (int begin = 0; begin < vectors; begin += kStretch) {
    const Stretch stretch(squad, begin, vectors);
    Sums<T> sums = {};
    AddRows<T>(sums, own, p, vectors, stretch);
    stretch.Store<T>(to, sums);
  }
}

template <typename T>
__device__ void SendSum(const MoEShape& shape, const Arena& arena, const Squad& squad,
                        const CombineParams& p, uint32_t epoch, int source, int64_t token) {
  const TokenRows own(shape, p, source, token);
  if (!own.is_mine) return;
  SumInto<T>(arena.Row(epoch, source, arena.rank, token), own, squad, p, NumVectors(shape));
  squad.Sync();
  if (squad.thread == 0) ptx::st_release_sys(arena.TokenFlag(source, arena.rank, token), epoch);
}

template <typename T>
__device__ void ReceiveSums(const MoEShape& shape, const Arena& arena, const Squad& squad,
                            const CombineParams& p, uint32_t epoch, int64_t token) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  int4* out = static_cast<int4*>(p.out) + token * vectors;
  // Ascending, then -1.
  const int rank = lane < shape.topk ? p.tables.send_ranks[token * shape.topk + lane] : -1;
  // This rank's sum waits in `out` for the others, rounded as they were to cross. A thread reads
  // again what it wrote itself.
  if (__any_sync(kAllLanes, rank == arena.rank))
    SumInto<T>(out, TokenRows(shape, p, arena.rank, token), squad, p, vectors);
  bool arrived = true;
  if (squad.warp == 0 && rank >= 0 && rank != arena.rank)
    arrived = Wait(arena, arena.TokenFlag(arena.rank, rank, token), epoch, rank, Phase::kCombine);
  if (!squad.SyncAnd(arrived)) {
    if (squad.warp == 0) FillRow(out, vectors, NaNs(shape.dtype));
    return;
  }
  const auto sum_of = [&](unsigned rest) -> const int4* {
    const int from = __shfl_sync(kAllLanes, rank, __ffs(rest) - 1);
    return from == arena.rank ? out : arena.Row(epoch, arena.rank, from, token);
  };
  for (int begin = 0; begin < vectors; begin += kStretch) {
    const Stretch stretch(squad, begin, vectors);
    Sums<T> total = {};
    int4 v[kHeld], next[kHeld];
    unsigned rest = __ballot_sync(kAllLanes, rank >= 0);
    if (rest != 0) stretch.Load(sum_of(rest), v);
    while (rest != 0) {
      rest &= rest - 1;
      if (rest != 0) stretch.Load(sum_of(rest), next);
      AddAll<T>(total, v, 1);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) v[u] = next[u];
    }
    stretch.Store<T>(out, total);
  }
}

// All sums are sent before any is waited for: tasks come in that order, whichever squad has them.
template <typename T>
__global__ void __launch_bounds__(kLatencyThreads, 1)
    LatencyCombineKernel(MoEShape shape, Arena arena, CombineParams p) {
  const Squad squad;
  const uint32_t epoch = EnterLatencyEpoch(arena);
  const int64_t peers = shape.num_ranks - 1, to_send = p.num_tokens * peers,
                squads = int64_t{gridDim.x} * kSquads;
  const bool is_poisoned = p.tables.status[kCode] != 0;
  __syncthreads();
  if (threadIdx.x == 0) CountBlock(arena, epoch);
  for (int64_t task = squad.index * gridDim.x + blockIdx.x; task < to_send + p.num_tokens;
       task += squads) {
    if (is_poisoned) {
      if (task >= to_send && squad.warp == 0)
        FillRow(static_cast<int4*>(p.out) + (task - to_send) * NumVectors(shape), NumVectors(shape),
                NaNs(shape.dtype));
    } else if (task < to_send) {
      const int source = static_cast<int>((arena.rank + 1 + task % peers) % shape.num_ranks);
      SendSum<T>(shape, arena, squad, p, epoch, source, task / peers);
    } else {
      ReceiveSums<T>(shape, arena, squad, p, epoch, task - to_send);
    }
  }
  LeaveLatencyEpoch(arena, epoch, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchLatencyCombine(const MoEShape& shape, const Arena& arena,
                                 const CombineParams& params, int sms, cudaStream_t stream) {
  const int blocks = LatencyBlocks(sms, CeilDiv(params.num_tokens * shape.num_ranks, kSquads));
  return VisitDType(shape.dtype, [&](auto* t) {
    return Launch(LatencyCombineKernel<std::remove_pointer_t<decltype(t)>>,
                  {blocks, kLatencyThreads}, stream, shape, arena, params);
  });
}

cudaError_t LoadLatencyCombine(const MoEShape& shape) {
  return VisitDType(shape.dtype, [&](auto* t) {
    return AllowSharedMemory(LatencyCombineKernel<std::remove_pointer_t<decltype(t)>>, 0);
  });
}

}  // namespace jax_ep::cuda
