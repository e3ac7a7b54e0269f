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

// How rows travel in a dispatch: as they are or, with a `block`, quantised, with a scale for each
// block of elements. See jax_ep/_quant.py for what a quantised row is.
struct QuantParams {
  int32_t block = 0;  // elements that share a scale; 0: rows are not quantised
  QuantDType dtype = QuantDType::kE4M3;
  ScaleDType scale_dtype = ScaleDType::kF32;
  const void* scales = nullptr;  // [T, H / block] of an x that is quantised already; else null
  void* row_scales = nullptr;    // [C, H / block] written

  JAX_EP_HOST_DEVICE int64_t scale_bytes() const { return scale_dtype == ScaleDType::kF32 ? 4 : 1; }
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
  bool fill;           // with kExpertMajor: zero the slots that hold no token, too
  QuantParams quant;   // never with y
  const int32_t* ticket = nullptr;  // [2] of the request that this op receives, or null

  // Whether x is still to be quantised.
  JAX_EP_HOST_DEVICE bool quantises() const { return quant.block != 0 && quant.scales == nullptr; }
  // Of a row as it leaves in `tokens`, and as it is in `x`.
  JAX_EP_HOST_DEVICE int64_t row_bytes(const MoEShape& shape) const {
    return quant.block == 0 ? shape.row_bytes() : shape.hidden_size;
  }
  JAX_EP_HOST_DEVICE int64_t x_row_bytes(const MoEShape& shape) const {
    return quant.scales == nullptr ? shape.row_bytes() : shape.hidden_size;
  }
  JAX_EP_HOST_DEVICE int64_t scale_row_bytes(const MoEShape& shape) const {
    return quant.block == 0 ? 0 : shape.hidden_size / quant.block * quant.scale_bytes();
  }
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
  const void* y;                    // [C, H]
  const float* row_weights;         // [C], or null for an unweighted sum
  const float* row_scalars;         // [C, weights_per_row] returned to their (token, k), or null
  RouteTables tables;               // read
  void* out;                        // [T, H] written
  float* token_scalars;             // [T, K] written with row_scalars
  const int32_t* ticket = nullptr;  // [2] of the request that this op receives, or null
};

// The sending half of a dispatch: fresh with `topk_ids`, else along the tables of another. Its only
// result is the ticket, by which the receiving half finds what was sent: whatever else `dispatch`
// says is written is null, and so are the tables with `topk_ids`.
struct DispatchStartParams {
  const int32_t* topk_ids;  // [T, K], or null
  DispatchParams dispatch;
  int32_t* ticket;  // [2] written
};

// The sending half of a combine, likewise: `out` and `token_scalars` are null.
struct CombineStartParams {
  CombineParams combine;
  int32_t* ticket;  // [2] written
};

// In the place of a slot's source: it stays empty, which is all zeros, or its rows come from
// another rank.
enum NoSource : int32_t { kEmpty = -1, kArrives = -2 };

// What a transfer of slots does, as one rank sees it.
struct TransferTables {
  const int32_t* source;      // [D] this rank's slot that fills slot d, or a NoSource
  const int32_t* next;        // [D] the next slot that gets what arrives for slot d, or -1
  const int32_t* send_begin;  // [R + 1] where send_slots begin, by destination
  const int32_t* recv_begin;  // [R + 1] where recv_slots begin, by source
  const int32_t* most;        // [1] slots that go from any rank to any other, at most
  const int32_t* send_slots;  // [N] slots that leave
  const int32_t* recv_slots;  // [N] slots that they come to, in the order in which they left
};

// Packs TransferTables into one int32 buffer.
struct TransferTablesLayout {
  int64_t source, next, send_begin, recv_begin, most, send_slots, recv_slots, size;

  TransferTablesLayout(int64_t num_ranks, int64_t num_slots, int64_t max_moved) {
    int64_t at = 0;
    source = at, at += num_slots;
    next = at, at += num_slots;
    send_begin = at, at += num_ranks + 1;
    recv_begin = at, at += num_ranks + 1;
    most = at, at += 1;
    send_slots = at, at += max_moved;
    recv_slots = at, at += max_moved;
    size = at;
  }

  TransferTables At(const int32_t* base) const {
    return {base + source, base + next,       base + send_begin, base + recv_begin,
            base + most,   base + send_slots, base + recv_slots};
  }
};

// Fills slots of equal size from this rank's own and from those of others, bit by bit.
struct TransferParams {
  const void* source;  // [S, slot_bytes]
  void* dest;          // [D, slot_bytes] written
  int64_t slot_bytes;
  int64_t num_slots;  // D
  TransferTables tables;
};

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_OPS_H_
