// What the combine kernels of both modes share.
#ifndef JAX_EP_CUDA_COMBINE_CUH_
#define JAX_EP_CUDA_COMBINE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/ops.h"
#include "cuda/rows.cuh"

namespace jax_ep::cuda {

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
    if (shape.layout != OutputLayout::kRankMajor) return row >= 0 ? p.row_scalars[row] : 0.0f;
    const int64_t only_row = __shfl_sync(kAllLanes, row, 0);
    return only_row >= 0 && lane < shape.topk ? p.row_scalars[only_row * shape.topk + lane] : 0.0f;
  }
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_COMBINE_CUH_
