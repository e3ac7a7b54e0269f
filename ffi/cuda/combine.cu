// Combine: sending blocks sum, per token of another rank, the rows that it has here, and write one
// row into its place in the source's window; receiving blocks add the ranks' rows of each token, in
// rank order.
//
// As in dispatch, senders come first in the grid, wait for nobody, and help to receive at the end.
#include "cuda/bulk.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;
// Warps that share a token at its source: more tokens at a time would each take longer, and the
// last one counts.
constexpr int kWarpsPerToken = 4;
constexpr int kTokensPerTask = kTeamWarps / kWarpsPerToken;

__device__ int NumVectors(const MoEShape& shape) {
  return static_cast<int>(shape.row_bytes() / 16);
}

// The vectors of a row that one of several warps works on.
struct Share {
  int begin, end;
  bool first;  // this warp also does what is done once per row

  __device__ Share(int vectors, int warp, int warps_per_row) {
    const int part = warp % warps_per_row;
    const int per_part = static_cast<int>(CeilDiv(vectors, warps_per_row));
    begin = part * per_part;
    end = min(begin + per_part, vectors);
    first = part == 0;
  }
};

// The rows of y that one token of `source` has here; lane k of the warp holds the k-th.
struct TokenRows {
  int row;
  float weight;
  unsigned lanes;
  bool is_mine;  // its rows may still all have been dropped

  __device__ TokenRows(const MoEShape& shape, const CombineParams& p, int source, int64_t token) {
    const int lane = threadIdx.x % 32, per_token = shape.rows_per_token();
    row = lane < per_token ? p.tables.recv_rows[(source * p.num_tokens + token) * per_token + lane]
                           : static_cast<int32_t>(kNotMine);
    weight = row < 0 ? 0.0f : p.row_weights == nullptr ? 1.0f : p.row_weights[row];
    lanes = __ballot_sync(kAllLanes, row >= 0);
    is_mine = __any_sync(kAllLanes, row != kNotMine);
  }

  // The scalar of each of the token's k: lane k gets the k-th, 0 where this rank has none.
  __device__ float Scalar(const MoEShape& shape, const CombineParams& p) const {
    const int lane = threadIdx.x % 32;
    if (shape.layout == OutputLayout::kFlat) return row >= 0 ? p.row_scalars[row] : 0.0f;
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    return only_row >= 0 && lane < shape.topk ? p.row_scalars[only_row * shape.topk + lane] : 0.0f;
  }
};

// What is added up for one token; lane i of the warp holds the i-th term. This rank's own rows are
// [own_begin, own_end): they are weighted, and their sum is rounded, as other ranks did with
// theirs.
struct Terms {
  const int4* row;
  float weight;
  int count, own_begin, own_end;
};

// A token's own rows alone.
__device__ Terms TermsOfRank(const CombineParams& p, const TokenRows& own, int vectors) {
  const int lane = threadIdx.x % 32, count = __popc(own.lanes);
  // The lane that holds the i-th row.
  int from = 0;
  unsigned rest = own.lanes;
  for (int i = 0; i < count; ++i, rest &= rest - 1)
    if (lane == i) from = __ffs(rest) - 1;
  const int64_t row = __shfl_sync(kAllLanes, own.row, from);
  const float weight = __shfl_sync(kAllLanes, own.weight, from);
  return {static_cast<const int4*>(p.y) + row * vectors, weight, count, 0, count};
}

// A token's sums from all ranks in their order, with the own rows in this rank's place. `rank` of
// lane i is the i-th of the ranks that the token went to, ascending, or -1. There is at most one
// term for each of the token's k.
__device__ Terms TermsOfToken(const Arena& arena, const CombineParams& p, uint32_t epoch,
                              int64_t token, int rank, const TokenRows& own, int vectors) {
  const int lane = threadIdx.x % 32;
  Terms terms = TermsOfRank(p, own, vectors);
  const int before = __popc(__ballot_sync(kAllLanes, rank >= 0 && rank < arena.rank));
  const int after = __popc(__ballot_sync(kAllLanes, rank > arena.rank));
  const int has_own = __any_sync(kAllLanes, rank == arena.rank);
  const int own_count = terms.count;
  terms.own_begin = before;
  terms.own_end = before + own_count;
  terms.count = before + own_count + after;
  // Own rows move up behind the ranks before.
  const int from = lane >= before ? lane - before : 0;
  const auto own_row = reinterpret_cast<const int4*>(
      __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(terms.row), from));
  const float own_weight = __shfl_sync(kAllLanes, terms.weight, from);
  const bool is_own = lane >= terms.own_begin && lane < terms.own_end;
  const int nth = lane < before ? lane : lane - own_count + has_own;
  const int peer = __shfl_sync(kAllLanes, rank, nth & 31);
  terms.weight = is_own ? own_weight : 1.0f;
  if (is_own)
    terms.row = own_row;
  else if (lane < terms.count)
    terms.row = arena.Row(epoch, arena.rank, peer, token);
  return terms;
}

// Adds up `terms` over the vectors of `share`, in order, into `out`.
template <typename T>
__device__ void AddUp(const Terms& terms, const Share& share, int4* out, PieceRing& ring) {
  constexpr int kPerLane = PieceRing::kVectors / 32;
  const int lane = threadIdx.x % 32;
  int load_begin = share.begin, load_term = 0;
  const auto load_next = [&] {
    if (load_begin >= share.end || terms.count == 0) return;
    const uint64_t row = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(terms.row), load_term);
    ring.Load(reinterpret_cast<const int4*>(row) + load_begin,
              min(PieceRing::kVectors, share.end - load_begin));
    if (++load_term == terms.count) load_term = 0, load_begin += PieceRing::kVectors;
  };
  for (int i = 0; i < PieceRing::kPieces; ++i) load_next();
  for (int begin = share.begin; begin < share.end; begin += PieceRing::kVectors) {
    const int first = begin + lane;
    Sum<T> total[kPerLane][kPerVector<T>] = {}, own[kPerLane][kPerVector<T>] = {};
    for (int i = 0; i < terms.count; ++i) {
      const int4* piece = ring.Front();
      const Sum<T> weight = __shfl_sync(kAllLanes, terms.weight, i);
      const bool is_own = i >= terms.own_begin && i < terms.own_end;
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) {
        if (first + 32 * u >= share.end) continue;
        const int4 v = piece[lane + 32 * u];
        if (is_own)
          AddScaled<T>(own[u], v, weight);
        else
          AddScaled<T>(total[u], v, 1);
      }
      ring.Pop();
      load_next();
      if (i + 1 != terms.own_end) continue;
#pragma unroll
      for (int u = 0; u < kPerLane; ++u) AddScaled<T>(total[u], Pack<T>(own[u]), 1);
    }
#pragma unroll
    for (int u = 0; u < kPerLane; ++u)
      if (first + 32 * u < share.end) ptx::st_no_allocate(out + first + 32 * u, Pack<T>(total[u]));
  }
}

template <typename T>
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                          uint32_t epoch, int source, int64_t token, PieceRing& ring) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const TokenRows rows(shape, p, source, token);
  if (!rows.is_mine) return;
  AddUp<T>(TermsOfRank(p, rows, vectors), Share(vectors, 0, 1),
           arena.Row(epoch, source, arena.rank, token), ring);
  if (p.row_scalars == nullptr) return;
  const float scalar = rows.Scalar(shape, p);
  if (lane < shape.topk) arena.Scalars(epoch, source, arena.rank, token)[lane] = scalar;
}

template <typename T>
__device__ void Send(const MoEShape& shape, const Arena& arena, const Team& team,
                     const CombineParams& p, uint32_t epoch, PieceRing& ring) {
  const int peers = shape.num_ranks - 1, per_chunk = arena.layout.tokens_per_chunk;
  const int64_t num_tasks = CeilDiv(p.num_tokens, per_chunk) * peers;
  Tasks tasks(team, &arena.Header()->send_tasks);
  while (tasks.current() < num_tasks) {
    // Every rank starts with another peer, so that no link is everybody's first.
    const int source =
        (arena.rank + 1 + static_cast<int>(tasks.current() % peers)) % shape.num_ranks;
    const int64_t chunk = tasks.current() / peers, first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    tasks.Ask();
    for (int64_t token = first + team.warp; token < last; token += kTeamWarps)
      SendToken<T>(shape, arena, p, epoch, source, token, ring);
    tasks.Advance();
    if (team.thread == 0) ptx::st_release_sys(arena.ChunkFlag(source, arena.rank, chunk), epoch);
  }
}

template <typename T>
__device__ void ReceiveToken(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                             const Share& share, uint32_t epoch, int64_t token, int rank,
                             const TokenRows& own, PieceRing& ring) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  AddUp<T>(TermsOfToken(arena, p, epoch, token, rank, own, vectors), share,
           static_cast<int4*>(p.out) + token * vectors, ring);
  if (p.row_scalars == nullptr || !share.first) return;
  float scalar = own.Scalar(shape, p);
  for (unsigned rest = __ballot_sync(kAllLanes, rank >= 0); rest != 0; rest &= rest - 1) {
    const int from = __shfl_sync(kAllLanes, rank, __ffs(rest) - 1);
    if (from != arena.rank && lane < shape.topk)
      scalar += arena.Scalars(epoch, arena.rank, from, token)[lane];
  }
  if (lane < shape.topk) p.token_scalars[token * shape.topk + lane] = scalar;
}

// A few tokens at a time. A thread per peer waits for the chunk that they are in.
template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const Team& team,
                        const CombineParams& p, uint32_t epoch, PieceRing& ring) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const int64_t num_tasks = CeilDiv(p.num_tokens, kTokensPerTask);
  const Share share(vectors, team.warp, kWarpsPerToken);
  Tasks tasks(team, &arena.Header()->receive_tasks);
  while (tasks.current() < num_tasks) {
    const int64_t first = int64_t{tasks.current()} * kTokensPerTask,
                  token = first + team.warp / kWarpsPerToken,
                  chunk = first / arena.layout.tokens_per_chunk;
    const bool in_range = token < p.num_tokens;
    tasks.Ask();
    // Fetched before the wait, so that its latency passes meanwhile.
    const int rank =
        in_range && lane < shape.topk ? p.tables.send_ranks[token * shape.topk + lane] : -1;
    const TokenRows own(shape, p, arena.rank, in_range ? token : first);
    bool arrived = true;
    for (int peer = team.thread; peer < shape.num_ranks; peer += kTeamThreads)
      if (peer != arena.rank)
        arrived &=
            Wait(arena, arena.ChunkFlag(arena.rank, peer, chunk), epoch, peer, Phase::kCombine);
    arrived = tasks.Advance(arrived);
    ptx::fence_proxy_async();  // what arrived is read by bulk copies
    if (!in_range) continue;
    if (arrived)
      ReceiveToken<T>(shape, arena, p, share, epoch, token, rank, own, ring);
    else
      FillRow(static_cast<int4*>(p.out) + token * vectors, vectors, NaNs(shape.dtype));
  }
}

__device__ void FillNaN(const MoEShape& shape, const CombineParams& p) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; token < p.num_tokens;
       token += warps) {
    FillRow(static_cast<int4*>(p.out) + token * vectors, vectors, NaNs(shape.dtype));
    if (p.row_scalars != nullptr && lane < shape.topk)
      p.token_scalars[token * shape.topk + lane] = __int_as_float(0x7fc00000);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    CombineKernel(MoEShape shape, Arena arena, CombineParams p, int senders) {
  extern __shared__ __align__(128) std::byte shared[];
  const Team team;
  PieceRing ring(shared, kWarps);
  const uint32_t epoch = EnterEpoch(arena);
  if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p);
  } else {
    if (static_cast<int>(blockIdx.x) < senders) Send<T>(shape, arena, team, p, epoch, ring);
    Receive<T>(shape, arena, team, p, epoch, ring);
  }
  LeaveEpoch(arena, epoch, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params,
                          Blocks blocks, cudaStream_t stream) {
  VisitDType(shape.dtype, [&](auto* t) {
    CombineKernel<std::remove_pointer_t<decltype(t)>>
        <<<blocks.total, kThreads, PieceRing::SharedBytes(kWarps), stream>>>(shape, arena, params,
                                                                             blocks.senders);
  });
  return cudaGetLastError();
}

cudaError_t LoadCombine(const MoEShape& shape) {
  return VisitDType(shape.dtype, [&](auto* t) {
    return AllowSharedMemory(CombineKernel<std::remove_pointer_t<decltype(t)>>,
                             PieceRing::SharedBytes(kWarps));
  });
}

}  // namespace jax_ep::cuda
