#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/ops.h"

namespace jax_ep::cpu {
namespace {

int64_t AlignUp(int64_t n, int64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

bool IsExpert(const MoEShape& shape, int32_t id) { return id >= 0 && id < shape.num_experts; }

struct Totals {
  std::vector<int64_t> rows_per_expert;  // [E] over all ranks
  std::vector<int64_t> tokens;           // [R, R] that a source has for a destination
  std::vector<int64_t> bad_ids;          // [R]
};

Totals Count(const MoEShape& shape, const std::vector<const int32_t*>& topk_ids,
             int64_t num_tokens) {
  const int ranks = shape.num_ranks, local = shape.local_experts();
  Totals totals{std::vector<int64_t>(shape.num_experts), std::vector<int64_t>(ranks * ranks),
                std::vector<int64_t>(ranks)};
  std::vector<int64_t> last_token(ranks);
  for (int source = 0; source < ranks; ++source) {
    std::fill(last_token.begin(), last_token.end(), -1);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int k = 0; k < shape.topk; ++k) {
        const int32_t id = topk_ids[source][t * shape.topk + k];
        if (!IsExpert(shape, id)) {
          totals.bad_ids[source] += id != -1;
          continue;
        }
        ++totals.rows_per_expert[id];
        const int rank = id / local;
        totals.tokens[source * ranks + rank] += last_token[rank] != t;
        last_token[rank] = t;
      }
    }
  }
  return totals;
}

// Rows that there are, on a rank or, with kExpertMajor, for each expert.
int64_t RowLimit(const MoEShape& shape) {
  return shape.layout == OutputLayout::kExpertMajor ? shape.slots_per_expert() : shape.capacity;
}

// Rows that `rank` or, with kExpertMajor, one of its experts needs; padding included.
int64_t RowsNeeded(const MoEShape& shape, const Totals& totals, int rank) {
  int64_t rows = 0;
  if (shape.layout == OutputLayout::kRankMajor) {
    for (int source = 0; source < shape.num_ranks; ++source)
      rows += totals.tokens[source * shape.num_ranks + rank];
    return rows;
  }
  const auto first = totals.rows_per_expert.begin() + rank * shape.local_experts();
  const auto last = first + shape.local_experts();
  if (shape.layout == OutputLayout::kExpertMajor) return *std::max_element(first, last);
  for (auto expert = first; expert != last; ++expert)
    rows += AlignUp(*expert, shape.expert_alignment);
  return rows;
}

ErrorRecord FindError(const MoEShape& shape, const Totals& totals) {
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    if (totals.bad_ids[rank] > 0)
      return {ErrorCode::kBadExpertId, rank, -1, Phase::kRoute, shape.num_experts,
              totals.bad_ids[rank]};
  if (!shape.drop_overflow) {
    for (int rank = 0; rank < shape.num_ranks; ++rank)
      if (const int64_t rows = RowsNeeded(shape, totals, rank); rows > RowLimit(shape))
        return {ErrorCode::kOverflow, rank, -1, Phase::kRoute, RowLimit(shape), rows};
  }
  return {};
}

void FillSendRanks(const MoEShape& shape, const RouteParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    int32_t* ranks = p.tables.send_ranks + t * shape.topk;
    int32_t* end = ranks;
    for (int k = 0; k < shape.topk; ++k)
      if (const int32_t id = p.topk_ids[t * shape.topk + k]; IsExpert(shape, id))
        *end++ = id / shape.local_experts();
    std::sort(ranks, end);
    std::fill(std::unique(ranks, end), ranks + shape.topk, -1);
  }
}

// Rows from the first of each group to the first of the next, as if capacity had no end.
int64_t GroupRows(const MoEShape& shape, int me, const Totals& totals, int group) {
  switch (shape.layout) {
    case OutputLayout::kRankMajor:
      return totals.tokens[group * shape.num_ranks + me];
    case OutputLayout::kExpertMajor:
      return shape.slots_per_expert();
    case OutputLayout::kFlat:
      break;
  }
  return AlignUp(totals.rows_per_expert[me * shape.local_experts() + group],
                 shape.expert_alignment);
}

// First row of each group; the last entry is the end of all rows.
std::vector<int64_t> GroupOffsets(const MoEShape& shape, int me, const Totals& totals) {
  std::vector<int64_t> offsets{0};
  for (int group = 0; group < shape.num_row_groups(); ++group)
    offsets.push_back(offsets.back() + GroupRows(shape, me, totals, group));
  return offsets;
}

// Gives each row its place by (group, source, token, k). Rows that find none are dropped and
// counted.
class RowPlacer {
 public:
  RowPlacer(const MoEShape& shape, int me, const RouteParams& params, std::vector<int64_t> offsets)
      : shape_(shape),
        first_expert_(me * shape.local_experts()),
        params_(params),
        next_(std::move(offsets)) {}

  void Place(int source, const int32_t* topk_ids) {
    const int per_token = shape_.rows_per_token();
    int32_t* rows = params_.tables.recv_rows + source * params_.num_tokens * per_token;
    for (int64_t t = 0; t < params_.num_tokens; ++t) {
      const int32_t* ids = topk_ids + t * shape_.topk;
      if (std::any_of(ids, ids + shape_.topk, [this](int32_t id) { return IsMine(id); }))
        PlaceToken(source, ids, rows + t * per_token);
    }
  }
  int32_t num_dropped() const { return num_dropped_; }

 private:
  bool IsMine(int32_t id) const {
    return id >= first_expert_ && id < first_expert_ + shape_.local_experts();
  }

  // The row that those of a group stay below.
  int64_t End(int group) const {
    return shape_.layout == OutputLayout::kExpertMajor ? (group + 1) * shape_.slots_per_expert()
                                                       : shape_.capacity;
  }

  int32_t NextRow(int group) {
    const int64_t row = next_[group]++;
    if (row >= End(group)) return ++num_dropped_, kDropped;
    ++params_.tables.group_counts[group];
    return static_cast<int32_t>(row);
  }

  void PlaceToken(int source, const int32_t* ids, int32_t* rows) {
    if (shape_.layout == OutputLayout::kRankMajor) {
      const int32_t row = rows[0] = NextRow(source);
      if (row < 0) return;
      for (int k = 0; k < shape_.topk; ++k) {
        const int32_t local = IsMine(ids[k]) ? ids[k] - first_expert_ : -1;
        params_.recv_topk_ids[int64_t{row} * shape_.topk + k] = local;
        if (local >= 0) ++params_.num_tokens_per_expert[local];
      }
      return;
    }
    for (int k = 0; k < shape_.topk; ++k)
      rows[k] = IsMine(ids[k]) ? NextRow(ids[k] - first_expert_) : kNotMine;
  }

  const MoEShape& shape_;
  const int32_t first_expert_;
  const RouteParams& params_;
  std::vector<int64_t> next_;
  int32_t num_dropped_ = 0;
};

}  // namespace

ErrorRecord Route(const MoEShape& shape, int me, const std::vector<const int32_t*>& topk_ids,
                  const RouteParams& params) {
  const Totals totals = Count(shape, topk_ids, params.num_tokens);
  const ErrorRecord error = FindError(shape, totals);
  const int ranks = shape.num_ranks, groups = shape.num_row_groups();
  const RouteTables& tables = params.tables;

  FillSendRanks(shape, params);
  std::fill_n(tables.recv_rows, ranks * params.num_tokens * shape.rows_per_token(), kNotMine);
  std::fill_n(tables.group_counts, groups, 0);
  std::fill_n(params.num_tokens_per_expert, shape.local_experts(), 0);
  if (shape.layout == OutputLayout::kRankMajor)
    std::fill_n(params.recv_topk_ids, shape.capacity * shape.topk, -1);

  std::vector<int64_t> offsets = GroupOffsets(shape, me, totals);
  RowPlacer placer(shape, me, params, offsets);
  for (int source = 0; source < ranks; ++source) placer.Place(source, topk_ids[source]);

  for (int group = 0; group <= groups; ++group)
    tables.group_offsets[group] = static_cast<int32_t>(std::min(offsets[group], shape.capacity));
  if (shape.layout != OutputLayout::kRankMajor)
    std::copy_n(tables.group_counts, groups, params.num_tokens_per_expert);
  std::copy_n(tables.group_offsets, groups + 1, params.offsets);
  *params.num_dropped = placer.num_dropped();

  tables.status[kNumDropped] = placer.num_dropped();
  tables.status[kCode] = static_cast<int32_t>(error.code);
  tables.status[kRank] = error.rank;
  tables.status[kDetail] = static_cast<int32_t>(error.got);
  return error;
}

}  // namespace jax_ep::cpu
