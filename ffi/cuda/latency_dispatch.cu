// Dispatch in the low-latency mode: one kernel routes, sends, receives and expands.
//
// Sending blocks send each token with a flag of its own, and are done. Ids travel in words that
// also hold the epoch, so that they need no flag. Every receiving block counts all ids by itself,
// which takes less time than to wait for a block that does it for all; finds the rows of a few
// (source, token)s; and copies those when they have arrived. The last block writes the tables.
#include <algorithm>
#include <type_traits>

#include "cuda/dispatch.cuh"
#include "cuda/latency_route.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

// Few vectors in a row: more rows at a time.
using Pair = TeamOf<64>;

// Vectors of a row that a thread holds at a time: a squad holds a row of 7168 16-bit elements, a
// pair of warps one of as many 8-bit ones with its scales.
template <typename Team>
constexpr int kHeld = Team::kThreads == Pair::kThreads ? 8 : 7;

// This thread's vectors of a row, from vector `begin` on. Of a window they may have come from a
// peer.
template <typename Team>
__device__ __forceinline__ void Load(const Team& team, const int4* row, int begin, int vectors,
                                     int4 (&v)[kHeld<Team>]) {
#pragma unroll
  for (int u = 0; u < kHeld<Team>; ++u)
    if (const int at = begin + u * Team::kThreads + team.thread; at < vectors)
      v[u] = ptx::ld_no_allocate(row + at);
}
template <typename Team>
__device__ __forceinline__ void Store(const Team& team, int4* row, int begin, int vectors,
                                      const int4 (&v)[kHeld<Team>]) {
#pragma unroll
  for (int u = 0; u < kHeld<Team>; ++u)
    if (const int at = begin + u * Team::kThreads + team.thread; at < vectors)
      ptx::st_no_allocate(row + at, v[u]);
}

// A squad sends one token to all ranks it goes to, and tells them. X is the type of elements that
// are quantised on the way, or void.
template <typename X>
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const Squad& squad,
                          const DispatchParams& p, uint32_t epoch, int64_t token, int rank,
                          int4 (&v)[kHeld<Squad>]) {
  const TokenSource from(shape, arena, p, epoch, arena.rank, token);
  const int vectors = NumRowVectors(shape, p);
  const bool sends = rank >= 0 && rank != arena.rank;
  const unsigned lanes = __ballot_sync(kAllLanes, sends);
  if (lanes == 0) return;  // the same in all warps
  const auto window =
      reinterpret_cast<uint64_t>(sends ? arena.Row(epoch, rank, arena.rank, token) : nullptr);
  const float weight = WeightOfLane(shape, p, from);
  if constexpr (!std::is_void_v<X>) {
    QuantiseInto<X>(shape, p, from.row, squad.warp, Squad::kWarps, lanes, window,
                    [&](uint64_t to) { return InWindow(shape, reinterpret_cast<int4*>(to)); });
  } else {
    // All lanes take part in every round.
    for (int begin = 0; begin < vectors; begin += kHeld<Squad> * Squad::kThreads) {
      if (begin > 0) Load(squad, from.row, begin, vectors, v);
      ForEachLane(lanes, window, [&](uint64_t to) {
        Store(squad, reinterpret_cast<int4*>(to), begin, vectors, v);
      });
    }
    if (p.quant.block != 0)
      ForEachLane(lanes, window, [&](uint64_t to) {
        CopyScales(InWindow(shape, reinterpret_cast<int4*>(to)).scales, from.scales,
                   p.scale_row_bytes(shape), squad.thread, Squad::kThreads);
      });
  }
  if (squad.warp == 0) SendWeights(shape, arena, p, epoch, token, lanes, rank, weight);
  squad.Sync();
  if (squad.warp == Squad::kWarps - 1 && sends)
    ptx::st_release_sys(arena.TokenFlag(rank, arena.rank, token), epoch);
}

// All that a sending block does. With `topk_ids` of a fresh dispatch, else by its tables. A token's
// first vectors are asked for before it is known where to: all wait for memory together.
template <typename X>
__device__ void SendAll(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                        const int32_t* topk_ids, uint32_t epoch, int senders) {
  const Squad squad;
  int64_t token = squad.index * senders + blockIdx.x;
  int entry = -1;
  int4 v[kHeld<Squad>];
  const auto ask = [&] {
    if (token >= p.num_tokens) return;
    entry = EntryOfLane(shape, p, topk_ids, token);
    if constexpr (std::is_void_v<X>)
      Load(squad, TokenSource(shape, arena, p, epoch, arena.rank, token).row, 0,
           NumRowVectors(shape, p), v);
  };
  ask();
  if (topk_ids != nullptr) SendIds(shape, arena, topk_ids, p.num_tokens, epoch, senders);
  while (token < p.num_tokens) {
    SendToken<X>(shape, arena, squad, p, epoch, token, DestinationOfLane(shape, topk_ids, entry),
                 v);
    token += senders * kSquads;
    ask();
  }
}

// Gives one token to its rows; lane k of every warp of the team holds the k-th.
template <typename X, typename Team>
__device__ void ExpandToken(const MoEShape& shape, const Team& team, const DispatchParams& p,
                            const TokenSource& from, int32_t row) {
  const float weight = WeightOfLane(shape, p, from);
  const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
  if (!std::is_void_v<X> && from.is_own) {
    QuantiseInto<X>(shape, p, from.row, team.warp, Team::kWarps, lanes, row,
                    [&](int32_t to) { return InOutput(shape, p, to); });
  } else {
    constexpr int kAll = kHeld<Team> * Team::kThreads;
    const int vectors = NumRowVectors(shape, p);
    const int64_t scale_bytes = p.scale_row_bytes(shape);
    // Scales that follow the elements are read with them.
    const bool reads_scales =
        !from.is_own && scale_bytes % 16 == 0 && vectors + scale_bytes / 16 <= kAll;
    const int scale_vectors = reads_scales ? static_cast<int>(scale_bytes / 16) : 0;
    for (int begin = 0; begin < vectors; begin += kAll) {
      int4 v[kHeld<Team>];
      Load(team, from.row, begin, vectors + scale_vectors, v);
      ForEachLane(lanes, row, [&](int64_t to) {
        Store(team, OutputRow(shape, p, to), begin, vectors, v);
        if (scale_vectors == 0) return;
        auto* scales = reinterpret_cast<int4*>(InOutput(shape, p, to).scales);
#pragma unroll
        for (int u = 0; u < kHeld<Team>; ++u)
          if (const int at = u * Team::kThreads + team.thread - vectors;
              at >= 0 && at < scale_vectors)
            scales[at] = v[u];
      });
    }
    if (scale_bytes > 0 && !reads_scales)
      ForEachLane(lanes, row, [&](int64_t to) {
        CopyScales(InOutput(shape, p, to).scales, from.scales, scale_bytes, team.thread,
                   Team::kThreads);
      });
  }
  if (team.warp == 0) PlaceWeights(shape, p, weight, row);
}

// A row that holds no token, or one that cannot be had, and what belongs to it: a warp.
__device__ void FillOne(const MoEShape& shape, const DispatchParams& p, int64_t row, bool poison) {
  FillRow(OutputRow(shape, p, row), NumRowVectors(shape, p), RowFilling(shape, p, poison));
  FillBesideRow(shape, p, row, poison);
}

// The receiving blocks of a kernel.
struct Receivers {
  int block, blocks;

  __device__ explicit Receivers(int senders)
      : block(static_cast<int>(blockIdx.x) - senders),
        blocks(static_cast<int>(gridDim.x) - senders) {}
  // The last block of all: tables are its own, and tokens only where there is no other.
  __device__ bool is_last() const { return block == blocks - 1; }
  __device__ int copying() const { return blocks > 1 ? blocks - 1 : 1; }

  // Calls f for each of rows [begin, end), a warp for each.
  template <typename F>
  __device__ void ForEachRow(int64_t begin, int64_t end, const F& f) const {
    const int64_t stride = int64_t{blocks} * kLatencyWarps;
    for (int64_t row = begin + block * kLatencyWarps + threadIdx.x / 32; row < end; row += stride)
      f(row);
  }
};

// Rows that hold no token, and what they are given beside.
template <typename Offsets, typename Counts>
__device__ void FillPadding(const MoEShape& shape, const DispatchParams& p,
                            const Receivers& receivers, const Offsets& offset,
                            const Counts& count) {
  const int groups = shape.num_row_groups();
  const auto fill = [&](int64_t row) { FillOne(shape, p, row, false); };
  if (FillsGaps(shape, p))
    for (int group = 0; group < groups; ++group)
      receivers.ForEachRow(offset(group) + count(group), offset(group + 1), fill);
  if (shape.layout != OutputLayout::kExpertMajor)
    receivers.ForEachRow(offset(groups), shape.capacity, fill);
}

// The (source, token)s of a team, one after the other: finds the rows of one while it waits for the
// one before. A source's tokens come in the order in which they are sent.
template <typename X, bool kFresh, typename Team>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const RouteParams& route,
                        const DispatchParams& p, uint32_t epoch, const Routing& routing,
                        bool is_poisoned, const Receivers& receivers) {
  // A warp may still read those of one item while others find those of the next but one.
  constexpr int kTurns = 3, kTeams = kLatencyThreads / Team::kThreads;
  __shared__ int32_t rows_of_teams[kTeams][kTurns][kMaxTopk];
  const Team team;
  const int lane = threadIdx.x % 32, per_token = shape.rows_per_token(), ranks = shape.num_ranks,
            tokens = static_cast<int>(p.num_tokens), num_items = ranks * tokens;
  // Own tokens are spread over the teams as all others are.
  const auto source_of = [&](int item) { return (arena.rank + item) % ranks; };
  const auto find_rows = [&](int item, int turn) {
    const int token = source_of(item) * tokens + item / ranks;
    for (int k = team.warp; k < per_token; k += Team::kWarps) {
      const int32_t row = RowOf(shape, arena.rank, routing, token, k);
      if (lane != 0) continue;
      rows_of_teams[team.index][turn][k] = row;
      route.tables.recv_rows[token * per_token + k] = row;
    }
  };
  const int stride = receivers.copying() * kTeams;
  int item = team.index * receivers.copying() + receivers.block;
  if (kFresh && item < num_items) find_rows(item, 0);
  for (int turn = 0; item < num_items; item += stride, turn = (turn + 1) % kTurns) {
    const int source = source_of(item);
    const int64_t token = item / ranks;
    if (kFresh && item + stride < num_items) find_rows(item + stride, (turn + 1) % kTurns);
    if (kFresh) team.Sync();
    int32_t row = kNotMine;
    if (lane < per_token)
      row = kFresh ? rows_of_teams[team.index][turn][lane]
                   : p.tables.recv_rows[(source * p.num_tokens + token) * per_token + lane];
    if (!__any_sync(kAllLanes, row >= 0)) continue;
    if (kFresh && shape.layout == OutputLayout::kRankMajor && team.warp == 0) {
      const int first_expert = arena.rank * routing.local_experts;
      const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
      if (lane < shape.topk) {
        const int e =
            routing.ids[(source * p.num_tokens + token) * shape.topk + lane] - first_expert;
        route.recv_topk_ids[only_row * shape.topk + lane] =
            e >= 0 && e < routing.local_experts ? e : -1;
      }
    }
    if (is_poisoned) continue;
    bool arrived = true;
    if (team.thread == 0 && source != arena.rank)
      arrived = WaitClosely(arena, arena.TokenFlag(arena.rank, source, token), epoch, source,
                            Phase::kDispatch);
    if (team.SyncAnd(arrived))
      ExpandToken<X>(shape, team, p, TokenSource(shape, arena, p, epoch, source, token), row);
    else if (team.warp == 0)
      PoisonRows(shape, p, row);
  }
}

// All that the receiving blocks do of a fresh dispatch before rows; returns its ErrorCode.
__device__ int RouteHere(const MoEShape& shape, const Arena& arena, const RouteParams& route,
                         uint32_t epoch, const Routing& routing, const Receivers& receivers) {
  const Verdict verdict = Count(shape, arena, route, epoch, routing);
  if (receivers.is_last()) {
    FillTables(shape, arena, route, routing, verdict);
    for (int token = threadIdx.x / 32; token < route.num_tokens; token += kLatencyWarps)
      FillSendRanks(shape, route, token);
    if (shape.layout == OutputLayout::kRankMajor)
      CountKeptIds(shape, arena.rank, route, routing, routing.experts);
  }
  if (shape.layout == OutputLayout::kRankMajor)
    receivers.ForEachRow(Offset(shape, routing, shape.num_ranks), shape.capacity, [&](int64_t row) {
      if (const int lane = threadIdx.x % 32; lane < shape.topk)
        route.recv_topk_ids[row * shape.topk + lane] = -1;
    });
  return verdict.code;
}

template <typename X, bool kFresh>
__device__ void ReceiveAll(const MoEShape& shape, const Arena& arena, const RouteParams& route,
                           const DispatchParams& p, uint32_t epoch, const Receivers& receivers) {
  const Routing routing(shape, p.num_tokens, ptx::dynamic_shared());
  const int code =
      kFresh ? RouteHere(shape, arena, route, epoch, routing, receivers) : p.tables.status[kCode];
  if (code != 0)
    receivers.ForEachRow(0, shape.capacity, [&](int64_t row) { FillOne(shape, p, row, true); });
  else if (kFresh)
    FillPadding(
        shape, p, receivers, [&](int group) { return Offset(shape, routing, group); },
        [&](int group) { return Kept(shape, arena.rank, routing, group); });
  else
    FillPadding(
        shape, p, receivers, [&](int group) { return int64_t{p.tables.group_offsets[group]}; },
        [&](int group) { return p.tables.group_counts[group]; });
  if (receivers.block >= receivers.copying()) return;
  if (!std::is_void_v<X> || p.quant.block != 0)
    Receive<X, kFresh, Pair>(shape, arena, route, p, epoch, routing, code != 0, receivers);
  else
    Receive<X, kFresh, Squad>(shape, arena, route, p, epoch, routing, code != 0, receivers);
}

template <typename X, bool kFresh>
__global__ void __launch_bounds__(kLatencyThreads, 1)
    LatencyDispatchKernel(MoEShape shape, Arena arena, RouteParams route, DispatchParams p,
                          int senders) {
  const Request request(arena);
  if (request.is_refused) return request.LeaveRefused(arena);
  const uint32_t epoch = LatencyEpoch(arena);
  const Receivers receivers(senders);
  const int32_t* topk_ids = kFresh ? route.topk_ids : nullptr;
  if (!kFresh && IsLastInGrid() && threadIdx.x < 32) TellEntered(arena, epoch);
  if (receivers.block >= 0 && arena.receives())
    ReceiveAll<X, kFresh>(shape, arena, route, p, epoch, receivers);
  else if (receivers.block < 0 && arena.sends())
    SendAll<X>(shape, arena, p, topk_ids, epoch, senders);
  // Whoever sent its ids has entered.
  LeaveLatencyEpoch(arena, request, epoch, !kFresh, Phase::kDispatch);
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
constexpr int kSenders = 16, kQuantisers = 40;

// Both kinds at least one where there is a peer.
Blocks BlocksFor(const MoEShape& shape, const DispatchParams& p, int sms) {
  const bool fills = shape.layout != OutputLayout::kExpertMajor || p.fill;
  const int most = std::clamp(sms / 3, 1, p.quantises() ? kQuantisers : kSenders);
  const int senders = shape.num_ranks > 1 ? LatencyBlocks(most, p.num_tokens) : 0;
  // One block more for the tables.
  const int64_t work = std::max(CeilDiv(p.num_tokens * shape.num_ranks, kSquads) + 1,
                                fills ? CeilDiv(shape.capacity, kLatencyWarps) : 0);
  return {senders + LatencyBlocks(std::max(sms - senders, 1), work), senders};
}

}  // namespace

cudaError_t LaunchLatencyDispatch(const MoEShape& shape, const Arena& arena,
                                  const RouteParams* route, const DispatchParams& params, int sms,
                                  cudaStream_t stream) {
  const Blocks blocks = BlocksFor(shape, params, sms);
  const auto launch = [&](auto* kernel, size_t shared_bytes) {
    return Launch(kernel, {blocks.of(arena.half), kLatencyThreads, shared_bytes}, stream, shape,
                  arena, route == nullptr ? RouteParams{} : *route, params, blocks.senders);
  };
  if (route == nullptr)
    return VisitKernel<false>(shape, params.quantises(),
                              [&](auto* kernel) { return launch(kernel, 0); });
  return VisitKernel<true>(shape, params.quantises(), [&](auto* kernel) {
    return launch(kernel, Routing::SharedBytes(shape, params.num_tokens));
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
