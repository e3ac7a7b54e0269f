// The steps of the ops on the CPU: what one rank computes once the inputs of the others are
// readable. No threads, no waiting: communicator.cc decides who runs which piece and when.
#ifndef JAX_EP_CPU_OPS_H_
#define JAX_EP_CPU_OPS_H_

#include <cstdint>
#include <vector>

#include "common/error.h"
#include "common/ops.h"

namespace jax_ep::cpu {

// Routes for rank `me` from the topk_ids of every rank. Returns what comm.check() is to raise.
ErrorRecord Route(const MoEShape& shape, int me, const std::vector<const int32_t*>& topk_ids,
                  const RouteParams& params);

// What a dispatching rank lets the others read.
struct DispatchSource {
  const std::byte* x;
  const std::byte* scales;  // or null
  const float* weights;     // or null
};
// Expands tokens [begin, end) of `source` into the output rows that they have on the ranks `to`.
void ExpandTokens(const MoEShape& shape, int source, const DispatchSource& from,
                  const std::vector<const DispatchParams*>& to, int64_t begin, int64_t end);
// Zeroes the rows that hold no token, or fills all rows with NaN when routing failed.
void FillPadding(const MoEShape& shape, const DispatchParams& params);
void PoisonDispatch(const MoEShape& shape, const DispatchParams& params);

// What an expert rank lets the others read: its rows, or, from another process, their sums per
// token.
struct CombineSource {
  const std::byte* y = nullptr;
  const float* row_weights = nullptr;
  const float* row_scalars = nullptr;
  const int32_t* recv_rows = nullptr;      // [T, rows_per_token] for the reading rank
  const std::byte* partial = nullptr;      // [T, H]
  const float* partial_scalars = nullptr;  // [T, K]
};
// Sums what `from` owes tokens [begin, end) of one source rank into their rows of `partial`.
void SumTokens(const MoEShape& shape, const CombineSource& from, int64_t begin, int64_t end,
               std::byte* partial, float* partial_scalars);
// Combines tokens [begin, end), adding the ranks in order.
void CombineTokens(const MoEShape& shape, const std::vector<CombineSource>& from,
                   const CombineParams& params, int64_t begin, int64_t end);
void PoisonCombine(const MoEShape& shape, const CombineParams& params);

// A part of a transfer: of the rows that any rank sends to any other, those that fit into a window
// of max_tokens_per_rank rows.
struct TransferLap {
  TransferParams params;
  int64_t number;
};
// What a sending rank lets the others read: its slots, or from another process a window.
struct TransferSource {
  const TransferParams* params;
  const std::byte* window;  // [Tmax, row_bytes], or null
};
// The same on all ranks.
int64_t NumLaps(const MoEShape& shape, const TransferParams& params);
// Rows of the lap that come from rank `src`.
int64_t NumReceived(const MoEShape& shape, const TransferLap& lap, int src);
// Puts the lap's rows for rank `dst` into a window.
void GatherRows(const MoEShape& shape, const TransferLap& lap, int dst, std::byte* window);
// Puts rows [begin, end) of the lap that come from rank `src` into the slots of rank `me`.
void PlaceRows(const MoEShape& shape, const TransferLap& lap, int src, const TransferSource& from,
               int me, int64_t begin, int64_t end);
// Fills a slot that nothing arrives for.
void FillSlot(const TransferParams& params, int64_t slot);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_OPS_H_
