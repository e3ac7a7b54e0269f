// What the processes of a group show each other. Each process owns kNumLanes lanes of one shared
// segment; a lane holds the inputs of its local ranks to one execution of one op, until every other
// process of the group has read them.
#ifndef JAX_EP_CPU_LANES_H_
#define JAX_EP_CPU_LANES_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "common/error.h"
#include "common/layout.h"

namespace jax_ep::cpu {

// More executions than this in flight at a time wait for one another. With several times as many,
// processes could fill their lanes with different ones and wait until they time out; the ops of a
// program depend on each other, which keeps it far from there.
constexpr int kNumLanes = 64;

// One execution of one op by one group; equal in all its processes. `site` numbers the op's call
// sites in the order in which the process loaded them, `occurrence` the executions within one
// program run.
struct OpKey {
  int64_t group = 0, site = 0, run_id = 0, occurrence = 0;

  bool operator==(const OpKey& o) const {
    return group == o.group && site == o.site && run_id == o.run_id && occurrence == o.occurrence;
  }
};

struct OpKeyHash {
  size_t operator()(const OpKey& key) const {
    uint64_t hash = 0;
    for (const int64_t part : {key.group, key.site, key.run_id, key.occurrence})
      hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
    return hash;
  }
};

// The inputs that a lane holds. The steps of one op share a key, and processes that run different
// programs may agree on a key and nothing else; they must not take each other's bytes for their
// own.
struct LaneContent {
  OpKey key;
  Phase phase = Phase::kRoute;
  int64_t num_tokens = 0;
  int64_t kind = 0;  // which optional inputs there are, and in which format
};

// Lives in shared memory, where zeros are a free lane. The owner of a free lane writes what it
// holds, then the inputs, and publishes it, which makes both visible to who sees that it holds
// them. Each reading process releases it once it has read; after the last one it is free, and its
// owner sees all reads done.
class LaneHeader {
 public:
  bool IsFree() const { return ReadersLeft(state_.load(std::memory_order_acquire)) == 0; }
  void SetContent(const LaneContent& content) {
    const Words words = WordsOf(content);
    for (size_t i = 0; i < words.size(); ++i) words_[i].store(words[i], std::memory_order_release);
  }
  void Publish(uint32_t num_readers) {
    const uint64_t times_published = state_.load(std::memory_order_relaxed) >> 32;
    state_.store((times_published + 1) << 32 | num_readers, std::memory_order_release);
  }

  bool Holds(const LaneContent& content) const {
    // The owner may replace the words while they are read, but then the state has changed too: it
    // was free, and is so still or has been published again.
    const uint64_t before = state_.load(std::memory_order_acquire);
    if (ReadersLeft(before) == 0 || !HasWords(WordsOf(content))) return false;
    const uint64_t after = state_.load(std::memory_order_acquire);
    return ReadersLeft(after) > 0 && after >> 32 == before >> 32;
  }
  void Release() { state_.fetch_sub(1, std::memory_order_release); }

 private:
  using Words = std::array<int64_t, 7>;

  static uint32_t ReadersLeft(uint64_t state) { return static_cast<uint32_t>(state); }
  static Words WordsOf(const LaneContent& content) {
    const OpKey& key = content.key;
    return {key.group,
            key.site,
            key.run_id,
            key.occurrence,
            static_cast<int64_t>(content.phase),
            content.num_tokens,
            content.kind};
  }
  bool HasWords(const Words& words) const {
    for (size_t i = 0; i < words.size(); ++i)
      if (words_[i].load(std::memory_order_acquire) != words[i]) return false;
    return true;
  }

  std::atomic<uint64_t> state_;  // times published << 32 | processes that have yet to read
  std::atomic<int64_t> words_[std::tuple_size_v<Words>];
};

// Offsets in bytes. Every op has regions of its own: untouched pages cost nothing.
struct LaneLayout {
  // From the start of the segment:
  int64_t headers, lanes, segment_bytes;
  // From the start of a lane, for one local rank. A transfer has its windows where combine has its
  // partial sums:
  int64_t topk_ids, x, scales, weights, partial, partial_scalars;
  int64_t rank_bytes, lane_bytes;
  // Strides of the regions that have one part per source rank.
  int64_t partial_stride, partial_scalars_stride;

  LaneLayout(const MoEShape& shape, int max_local_ranks) {
    const int64_t ranks = shape.num_ranks, tokens = shape.max_tokens_per_rank;
    const int64_t topk_bytes = tokens * shape.topk * 4;
    partial_stride = tokens * shape.row_bytes();
    partial_scalars_stride = topk_bytes;
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at;
      at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return begin;
    };
    topk_ids = take(topk_bytes);
    x = take(tokens * shape.row_bytes());
    scales = take(tokens * shape.hidden_size * 4);  // at most one for each element
    weights = take(topk_bytes);
    partial = take(ranks * partial_stride);
    partial_scalars = take(ranks * partial_scalars_stride);
    rank_bytes = at;
    lane_bytes = rank_bytes * max_local_ranks;
    at = 0;
    headers = take(kNumLanes * static_cast<int64_t>(sizeof(LaneHeader)));
    lanes = take(kNumLanes * lane_bytes);
    segment_bytes = at;
  }

  LaneHeader* Header(std::byte* segment, int lane) const {
    return reinterpret_cast<LaneHeader*>(segment + headers) + lane;
  }
  std::byte* Rank(std::byte* segment, int lane, int local_rank) const {
    return segment + lanes + lane * lane_bytes + local_rank * rank_bytes;
  }

 private:
  static constexpr int64_t kAlignment = 4096;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_LANES_H_
