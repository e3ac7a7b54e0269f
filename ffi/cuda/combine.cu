// Combine: sending blocks sum, per token of another rank, the rows that it has here, and write one
// row into its place in the source's window; receiving blocks add the ranks' rows of each token, in
// rank order.
//
// As in dispatch, senders come first in the grid, wait for nobody, and help to receive at the end.
#include "cuda/ops.h"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// Warps that share a row: more rows at a time would each take longer, and the last one counts.
constexpr int kWarpsPerSum = 2;
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
template <typename T>
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

  // Adds up to kUnroll vectors of each row, from vector `first` on and before `end`, two rows at a
  // time to have more loads in flight. All lanes must call it together.
  __device__ void AddTo(Sum<T> (&sum)[kUnroll][kPerVector<T>], const int4* y, int vectors,
                        int first, int end) const {
    for (unsigned rest = lanes; rest != 0;) {
      const int a = __ffs(rest) - 1;
      rest &= rest - 1;
      const int b = rest != 0 ? __ffs(rest) - 1 : a;
      const bool two = rest != 0;
      rest &= rest - 1;
      const int4* row_a = y + static_cast<int64_t>(__shfl_sync(kAllLanes, row, a)) * vectors;
      const int4* row_b = y + static_cast<int64_t>(__shfl_sync(kAllLanes, row, b)) * vectors;
      const Sum<T> weight_a = __shfl_sync(kAllLanes, weight, a),
                   weight_b = __shfl_sync(kAllLanes, weight, b);
      int4 va[kUnroll], vb[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < end) {
          va[u] = ptx::ld_nc_no_allocate(row_a + first + 32 * u);
          if (two) vb[u] = ptx::ld_nc_no_allocate(row_b + first + 32 * u);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < end) {
          AddScaled<T>(sum[u], va[u], weight_a);
          if (two) AddScaled<T>(sum[u], vb[u], weight_b);
        }
    }
  }

  // The scalar of each of the token's k: lane k gets the k-th, 0 where this rank has none.
  __device__ float Scalar(const MoEShape& shape, const CombineParams& p) const {
    const int lane = threadIdx.x % 32;
    if (shape.layout == OutputLayout::kFlat) return row >= 0 ? p.row_scalars[row] : 0.0f;
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    return only_row >= 0 && lane < shape.topk ? p.row_scalars[only_row * shape.topk + lane] : 0.0f;
  }
};

template <typename T>
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                          const Share& share, uint32_t epoch, int source, int64_t token) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const TokenRows<T> rows(shape, p, source, token);
  if (!rows.is_mine) return;
  int4* to = arena.Row(epoch, source, arena.rank, token);
  for (int begin = share.begin; begin < share.end; begin += 32 * kUnroll) {
    const int first = begin + lane;
    Sum<T> sum[kUnroll][kPerVector<T>] = {};
    rows.AddTo(sum, static_cast<const int4*>(p.y), vectors, first, share.end);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < share.end) ptx::st_no_allocate(to + first + 32 * u, Pack<T>(sum[u]));
  }
  if (p.row_scalars == nullptr || !share.first) return;
  const float scalar = rows.Scalar(shape, p);
  if (lane < shape.topk) arena.Scalars(epoch, source, arena.rank, token)[lane] = scalar;
}

template <typename T>
__device__ void Send(const MoEShape& shape, const Arena& arena, const Team& team,
                     const CombineParams& p, uint32_t epoch) {
  const int peers = shape.num_ranks - 1, per_chunk = arena.layout.tokens_per_chunk;
  const int64_t num_tasks = CeilDiv(p.num_tokens, per_chunk) * peers;
  const Share share(NumVectors(shape), team.warp, kWarpsPerSum);
  Tasks tasks(team, &arena.Header()->send_tasks);
  while (tasks.current() < num_tasks) {
    // Every rank starts with another peer, so that no link is everybody's first.
    const int source =
        (arena.rank + 1 + static_cast<int>(tasks.current() % peers)) % shape.num_ranks;
    const int64_t chunk = tasks.current() / peers, first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    tasks.Ask();
    for (int64_t token = first + team.warp / kWarpsPerSum; token < last;
         token += kTeamWarps / kWarpsPerSum)
      SendToken<T>(shape, arena, p, share, epoch, source, token);
    tasks.Advance();
    if (team.thread == 0) ptx::st_release_sys(arena.ChunkFlag(source, arena.rank, chunk), epoch);
  }
}

// Adds up one token; lane k holds the k-th of the ranks that have a part of it, ascending.
template <typename T>
__device__ void ReceiveToken(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                             const Share& share, uint32_t epoch, int64_t token, int rank,
                             const TokenRows<T>& own) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const int num_sums = __popc(__ballot_sync(kAllLanes, rank >= 0));
  int4* out = static_cast<int4*>(p.out) + token * vectors;
  for (int begin = share.begin; begin < share.end; begin += 32 * kUnroll) {
    const int first = begin + lane;
    Sum<T> total[kUnroll][kPerVector<T>] = {};
    for (int i = 0; i < num_sums; ++i) {
      const int from = __shfl_sync(kAllLanes, rank, i);
      // This rank's own sum is made on the spot, and rounded to T as the others' were to cross.
      if (from == arena.rank) {
        Sum<T> sum[kUnroll][kPerVector<T>] = {};
        own.AddTo(sum, static_cast<const int4*>(p.y), vectors, first, share.end);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) AddScaled<T>(total[u], Pack<T>(sum[u]), 1);
        continue;
      }
      // Two at a time, to have more loads in flight.
      const int next = i + 1 < num_sums ? __shfl_sync(kAllLanes, rank, i + 1) : arena.rank;
      const bool two = next != arena.rank;
      const int4* row_a = arena.Row(epoch, arena.rank, from, token);
      const int4* row_b = arena.Row(epoch, arena.rank, two ? next : from, token);
      int4 a[kUnroll] = {}, b[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < share.end) {
          a[u] = ptx::ld_no_allocate(row_a + first + 32 * u);
          if (two) b[u] = ptx::ld_no_allocate(row_b + first + 32 * u);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        AddScaled<T>(total[u], a[u], 1);
        if (two) AddScaled<T>(total[u], b[u], 1);
      }
      i += two;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < share.end) ptx::st_no_allocate(out + first + 32 * u, Pack<T>(total[u]));
  }
  if (p.row_scalars == nullptr || !share.first) return;
  float scalar = own.Scalar(shape, p);
  for (int i = 0; i < num_sums; ++i) {
    const int from = __shfl_sync(kAllLanes, rank, i);
    if (from != arena.rank && lane < shape.topk)
      scalar += arena.Scalars(epoch, arena.rank, from, token)[lane];
  }
  if (lane < shape.topk) p.token_scalars[token * shape.topk + lane] = scalar;
}

// A few tokens at a time. A thread per peer waits for the chunk that they are in.
template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const Team& team,
                        const CombineParams& p, uint32_t epoch) {
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
    const TokenRows<T> own(shape, p, arena.rank, in_range ? token : first);
    bool arrived = true;
    for (int peer = team.thread; peer < shape.num_ranks; peer += kTeamThreads)
      if (peer != arena.rank)
        arrived &=
            Wait(arena, arena.ChunkFlag(arena.rank, peer, chunk), epoch, peer, Phase::kCombine);
    arrived = tasks.Advance(arrived);
    if (!in_range) continue;
    if (arrived)
      ReceiveToken<T>(shape, arena, p, share, epoch, token, rank, own);
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
  const Team team;
  const uint32_t epoch = EnterEpoch(arena);
  if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p);
  } else {
    if (static_cast<int>(blockIdx.x) < senders) Send<T>(shape, arena, team, p, epoch);
    Receive<T>(shape, arena, team, p, epoch);
  }
  LeaveEpoch(arena, epoch, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params,
                          Blocks blocks, cudaStream_t stream) {
  VisitDType(shape.dtype, [&](auto* t) {
    CombineKernel<std::remove_pointer_t<decltype(t)>>
        <<<blocks.total, kThreads, 0, stream>>>(shape, arena, params, blocks.senders);
  });
  return cudaGetLastError();
}

cudaError_t LoadCombine(const MoEShape& shape) {
  cudaFuncAttributes attributes;
  return VisitDType(shape.dtype, [&](auto* t) {
    return cudaFuncGetAttributes(&attributes, CombineKernel<std::remove_pointer_t<decltype(t)>>);
  });
}

}  // namespace jax_ep::cuda
