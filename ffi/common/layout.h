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
enum class OutputLayout : int32_t { kFlat = 0, kRankMajor = 1, kExpertMajor = 2 };
// What quantised rows hold, and the scale of each block of their elements.
enum class QuantDType : int32_t { kE4M3 = 0, kE5M2 = 1, kInt8 = 2 };
enum class ScaleDType : int32_t { kF32 = 0, kE8M0 = 1 };
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
  bool low_latency = false;

  JAX_EP_HOST_DEVICE int32_t local_experts() const { return num_experts / num_ranks; }
  JAX_EP_HOST_DEVICE int64_t element_bytes() const {
    return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
  }
  JAX_EP_HOST_DEVICE int64_t row_bytes() const { return hidden_size * element_bytes(); }
  // Output rows that one token expands into on one rank at most.
  JAX_EP_HOST_DEVICE int32_t rows_per_token() const {
    return layout == OutputLayout::kRankMajor ? 1 : topk;
  }
  // With kExpertMajor every local expert has as many rows, from its own first one on.
  JAX_EP_HOST_DEVICE int64_t slots_per_expert() const { return capacity / local_experts(); }
  // Groups that the output rows are sorted by: local experts, or source ranks.
  JAX_EP_HOST_DEVICE int32_t num_row_groups() const {
    return layout == OutputLayout::kRankMajor ? num_ranks : local_experts();
  }
  // Routing weights stored with one output row.
  JAX_EP_HOST_DEVICE int32_t weights_per_row() const {
    return layout == OutputLayout::kRankMajor ? topk : 1;
  }
};

// In the place of a row number: the (token, k) has no expert here, or its row is past the capacity.
// A token whose rows are all dropped still takes part, with a sum of zero.
enum NoRow : int32_t { kNotMine = -1, kDropped = -2 };

// The tables that routing leaves in a handle. Nothing in them is numbered anew: what travels
// between two ranks is addressed by the source's own token number on both sides.
struct RouteTables {
  int32_t* send_ranks;     // [T, K] ranks that my token t goes to, ascending, then -1
  int32_t* recv_rows;      // [R, T, rows_per_token] my row of (source, token, k), or a NoRow
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
  int64_t send_ranks, recv_rows, group_counts, group_offsets, status, size;

  JAX_EP_HOST_DEVICE RouteTablesLayout(const MoEShape& shape, int64_t num_tokens) {
    int64_t at = 0;
    send_ranks = at, at += num_tokens * shape.topk;
    recv_rows = at, at += shape.num_ranks * num_tokens * shape.rows_per_token();
    group_counts = at, at += shape.num_row_groups();
    group_offsets = at, at += shape.num_row_groups() + 1;
    status = at, at += kStatusSize;
    size = at;
  }

  JAX_EP_HOST_DEVICE RouteTables At(int32_t* base) const {
    return {base + send_ranks, base + recv_rows, base + group_counts, base + group_offsets,
            base + status};
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_LAYOUT_H_
