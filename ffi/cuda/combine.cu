// Combine: sending blocks sum, per slot, the rows that a token has here, and write one row into the
// source's window; receiving blocks add the ranks' rows of each token, in rank order.
//
// As in dispatch, senders come first in the grid and wait for nobody.
#include "cuda/ops.h"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ int NumVectors(const MoEShape& shape) { return static_cast<int>(shape.row_bytes() / 16); }

// The rows of y that make up one slot; lane k of the warp holds the k-th.
template <typename T>
struct SlotRows {
  int row;
  float weight;
  unsigned lanes;

  __device__ SlotRows(const MoEShape& shape, const CombineParams& p, int source, int64_t slot) {
    const int lane = threadIdx.x % 32, per_slot = shape.rows_per_slot();
    row = lane < per_slot ? p.tables.recv_rows[(source * p.num_tokens + slot) * per_slot + lane] : -1;
    weight = row < 0 ? 0.0f : p.row_weights == nullptr ? 1.0f : p.row_weights[row];
    lanes = __ballot_sync(kAllLanes, row >= 0);
  }

  // Adds up to kUnroll vectors of each row, from vector `first` on, two rows at a time to have more loads
  // in flight. All lanes must call it together.
  __device__ void AddTo(Sum<T> (&sum)[kUnroll][kPerVector<T>], const int4* y, int vectors, int first) const {
    for (unsigned rest = lanes; rest != 0;) {
      const int a = __ffs(rest) - 1;
      rest &= rest - 1;
      const int b = rest != 0 ? __ffs(rest) - 1 : a;
      const bool two = rest != 0;
      rest &= rest - 1;
      const int4* row_a = y + static_cast<int64_t>(__shfl_sync(kAllLanes, row, a)) * vectors;
      const int4* row_b = y + static_cast<int64_t>(__shfl_sync(kAllLanes, row, b)) * vectors;
      const Sum<T> weight_a = __shfl_sync(kAllLanes, weight, a), weight_b = __shfl_sync(kAllLanes, weight, b);
      int4 va[kUnroll], vb[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < vectors) {
          va[u] = ptx::ld_nc_no_allocate(row_a + first + 32 * u);
          if (two) vb[u] = ptx::ld_nc_no_allocate(row_b + first + 32 * u);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < vectors) {
          AddScaled<T>(sum[u], va[u], weight_a);
          if (two) AddScaled<T>(sum[u], vb[u], weight_b);
        }
    }
  }

  // The scalar of each of the slot's (token, k): lane k gets the k-th, 0 where this rank has none.
  __device__ float Scalar(const MoEShape& shape, const CombineParams& p) const {
    const int lane = threadIdx.x % 32;
    if (shape.layout == OutputLayout::kFlat) return row >= 0 ? p.row_scalars[row] : 0.0f;
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    return only_row >= 0 && lane < shape.topk ? p.row_scalars[only_row * shape.topk + lane] : 0.0f;
  }
};

template <typename T>
__device__ void SendSlot(const MoEShape& shape, const Arena& arena, const CombineParams& p, uint32_t epoch, int source,
                         int64_t slot) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const SlotRows<T> rows(shape, p, source, slot);
  int4* to = arena.Row(epoch, source, arena.rank, slot);
  for (int begin = 0; begin < vectors; begin += 32 * kUnroll) {
    Sum<T> sum[kUnroll][kPerVector<T>] = {};
    rows.AddTo(sum, static_cast<const int4*>(p.y), vectors, begin + lane);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (begin + lane + 32 * u < vectors) ptx::st_no_allocate(to + begin + lane + 32 * u, Pack<T>(sum[u]));
  }
  if (p.row_scalars == nullptr) return;
  const float scalar = rows.Scalar(shape, p);
  if (lane < shape.topk) arena.Scalars(epoch, source, arena.rank, slot)[lane] = scalar;
}

template <typename T>
__device__ void Send(const MoEShape& shape, const Arena& arena, const CombineParams& p, uint32_t epoch, int senders) {
  const int peers = shape.num_ranks - 1;
  const int64_t chunks = CeilDiv(p.num_tokens, kSlotsPerChunk);
  for (int64_t task = blockIdx.x; task < chunks * peers; task += senders) {
    const int source = (arena.rank + 1 + static_cast<int>(task % peers)) % shape.num_ranks;
    const int64_t first = task / peers * kSlotsPerChunk;
    const int64_t count = p.tables.recv_counts[source];
    if (first >= count) continue;
    for (int64_t slot = first + threadIdx.x / 32; slot < min(first + kSlotsPerChunk, count); slot += kWarps)
      SendSlot<T>(shape, arena, p, epoch, source, slot);
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::fence_acq_rel_sys();
      ptx::st_release_sys(arena.SlotFlag(source, arena.rank, first), epoch);
    }
  }
}

// One warp waits until every rank's row of a token is here.
__device__ bool WaitForToken(const MoEShape& shape, const Arena& arena, const int32_t* slots, uint32_t epoch) {
  bool arrived = true;
  for (int rank = threadIdx.x % 32; rank < shape.num_ranks; rank += 32)
    if (rank != arena.rank && slots[rank] >= 0)
      arrived &= Wait(arena, arena.SlotFlag(arena.rank, rank, slots[rank]), epoch, rank, Phase::kCombine);
  arrived = __all_sync(kAllLanes, arrived);
  __syncwarp();  // hands what each lane acquired to the others
  return arrived;
}

// What rank `from` returned for `slot`, rounded to T as it crossed; this rank's own is summed on the spot.
template <typename T>
__device__ void AddRank(Sum<T> (&total)[kUnroll][kPerVector<T>], const MoEShape& shape, const Arena& arena,
                        const CombineParams& p, uint32_t epoch, int from, int slot, int first, int vectors) {
  if (from == arena.rank) {
    Sum<T> sum[kUnroll][kPerVector<T>] = {};
    SlotRows<T>(shape, p, from, slot).AddTo(sum, static_cast<const int4*>(p.y), vectors, first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) AddScaled<T>(total[u], Pack<T>(sum[u]), 1);
    return;
  }
  const int4* row = arena.Row(epoch, arena.rank, from, slot);
  int4 v[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (first + 32 * u < vectors) v[u] = ptx::ld_no_allocate(row + first + 32 * u);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (first + 32 * u < vectors) AddScaled<T>(total[u], v[u], 1);
}

template <typename T>
__device__ void ReceiveToken(const MoEShape& shape, const Arena& arena, const CombineParams& p, uint32_t epoch,
                             int64_t token) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape), ranks = shape.num_ranks;
  const int32_t* slots = p.tables.send_slots + token * ranks;
  int4* out = static_cast<int4*>(p.out) + token * vectors;
  if (!WaitForToken(shape, arena, slots, epoch)) return FillRow(out, vectors, NaNs(shape.dtype));
  for (int begin = 0; begin < vectors; begin += 32 * kUnroll) {
    Sum<T> total[kUnroll][kPerVector<T>] = {};
    for (int rank = 0; rank < ranks; ++rank)
      if (slots[rank] >= 0) AddRank<T>(total, shape, arena, p, epoch, rank, slots[rank], begin + lane, vectors);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (begin + lane + 32 * u < vectors) ptx::st_no_allocate(out + begin + lane + 32 * u, Pack<T>(total[u]));
  }
  if (p.row_scalars == nullptr) return;
  float scalar = 0.0f;
  for (int rank = 0; rank < ranks; ++rank) {
    if (slots[rank] < 0) continue;
    if (rank == arena.rank)
      scalar += SlotRows<T>(shape, p, rank, slots[rank]).Scalar(shape, p);
    else if (lane < shape.topk)
      scalar += arena.Scalars(epoch, arena.rank, rank, slots[rank])[lane];
  }
  if (lane < shape.topk) p.token_scalars[token * shape.topk + lane] = scalar;
}

__device__ void FillNaN(const MoEShape& shape, const CombineParams& p) {
  const int vectors = NumVectors(shape), lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; token < p.num_tokens; token += warps) {
    FillRow(static_cast<int4*>(p.out) + token * vectors, vectors, NaNs(shape.dtype));
    if (p.row_scalars != nullptr && lane < shape.topk)
      p.token_scalars[token * shape.topk + lane] = __int_as_float(0x7fc00000);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) CombineKernel(MoEShape shape, Arena arena, CombineParams p, int senders) {
  const uint32_t epoch = EnterEpoch(arena);
  const int block = static_cast<int>(blockIdx.x) - senders, blocks = static_cast<int>(gridDim.x) - senders;
  if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p);
  } else if (block < 0) {
    Send<T>(shape, arena, p, epoch, senders);
  } else {
    for (int64_t token = block * int64_t{kWarps} + threadIdx.x / 32; token < p.num_tokens;
         token += static_cast<int64_t>(blocks) * kWarps)
      ReceiveToken<T>(shape, arena, p, epoch, token);
  }
  LeaveEpoch(arena, epoch, Phase::kCombine);
}

}  // namespace

cudaError_t LaunchCombine(const MoEShape& shape, const Arena& arena, const CombineParams& params, Blocks blocks,
                          cudaStream_t stream) {
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
