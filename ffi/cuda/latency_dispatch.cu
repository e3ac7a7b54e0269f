// Dispatch in the low-latency mode: one kernel routes, sends, receives and expands.
//
// A block sends its tokens first, each with a flag of its own. Ids travel in words that also hold
// the epoch, so that they need no flag. Then every block counts all ids by itself, which takes less
// time than to wait for a block that does it for all; finds the rows of a few (source, token)s; and
// copies those when they have arrived.
#include <algorithm>
#include <type_traits>

#include "cuda/dispatch.cuh"
#include "cuda/latency_route.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

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
    QuantiseInto<X>(shape, p, from.row, threadIdx.x / 32, kLatencyWarps, lanes, window,
                    [&](uint64_t to) { return InWindow(shape, reinterpret_cast<int4*>(to)); });
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
    QuantiseInto<X>(shape, p, from.row, squad.warp, Squad::kWarps, lanes, row,
                    [&](int32_t to) { return InOutput(shape, p, to); });
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
  if (FillsGaps(shape, p))
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
