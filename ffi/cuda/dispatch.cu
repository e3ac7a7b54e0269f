// Dispatch: sending blocks write each token once into its place in every destination's window, and
// raise a flag there per chunk of tokens; receiving blocks expand what arrived, and this rank's own
// tokens, into their output rows. Where a token lands does not depend on routing tables, so senders
// of a fresh dispatch start while routing still runs.
//
// Sending blocks come first in the grid and wait for nobody, so receivers always have something to
// wait for that is running or done. They help to receive once all is sent.
#include "cuda/dispatch.cuh"
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/route.cuh"
#include "cuda/rows.cuh"
#include "cuda/terms.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;

// Whether elements and scales of a quantised row are moved together, through the warp's buffer.
__device__ bool IsPacked(const MoEShape& shape, const DispatchParams& p) {
  return p.quant.block != 0 && p.scale_row_bytes(shape) % 16 == 0 &&
         RowBuffer::Fits(p.row_bytes(shape) + p.scale_row_bytes(shape));
}

// Puts a quantised row together in the buffer, the scales behind the elements as in a window. X is
// the type of elements that are quantised on the way, or void.
template <typename X>
__device__ void Assemble(const MoEShape& shape, const DispatchParams& p, const TokenSource& from,
                         RowBuffer& buffer) {
  if constexpr (!std::is_void_v<X>) {
    if (from.is_own)
      return buffer.Make([&](std::byte* row) {
        QuantRows to;
        to.count = 1;
        to.rows[0] = {row, row + shape.hidden_size};
        QuantiseRow(p.quant, reinterpret_cast<const X*>(from.row), shape.hidden_size, 0, 1, to);
      });
  }
  const int64_t row_bytes = p.row_bytes(shape), scale_bytes = p.scale_row_bytes(shape);
  if (from.is_own)
    buffer.Load(from.row, row_bytes, from.scales, scale_bytes);
  else
    buffer.Load(from.row, row_bytes + scale_bytes);
}

// One warp copies a token into the windows of all its destinations, reading it once. X is as above.
template <typename X>
__device__ void SendToken(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                          const int32_t* topk_ids, uint32_t epoch, int64_t token,
                          RowBuffer& buffer) {
  const int lane = threadIdx.x % 32;
  const int rank = DestinationOfLane(shape, topk_ids, EntryOfLane(shape, p, topk_ids, token));
  const bool sends = rank >= 0 && rank != arena.rank;
  const unsigned lanes = __ballot_sync(kAllLanes, sends);
  if (lanes == 0) return;
  int4* const window = sends ? arena.Row(epoch, rank, arena.rank, token) : nullptr;
  const TokenSource from(shape, arena, p, epoch, arena.rank, token);
  const float weight = WeightOfLane(shape, p, from);
  if (IsPacked(shape, p)) {
    Assemble<X>(shape, p, from, buffer);
    buffer.StorePart(window, 0, p.row_bytes(shape) + p.scale_row_bytes(shape));
  } else if constexpr (!std::is_void_v<X>) {
    QuantiseInto<X>(shape, p, from.row, 0, 1, lanes, reinterpret_cast<uint64_t>(window),
                    [&](uint64_t to) { return InWindow(shape, reinterpret_cast<int4*>(to)); });
  } else {
    buffer.Copy(window, from.row, NumRowVectors(shape, p));
    if (p.quant.block != 0)
      ForEachLane(lanes, rank, [&](int peer) {
        CopyScales(InWindow(shape, arena.Row(epoch, peer, arena.rank, token)).scales, from.scales,
                   p.scale_row_bytes(shape), lane, 32);
      });
  }
  SendWeights(shape, arena, p, epoch, token, lanes, rank, weight);
}

// Tells all peers that a chunk has arrived.
__device__ void Announce(const Arena& arena, const Team& team, uint32_t epoch, int64_t chunk) {
  for (int peer = team.thread; peer < arena.layout.num_ranks; peer += kTeamThreads)
    if (peer != arena.rank) ptx::st_release_sys(arena.ChunkFlag(peer, arena.rank, chunk), epoch);
}

// A chunk is announced only once the next one is under way, so that nobody waits for its stores.
template <typename X>
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
      SendToken<X>(shape, arena, p, topk_ids, epoch, token, buffer);
    buffer.WaitForEarlierStores();
    tasks.Advance();
    if (unannounced >= 0) Announce(arena, team, epoch, unannounced);
    unannounced = chunk;
  }
  buffer.WaitForStores();
  team.Sync();
  if (unannounced >= 0) Announce(arena, team, epoch, unannounced);
}

// Gives arrived tokens to their rows: copies, a warp per token. X as above: own tokens have not
// been quantised yet.
template <typename X>
class Expander {
 public:
  using Quantised = X;

  __device__ Expander(const Team& /*team*/, const WarpMemory& /*memory*/, RowBuffer& buffer)
      : buffer_(buffer) {}

  static __device__ int MaxTokens(int /*per_token*/) { return kTeamWarps; }

  __device__ void Receive(const MoEShape& shape, const Team& /*team*/, const DispatchParams& p,
                          const TokenSource& from, int row, bool arrived) {
    const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
    if (lanes == 0) return;
    if (!arrived) return PoisonRows(shape, p, row);
    const float weight = WeightOfLane(shape, p, from);
    if (IsPacked(shape, p)) {
      Assemble<X>(shape, p, from, buffer_);
      const QuantRow to = InOutput(shape, p, max(row, 0));
      buffer_.StorePart(row >= 0 ? to.elements : nullptr, 0, p.row_bytes(shape));
      buffer_.StorePart(row >= 0 ? to.scales : nullptr, p.row_bytes(shape),
                        p.scale_row_bytes(shape));
    } else if (!std::is_void_v<X> && from.is_own) {
      QuantiseInto<X>(shape, p, from.row, 0, 1, lanes, row,
                      [&](int32_t to) { return InOutput(shape, p, to); });
    } else {
      buffer_.Copy(row >= 0 ? OutputRow(shape, p, row) : nullptr, from.row,
                   NumRowVectors(shape, p));
      if (p.quant.block != 0)
        ForEachLane(lanes, row, [&](int64_t to) {
          CopyScales(InOutput(shape, p, to).scales, from.scales, p.scale_row_bytes(shape),
                     threadIdx.x % 32, 32);
        });
    }
    PlaceWeights(shape, p, weight, row);
  }

 private:
  RowBuffer& buffer_;
};

// The gradient of combine: each row gets its token's gradient times its weight, and the dot product
// of that gradient with the row of y. The team's warps share the columns of all tokens.
template <typename T>
class Scaler {
 public:
  using Quantised = void;

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
    if (!arrived) return PoisonRows(shape, p, row);
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

// Fills rows [begin, end) with what `buffer` is full of, a warp per row, and what belongs to them.
__device__ void FillRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end,
                         int block, int blocks, const RowBuffer& buffer, bool poison) {
  const int64_t warp = static_cast<int64_t>(block) * kWarps + threadIdx.x / 32;
  for (int64_t row = begin + warp; row < end; row += static_cast<int64_t>(blocks) * kWarps) {
    if (threadIdx.x % 32 == 0) buffer.Store(OutputRow(shape, p, row), NumRowVectors(shape, p));
    FillBesideRow(shape, p, row, poison);
  }
}

// Rows that hold no token: between the end of each group and the start of the next, and at the very
// end.
__device__ void FillPadding(const MoEShape& shape, const DispatchParams& p, int block, int blocks,
                            RowBuffer& buffer) {
  const int groups = shape.num_row_groups();
  buffer.Fill(RowFilling(shape, p, false), NumRowVectors(shape, p));
  if (FillsGaps(shape, p))
    for (int group = block; group < groups; group += blocks)
      FillRows(shape, p, p.tables.group_offsets[group] + p.tables.group_counts[group],
               p.tables.group_offsets[group + 1], 0, 1, buffer, false);
  FillRows(shape, p, p.tables.group_offsets[groups], shape.capacity, block, blocks, buffer, false);
}

// Every rank knows, so nobody waits for what was sent.
__device__ void FillNaN(const MoEShape& shape, const DispatchParams& p, RowBuffer& buffer) {
  buffer.Fill(RowFilling(shape, p, true), NumRowVectors(shape, p));
  FillRows(shape, p, 0, shape.capacity, blockIdx.x, gridDim.x, buffer, true);
}

template <typename Receiver>
__global__ void __launch_bounds__(kThreads, 1)
    DispatchKernel(MoEShape shape, Arena arena, DispatchParams p, const int32_t* topk_ids,
                   int senders) {
  const Team team;
  const WarpMemory memory(ptx::dynamic_shared());
  RowBuffer buffer(memory);
  const Request request(arena);
  if (request.is_refused) {
    if (topk_ids != nullptr) ptx::griddepcontrol_wait();
    return request.LeaveRefused(arena);
  }
  const uint32_t epoch = EnterEpoch(arena);
  const int block = static_cast<int>(blockIdx.x) - senders,
            blocks = static_cast<int>(gridDim.x) - senders;
  if (block < 0 && arena.sends())
    Send<typename Receiver::Quantised>(shape, arena, team, p, topk_ids, epoch, buffer);
  // From here on the tables are read, which a fresh dispatch gets from the kernel before.
  if (topk_ids != nullptr) ptx::griddepcontrol_wait();
  if (!arena.receives()) {
  } else if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p, buffer);
  } else {
    if (block >= 0) FillPadding(shape, p, block, blocks, buffer);
    Receiver receiver(team, memory, buffer);
    Receive(shape, arena, team, p, epoch, receiver);
  }
  buffer.WaitForStores();
  LeaveEpoch(arena, request, epoch, Phase::kDispatch);
}

// Calls `visit` with the kernel for what is asked for.
template <typename F>
cudaError_t VisitKernel(const MoEShape& shape, bool scales, bool quantises, const F& visit) {
  if (!scales && !quantises) return visit(DispatchKernel<Expander<void>>);
  return VisitDType(shape.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return scales ? visit(DispatchKernel<Scaler<T>>) : visit(DispatchKernel<Expander<T>>);
  });
}

}  // namespace

cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           const int32_t* topk_ids, Blocks blocks, cudaStream_t stream) {
  const Grid grid{blocks.of(arena.half), kThreads, WarpMemory::SharedBytes(kWarps)};
  return VisitKernel(shape, params.y != nullptr, params.quantises(), [&](auto* kernel) {
    return topk_ids != nullptr
               ? LaunchOverlapping(kernel, grid, stream, shape, arena, params, topk_ids,
                                   blocks.senders)
               : Launch(kernel, grid, stream, shape, arena, params, topk_ids, blocks.senders);
  });
}

cudaError_t LoadDispatch(const MoEShape& shape) {
  const auto allow = [](auto* kernel) {
    return AllowSharedMemory(kernel, WarpMemory::SharedBytes(kWarps));
  };
  cudaError_t error = VisitKernel(shape, false, false, allow);
  if (error == cudaSuccess) error = VisitKernel(shape, true, false, allow);
  return error != cudaSuccess ? error : VisitKernel(shape, false, true, allow);
}

}  // namespace jax_ep::cuda
