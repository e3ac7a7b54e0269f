// Combine: sending blocks sum, per token of another rank, the rows that it has here, and write one
// row into its place in the source's window; receiving blocks add the ranks' rows of each token, in
// rank order.
//
// As in dispatch, senders come first in the grid, wait for nobody, and help to receive at the end.
#include "cuda/combine.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"
#include "cuda/terms.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;
// Tokens that a team adds up at a time at their source: few, for the last ones are pure latency.
constexpr int kTokensPerTask = 2;

// What is added up for a token: its own rows here, which are weighted, and sums of other ranks. The
// sum of the own rows is rounded to T, as the others' were to cross.
enum TermTag : int32_t { kOwnRow, kOtherRank };

// Lists the rows that a token has here, this warp's.
__device__ void ListRows(const MoEShape& shape, const CombineParams& p, const TokenRows& own,
                         Term* terms) {
  const int lane = threadIdx.x % 32;
  if (own.row < 0) return;
  terms[__popc(own.lanes & ((1u << lane) - 1))] = {
      static_cast<const int4*>(p.y) + int64_t{own.row} * NumVectors(shape), own.weight, kOwnRow};
}

// Adds up each token of `list` in order, into the row that `out_of` gives for it. With kOwnOnly,
// all terms are own rows.
template <typename T, bool kOwnOnly, typename OutOf>
__device__ void AddUp(const TermList& list, const Team& team, int vectors, PieceRing& ring,
                      const OutOf& out_of) {
  constexpr int kPerLane = PieceRing::kPerLane;
  const int lane = threadIdx.x % 32;
  for (int stretch = 0; stretch < Columns::NumStretches(vectors); ++stretch) {
    const Columns columns(team, vectors, stretch);
    if (columns.size() == 0) continue;
    TermStream stream(list, columns, ring);
    for (int token = 0; token < kTeamWarps; ++token) {
      Sum<T> own[kPerLane][kPerVector<T>] = {}, total[kPerLane][kPerVector<T>] = {};
      const int end = list.begins[token + 1];
      for (int i = list.begins[token]; i < end; ++i) {
        const Sum<T> weight = list.terms[i].weight;
        const bool is_own = kOwnOnly || list.terms[i].tag == kOwnRow;
        int4 v[kPerLane];
        stream.Take(v);
        if (is_own) {
#pragma unroll
          for (int u = 0; u < kPerLane; ++u) AddScaled<T>(own[u], v[u], weight);
        } else {
#pragma unroll
          for (int u = 0; u < kPerLane; ++u) AddScaled<T>(total[u], v[u], 1);
        }
        if constexpr (!kOwnOnly) {
          if (!is_own || (i + 1 < end && list.terms[i + 1].tag == kOwnRow)) continue;
#pragma unroll
          for (int u = 0; u < kPerLane; ++u) AddScaled<T>(total[u], Pack<T>(own[u]), 1);
        }
      }
      if (!list.is_wanted[token]) continue;
      int4* out = out_of(token) + columns.begin;
#pragma unroll
      for (int u = 0; u < kPerLane; ++u)
        if (lane + 32 * u < columns.size())
          ptx::st_no_allocate(out + lane + 32 * u, Pack<T>(kOwnOnly ? own[u] : total[u]));
    }
  }
}

// Sends the sums of tokens [first, last) of `source`, at most as many as a list holds. Calls
// `before_stores` once they are listed.
template <typename T, typename F>
__device__ void SendTokens(const MoEShape& shape, const Arena& arena, const Team& team,
                           const CombineParams& p, uint32_t epoch, int source, int64_t first,
                           int64_t last, TermList& list, PieceRing& ring, const F& before_stores) {
  const int lane = threadIdx.x % 32;
  const int64_t token = first + team.warp;
  const bool in_range = token < last;
  const TokenRows rows(shape, p, source, in_range ? token : first);
  const bool sends = in_range && rows.is_mine;
  Term* terms = list.Reserve(team, sends ? __popc(rows.lanes) : 0, sends);
  if (sends) ListRows(shape, p, rows, terms);
  team.Sync();
  before_stores();
  if (sends && p.row_scalars != nullptr) {
    const float scalar = rows.Scalar(shape, p);
    if (lane < shape.topk) arena.Scalars(epoch, source, arena.rank, token)[lane] = scalar;
  }
  AddUp<T, true>(list, team, NumVectors(shape), ring,
                 [&](int i) { return arena.Row(epoch, source, arena.rank, first + i); });
}

// A chunk is announced when the next one has been listed: by then most of its stores have arrived,
// and the release need not wait for them.
template <typename T>
__device__ void Send(const MoEShape& shape, const Arena& arena, const Team& team,
                     const CombineParams& p, uint32_t epoch, TermList& list, PieceRing& ring) {
  const int peers = shape.num_ranks - 1, per_chunk = arena.layout.tokens_per_chunk,
            per_list = TermList::MaxTokens(shape.topk);
  const int64_t num_tasks = CeilDiv(p.num_tokens, per_chunk) * peers;
  uint32_t* unannounced = nullptr;
  const auto announce = [&] {
    if (unannounced != nullptr && team.thread == 0) ptx::st_release_sys(unannounced, epoch);
    unannounced = nullptr;
  };
  Tasks tasks(team, &arena.Header()->send_tasks);
  while (tasks.current() < num_tasks) {
    // Every rank starts with another peer, so that no link is everybody's first.
    const int source =
        (arena.rank + 1 + static_cast<int>(tasks.current() % peers)) % shape.num_ranks;
    const int64_t chunk = tasks.current() / peers, first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    tasks.Ask();
    for (int64_t begin = first; begin < last; begin += per_list)
      SendTokens<T>(shape, arena, team, p, epoch, source, begin, min(begin + per_list, last), list,
                    ring, announce);
    tasks.Advance();
    unannounced = arena.ChunkFlag(source, arena.rank, chunk);
  }
  announce();
}

// Lists what a token is added up from, in the order of the ranks: lane i of the warp holds the i-th
// of those that the token went to. There is at most one term for each of its k.
__device__ void ListRanks(const MoEShape& shape, const Arena& arena, const Team& team,
                          const CombineParams& p, uint32_t epoch, int64_t token, int rank,
                          const TokenRows& own, bool in_range, TermList& list) {
  const int lane = threadIdx.x % 32, own_count = in_range ? __popc(own.lanes) : 0;
  const int before = __popc(__ballot_sync(kAllLanes, rank >= 0 && rank < arena.rank)),
            after = __popc(__ballot_sync(kAllLanes, rank > arena.rank)),
            has_own = __any_sync(kAllLanes, rank == arena.rank);
  Term* terms = list.Reserve(team, before + own_count + after, in_range);
  if (own_count > 0) ListRows(shape, p, own, terms + before);
  if (rank >= 0 && rank != arena.rank)
    terms[lane < before ? lane : lane - has_own + own_count] = {
        arena.Row(epoch, arena.rank, rank, token), 1.0f, kOtherRank};
}

__device__ void ReceiveScalars(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                               uint32_t epoch, int64_t token, int rank, const TokenRows& own) {
  const int lane = threadIdx.x % 32;
  float scalar = own.Scalar(shape, p);
  for (unsigned rest = __ballot_sync(kAllLanes, rank >= 0); rest != 0; rest &= rest - 1) {
    const int from = __shfl_sync(kAllLanes, rank, __ffs(rest) - 1);
    if (from != arena.rank && lane < shape.topk)
      scalar += arena.Scalars(epoch, arena.rank, from, token)[lane];
  }
  if (lane < shape.topk) p.token_scalars[token * shape.topk + lane] = scalar;
}

// NaN for a token, by one warp.
__device__ void PoisonToken(const MoEShape& shape, const CombineParams& p, int64_t token) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32;
  FillRow(static_cast<int4*>(p.out) + token * vectors, vectors, NaNs(shape.dtype));
  if (p.row_scalars != nullptr && lane < shape.topk)
    p.token_scalars[token * shape.topk + lane] = __int_as_float(0x7fc00000);
}

// A few tokens at a time. A thread per peer waits for the chunk that they are in.
template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const Team& team,
                        const CombineParams& p, uint32_t epoch, TermList& list, PieceRing& ring) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const int64_t num_tasks = CeilDiv(p.num_tokens, kTokensPerTask);
  Tasks tasks(team, &arena.Header()->receive_tasks);
  while (tasks.current() < num_tasks) {
    const int64_t first = int64_t{tasks.current()} * kTokensPerTask, token = first + team.warp,
                  chunk = static_cast<uint32_t>(first) / arena.layout.tokens_per_chunk;
    const bool in_range = team.warp < kTokensPerTask && token < p.num_tokens;
    tasks.Ask();
    // Fetched before the wait, so that its latency passes meanwhile.
    const int rank =
        in_range && lane < shape.topk ? p.tables.send_ranks[token * shape.topk + lane] : -1;
    const TokenRows own(shape, p, arena.rank, in_range ? token : first);
    ListRanks(shape, arena, team, p, epoch, token, rank, own, in_range, list);
    bool arrived = true;
    for (int peer = team.thread; peer < shape.num_ranks; peer += kTeamThreads)
      if (peer != arena.rank)
        arrived &=
            Wait(arena, arena.ChunkFlag(arena.rank, peer, chunk), epoch, peer, Phase::kCombine);
    arrived = tasks.Advance(arrived);
    int4* out = static_cast<int4*>(p.out) + first * vectors;
    if (arrived) {
      AddUp<T, false>(list, team, vectors, ring, [&](int i) { return out + int64_t{i} * vectors; });
      if (in_range && p.row_scalars != nullptr)
        ReceiveScalars(shape, arena, p, epoch, token, rank, own);
    } else if (in_range) {
      PoisonToken(shape, p, token);
    }
  }
}

__device__ void FillNaN(const MoEShape& shape, const CombineParams& p) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; token < p.num_tokens;
       token += warps)
    PoisonToken(shape, p, token);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    CombineKernel(MoEShape shape, Arena arena, CombineParams p, int senders) {
  const Team team;
  const WarpMemory memory(ptx::dynamic_shared());
  PieceRing ring(memory);
  TermList& list = TeamMemory{memory, team.warp}.list();
  const Request request(arena);
  if (request.is_refused) return request.LeaveRefused(arena);
  const uint32_t epoch = EnterEpoch(arena);
  if (p.tables.status[kCode] != 0) {
    if (arena.receives()) FillNaN(shape, p);
  } else {
    if (static_cast<int>(blockIdx.x) < senders && arena.sends())
      Send<T>(shape, arena, team, p, epoch, list, ring);
    if (arena.receives()) Receive<T>(shape, arena, team, p, epoch, list, ring);
  }
  LeaveEpoch(arena, request, epoch, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params,
                          Blocks blocks, cudaStream_t stream) {
  return VisitDType(shape.dtype, [&](auto* t) {
    return Launch(CombineKernel<std::remove_pointer_t<decltype(t)>>,
                  {blocks.of(arena.half), kThreads, WarpMemory::SharedBytes(kWarps)}, stream, shape,
                  arena, params, blocks.senders);
  });
}

cudaError_t LoadCombine(const MoEShape& shape) {
  return VisitDType(shape.dtype, [&](auto* t) {
    return AllowSharedMemory(CombineKernel<std::remove_pointer_t<decltype(t)>>,
                             WarpMemory::SharedBytes(kWarps));
  });
}

}  // namespace jax_ep::cuda
