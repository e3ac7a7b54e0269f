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
// Warps that share a row: more rows at a time would each take longer, and the last one counts.
constexpr int kWarpsPerSlot = kWarps / kSlotsPerChunk;
constexpr int kWarpsPerToken = 4;
constexpr int kTokensPerBlock = kWarps / kWarpsPerToken;

__device__ int NumVectors(const MoEShape& shape) {
  return static_cast<int>(shape.row_bytes() / 16);
}

// The vectors of a row that one of several warps works on.
struct Share {
  int begin, end;
  bool first;  // this warp also does what is done once per row

  __device__ Share(int vectors, int warps_per_row) {
    const int part = threadIdx.x / 32 % warps_per_row;
    const int per_part = static_cast<int>(CeilDiv(vectors, warps_per_row));
    begin = part * per_part;
    end = min(begin + per_part, vectors);
    first = part == 0;
  }
};

// The rows of y that make up one slot, none for slot -1; lane k of the warp holds the k-th.
template <typename T>
struct SlotRows {
  int row;
  float weight;
  unsigned lanes;

  __device__ SlotRows(const MoEShape& shape, const CombineParams& p, int source, int64_t slot) {
    const int lane = threadIdx.x % 32, per_slot = shape.rows_per_slot();
    row = slot >= 0 && lane < per_slot
              ? p.tables.recv_rows[(source * p.num_tokens + slot) * per_slot + lane]
              : -1;
    weight = row < 0 ? 0.0f : p.row_weights == nullptr ? 1.0f : p.row_weights[row];
    lanes = __ballot_sync(kAllLanes, row >= 0);
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

  // The scalar of each of the slot's (token, k): lane k gets the k-th, 0 where this rank has none.
  __device__ float Scalar(const MoEShape& shape, const CombineParams& p) const {
    const int lane = threadIdx.x % 32;
    if (shape.layout == OutputLayout::kFlat) return row >= 0 ? p.row_scalars[row] : 0.0f;
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    return only_row >= 0 && lane < shape.topk ? p.row_scalars[only_row * shape.topk + lane] : 0.0f;
  }
};

template <typename T>
__device__ void SendSlot(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                         uint32_t epoch, int source, int64_t slot) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape);
  const Share share(vectors, kWarpsPerSlot);
  const SlotRows<T> rows(shape, p, source, slot);
  int4* to = arena.Row(epoch, source, arena.rank, slot);
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
  if (lane < shape.topk) arena.Scalars(epoch, source, arena.rank, slot)[lane] = scalar;
}

template <typename T>
__device__ void Send(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                     uint32_t epoch, int senders) {
  const int peers = shape.num_ranks - 1;
  const int64_t chunks = CeilDiv(p.num_tokens, kSlotsPerChunk);
  for (int64_t task = blockIdx.x; task < chunks * peers; task += senders) {
    const int source = (arena.rank + 1 + static_cast<int>(task % peers)) % shape.num_ranks;
    const int64_t first = task / peers * kSlotsPerChunk;
    const int64_t count = p.tables.recv_counts[source];
    if (first >= count) continue;
    const int64_t slot = first + threadIdx.x / 32 / kWarpsPerSlot;
    if (slot < count) SendSlot<T>(shape, arena, p, epoch, source, slot);
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::fence_acq_rel_sys();
      ptx::st_release_sys(arena.SlotFlag(source, arena.rank, first), epoch);
    }
  }
}

// Waits until every rank's rows of tokens [first, last) are here; a thread per (token, rank), those
// with the same flag together. To be called by the whole block. False if any is missing.
__device__ bool WaitForTokens(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                              uint32_t epoch, int64_t first, int64_t last) {
  bool arrived = true;
  const int64_t pairs = (last - first) * shape.num_ranks;
  for (int64_t i = threadIdx.x; i - threadIdx.x % 32 < pairs; i += kThreads) {
    const int rank = static_cast<int>(i % shape.num_ranks);
    const int slot =
        i < pairs && rank != arena.rank ? p.tables.send_slots[first * shape.num_ranks + i] : -1;
    const uint32_t* flag = slot >= 0 ? arena.SlotFlag(arena.rank, rank, slot) : nullptr;
    const unsigned same = __match_any_sync(kAllLanes, reinterpret_cast<uintptr_t>(flag));
    if (flag != nullptr && threadIdx.x % 32 == __ffs(same) - 1)
      arrived &= Wait(arena, flag, epoch, rank, Phase::kCombine);
  }
  return __syncthreads_and(arrived);
}

// Adds what ranks [0, R) returned for a token, in order and rounded to T as it crossed; this rank's
// own is summed on the spot. Vectors `first` + 32 u of the row, before `end`, kUnroll of them at
// most.
template <typename T>
__device__ void AddRanks(Sum<T> (&total)[kUnroll][kPerVector<T>], const MoEShape& shape,
                         const Arena& arena, const CombineParams& p, uint32_t epoch,
                         const int32_t* slots, const SlotRows<T>& own, int first, int end) {
  const int vectors = NumVectors(shape);
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    const int slot = slots[rank];
    if (slot < 0) continue;
    int4 v[kUnroll] = {};
    if (rank == arena.rank) {
      Sum<T> sum[kUnroll][kPerVector<T>] = {};
      own.AddTo(sum, static_cast<const int4*>(p.y), vectors, first, end);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) v[u] = Pack<T>(sum[u]);
    } else {
      const int4* row = arena.Row(epoch, arena.rank, rank, slot);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < end) v[u] = ptx::ld_no_allocate(row + first + 32 * u);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) AddScaled<T>(total[u], v[u], 1);
  }
}

template <typename T>
__device__ void ReceiveToken(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                             uint32_t epoch, int64_t token) {
  const int lane = threadIdx.x % 32, vectors = NumVectors(shape), ranks = shape.num_ranks;
  const int32_t* slots = p.tables.send_slots + token * ranks;
  int4* out = static_cast<int4*>(p.out) + token * vectors;
  const Share share(vectors, kWarpsPerToken);
  const SlotRows<T> own(shape, p, arena.rank, slots[arena.rank]);
  for (int begin = share.begin; begin < share.end; begin += 32 * kUnroll) {
    const int first = begin + lane;
    Sum<T> total[kUnroll][kPerVector<T>] = {};
    AddRanks<T>(total, shape, arena, p, epoch, slots, own, first, share.end);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < share.end) ptx::st_no_allocate(out + first + 32 * u, Pack<T>(total[u]));
  }
  if (p.row_scalars == nullptr || !share.first) return;
  float scalar = own.Scalar(shape, p);
  for (int rank = 0; rank < ranks; ++rank)
    if (rank != arena.rank && slots[rank] >= 0 && lane < shape.topk)
      scalar += arena.Scalars(epoch, arena.rank, rank, slots[rank])[lane];
  if (lane < shape.topk) p.token_scalars[token * shape.topk + lane] = scalar;
}

template <typename T>
__device__ void Receive(const MoEShape& shape, const Arena& arena, const CombineParams& p,
                        uint32_t epoch, int block, int blocks) {
  const int64_t stride = static_cast<int64_t>(blocks) * kTokensPerBlock;
  for (int64_t first = block * int64_t{kTokensPerBlock}; first < p.num_tokens; first += stride) {
    const int64_t last = min(first + kTokensPerBlock, p.num_tokens);
    const int64_t token = first + threadIdx.x / 32 / kWarpsPerToken;
    const bool arrived = WaitForTokens(shape, arena, p, epoch, first, last);
    if (token >= last) continue;
    if (arrived)
      ReceiveToken<T>(shape, arena, p, epoch, token);
    else
      FillRow(static_cast<int4*>(p.out) + token * NumVectors(shape), NumVectors(shape),
              NaNs(shape.dtype));
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
  const uint32_t epoch = EnterEpoch(arena);
  const int block = static_cast<int>(blockIdx.x) - senders,
            blocks = static_cast<int>(gridDim.x) - senders;
  if (p.tables.status[kCode] != 0) {
    FillNaN(shape, p);
  } else if (block < 0) {
    Send<T>(shape, arena, p, epoch, senders);
  } else {
    Receive<T>(shape, arena, p, epoch, block, blocks);
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
