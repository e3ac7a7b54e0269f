// Rounds for cpu_ops_test.cc: shapes and groups, and all ranks of a process walking through the
// same layers again and again.
#ifndef JAX_EP_TESTS_ROUNDS_H_
#define JAX_EP_TESTS_ROUNDS_H_

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "cpu/communicator.h"
#include "layer.h"

namespace jax_ep::test {

// Far above what anything here takes, since a busy machine must not fail a test that expects no
// timeout.
constexpr double kNoTimeout = 100.0;
// XLA numbers the devices of the next process so.
constexpr int32_t kOrdinalsPerProcess = 2048;

inline MoEShape SmallShape(int ranks, OutputLayout layout = OutputLayout::kFlat) {
  MoEShape shape;
  shape.num_ranks = ranks, shape.num_experts = 2 * ranks, shape.topk = 2, shape.hidden_size = 5;
  shape.max_tokens_per_rank = 3, shape.capacity = 6 * ranks, shape.layout = layout;
  return shape;
}

inline MoEShape DrawShape(int ranks, Random& random, Features features = {}) {
  MoEShape shape;
  shape.num_ranks = ranks;
  shape.num_experts = ranks * static_cast<int32_t>(Between(random, 1, 6));
  shape.topk = static_cast<int32_t>(Between(random, 1, 16));
  shape.hidden_size = OneOf<int32_t>(random, {1, 3, 8, 17, 33, 96});
  shape.max_tokens_per_rank = OneOf<int32_t>(random, {1, 2, 9, 20});
  shape.layout = OneOf(random, {OutputLayout::kFlat, OutputLayout::kRankMajor});
  if (features.expert_major && Between(random, 0, 2) == 0)
    shape.layout = OutputLayout::kExpertMajor, shape.low_latency = true;
  shape.dtype = OneOf(random, {DType::kF16, DType::kBF16, DType::kF32, DType::kF64});
  if (shape.layout == OutputLayout::kFlat)
    shape.expert_alignment = OneOf<int32_t>(random, {1, 1, 3, 16});
  const int64_t tokens = int64_t{ranks} * shape.max_tokens_per_rank;
  // In kExpertMajor of each expert; too few where tokens name it more than once.
  const bool expert_major = shape.layout == OutputLayout::kExpertMajor;
  const int64_t worst = expert_major ? tokens
                                     : tokens * shape.rows_per_token() +
                                           shape.local_experts() * (shape.expert_alignment - 1);
  shape.capacity = Between(random, 0, 2) > 0 ? worst : Between(random, 1, worst);
  if (expert_major) shape.capacity *= shape.local_experts();
  shape.drop_overflow = Between(random, 0, 1) > 0;
  return shape;
}

// Rows over more than one tile of the sums, and tokens over more than one piece of work.
inline MoEShape LargeShape(int ranks, OutputLayout layout, DType dtype) {
  MoEShape shape = SmallShape(ranks, layout);
  shape.dtype = dtype;
  shape.hidden_size = dtype == DType::kF16 ? 1500 : 9;
  shape.max_tokens_per_rank = dtype == DType::kF16 ? 20 : 300;
  shape.capacity = int64_t{ranks} * shape.max_tokens_per_rank * shape.rows_per_token();
  return shape;
}

// For tests of what goes on around an op.
inline Layer AnyLayer(const MoEShape& shape) {
  Random random(0);
  return DrawLayer(shape, shape.max_tokens_per_rank, Draw::kUniform, random);
}

inline std::vector<Layer> DrawLayers(const MoEShape& shape, int count, Random& random,
                                     Features features = {}) {
  std::vector<Layer> layers;
  for (int i = 0; i < count; ++i) {
    const Draw draw = static_cast<Draw>(Between(random, 0, kNumDraws - 1));
    const int64_t num_tokens = Between(random, 0, shape.max_tokens_per_rank);
    layers.push_back(DrawLayer(shape, num_tokens, draw, random, features));
  }
  return layers;
}

// `groups` independent groups of `processes` x `local` ranks. Interleaved, neighbouring ranks live
// in different processes.
inline CommunicatorSpec MakeSpec(const MoEShape& shape, int processes, int local, int groups,
                                 double timeout_s, bool interleaved = false) {
  CommunicatorSpec spec;
  spec.shape = shape;
  spec.timeout_s = timeout_s;
  for (int group = 0; group < groups; ++group) {
    Group& members = spec.groups.emplace_back();
    for (int rank = 0; rank < processes * local; ++rank) {
      const int process = interleaved ? rank % processes : rank / local;
      const int index = interleaved ? rank / processes : rank % local;
      members.push_back({process, process * kOrdinalsPerProcess + group * local + index});
    }
  }
  return spec;
}

inline CommunicatorSpec LocalSpec(const MoEShape& shape, double timeout_s = kNoTimeout) {
  return MakeSpec(shape, 1, shape.num_ranks, 1, timeout_s);
}

inline OpKey KeyOf(size_t layer, int64_t round) {
  // Two layers share their call sites, as two iterations of a scan do.
  OpKey key;
  key.site = static_cast<int64_t>(layer / 2) * RankWalk::kNumSteps;
  key.run_id = round;
  key.occurrence = static_cast<int64_t>(layer % 2);
  return key;
}

// As XLA does in its threads. Threads inherit it; the ops must not let it change their results.
inline void FlushSubnormalsInThisThread() {
#ifdef __SSE2__
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero);
#endif
}

// Returns the first error that an op of this rank was given; stops there.
inline ErrorRecord RunRank(Communicator& communicator, const std::vector<Layer>& layers,
                           Place place, int64_t first_round, int64_t rounds) {
  const int32_t ordinal = communicator.spec().groups[place.group][place.rank].ordinal;
  Random random(static_cast<uint32_t>(ordinal) + 1);
  std::vector<size_t> order(layers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (int64_t round = first_round; round < first_round + rounds; ++round) {
    std::deque<RankWalk> walks;
    // Groups differ in which data a layer has.
    for (size_t i = 0; i < layers.size(); ++i)
      walks.emplace_back(layers[(i + place.group) % layers.size()], place.rank);
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order)
      walks[i].Start(communicator, ordinal, KeyOf(i, round), static_cast<uint32_t>(random()));
    ErrorRecord error;
    for (RankWalk& walk : walks)
      if (const ErrorRecord of_walk = walk.Wait(); error.code == ErrorCode::kNone) error = of_walk;
    if (error.code != ErrorCode::kNone) return error;
    for (const RankWalk& walk : walks) walk.Check();
  }
  return {};
}

// All ranks of this process; returns the error of each. They do not wait for each other between
// rounds.
inline std::vector<ErrorRecord> RunRanks(Communicator& communicator,
                                         const std::vector<Layer>& layers, int64_t first_round,
                                         int64_t rounds) {
  const CommunicatorSpec& spec = communicator.spec();
  std::deque<ErrorRecord> errors;
  std::vector<std::thread> threads;
  for (int group = 0; group < static_cast<int>(spec.groups.size()); ++group)
    for (int rank = 0; rank < spec.shape.num_ranks; ++rank) {
      if (spec.groups[group][rank].process != spec.process) continue;
      ErrorRecord& error = errors.emplace_back();
      threads.emplace_back([&, group, rank] {
        FlushSubnormalsInThisThread();
        error = RunRank(communicator, layers, {group, rank}, first_round, rounds);
      });
    }
  for (std::thread& thread : threads) thread.join();
  return {errors.begin(), errors.end()};
}

inline bool Equal(const ErrorRecord& a, const ErrorRecord& b) {
  return a.code == b.code && a.rank == b.rank && a.peer == b.peer && a.phase == b.phase &&
         a.expected == b.expected && a.got == b.got;
}

// The communicator holds the error of one of the layers, if any has one, and gives it away once.
inline void ExpectErrorOf(Communicator& communicator, const std::vector<Layer>& layers) {
  const ErrorRecord error = communicator.TakeError();
  const auto fits = [&](const Layer& layer) { return Equal(layer.error, error); };
  const auto fails = [](const Layer& layer) { return layer.error.code != ErrorCode::kNone; };
  if (!std::any_of(layers.begin(), layers.end(), fits) ||
      (error.code == ErrorCode::kNone && std::any_of(layers.begin(), layers.end(), fails)))
    Fail("TakeError: got code %d of rank %d", static_cast<int>(error.code), error.rank);
  if (communicator.TakeError().code != ErrorCode::kNone) Fail("TakeError: the error came twice");
}

inline void RunRounds(Communicator& communicator, const std::vector<Layer>& layers,
                      int64_t rounds) {
  for (const ErrorRecord& error : RunRanks(communicator, layers, 0, rounds))
    if (error.code != ErrorCode::kNone)
      Fail("%s; %s", DescribeTimeout(error, communicator.spec().timeout_s).c_str(),
           Describe(communicator.spec().shape).c_str());
  ExpectErrorOf(communicator, layers);
}

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_ROUNDS_H_
