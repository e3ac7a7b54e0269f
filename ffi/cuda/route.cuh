// What the two kernels of routing share: the parts of the tokens that teams work on, and the
// histograms that the first kernel leaves for the second.
#ifndef JAX_EP_CUDA_ROUTE_CUH_
#define JAX_EP_CUDA_ROUTE_CUH_

#include <cuda_runtime.h>

#include <algorithm>

#include "common/ops.h"
#include "cuda/dispatch.cuh"
#include "cuda/launch.h"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

// A thread per token.
static_assert(kTokensPerRoutePart == kTeamThreads);
// Routing leaves most of the GPU to the dispatch that it runs beside.
constexpr int kMaxRouteBlocks = 32;

JAX_EP_HOST_DEVICE inline int PartsPerSource(int64_t num_tokens) {
  return num_tokens == 0 ? 1 : static_cast<int>(CeilDiv(num_tokens, kTokensPerRoutePart));
}

// A block for each part while there are enough, then more teams per block, as its shared memory
// allows.
struct RouteLaunch {
  int teams, blocks;
  size_t shared_bytes;

  RouteLaunch(const MoEShape& shape, int64_t num_tokens, size_t bytes_per_team,
              size_t bytes_per_block) {
    constexpr size_t kSharedBytes = 96 << 10;
    const size_t left = kSharedBytes > bytes_per_block ? kSharedBytes - bytes_per_block : 0;
    const int64_t parts = int64_t{shape.num_ranks} * PartsPerSource(num_tokens);
    const auto most = static_cast<int64_t>(std::clamp<size_t>(left / bytes_per_team, 1, kMaxTeams));
    teams = static_cast<int>(std::min(CeilDiv(parts, kMaxRouteBlocks), most));
    blocks = static_cast<int>(std::min<int64_t>(CeilDiv(parts, teams), kMaxRouteBlocks));
    shared_bytes = bytes_per_block + teams * bytes_per_team;
  }
  Grid GridOf(int num_blocks) const { return {num_blocks, teams * kTeamThreads, shared_bytes}; }
};

// Calls f with each of a token's ids, or with -1; several are loaded at a time, since loads take
// longer than all that is done with them.
template <typename F>
__device__ __forceinline__ void ForEachId(const int32_t* ids, int topk, const F& f) {
  constexpr int kBatch = 8;
  for (int begin = 0; begin < topk; begin += kBatch) {
    int32_t batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = begin + k < topk ? ids[begin + k] : -1;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) f(batch[k]);
  }
}

// Calls f with each rank that a token goes to, ascending.
template <typename F>
__device__ __forceinline__ void ForEachRank(const MoEShape& shape, const int32_t* ids, const F& f) {
  constexpr unsigned kWindow = 64;
  for (unsigned first = 0; first < static_cast<unsigned>(shape.num_ranks); first += kWindow) {
    uint64_t ranks = 0;
    ForEachId(ids, shape.topk, [&](int id) {
      const unsigned rank = static_cast<unsigned>(id) / shape.local_experts() - first;
      if (IsExpert(shape, id) && rank < kWindow) ranks |= uint64_t{1} << rank;
    });
    for (; ranks != 0; ranks &= ranks - 1)
      f(static_cast<int>(first) + __ffsll(static_cast<long long>(ranks)) - 1);
  }
}

// Tokens of one source that a team works on.
struct Part {
  int source;
  int index;           // of the source's
  int histogram;       // row of the histograms: in order of (source, index)
  int64_t begin, end;  // tokens

  // Part 0 is this rank's own first one, and all its own come before any other: they wait for
  // nobody, so a peer that waits for them waits for something that is running.
  __device__ Part(const Arena& arena, int64_t num_tokens, int number) {
    const int per_source = PartsPerSource(num_tokens);
    source = (arena.rank + number / per_source) % arena.layout.num_ranks;
    index = number % per_source;
    histogram = source * per_source + index;
    begin = static_cast<int64_t>(index) * kTokensPerRoutePart;
    end = min(begin + kTokensPerRoutePart, num_tokens);
  }
};

// Columns of a histogram.
struct HistogramColumns {
  int experts, ranks, bad_ids;

  __device__ explicit HistogramColumns(const MoEShape& shape)
      : experts(0), ranks(shape.num_experts), bad_ids(shape.num_experts + shape.num_ranks) {}
};

// After the first kernel: what `column` counts in parts [begin, end), in order of (source, index).
// Several loads at a time, as above.
__device__ __forceinline__ int CountRange(const Arena& arena, int column, int begin, int end) {
  constexpr int kBatch = 16;
  int sum = 0;
  for (int first = begin; first < end; first += kBatch) {
    int counts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      counts[i] = first + i < end ? arena.Histogram(first + i)[column] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += counts[i];
  }
  return sum;
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_ROUTE_CUH_
