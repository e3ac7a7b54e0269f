// Parameters of the ops, as one rank sees them. Pointers are that rank's own buffers.
#ifndef JAX_EP_COMMON_OPS_H_
#define JAX_EP_COMMON_OPS_H_

#include <cstdint>

#include "common/layout.h"

namespace jax_ep {

// Which output row each (token, k) of every rank goes to.
struct RouteParams {
  int64_t num_tokens;
  const int32_t* topk_ids;         // [T, K], -1 where unused
  RouteTables tables;              // written
  int32_t* num_tokens_per_expert;  // [L] written
  int32_t* offsets;                // [num_row_groups + 1] written
  int32_t* num_dropped;            // [] written
  int32_t* recv_topk_ids;          // [C, K] written for kRankMajor: local expert ids or -1
};

// Moves x to the ranks of its experts. With `y`, the gradient of combine: x is the gradient of the
// combined output, and each row leaves scaled by its routing weight, beside its dot product with y.
struct DispatchParams {
  int64_t num_tokens;
  const void* x;             // [T, H]
  const float* weights;      // [T, K], or null
  RouteTables tables;        // read
  const void* y;             // [C, H], or null
  const float* row_weights;  // [C] with y, else null
  void* tokens;              // [C, H] written
  float* row_scalars;  // [C, weights_per_row], or null: the weights, or with y the dot products
};

// A dispatch that makes its own routing: one exchange on GPUs, where payload need not wait for
// tables.
struct FreshDispatchParams {
  RouteParams route;
  DispatchParams dispatch;  // with the tables that `route` writes; never with y
};

// Sums the expert rows of every token back at its source.
struct CombineParams {
  int64_t num_tokens;
  const void* y;             // [C, H]
  const float* row_weights;  // [C], or null for an unweighted sum
  const float* row_scalars;  // [C, weights_per_row] returned to their (token, k), or null
  RouteTables tables;        // read
  void* out;                 // [T, H] written
  float* token_scalars;      // [T, K] written with row_scalars
};

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_OPS_H_
