#include <algorithm>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/rows.h"

namespace jax_ep::cpu {
namespace {

// A tile of both sums stays in the first-level cache while up to K rows are added to it.
constexpr int64_t kTile = 1024;

template <typename T>
void SumRows(const MoEShape& shape, const CombineSource& from, int64_t slot, int64_t column,
             int64_t n, Sum<T>* sum) {
  std::fill_n(sum, n, Sum<T>{0});
  const int per_slot = shape.rows_per_slot();
  for (int k = 0; k < per_slot; ++k) {
    const int64_t row = from.recv_rows[slot * per_slot + k];
    if (row < 0) continue;
    const float weight = from.row_weights == nullptr ? 1.0f : from.row_weights[row];
    AddScaled(sum, reinterpret_cast<const T*>(from.y) + row * shape.hidden_size + column, weight,
              n);
  }
}

// The scalars of one slot, each at its k. In kRankMajor the one row holds all of them.
void GatherScalars(const MoEShape& shape, const CombineSource& from, int64_t slot, float* scalars) {
  const int per_slot = shape.rows_per_slot(), topk = shape.topk;
  if (from.partial_scalars != nullptr) {
    for (int k = 0; k < topk; ++k) scalars[k] += from.partial_scalars[slot * topk + k];
    return;
  }
  for (int k = 0; k < topk; ++k) {
    const int64_t row = from.recv_rows[slot * per_slot + (per_slot == 1 ? 0 : k)];
    if (row < 0) continue;
    scalars[k] += from.row_scalars[shape.layout == OutputLayout::kRankMajor ? row * topk + k : row];
  }
}

template <typename T>
void SumSlotsOf(const MoEShape& shape, const CombineSource& from, int64_t begin, int64_t end,
                T* partial) {
  Sum<T> sum[kTile];
  const int64_t hidden = shape.hidden_size;
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int64_t column = 0; column < hidden; column += kTile) {
      const int64_t n = std::min(kTile, hidden - column);
      SumRows<T>(shape, from, slot, column, n, sum);
      Store(partial + slot * hidden + column, sum, n);
    }
  }
}

template <typename T>
void CombineTokensOf(const MoEShape& shape, const std::vector<CombineSource>& from,
                     const CombineParams& p, int64_t begin, int64_t end) {
  Sum<T> sum[kTile], total[kTile];
  const int64_t hidden = shape.hidden_size, ranks = shape.num_ranks;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t column = 0; column < hidden; column += kTile) {
      const int64_t n = std::min(kTile, hidden - column);
      std::fill_n(total, n, Sum<T>{0});
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const int64_t slot = p.tables.send_slots[t * ranks + rank];
        if (slot < 0) continue;
        if (from[rank].partial != nullptr) {
          AddScaled(total, reinterpret_cast<const T*>(from[rank].partial) + slot * hidden + column,
                    1.0f, n);
        } else {
          SumRows<T>(shape, from[rank], slot, column, n, sum);
          AddRounded<T>(total, sum, n);
        }
      }
      Store(static_cast<T*>(p.out) + t * hidden + column, total, n);
    }
  }
}

}  // namespace

void SumSlots(const MoEShape& shape, const CombineSource& from, int64_t begin, int64_t end,
              std::byte* partial, float* partial_scalars) {
  VisitDType(shape.dtype, [&](auto* t) {
    SumSlotsOf(shape, from, begin, end, reinterpret_cast<decltype(t)>(partial));
  });
  if (from.row_scalars == nullptr) return;
  for (int64_t slot = begin; slot < end; ++slot) {
    float* scalars = partial_scalars + slot * shape.topk;
    std::fill_n(scalars, shape.topk, 0.0f);
    GatherScalars(shape, from, slot, scalars);
  }
}

void CombineTokens(const MoEShape& shape, const std::vector<CombineSource>& from,
                   const CombineParams& p, int64_t begin, int64_t end) {
  VisitDType(shape.dtype, [&](auto* t) {
    CombineTokensOf<std::remove_pointer_t<decltype(t)>>(shape, from, p, begin, end);
  });
  if (p.row_scalars == nullptr) return;
  for (int64_t t = begin; t < end; ++t) {
    float* scalars = p.token_scalars + t * shape.topk;
    std::fill_n(scalars, shape.topk, 0.0f);
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      const int64_t slot = p.tables.send_slots[t * shape.num_ranks + rank];
      if (slot >= 0) GatherScalars(shape, from[rank], slot, scalars);
    }
  }
}

void PoisonCombine(const MoEShape& shape, const CombineParams& p) {
  VisitDType(shape.dtype, [&](auto* t) {
    FillNaN(static_cast<decltype(t)>(p.out), p.num_tokens * shape.hidden_size);
  });
  if (p.row_scalars != nullptr) FillNaN(p.token_scalars, p.num_tokens * shape.topk);
}

}  // namespace jax_ep::cpu
