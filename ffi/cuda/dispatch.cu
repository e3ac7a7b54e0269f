// Dispatch: sending blocks write each token once into a fixed slot of every destination's window;
// receiving blocks expand arrived slots, and this rank's own tokens, into their output rows.
//
// Sending blocks come first in the grid and wait for nobody, so receivers always have something to
// wait for that is running or done.
#include "cuda/ops.h"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
// Slots that a block sends before it fences once and raises the flags of their chunks; its warps
// share them.
constexpr int kSlotsPerSend = 16;
constexpr int kWarpsPerRow = kWarps / kSlotsPerSend;

__device__ int NumVectors(const MoEShape& shape) {
  return static_cast<int>(shape.row_bytes() / 16);
}

__device__ void CopyVectors(int4* to, const int4* from, int begin, int end) {
  for (int first = begin + threadIdx.x % 32; first < end; first += 32 * kUnroll) {
    int4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < end) v[u] = ptx::ld_nc_no_allocate(from + first + 32 * u);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < end) ptx::st_no_allocate(to + first + 32 * u, v[u]);
  }
}

// Slots for one destination, as one warp of the block that sends them sees it.
struct SendTask {
  int peer;
  int first;  // slot of the block
  int slot;   // of this warp
  int count;  // slots of the destination
  int token;  // in `slot`, if that is less than `count`

  __device__ SendTask(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                      int task) {
    const int peers = shape.num_ranks - 1;
    // Every rank starts with another peer, so that no link is everybody's first.
    peer = (arena.rank + 1 + static_cast<int>(task % peers)) % shape.num_ranks;
    first = task / peers * kSlotsPerSend;
    slot = first + threadIdx.x / 32 / kWarpsPerRow;
    count = p.tables.send_counts[peer];
    token = slot < count ? p.tables.send_tokens[peer * p.num_tokens + slot] : -1;
  }
};

__device__ void Send(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                     uint32_t epoch, int senders) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32,
            part = threadIdx.x / 32 % kWarpsPerRow;
  const int vectors_per_part = static_cast<int>(CeilDiv(vectors, kWarpsPerRow));
  const int begin = part * vectors_per_part, end = min(begin + vectors_per_part, vectors);
  const int tasks = static_cast<int>(CeilDiv(p.num_tokens, kSlotsPerSend)) * (shape.num_ranks - 1);
  if (blockIdx.x >= tasks) return;
  SendTask next(shape, arena, p, blockIdx.x);
  for (int task = blockIdx.x; task < tasks; task += senders) {
    const SendTask now = next;
    // Looked up early: its latency passes while these slots are copied.
    if (task + senders < tasks) next = SendTask(shape, arena, p, task + senders);
    if (now.first >= now.count) continue;
    if (now.slot < now.count) {
      CopyVectors(arena.Row(epoch, now.peer, arena.rank, now.slot),
                  static_cast<const int4*>(p.x) + int64_t{now.token} * vectors, begin, end);
      if (p.weights != nullptr && part == 0 && lane < shape.topk)
        arena.Scalars(epoch, now.peer, arena.rank, now.slot)[lane] =
            p.weights[int64_t{now.token} * shape.topk + lane];
    }
    __syncthreads();
    const int chunk = now.first + threadIdx.x * kSlotsPerChunk;
    if (threadIdx.x < kSlotsPerSend / kSlotsPerChunk && chunk < now.count) {
      ptx::fence_acq_rel_sys();
      ptx::st_release_sys(arena.SlotFlag(now.peer, arena.rank, chunk), epoch);
    }
  }
}

// Copies one arrived row to up to 32 output rows; lane k of the warp holds the k-th.
__device__ void ExpandRow(int4* tokens, const int4* from, int vectors, int row, unsigned lanes) {
  for (int begin = 0; begin < vectors; begin += 32 * kUnroll) {
    const int first = begin + threadIdx.x % 32;
    int4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < vectors) v[u] = ptx::ld_no_allocate(from + first + 32 * u);
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      int4* to =
          tokens + static_cast<int64_t>(__shfl_sync(kAllLanes, row, __ffs(rest) - 1)) * vectors;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < vectors) ptx::st_no_allocate(to + first + 32 * u, v[u]);
    }
  }
}

// The gradient of combine, for one output row: the arrived gradient times the row's weight, and its
// dot product with the row of y. Lanes and vectors are added in fixed order.
template <typename T>
__device__ void ScaleRow(const DispatchParams& p, const int4* from, int vectors, int64_t row) {
  const int4* y = static_cast<const int4*>(p.y) + row * vectors;
  int4* to = static_cast<int4*>(p.tokens) + row * vectors;
  const Sum<T> weight = p.row_weights[row];
  Sum<T> dot = 0;
  constexpr int kUnroll = 2;  // two rows are read
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
      Sum<T> scaled[kPerVector<T>] = {};
      AddScaled<T>(scaled, g[u], weight);
      ptx::st_no_allocate(to + first + 32 * u, Pack<T>(scaled));
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i)
        dot += Load(reinterpret_cast<const T*>(&g[u])[i]) *
               Load(reinterpret_cast<const T*>(&rows[u])[i]);
    }
  }
  for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
  if (threadIdx.x % 32 == 0) p.row_scalars[row] = static_cast<float>(dot);
}

// Stores the weights that came with a slot beside its rows.
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

// What a receiving warp reads for one slot.
struct SlotSource {
  const int4* row;
  const float* weights;

  __device__ SlotSource(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                        uint32_t epoch, int source, int64_t slot) {
    if (source == arena.rank) {
      const int64_t token = p.tables.send_tokens[source * p.num_tokens + slot];
      row = static_cast<const int4*>(p.x) + token * NumVectors(shape);
      weights = p.weights + token * shape.topk;
    } else {
      row = arena.Row(epoch, arena.rank, source, slot);
      weights = arena.Scalars(epoch, arena.rank, source, slot);
    }
  }
};

// One warp gives the rows of a slot what they are due, NaN if it never came. T is void where rows
// are copied as bytes, and their element type where they are scaled.
template <typename T>
__device__ void ReceiveSlot(const MoEShape& shape, const DispatchParams& p, const SlotSource& from,
                            int row, bool arrived) {
  const int vectors = NumVectors(shape);
  int4* tokens = static_cast<int4*>(p.tokens);
  const unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
  if (!arrived) {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
      FillRow(tokens + int64_t{__shfl_sync(kAllLanes, row, __ffs(rest) - 1)} * vectors, vectors,
              NaNs(shape.dtype));
  } else if constexpr (std::is_void_v<T>) {
    ExpandRow(tokens, from.row, vectors, row, lanes);
    PlaceWeights(shape, p, from.weights, row, lanes);
  } else {
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
      ScaleRow<T>(p, from.row, vectors, __shfl_sync(kAllLanes, row, __ffs(rest) - 1));
  }
}

// One (source, kWarps slots) at a time, a warp per slot. One thread per chunk waits for all: flags
// polled by every warp would slow down what they wait for.
template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                        uint32_t epoch, int block, int blocks) {
  __shared__ bool arrived[kWarps / kSlotsPerChunk];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, per_slot = shape.rows_per_slot();
  const int64_t tasks_per_source = CeilDiv(p.num_tokens, kWarps);
  for (int64_t task = block; task < tasks_per_source * shape.num_ranks; task += blocks) {
    // Own tokens are there from the start: they fill the time until others arrive.
    const int source = (arena.rank + static_cast<int>(task % shape.num_ranks)) % shape.num_ranks;
    const int64_t first = task / shape.num_ranks * kWarps, slot = first + warp;
    const int64_t count = p.tables.recv_counts[source];
    if (first >= count) continue;
    // Fetched before the wait, so that its latency passes meanwhile.
    const int32_t* rows = p.tables.recv_rows + (source * p.num_tokens + slot) * per_slot;
    const int row = slot < count && lane < per_slot ? rows[lane] : -1;
    if (source != arena.rank) {
      const int64_t waited_for = first + threadIdx.x * kSlotsPerChunk;
      if (threadIdx.x < kWarps / kSlotsPerChunk && waited_for < count)
        arrived[threadIdx.x] = Wait(arena, arena.SlotFlag(arena.rank, source, waited_for), epoch,
                                    source, Phase::kDispatch);
      __syncthreads();
    }
    if (slot < count)
      ReceiveSlot<T>(shape, p, SlotSource(shape, arena, p, epoch, source, slot), row,
                     source == arena.rank || arrived[warp / kSlotsPerChunk]);
    if (source != arena.rank) __syncthreads();  // before `arrived` is written again
  }
}

// Fills rows [begin, end), a warp per row, and what belongs to them in row_scalars.
__device__ void FillRows(const MoEShape& shape, const DispatchParams& p, int64_t begin, int64_t end,
                         int block, int blocks, const int4& value, float scalar) {
  const int vectors = NumVectors(shape), per_row = p.y != nullptr ? 1 : shape.weights_per_row();
  const int64_t warp = static_cast<int64_t>(block) * kWarps + threadIdx.x / 32;
  for (int64_t row = begin + warp; row < end; row += static_cast<int64_t>(blocks) * kWarps) {
    FillRow(static_cast<int4*>(p.tokens) + row * vectors, vectors, value);
    if (p.row_scalars == nullptr) continue;
    for (int i = threadIdx.x % 32; i < per_row; i += 32) p.row_scalars[row * per_row + i] = scalar;
  }
}

// Rows that hold no token: between the end of each group and the start of the next, and at the very
// end.
__device__ void FillPadding(const MoEShape& shape, const DispatchParams& p, int block, int blocks) {
  const int groups = shape.num_row_groups();
  const int4 zero = make_int4(0, 0, 0, 0);
  if (shape.layout == OutputLayout::kFlat && shape.expert_alignment > 1)
    for (int group = block; group < groups; group += blocks)
      FillRows(shape, p, p.tables.group_offsets[group] + p.tables.group_counts[group],
               p.tables.group_offsets[group + 1], 0, 1, zero, 0.0f);
  FillRows(shape, p, p.tables.group_offsets[groups], shape.capacity, block, blocks, zero, 0.0f);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    DispatchKernel(MoEShape shape, Arena arena, DispatchParams p, int senders) {
  const uint32_t epoch = EnterEpoch(arena);
  const int block = static_cast<int>(blockIdx.x) - senders,
            blocks = static_cast<int>(gridDim.x) - senders;
  if (p.tables.status[kCode] != 0) {
    // Every rank knows, so nobody sends.
    FillRows(shape, p, 0, shape.capacity, blockIdx.x, gridDim.x, NaNs(shape.dtype),
             __int_as_float(0x7fc00000));
  } else if (block < 0) {
    Send(shape, arena, p, epoch, senders);
  } else {
    FillPadding(shape, p, block, blocks);
    Receive<T>(shape, arena, p, epoch, block, blocks);
  }
  LeaveEpoch(arena, epoch, Phase::kDispatch);
}

}  // namespace

cudaError_t LaunchDispatch(const MoEShape& shape, const Arena& arena, const DispatchParams& params,
                           Blocks blocks, cudaStream_t stream) {
  const auto launch = [&](auto* kernel) {
    kernel<<<blocks.total, kThreads, 0, stream>>>(shape, arena, params, blocks.senders);
  };
  if (params.y == nullptr)
    launch(DispatchKernel<void>);
  else
    VisitDType(shape.dtype,
               [&](auto* t) { launch(DispatchKernel<std::remove_pointer_t<decltype(t)>>); });
  return cudaGetLastError();
}

cudaError_t LoadDispatch(const MoEShape& shape) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, DispatchKernel<void>);
  if (error != cudaSuccess) return error;
  return VisitDType(shape.dtype, [&](auto* t) {
    return cudaFuncGetAttributes(&attributes, DispatchKernel<std::remove_pointer_t<decltype(t)>>);
  });
}

}  // namespace jax_ep::cuda
