// A transfer of slots between all ranks, for both tests of ops: who gets what is drawn from a seed.
#ifndef JAX_EP_TESTS_TRANSFER_H_
#define JAX_EP_TESTS_TRANSFER_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "common/ops.h"
#include "layer.h"

namespace jax_ep::test {

class TransferWalk {
 public:
  struct Rank {
    Bytes source, dest;
    Ints tables;
  };

  TransferWalk(const MoEShape& shape, Random& random)
      : num_ranks_(shape.num_ranks),
        num_source_(Between(random, 1, 5)),
        num_dest_(Between(random, 1, 7)),
        ranks_(num_ranks_) {
    const int64_t row = shape.row_bytes();
    // Odd ones, parts of rows, and several laps.
    const int64_t window = row * shape.max_tokens_per_rank;
    slot_bytes_ = OneOf<int64_t>(
        random, {1, 6, 20, 24, 16, row, 2 * row + 16, 3 * window + 16, 2 * window, row + 2});
    for (Rank& rank : ranks_) {
      rank.source.resize(num_source_ * slot_bytes_);
      for (auto& byte : rank.source) byte = static_cast<std::byte>(Between(random, 0, 255));
      rank.dest.assign(num_dest_ * slot_bytes_, std::byte{0x5a});
    }
    Draw(random);
    MakeTables(random);
  }

  Rank& rank(int rank) { return ranks_[rank]; }
  TransferParams Params(int rank) {
    Rank& r = ranks_[rank];
    return {r.source.data(), r.dest.data(), slot_bytes_, num_dest_, layout_.At(r.tables.data())};
  }
  TransferTablesLayout layout() const { return layout_; }

  void Check(int rank) const {
    for (int64_t slot = 0; slot < num_dest_; ++slot) {
      const Wanted wanted = wanted_[rank * num_dest_ + slot];
      for (int64_t i = 0; i < slot_bytes_; ++i) {
        const std::byte want = wanted.rank < 0
                                   ? std::byte{0}
                                   : ranks_[wanted.rank].source[wanted.slot * slot_bytes_ + i];
        if (ranks_[rank].dest[slot * slot_bytes_ + i] != want)
          Fail("transfer of %lld bytes: byte %lld of slot %lld on rank %d of %d",
               static_cast<long long>(slot_bytes_), static_cast<long long>(i),
               static_cast<long long>(slot), rank, num_ranks_);
      }
    }
  }

 private:
  struct Wanted {
    int rank;  // -1: empty
    int slot;
  };

  void Draw(Random& random) {
    const int64_t skew = Between(random, 0, 2);
    for (int i = 0; i < num_ranks_ * num_dest_; ++i) {
      const int rank = static_cast<int>(Between(random, -1, num_ranks_ - 1));
      const bool from_first = skew == 0 && rank > 0;
      wanted_.push_back(
          {from_first ? 0 : rank, static_cast<int>(Between(random, 0, num_source_ - 1))});
    }
  }

  void MakeTables(Random& random) {
    // By source and destination: slots there, and the first to get each.
    std::map<std::pair<int, int>, std::vector<std::pair<int32_t, int32_t>>> moves;
    std::vector<Ints> source(num_ranks_, Ints(num_dest_)), next(num_ranks_, Ints(num_dest_, -1));
    for (int rank = 0; rank < num_ranks_; ++rank)
      for (int32_t slot = 0; slot < num_dest_; ++slot) {
        const Wanted from = wanted_[rank * num_dest_ + slot];
        source[rank][slot] = from.rank < 0 ? kEmpty : from.rank == rank ? from.slot : kArrives;
        if (source[rank][slot] != kArrives) continue;
        auto& moved = moves[{from.rank, rank}];
        const auto known = std::find_if(moved.begin(), moved.end(),
                                        [&](const auto& move) { return move.first == from.slot; });
        if (known == moved.end()) {
          moved.emplace_back(from.slot, slot);
        } else {
          next[rank][slot] = next[rank][known->second];
          next[rank][known->second] = slot;
        }
      }
    size_t most = 0, most_of_rank = 0;
    for (const auto& [pair, moved] : moves) most = std::max(most, moved.size());
    most_of_rank = most * num_ranks_;
    layout_ = TransferTablesLayout(num_ranks_, num_dest_, most_of_rank + Between(random, 0, 3));
    for (int rank = 0; rank < num_ranks_; ++rank) {
      Ints& tables = ranks_[rank].tables;
      tables.assign(layout_.size, -9);
      std::copy(source[rank].begin(), source[rank].end(), tables.begin() + layout_.source);
      std::copy(next[rank].begin(), next[rank].end(), tables.begin() + layout_.next);
      tables[layout_.most] = static_cast<int32_t>(most);
      int32_t sent = 0, received = 0;
      for (int peer = 0; peer < num_ranks_; ++peer) {
        tables[layout_.send_begin + peer] = sent;
        tables[layout_.recv_begin + peer] = received;
        for (const auto& move : moves[{rank, peer}])
          tables[layout_.send_slots + sent++] = move.first;
        for (const auto& move : moves[{peer, rank}])
          tables[layout_.recv_slots + received++] = move.second;
      }
      tables[layout_.send_begin + num_ranks_] = sent;
      tables[layout_.recv_begin + num_ranks_] = received;
    }
  }

  const int num_ranks_;
  const int64_t num_source_, num_dest_;
  int64_t slot_bytes_;
  std::vector<Rank> ranks_;
  std::vector<Wanted> wanted_;  // [R, D]
  TransferTablesLayout layout_{1, 1, 0};
};

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_TRANSFER_H_
