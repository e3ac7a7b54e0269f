// Shapes of one communicator, and the structs that both size a buffer and address what is in it.
// Plain integers only: shared by host code, kernels and both backends.
#ifndef JAX_EP_COMMON_LAYOUT_H_
#define JAX_EP_COMMON_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define JAX_EP_HOST_DEVICE __host__ __device__
#else
#define JAX_EP_HOST_DEVICE
#endif

namespace jax_ep {

// Values are part of the contract with jax_ep/_ffi.py.
enum class DType : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2, kF64 = 3 };
enum class OutputLayout : int32_t { kFlat = 0, kRankMajor = 1 };
enum class ErrorCode : int32_t { kNone = 0, kOverflow = 1, kBadExpertId = 2, kTimeout = 3 };

// What every rank of a communicator agrees on.
struct MoEShape {
  int32_t num_ranks = 0;
  int32_t num_experts = 0;
  int32_t topk = 0;
  int32_t hidden_size = 0;
  int32_t max_tokens_per_rank = 0;
  int32_t expert_alignment = 1;
  int64_t capacity = 0;  // rows of a rank's receive buffer
  OutputLayout layout = OutputLayout::kFlat;
  DType dtype = DType::kF32;
  bool drop_overflow = false;

  JAX_EP_HOST_DEVICE int32_t local_experts() const { return num_experts / num_ranks; }
  JAX_EP_HOST_DEVICE int64_t element_bytes() const {
    return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
  }
  JAX_EP_HOST_DEVICE int64_t row_bytes() const { return hidden_size * element_bytes(); }
  // Output rows that one (token, rank) slot expands into at most.
  JAX_EP_HOST_DEVICE int32_t rows_per_slot() const {
    return layout == OutputLayout::kRankMajor ? 1 : topk;
  }
  // Groups that the output rows are sorted by: local experts, or source ranks.
  JAX_EP_HOST_DEVICE int32_t num_row_groups() const {
    return layout == OutputLayout::kRankMajor ? num_ranks : local_experts();
  }
  // Routing weights stored with one output row.
  JAX_EP_HOST_DEVICE int32_t weights_per_row() const {
    return layout == OutputLayout::kRankMajor ? topk : 1;
  }
};

// The tables that routing leaves in a handle. A *slot* is one (token, destination rank): slot i of
// (source s, destination d) is the i-th token of s, in token order, with an expert on d.
struct RouteTables {
  int32_t* send_slots;     // [T, R] slot of my token t at rank d, or -1
  int32_t* send_tokens;    // [R, T] my token in slot i at rank d, -1 past send_counts[d]
  int32_t* send_counts;    // [R] slots I fill at rank d
  int32_t* recv_rows;      // [R, T, rows_per_slot] my output row, -1 if not mine or dropped
  int32_t* recv_counts;    // [R] slots that rank s fills at mine
  int32_t* group_counts;   // [num_row_groups] rows that hold a token
  int32_t* group_offsets;  // [num_row_groups + 1] first row of each group; the last is the end
  int32_t* status;         // [kStatusSize] see StatusField
};

// `kCode` is an ErrorCode and equal on all ranks, because every rank sees every rank's routing: all
// of them poison the same step. kRank and kDetail say where and how much, for the message.
enum StatusField { kNumDropped = 0, kCode = 1, kRank = 2, kDetail = 3, kStatusSize = 4 };

// Packs RouteTables into one int32 buffer, so that a handle is one array and an op takes one
// operand.
struct RouteTablesLayout {
  int64_t send_slots, send_tokens, send_counts, recv_rows, recv_counts;
  int64_t group_counts, group_offsets, status, size;

  JAX_EP_HOST_DEVICE RouteTablesLayout(const MoEShape& shape, int64_t num_tokens) {
    const int64_t ranks = shape.num_ranks;
    int64_t at = 0;
    send_slots = at, at += num_tokens * ranks;
    send_tokens = at, at += ranks * num_tokens;
    send_counts = at, at += ranks;
    recv_rows = at, at += ranks * num_tokens * shape.rows_per_slot();
    recv_counts = at, at += ranks;
    group_counts = at, at += shape.num_row_groups();
    group_offsets = at, at += shape.num_row_groups() + 1;
    status = at, at += kStatusSize;
    size = at;
  }

  JAX_EP_HOST_DEVICE RouteTables At(int32_t* base) const {
    return {base + send_slots,  base + send_tokens,  base + send_counts,   base + recv_rows,
            base + recv_counts, base + group_counts, base + group_offsets, base + status};
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_LAYOUT_H_
