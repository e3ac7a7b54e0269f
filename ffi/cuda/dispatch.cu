// Dispatch: sending blocks write each token once into its place in every destination's window, and
// raise a flag there per chunk of tokens; receiving blocks expand what arrived, and this rank's own
// tokens, into their output rows. Where a token lands does not depend on routing tables, so senders
// of a fresh dispatch start while routing still runs.
//
// Sending blocks come first in the grid and wait for nobody, so receivers always have something to
// wait for that is running or done. They help to receive once all is sent.
#include "cuda/bulk.cuh"
#include "cuda/ops.h"
#include "cuda/route.cuh"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;

__device__ int NumVectors(const MoEShape& shape) {
  return static_cast<int>(shape.row_bytes() / 16);
}

// The ranks that a token goes to, one in each of some lanes of the warp and -1 in the others.
__device__ int DestinationOfLane(const MoEShape& shape, const DispatchParams& p,
                                 const int32_t* topk_ids, int64_t token) {
  const int lane = threadIdx.x % 32;
  if (topk_ids == nullptr)
    return lane < shape.topk ? p.tables.send_ranks[token * shape.topk + lane] : -1;
  const int id = lane < shape.topk ? topk_ids[token * shape.topk + lane] : -1;
  const int rank = IsExpert(shape, id) ? id / shape.local_experts() : -1;
  const unsigned same = __match_any_sync(kAllLanes, rank);
  return lane == __ffs(same) - 1 ? rank : -1;
}

// One warp copies a token into the windows of all its destinations, reading it once.
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                          const int32_t* topk_ids, uint32_t epoch, int64_t token,
                          RowBuffer& buffer) {
  const int lane = threadIdx.x % 32;
  const int rank = DestinationOfLane(shape, p, topk_ids, token);
  const bool sends = rank >= 0 && rank != arena.rank;
  const unsigned lanes = __ballot_sync(kAllLanes, sends);
  if (lanes == 0) return;
  buffer.Copy(sends ? arena.Row(epoch, rank, arena.rank, token) : nullptr,
              static_cast<const int4*>(p.x) + token * NumVectors(shape), NumVectors(shape));
  if (p.weights == nullptr) return;
  const float weight = lane < shape.topk ? p.weights[token * shape.topk + lane] : 0.0f;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int peer = __shfl_sync(kAllLanes, rank, __ffs(rest) - 1);
    if (lane < shape.topk) arena.Scalars(epoch, peer, arena.rank, token)[lane] = weight;
  }
}

// Tells all peers that a chunk has arrived.
__device__ void Announce(const Arena& arena, const Team& team, uint32_t epoch, int64_t chunk) {
  for (int peer = team.thread; peer < arena.layout.num_ranks; peer += kTeamThreads)
    if (peer != arena.rank) ptx::st_release_sys(arena.ChunkFlag(peer, arena.rank, chunk), epoch);
}

// A chunk is announced only once the next one is under way, so that nobody waits for its stores.
__device__ void Send(const MoEShape& shape, const Arena& arena, const Team& team,
                     const DispatchParams& p, const int32_t* topk_ids, uint32_t epoch,
                     RowBuffer& buffer) {
  const int per_chunk = arena.layout.tokens_per_chunk;
  const int64_t chunks = CeilDiv(p.num_tokens, per_chunk);
  int64_t unannounced = -1;
  Tasks tasks(team, &arena.Header()->send_tasks);
  while (tasks.current() < chunks) {
    const int64_t chunk = tasks.current(), first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    tasks.Ask();
    for (int64_t token = first + team.warp; token < last; token += kTeamWarps)
      SendToken(shape, arena, p, topk_ids, epoch, token, buffer);
    buffer.WaitForEarlierStores();
    tasks.Advance();
    if (unannounced >= 0) Announce(arena, team, epoch, unannounced);
    unannounced = chunk;
  }
  buffer.WaitForStores();
  team.Sync();
  if (unannounced >= 0) Announce(arena, team, epoch, unannounced);
}

// The gradient of combine, for one output row: the arrived gradient times the row's weight, and its
// dot product with the row of y. Lanes and vectors are added in fixed order.
template <typename T>
__device__ void ScaleRow(const DispatchParams& p, const int4* from, int vectors, int64_t row) {
  const int4* y = static_cast<const int4*>(p.y) + row * vectors;
  int4* to = static_cast<int4*>(p.tokens) + row * vectors;
  const Sum<T> weight = p.row_weights[row];
  Sum<T> dot = 0;
  constexpr int kUnroll = 7;
  for (int first = threadIdx.x % 32; first < vectors; first += 32 * kUnroll) {
    int4 g[kUnroll], rows[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < vectors) {
        g[u] = ptx::ld_no_allocate(from + first + 32 * u);
        rows[u] = ptx::ld_nc_no_allocate(y + first + 32 * u);
      }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + 32 * u >= vectors) continue;
      Sum<T> gradient[kPerVector<T>], of_y[kPerVector<T>], scaled[kPerVector<T>];
      Vector<T>::Unpack(g[u], gradient);
      Vector<T>::Unpack(rows[u], of_y);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) {
        dot += gradient[i] * of_y[i];
        scaled[i] = weight * gradient[i];
      }
      ptx::st_no_allocate(to + first + 32 * u, Pack<T>(scaled));
    }
  }
  for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
  if (threadIdx.x % 32 == 0) p.row_scalars[row] = static_cast<float>(dot);
}

// Stores the weights that came with a token beside its rows.
__device__ void PlaceWeights(const MoEShape& shape, const DispatchParams& p, const float* weights,
                             int row, unsigned lanes) {
  const int lane = threadIdx.x % 32;
  if (p.weights == nullptr || lanes == 0) return;
  if (shape.layout == OutputLayout::kRankMajor) {
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    if (lane < shape.topk) p.row_scalars[only_row * shape.topk + lane] = weights[lane];
  } else if (row >= 0) {
    p.row_scalars[row] = weights[lane];
  }
}

// What a receiving warp reads of one token.
struct TokenSource {
  const int4* row;
  const float* weights;

  __device__ TokenSource(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                         uint32_t epoch, int source, int64_t token) {
    if (source == arena.rank) {
      row = static_cast<const int4*>(p.x) + token * NumVectors(shape);
      weights = p.weights + token * shape.topk;
    } else {
      row = arena.Row(epoch, arena.rank, source, token);
      weights = arena.Scalars(epoch, arena.rank, source, token);
    }
  }
};

// One warp gives the rows of a token what they are due, NaN if it never came; lane k holds the k-th
// row. T is void where rows are copied as bytes, and their element type where they are scaled.
template <typename T>
__device__ void ReceiveToken(const MoEShape& shape, const DispatchParams& p,
                             const TokenSource& from, int row, bool arrived, RowBuffer& buffer) {
  const int vectors = NumVectors(shape);
  int4* tokens = static_cast<int4*>(p.tokens);
  const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
  if (!arrived) {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
      FillRow(tokens + int64_t{__shfl_sync(kAllLanes, row, __ffs(rest) - 1)} * vectors, vectors,
              NaNs(shape.dtype));
  } else if constexpr (std::is_void_v<T>) {
    if (lanes != 0)
      buffer.Copy(row >= 0 ? tokens + int64_t{row} * vectors : nullptr, from.row, vectors);
    PlaceWeights(shape, p, from.weights, row, lanes);
  } else {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
      ScaleRow<T>(p, from.row, vectors, __shfl_sync(kAllLanes, row, __ffs(rest) - 1));
  }
}

// A chunk of one source at a time, a warp per token. One thread waits for all: flags polled by
// every warp would slow down what they wait for.
template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const Team& team,
                        const DispatchParams& p, uint32_t epoch, RowBuffer& buffer) {
  const int lane = threadIdx.x % 32, per_token = shape.rows_per_token(), ranks = shape.num_ranks,
            per_chunk = arena.layout.tokens_per_chunk;
  const int64_t num_tasks = CeilDiv(p.num_tokens, per_chunk) * ranks;
  Tasks tasks(team, &arena.Header()->receive_tasks);
  while (tasks.current() < num_tasks) {
    // Own tokens are there from the start: they fill the time until others arrive.
    const int source = (arena.rank + static_cast<int>(tasks.current() % ranks)) % ranks;
    const int64_t chunk = tasks.current() / ranks, first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    const auto row_of = [&](int64_t token) {
      return token < last && lane < per_token
                 ? p.tables.recv_rows[(source * p.num_tokens + token) * per_token + lane]
                 : static_cast<int32_t>(kNotMine);
    };
    tasks.Ask();
    // Fetched before the wait, so that its latency passes meanwhile.
    int row = row_of(first + team.warp);
    bool arrived = true;
    if (team.thread == 0 && source != arena.rank)
      arrived =
          Wait(arena, arena.ChunkFlag(arena.rank, source, chunk), epoch, source, Phase::kDispatch);
    arrived = tasks.Advance(arrived);
    ptx::fence_proxy_async();  // what arrived is read by bulk copies
    for (int64_t token = first + team.warp; token < last; token += kTeamWarps) {
      ReceiveToken<T>(shape, p, TokenSource(shape, arena, p, epoch, source, token), row, arrived,
                      buffer);
      row = row_of(token + kTeamWarps);
    }
  }
}

// Fills rows [begin, end) with what `buffer` is full of, a warp per row, and what belongs to them
// in row_scalars.
__device__ void FillRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end,
                         int block, int blocks, const RowBuffer& buffer, float scalar) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32,
            per_row = p.y != nullptr ? 1 : shape.weights_per_row();
  const int64_t warp = static_cast<int64_t>(block) * kWarps + threadIdx.x / 32;
  for (int64_t row = begin + warp; row < end; row += static_cast<int64_t>(blocks) * kWarps) {
    if (lane == 0) buffer.Store(static_cast<int4*>(p.tokens) + row * vectors, vectors);
    if (p.row_scalars == nullptr) continue;
    for (int i = lane; i < per_row; i += 32) p.row_scalars[row * per_row + i] = scalar;
  }
}

// Rows that hold no token: between the end of each group and the start of the next, and at the very
// end.
__device__ void FillPadding(const MoEShape& shape, const DispatchParams& p, int block, int blocks,
                            RowBuffer& buffer) {
  const int groups = shape.num_row_groups();
  buffer.Fill(make_int4(0, 0, 0, 0), NumVectors(shape));
  if (shape.layout == OutputLayout::kFlat && shape.expert_alignment > 1)
    for (int group = block; group < groups; group += blocks)
      FillRows(shape, p, p.tables.group_offsets[group] + p.tables.group_counts[group],
               p.tables.group_offsets[group + 1], 0, 1, buffer, 0.0f);
  FillRows(shape, p, p.tables.group_offsets[groups], shape.capacity, block, blocks, buffer, 0.0f);
}

// Every rank knows, so nobody waits for what was sent.
__device__ void FillNaN(const MoEShape& shape, const DispatchParams& p, RowBuffer& buffer) {
  buffer.Fill(NaNs(shape.dtype), NumVectors(shape));
  FillRows(shape, p, 0, shape.capacity, blockIdx.x, gridDim.x, buffer, __int_as_float(0x7fc00000));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    DispatchKernel(MoEShape shape, Arena arena, DispatchParams p, const int32_t* topk_ids,
                   int senders) {
  extern __shared__ __align__(128) std::byte shared[];
  const Team team;
  RowBuffer buffer(shared, kWarps);
  const uint32_t epoch = EnterEpoch(arena);
  const int block = static_cast<int>(blockIdx.x) - senders,
            blocks = static_cast<int>(gridDim.x) - senders;
  if (block < 0) Send(shape, arena, team, p, topk_ids, epoch, buffer);
  // From here on the tables are read, which a fresh dispatch gets from the kernel before.
  if (topk_ids != nullptr) ptx::griddepcontrol_wait();
  if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p, buffer);
  } else {
    if (block >= 0) FillPadding(shape, p, block, blocks, buffer);
    Receive<T>(shape, arena, team, p, epoch, buffer);
  }
  buffer.WaitForStores();
  LeaveEpoch(arena, epoch, Phase::kDispatch);
}

}  // namespace

cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           const int32_t* topk_ids, Blocks blocks, cudaStream_t stream) {
  const auto launch = [&](auto* kernel) {
    if (topk_ids != nullptr)
      return LaunchOverlapping(kernel, blocks.total, kThreads, RowBuffer::SharedBytes(kWarps),
                               stream, shape, arena, params, topk_ids, blocks.senders);
    kernel<<<blocks.total, kThreads, RowBuffer::SharedBytes(kWarps), stream>>>(
        shape, arena, params, topk_ids, blocks.senders);
    return cudaGetLastError();
  };
  if (params.y == nullptr) return launch(DispatchKernel<void>);
  return VisitDType(shape.dtype, [&](auto* t) {
    return launch(DispatchKernel<std::remove_pointer_t<decltype(t)>>);
  });
}

cudaError_t LoadDispatch(const MoEShape& shape) {
  const size_t bytes = RowBuffer::SharedBytes(kWarps);
  const cudaError_t error = AllowSharedMemory(DispatchKernel<void>, bytes);
  if (error != cudaSuccess) return error;
  return VisitDType(shape.dtype, [&](auto* t) {
    return AllowSharedMemory(DispatchKernel<std::remove_pointer_t<decltype(t)>>, bytes);
  });
}

}  // namespace jax_ep::cuda
