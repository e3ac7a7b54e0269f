#include <algorithm>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/rows.h"

namespace jax_ep::cpu {
namespace {

// A tile of both sums stays in the first-level cache while up to K rows are added to it.
constexpr int64_t kTile = 1024;

template <typename T>
void SumRows(const MoEShape& shape, const CombineSource& from, int64_t token, int64_t column,
             int64_t n, Sum<T>* sum) {
  std::fill_n(sum, n, Sum<T>{0});
  const int per_token = shape.rows_per_token();
  for (int k = 0; k < per_token; ++k) {
    const int64_t row = from.recv_rows[token * per_token + k];
    if (row < 0) continue;
    const float weight = from.row_weights == nullptr ? 1.0f : from.row_weights[row];
    AddScaled(sum, reinterpret_cast<const T*>(from.y) + row * shape.hidden_size + column, weight,
              n);
  }
}

// Adds the scalars of one token, each at its k. In kRankMajor the one row holds all of them.
void GatherScalars(const MoEShape& shape, const CombineSource& from, int64_t token,
                   float* scalars) {
  const int per_token = shape.rows_per_token(), topk = shape.topk;
  if (from.partial_scalars != nullptr) {
    for (int k = 0; k < topk; ++k) scalars[k] += from.partial_scalars[token * topk + k];
    return;
  }
  for (int k = 0; k < topk; ++k) {
    const int64_t row = from.recv_rows[token * per_token + (per_token == 1 ? 0 : k)];
    if (row < 0) continue;
    scalars[k] += from.row_scalars[shape.layout == OutputLayout::kRankMajor ? row * topk + k : row];
  }
}

// Whether the token has rows here, if only dropped ones: then its source reads their sum.
bool TakesPart(const MoEShape& shape, const CombineSource& from, int64_t token) {
  const int32_t* rows = from.recv_rows + token * shape.rows_per_token();
  return std::any_of(rows, rows + shape.rows_per_token(),
                     [](int32_t row) { return row != kNotMine; });
}

template <typename T>
void SumToken(const MoEShape& shape, const CombineSource& from, int64_t token, T* partial) {
  Sum<T> sum[kTile];
  const int64_t hidden = shape.hidden_size;
  for (int64_t column = 0; column < hidden; column += kTile) {
    const int64_t n = std::min(kTile, hidden - column);
    SumRows<T>(shape, from, token, column, n, sum);
    Store(partial + token * hidden + column, sum, n);
  }
}

// In the order in which their sums are added.
template <typename F>
void ForEachRank(const MoEShape& shape, const CombineParams& p, int64_t token, F&& f) {
  const int32_t* ranks = p.tables.send_ranks + token * shape.topk;
  for (int i = 0; i < shape.topk && ranks[i] >= 0; ++i) f(ranks[i]);
}

template <typename T>
void CombineTokensOf(const MoEShape& shape, const std::vector<CombineSource>& from,
                     const CombineParams& p, int64_t begin, int64_t end) {
  Sum<T> sum[kTile], total[kTile];
  const int64_t hidden = shape.hidden_size;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t column = 0; column < hidden; column += kTile) {
      const int64_t n = std::min(kTile, hidden - column);
      std::fill_n(total, n, Sum<T>{0});
      ForEachRank(shape, p, t, [&](int32_t rank) {
        if (from[rank].partial != nullptr) {
          AddScaled(total, reinterpret_cast<const T*>(from[rank].partial) + t * hidden + column,
                    1.0f, n);
        } else {
          SumRows<T>(shape, from[rank], t, column, n, sum);
          AddRounded<T>(total, sum, n);
        }
      });
      Store(static_cast<T*>(p.out) + t * hidden + column, total, n);
    }
  }
}

}  // namespace

void SumTokens(const MoEShape& shape, const CombineSource& from, int64_t begin, int64_t end,
               std::byte* partial, float* partial_scalars) {
  for (int64_t token = begin; token < end; ++token) {
    if (!TakesPart(shape, from, token)) continue;
    VisitDType(shape.dtype, [&](auto* t) {
      SumToken(shape, from, token, reinterpret_cast<decltype(t)>(partial));
    });
    if (from.row_scalars == nullptr) continue;
    float* scalars = partial_scalars + token * shape.topk;
    std::fill_n(scalars, shape.topk, 0.0f);
    GatherScalars(shape, from, token, scalars);
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
    ForEachRank(shape, p, t, [&](int32_t rank) { GatherScalars(shape, from[rank], t, scalars); });
  }
}

void PoisonCombine(const MoEShape& shape, const CombineParams& p) {
  VisitDType(shape.dtype, [&](auto* t) {
    FillNaN(static_cast<decltype(t)>(p.out), p.num_tokens * shape.hidden_size);
  });
  if (p.row_scalars != nullptr) FillNaN(p.token_scalars, p.num_tokens * shape.topk);
}

}  // namespace jax_ep::cpu
