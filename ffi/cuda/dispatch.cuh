// What the dispatch kernels of both modes share: where a token goes, and what a row has beside it.
#ifndef JAX_EP_CUDA_DISPATCH_CUH_
#define JAX_EP_CUDA_DISPATCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/ops.h"
#include "cuda/arena.h"
#include "cuda/quant.cuh"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {

constexpr int kMaxTopk = 32;

__device__ __forceinline__ bool IsExpert(const MoEShape& shape, int id) {
  return id >= 0 && id < shape.num_experts;
}

__device__ inline int NumRowVectors(const MoEShape& shape, const DispatchParams& p) {
  return static_cast<int>(p.row_bytes(shape) / 16);
}

__device__ inline int4* OutputRow(const MoEShape& shape, const DispatchParams& p, int64_t row) {
  return reinterpret_cast<int4*>(static_cast<std::byte*>(p.tokens) + row * p.row_bytes(shape));
}

// What is in row_scalars beside each row: its weights, or one dot product.
__device__ inline int ScalarsPerRow(const MoEShape& shape, const DispatchParams& p) {
  return p.y != nullptr ? 1 : shape.weights_per_row();
}

// What says where a token goes, an entry in each lane: to be read early.
__device__ __forceinline__ int EntryOfLane(const MoEShape& shape, const DispatchParams& p,
                                           const int32_t* topk_ids, int64_t token) {
  const int lane = threadIdx.x % 32;
  const int32_t* entries = topk_ids != nullptr ? topk_ids : p.tables.send_ranks;
  return lane < shape.topk ? entries[token * shape.topk + lane] : -1;
}
// The ranks that a token of these entries goes to, one in each of some lanes of the warp and -1 in
// the others.
__device__ __forceinline__ int DestinationOfLane(const MoEShape& shape, const int32_t* topk_ids,
                                                 int entry) {
  if (topk_ids == nullptr) return entry;
  const int lane = threadIdx.x % 32, id = entry;
  const int rank = IsExpert(shape, id) ? id / shape.local_experts() : -1;
  const unsigned same = __match_any_sync(kAllLanes, rank);
  return lane == __ffs(same) - 1 ? rank : -1;
}

// Calls f with the value of each of `lanes`; all lanes of the warp together.
template <typename T, typename F>
__device__ __forceinline__ void ForEachLane(unsigned lanes, T value, const F& f) {
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1)
    f(__shfl_sync(kAllLanes, value, __ffs(rest) - 1));
}

// What receivers read of one token.
struct TokenSource {
  bool is_own;
  const int4* row;
  const std::byte* scales;  // of quantised rows
  const float* weights;

  __device__ TokenSource(const MoEShape& shape, const Arena& arena, const DispatchParams& p,
                         uint32_t epoch, int source, int64_t token)
      : is_own(source == arena.rank) {
    if (is_own) {
      row = reinterpret_cast<const int4*>(static_cast<const std::byte*>(p.x) +
                                          token * p.x_row_bytes(shape));
      scales = static_cast<const std::byte*>(p.quant.scales) + token * p.scale_row_bytes(shape);
      weights = p.weights + token * shape.topk;
    } else {
      int4* window = arena.Row(epoch, arena.rank, source, token);
      row = window;
      scales = InWindow(shape, window).scales;
      weights = arena.Scalars(epoch, arena.rank, source, token);
    }
  }
};

// Lane k gets the k-th weight of a token: to be read early, and used late.
__device__ __forceinline__ float WeightOfLane(const MoEShape& shape, const DispatchParams& p,
                                              const TokenSource& from) {
  const int lane = threadIdx.x % 32;
  return p.weights != nullptr && lane < shape.topk ? from.weights[lane] : 0.0f;
}

// A token's weights go into the windows of `ranks`, one in each of `lanes`: a warp.
__device__ inline void SendWeights(const MoEShape& shape, const Arena& arena,
                                   const DispatchParams& p, uint32_t epoch, int64_t token,
                                   unsigned lanes, int rank, float weight) {
  const int lane = threadIdx.x % 32;
  if (p.weights == nullptr) return;
  ForEachLane(lanes, rank, [&](int peer) {
    if (lane < shape.topk) arena.Scalars(epoch, peer, arena.rank, token)[lane] = weight;
  });
}

// Stores the weights that came with a token beside its rows, of which lane k holds the k-th.
__device__ inline void PlaceWeights(const MoEShape& shape, const DispatchParams& p, float weight,
                                    int row) {
  const int lane = threadIdx.x % 32;
  if (p.weights == nullptr) return;
  if (shape.layout == OutputLayout::kRankMajor) {
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    if (only_row >= 0 && lane < shape.topk) p.row_scalars[only_row * shape.topk + lane] = weight;
  } else if (row >= 0) {
    p.row_scalars[row] = weight;
  }
}

// Quantises a token into a row for each of `lanes`, by warps `warp` of `warps`: `row_of` makes a
// QuantRow of a lane's value. Nothing where X is void, and nothing is quantised.
template <typename X, typename T, typename RowOf>
__device__ __forceinline__ void QuantiseInto(const MoEShape& shape, const DispatchParams& p,
                                             const void* x, int warp, int warps, unsigned lanes,
                                             T value, const RowOf& row_of) {
  if constexpr (!std::is_void_v<X>) {
    for (unsigned rest = lanes; rest != 0;) {
      QuantRows to;
#pragma unroll
      for (int i = 0; i < kMaxQuantRows; ++i) {
        if (rest == 0) break;
        to.rows[i] = row_of(__shfl_sync(kAllLanes, value, __ffs(rest) - 1));
        to.count = i + 1;
        rest &= rest - 1;
      }
      QuantiseRow(p.quant, static_cast<const X*>(x), shape.hidden_size, warp, warps, to);
    }
  }
}

// Whether rows without a token between the groups are to be filled.
__device__ inline bool FillsGaps(const MoEShape& shape, const DispatchParams& p) {
  return shape.layout == OutputLayout::kExpertMajor
             ? p.fill
             : shape.layout == OutputLayout::kFlat && shape.expert_alignment > 1;
}

// What belongs to a row that holds no token, or one that cannot be had: zeros, or NaN. A warp.
__device__ inline void FillBesideRow(const MoEShape& shape, const DispatchParams& p, int64_t row,
                                     bool poison) {
  const int lane = threadIdx.x % 32, per_row = ScalarsPerRow(shape, p);
  if (p.quant.block != 0) {
    std::byte* scales = InOutput(shape, p, row).scales;
    for (int i = lane; i < shape.hidden_size / p.quant.block; i += 32)
      StoreScale(p.quant, scales, i, poison ? NaNScale(p.quant) : 0);
  }
  if (p.row_scalars == nullptr) return;
  for (int i = lane; i < per_row; i += 32)
    p.row_scalars[row * per_row + i] = poison ? __int_as_float(0x7fc00000) : 0.0f;
}
// What such a row is full of: not all quantised elements know a NaN, their scales do.
__device__ inline int4 RowFilling(const MoEShape& shape, const DispatchParams& p, bool poison) {
  return poison && p.quant.block == 0 ? NaNs(shape.dtype) : make_int4(0, 0, 0, 0);
}

// NaN for the rows of a token that never came; lane k holds the k-th.
__device__ inline void PoisonRows(const MoEShape& shape, const DispatchParams& p, int row) {
  ForEachLane(__ballot_sync(kAllLanes, row >= 0), row, [&](int64_t to) {
    FillRow(OutputRow(shape, p, to), NumRowVectors(shape, p), RowFilling(shape, p, true));
    FillBesideRow(shape, p, to, true);
  });
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_DISPATCH_CUH_
