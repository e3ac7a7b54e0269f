// Dispatch: sending blocks write each token once into its place in every destination's window, and
// raise a flag there per chunk of tokens; receiving blocks expand what arrived, and this rank's own
// tokens, into their output rows. Where a token lands does not depend on routing tables, so senders
// of a fresh dispatch start while routing still runs.
//
// Sending blocks come first in the grid and wait for nobody, so receivers always have something to
// wait for that is running or done. They help to receive once all is sent.
#include "cuda/ops.h"
#include "cuda/route.cuh"
#include "cuda/rows.cuh"
#include "cuda/terms.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;

// What is in row_scalars beside each row: its weights, or one dot product.
__device__ int ScalarsPerRow(const MoEShape& shape, const DispatchParams& p) {
  return p.y != nullptr ? 1 : shape.weights_per_row();
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

// Stores the weights that came with a token beside its rows.
__device__ void PlaceWeights(const MoEShape& shape, const DispatchParams& p, const float* weights,
                             int row) {
  const int lane = threadIdx.x % 32;
  if (p.weights == nullptr) return;
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

// NaN for the rows of a token that never came, and for what belongs to them in row_scalars; lane k
// holds the k-th.
__device__ void PoisonRows(const MoEShape& shape, const DispatchParams& p, int row,
                           unsigned lanes) {
  const int vectors = NumVectors(shape);
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
    FillRow(static_cast<int4*>(p.tokens) +
                int64_t{__shfl_sync(kAllLanes, row, __ffs(rest) - 1)} * vectors,
            vectors, NaNs(shape.dtype));
  if (p.row_scalars == nullptr || row < 0) return;
  const int per_row = ScalarsPerRow(shape, p);
  for (int i = 0; i < per_row; ++i)
    p.row_scalars[int64_t{row} * per_row + i] = __int_as_float(0x7fc00000);
}

// Gives arrived tokens to their rows: copies, a warp per token.
class Expander {
 public:
  __device__ Expander(const Team& /*team*/, const WarpMemory& /*memory*/, RowBuffer& buffer)
      : buffer_(buffer) {}

  static __device__ int MaxTokens(int /*per_token*/) { return kTeamWarps; }

  __device__ void Receive(const MoEShape& shape, const Team& /*team*/, const DispatchParams& p,
                          const TokenSource& from, int row, bool arrived) {
    const int vectors = NumVectors(shape);
    const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
    if (lanes == 0) return;
    if (!arrived) return PoisonRows(shape, p, row, lanes);
    buffer_.Copy(row >= 0 ? static_cast<int4*>(p.tokens) + int64_t{row} * vectors : nullptr,
                 from.row, vectors);
    PlaceWeights(shape, p, from.weights, row);
  }

 private:
  RowBuffer& buffer_;
};

// The gradient of combine: each row gets its token's gradient times its weight, and the dot product
// of that gradient with the row of y. The team's warps share the columns of all tokens.
template <typename T>
class Scaler {
 public:
  __device__ Scaler(const Team& team, const WarpMemory& memory, RowBuffer& buffer)
      : memory_{memory, team.warp}, ring_(memory) {
    buffer.WaitForStores();
    team.Sync();
  }

  // A term for each row, and one for the gradient.
  static __device__ int MaxTokens(int per_token) { return TermList::MaxTokens(per_token + 1); }

  __device__ void Receive(const MoEShape& shape, const Team& team, const DispatchParams& p,
                          const TokenSource& from, int row, bool arrived) {
    const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
    const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
    if (!arrived) return PoisonRows(shape, p, row, lanes);
    TermList& list = memory_.list();
    const int count = __popc(lanes);
    Term* terms = list.Reserve(team, count > 0 ? count + 1 : 0, count > 0);
    if (count > 0 && lane == 0) terms[0] = {from.row, 0.0f, kGradient};
    if (row >= 0)
      terms[1 + __popc(lanes & ((1u << lane) - 1))] = {
          static_cast<const int4*>(p.y) + int64_t{row} * vectors, p.row_weights[row], row};
    team.Sync();
    for (int stretch = 0; stretch < Columns::NumStretches(vectors); ++stretch)
      ScaleColumns(p, vectors, list, Columns(team, vectors, stretch), stretch == 0);
    team.Sync();
    for (int i = team.thread; i < list.size(); i += kTeamThreads)
      if (list.terms[i].tag != kGradient) p.row_scalars[list.terms[i].tag] = Dot(i);
  }

 private:
  // The tag of a term is its row.
  static constexpr int32_t kGradient = -1;

  // One warp's columns. Leaves its part of each row's dot product.
  __device__ void ScaleColumns(const DispatchParams& p, int vectors, const TermList& list,
                               const Columns& columns, bool first) {
    constexpr int kPerLane = PieceRing::kPerLane;
    const int lane = threadIdx.x % 32;
    float* dots = memory_.numbers(memory_.warp_of_team);
    int4 gradient[kPerLane] = {};
    TermStream stream(list, columns, ring_);
    for (int i = 0; i < list.size(); ++i) {
      const Term& term = list.terms[i];
      int4 v[kPerLane];
      stream.Take(v);
      Sum<T> dot = 0;
      if (term.tag == kGradient) {
#pragma unroll
        for (int u = 0; u < kPerLane; ++u) gradient[u] = v[u];
      } else {
        int4* to = static_cast<int4*>(p.tokens) + int64_t{term.tag} * vectors + columns.begin;
#pragma unroll
        for (int u = 0; u < kPerLane; ++u)
          if (lane + 32 * u < columns.size())
            ptx::st_no_allocate(to + lane + 32 * u, Scale(gradient[u], v[u], term.weight, dot));
      }
      for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
      if (lane == 0) dots[i] = (first ? 0.0f : dots[i]) + static_cast<float>(dot);
    }
  }

  static __device__ __forceinline__ int4 Scale(const int4& gradient, const int4& of_y,
                                               Sum<T> weight, Sum<T>& dot) {
    Sum<T> g[kPerVector<T>], y[kPerVector<T>], scaled[kPerVector<T>];
    Vector<T>::Unpack(gradient, g);
    Vector<T>::Unpack(of_y, y);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) {
      dot += g[i] * y[i];
      scaled[i] = weight * g[i];
    }
    return Pack<T>(scaled);
  }

  // All warps' parts, in order.
  __device__ float Dot(int term) const {
    float dot = 0;
    for (int warp = 0; warp < kTeamWarps; ++warp) dot += memory_.numbers(warp)[term];
    return dot;
  }

  const TeamMemory memory_;
  PieceRing ring_;
};

// A few tokens of one source at a time, a warp for each. One thread waits for all: flags polled by
// every warp would slow down what they wait for.
template <typename Receiver>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const Team& team,
                        const DispatchParams& p, uint32_t epoch, Receiver& receiver) {
  const int lane = threadIdx.x % 32, per_token = shape.rows_per_token(), ranks = shape.num_ranks,
            per_chunk = arena.layout.tokens_per_chunk, at_a_time = Receiver::MaxTokens(per_token);
  const int64_t num_tasks = CeilDiv(p.num_tokens, per_chunk) * ranks;
  Tasks tasks(team, &arena.Header()->receive_tasks);
  while (tasks.current() < num_tasks) {
    // Own tokens are there from the start: they fill the time until others arrive.
    const int source = (arena.rank + static_cast<int>(tasks.current() % ranks)) % ranks;
    const int64_t chunk = tasks.current() / ranks, first = chunk * per_chunk,
                  last = min(first + per_chunk, p.num_tokens);
    const auto row_of = [&](int64_t begin) {
      const int64_t token = begin + team.warp;
      return team.warp < at_a_time && token < last && lane < per_token
                 ? p.tables.recv_rows[(source * p.num_tokens + token) * per_token + lane]
                 : static_cast<int32_t>(kNotMine);
    };
    tasks.Ask();
    // Fetched before the wait, so that its latency passes meanwhile.
    int row = row_of(first);
    bool arrived = true;
    if (team.thread == 0 && source != arena.rank)
      arrived =
          Wait(arena, arena.ChunkFlag(arena.rank, source, chunk), epoch, source, Phase::kDispatch);
    arrived = tasks.Advance(arrived);
    ptx::fence_proxy_async();  // what arrived is read by bulk copies
    for (int64_t begin = first; begin < last; begin += at_a_time) {
      const int64_t token = min(begin + team.warp, last - 1);
      receiver.Receive(shape, team, p, TokenSource(shape, arena, p, epoch, source, token), row,
                       arrived);
      row = row_of(begin + at_a_time);
    }
  }
}

// Fills rows [begin, end) with what `buffer` is full of, a warp per row, and what belongs to them
// in row_scalars.
__device__ void FillRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end,
                         int block, int blocks, const RowBuffer& buffer, float scalar) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32, per_row = ScalarsPerRow(shape, p);
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

// T is void where rows are copied, and their element type where they are scaled.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    DispatchKernel(MoEShape shape, Arena arena, DispatchParams p, const int32_t* topk_ids,
                   int senders) {
  const Team team;
  const WarpMemory memory(ptx::dynamic_shared());
  RowBuffer buffer(memory);
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
    using Receiver = std::conditional_t<std::is_void_v<T>, Expander, Scaler<T>>;
    Receiver receiver(team, memory, buffer);
    Receive(shape, arena, team, p, epoch, receiver);
  }
  buffer.WaitForStores();
  LeaveEpoch(arena, epoch, Phase::kDispatch);
}

}  // namespace

cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           const int32_t* topk_ids, Blocks blocks, cudaStream_t stream) {
  const Grid grid{blocks.total, kThreads, WarpMemory::SharedBytes(kWarps)};
  const auto launch = [&](auto* kernel) {
    return topk_ids != nullptr
               ? LaunchOverlapping(kernel, grid, stream, shape, arena, params, topk_ids,
                                   blocks.senders)
               : Launch(kernel, grid, stream, shape, arena, params, topk_ids, blocks.senders);
  };
  if (params.y == nullptr) return launch(DispatchKernel<void>);
  return VisitDType(shape.dtype, [&](auto* t) {
    return launch(DispatchKernel<std::remove_pointer_t<decltype(t)>>);
  });
}

cudaError_t LoadDispatch(const MoEShape& shape) {
  const size_t bytes = WarpMemory::SharedBytes(kWarps);
  const cudaError_t error = AllowSharedMemory(DispatchKernel<void>, bytes);
  if (error != cudaSuccess) return error;
  return VisitDType(shape.dtype, [&](auto* t) {
    return AllowSharedMemory(DispatchKernel<std::remove_pointer_t<decltype(t)>>, bytes);
  });
}

}  // namespace jax_ep::cuda
