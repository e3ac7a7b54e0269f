// What the processes of a group show each other. Each process owns kNumLanes lanes of one shared
// segment; a lane holds the inputs of its local ranks to one execution of one op, until every other
// process of the group has read them.
#ifndef JAX_EP_CPU_LANES_H_
#define JAX_EP_CPU_LANES_H_

#include <atomic>
#include <cstdint>

#include "common/error.h"
#include "common/layout.h"

namespace jax_ep::cpu {

// More executions than this in flight at a time wait for one another.
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

// Lives in shared memory. The owner writes the key (release), then the lane, then `readers_left`
// (release), which makes the lane visible to who acquires it. Each reading process lowers it once
// when it has read (release); 0 gives the lane back to its owner.
struct LaneHeader {
  std::atomic<int32_t> readers_left;
  std::atomic<int32_t> phase;
  std::atomic<int64_t> group, site, run_id, occurrence, num_tokens;

  bool Holds(const OpKey& key) const {
    // In this order: a key that is just being replaced is seen no later than that nobody may read
    // yet.
    return key == Key() && readers_left.load(std::memory_order_acquire) > 0;
  }
  void SetKey(const OpKey& key) {
    constexpr auto release = std::memory_order_release;
    group.store(key.group, release), site.store(key.site, release);
    run_id.store(key.run_id, release), occurrence.store(key.occurrence, release);
  }

 private:
  OpKey Key() const {
    constexpr auto acquire = std::memory_order_acquire;
    return {group.load(acquire), site.load(acquire), run_id.load(acquire),
            occurrence.load(acquire)};
  }
};

// Offsets in bytes. Every op has regions of its own: untouched pages cost nothing.
struct LaneLayout {
  // From the start of the segment:
  int64_t headers, lanes, segment_bytes;
  // From the start of a lane, for one local rank:
  int64_t topk_ids, x, weights, send_tokens, partial, partial_scalars;
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
    weights = take(topk_bytes);
    send_tokens = take(ranks * tokens * 4);
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
