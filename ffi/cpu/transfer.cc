// Transfer: slots from rank to rank. What crosses to another process goes in laps through windows,
// a row at a time, as on GPUs; within a process, rows are read where they lie.
#include <algorithm>
#include <cstring>

#include "cpu/ops.h"

namespace jax_ep::cpu {
namespace {

int64_t RowsPerSlot(const MoEShape& shape, const TransferParams& p) {
  return (p.slot_bytes + shape.row_bytes() - 1) / shape.row_bytes();
}

// Row `row` of the slots that go from one rank to another, as a range of bytes of one of them.
struct RowOfSlot {
  int64_t slot;  // its number among them
  int64_t offset, bytes;

  RowOfSlot(const MoEShape& shape, const TransferParams& p, int64_t row)
      : slot(row / RowsPerSlot(shape, p)),
        offset(row % RowsPerSlot(shape, p) * shape.row_bytes()),
        bytes(std::min(shape.row_bytes(), p.slot_bytes - offset)) {}
};

const std::byte* Source(const TransferParams& p, int64_t slot) {
  return static_cast<const std::byte*>(p.source) + slot * p.slot_bytes;
}
std::byte* Dest(const TransferParams& p, int64_t slot) {
  return static_cast<std::byte*>(p.dest) + slot * p.slot_bytes;
}
const std::byte* SentRow(const TransferParams& p, int dst, const RowOfSlot& row) {
  return Source(p, p.tables.send_slots[p.tables.send_begin[dst] + row.slot]) + row.offset;
}

int64_t InLap(const MoEShape& shape, const TransferLap& lap, int64_t slots) {
  const int64_t rows = slots * RowsPerSlot(shape, lap.params);
  return std::clamp<int64_t>(rows - lap.number * shape.max_tokens_per_rank, 0,
                             shape.max_tokens_per_rank);
}

}  // namespace

int64_t NumLaps(const MoEShape& shape, const TransferParams& p) {
  const int64_t rows = *p.tables.most * RowsPerSlot(shape, p);
  return std::max<int64_t>(1, (rows + shape.max_tokens_per_rank - 1) / shape.max_tokens_per_rank);
}

int64_t NumReceived(const MoEShape& shape, const TransferLap& lap, int src) {
  const int32_t* begin = lap.params.tables.recv_begin + src;
  return InLap(shape, lap, begin[1] - begin[0]);
}

void GatherRows(const MoEShape& shape, const TransferLap& lap, int dst, std::byte* window) {
  const int32_t* begin = lap.params.tables.send_begin + dst;
  const int64_t rows = InLap(shape, lap, begin[1] - begin[0]);
  for (int64_t i = 0; i < rows; ++i) {
    const RowOfSlot row(shape, lap.params, lap.number * shape.max_tokens_per_rank + i);
    std::memcpy(window + i * shape.row_bytes(), SentRow(lap.params, dst, row), row.bytes);
  }
}

void PlaceRows(const MoEShape& shape, const TransferLap& lap, int src, const TransferSource& from,
               int me, int64_t begin, int64_t end) {
  const TransferTables& tables = lap.params.tables;
  for (int64_t i = begin; i < end; ++i) {
    const RowOfSlot row(shape, lap.params, lap.number * shape.max_tokens_per_rank + i);
    const std::byte* bytes = from.window != nullptr ? from.window + i * shape.row_bytes()
                                                    : SentRow(*from.params, me, row);
    for (int32_t slot = tables.recv_slots[tables.recv_begin[src] + row.slot]; slot >= 0;
         slot = tables.next[slot])
      std::memcpy(Dest(lap.params, slot) + row.offset, bytes, row.bytes);
  }
}

void FillSlot(const TransferParams& p, int64_t slot) {
  const int32_t source = p.tables.source[slot];
  if (source == kEmpty)
    std::memset(Dest(p, slot), 0, p.slot_bytes);
  else if (source != kArrives)
    std::memcpy(Dest(p, slot), Source(p, source), p.slot_bytes);
}

}  // namespace jax_ep::cpu
