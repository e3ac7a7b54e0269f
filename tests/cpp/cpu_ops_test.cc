// The CPU ops without Python and XLA, so that a sanitizer sees nothing but our code. Threads and
// processes are ranks; every output is compared with naive.h. Ends with a message at the first
// failure.
//
//   cmake -S . -B build/asan -DJAX_EP_SANITIZE=address,undefined && cmake --build build/asan -j2
//   cmake -S . -B build/tsan -DJAX_EP_SANITIZE=thread && cmake --build build/tsan -j2
//   build/asan/cpu_ops_test && build/tsan/cpu_ops_test
//   g++ -std=c++17 -O2 -pthread -Iffi tests/cpp/cpu_ops_test.cc ffi/common/error.cc ffi/cpu/*.cc
//
// An argument runs only the tests whose name contains it. GCC 12's ThreadSanitizer needs 28 or
// fewer bits of address space randomisation (`sysctl vm.mmap_rnd_bits`); where there are more and
// it reports an "unexpected memory mapping", run it under `setarch -R`. Processes are forked before
// the test makes its first thread, since ThreadSanitizer does not follow a fork of several threads.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <thread>

#include "common/registry.h"
#include "cpu/communicator.h"
#include "cpu/quantize.h"
#include "cpu/rows.h"
#include "layer.h"
#include "naive.h"
#include "processes.h"
#include "rounds.h"
#include "transfer.h"

namespace jax_ep::test {
namespace {

using Clock = std::chrono::steady_clock;
using Communicators = Registry<Communicator>;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// --- Threads as ranks ---

int TestRandomShapes() {
  constexpr int kShapes = 40;
  Random random(1);
  int passed = 0;
  for (const int ranks : {1, 2, 3, 4, 8})
    for (int i = 0; i < kShapes; ++i, ++passed) {
      const MoEShape shape = DrawShape(ranks, random, kAllFeatures);
      Communicator communicator(LocalSpec(shape));
      RunRounds(communicator, DrawLayers(shape, 3, random, kAllFeatures), 2);
    }
  return passed;
}

constexpr OutputLayout kLayouts[] = {OutputLayout::kFlat, OutputLayout::kRankMajor,
                                     OutputLayout::kExpertMajor};

constexpr DType kDTypes[] = {DType::kF16, DType::kBF16, DType::kF32, DType::kF64};

// Every way to draw topk_ids with every layout, and with capacity for all, for some and for one
// row.
int TestRoutings() {
  Random random(2);
  int passed = 0;
  for (int draw = 0; draw < kNumDraws; ++draw)
    for (const OutputLayout layout : kLayouts)
      for (const int64_t capacity : {18, 7, 1})
        for (const bool drop : {false, true}) {
          MoEShape shape = SmallShape(3, layout);
          shape.capacity = capacity, shape.drop_overflow = drop;
          if (layout == OutputLayout::kExpertMajor)
            shape.capacity = naive::AlignUp(capacity, shape.local_experts());
          Communicator communicator(LocalSpec(shape));
          std::vector<Layer> layers;
          for (const int64_t tokens : {0, 1, 3})
            layers.push_back(
                DrawLayer(shape, tokens, static_cast<Draw>(draw), random, kAllFeatures));
          RunRounds(communicator, layers, 1);
          ++passed;
        }
  return passed;
}

int TestLargeShapes() {
  Random random(3);
  int passed = 0;
  for (const OutputLayout layout : kLayouts)
    for (const DType dtype : kDTypes) {
      const MoEShape shape = LargeShape(2, layout, dtype);
      Communicator communicator(LocalSpec(shape));
      std::vector<Layer> layers;
      for (const Features& features : {Features{}, kAllFeatures})
        layers.push_back(
            DrawLayer(shape, shape.max_tokens_per_rank, Draw::kUniform, random, features));
      RunRounds(communicator, layers, 1);
      ++passed;
    }
  return passed;
}

int TestManyRounds() {
  constexpr int kRounds = 1000;
  Random random(4);
  for (const int ranks : {2, 4}) {
    const MoEShape shape = SmallShape(ranks);
    Communicator communicator(LocalSpec(shape));
    RunRounds(communicator, DrawLayers(shape, 4, random, kAllFeatures), kRounds);
  }
  return 2 * kRounds;
}

// Two groups of one process share threads and locks, nothing else.
int TestGroups() {
  constexpr int kRounds = 100;
  Random random(5);
  const MoEShape shape = SmallShape(3);
  Communicator communicator(MakeSpec(shape, 1, 3, 2, kNoTimeout));
  RunRounds(communicator, DrawLayers(shape, 4, random, kAllFeatures), kRounds);
  return kRounds;
}

// --- One op, and what its ranks are told ---

// Hands one value from a callback to whoever waits for it.
class Answer {
 public:
  cpu::DoneCallback Callback() {
    return [this](const ErrorRecord& error) { Set(error); };
  }
  void Set(const ErrorRecord& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::exchange(is_set_, true)) Fail("an op was completed twice");
    error_ = error;
    set_.notify_all();
  }
  ErrorRecord Get() {
    std::unique_lock<std::mutex> lock(mutex_);
    set_.wait(lock, [this] { return is_set_; });
    return error_;
  }
  bool is_set() {
    std::lock_guard<std::mutex> lock(mutex_);
    return is_set_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable set_;
  ErrorRecord error_;
  bool is_set_ = false;
};

void ExpectTimeout(const ErrorRecord& error, int rank, int peer, Phase phase) {
  if (error.code == ErrorCode::kTimeout && error.rank == rank && error.peer == peer &&
      error.phase == phase)
    return;
  Fail(
      "expected a timeout of rank %d waiting for rank %d in phase %d, got code %d, rank %d, peer "
      "%d, phase %d",
      rank, peer, static_cast<int>(phase), static_cast<int>(error.code), error.rank, error.peer,
      static_cast<int>(error.phase));
}

void ExpectBetween(const char* what, double seconds, double low, double high) {
  if (seconds < low || seconds > high)
    Fail("%s took %.3f s, expected %.3f to %.3f", what, seconds, low, high);
}

// A rank of this process never comes: the others hear of it in time, and all that follows fails at
// once.
int TestMissingRank() {
  const Layer layer = AnyLayer(SmallShape(3));
  Communicator communicator(LocalSpec(layer.shape, 0.5));
  RankWalk first(layer, 0), third(layer, 2);
  Answer answers[2], late;
  const auto start = Clock::now();
  communicator.Submit(0, {}, first.Op(RankWalk::kRoute), answers[0].Callback());
  communicator.Submit(2, {}, third.Op(RankWalk::kRoute), answers[1].Callback());
  for (Answer& answer : answers) {
    const ErrorRecord error = answer.Get();
    ExpectTimeout(error, 0, 1, Phase::kRoute);
    if (error.expected != 3 || error.got != 2)
      Fail("expected 2 of 3 arrivals, got %lld", static_cast<long long>(error.got));
  }
  ExpectBetween("the timeout", SecondsSince(start), 0.5, 5.0);
  communicator.Submit(2, {}, third.Op(RankWalk::kRoute), late.Callback());
  ExpectTimeout(late.Get(), 0, 1, Phase::kRoute);
  for (int i = 0; i < 2; ++i) ExpectTimeout(communicator.TakeError(), 0, 1, Phase::kRoute);
  return 1;
}

int TestInfiniteTimeout() {
  const Layer layer = AnyLayer(SmallShape(2));
  Communicator communicator(LocalSpec(layer.shape, std::numeric_limits<double>::infinity()));
  RankWalk first(layer, 0), second(layer, 1);
  Answer answers[2];
  communicator.Submit(0, {}, first.Op(RankWalk::kRoute), answers[0].Callback());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  communicator.Submit(1, {}, second.Op(RankWalk::kRoute), answers[1].Callback());
  for (Answer& answer : answers)
    if (answer.Get().code != ErrorCode::kNone) Fail("an infinite timeout ended");
  return 1;
}

// --- Destruction ---

// Does not wait for ranks that may never come.
int TestDestroyWithPendingArrivals() {
  constexpr int kPending = 20;
  const Layer layer = AnyLayer(SmallShape(2));
  RankWalk walk(layer, 0);
  std::deque<Answer> answers(kPending);
  const auto start = Clock::now();
  {
    Communicator communicator(LocalSpec(layer.shape));
    for (int i = 0; i < kPending; ++i)
      communicator.Submit(i % 2, {0, i, 0, 0}, walk.Op(RankWalk::kRoute), answers[i].Callback());
  }
  for (int i = 0; i < kPending; ++i)
    ExpectTimeout(answers[i].Get(), i % 2, 1 - i % 2, Phase::kRoute);
  ExpectBetween("destruction", SecondsSince(start), 0, 10);
  return kPending;
}

// A callback that blocks, and so outlives the communicator, does not keep it from ending.
int TestDestroyWithCallbacksOutstanding() {
  const Layer layer = AnyLayer(SmallShape(2));
  RankWalk walks[] = {{layer, 0}, {layer, 1}};
  Answer go, answers[2];
  {
    Communicator communicator(LocalSpec(layer.shape));
    for (int rank = 0; rank < 2; ++rank)
      communicator.Submit(rank, {}, walks[rank].Op(RankWalk::kRoute),
                          [&go, &answer = answers[rank]](const ErrorRecord& error) {
                            go.Get();
                            answer.Set(error);
                          });
  }
  if (answers[0].is_set() || answers[1].is_set()) Fail("a callback did not block");
  go.Set({});
  for (Answer& answer : answers)
    if (answer.Get().code != ErrorCode::kNone) Fail("an op that had begun was not completed");
  return 1;
}

// As a handler does: finds a communicator by its id, and lets go of it in the callback.
void UseRegistered(const Layer& layer, int64_t id, int64_t run_id) {
  auto communicator = Communicators::Get().Find(id);
  if (communicator == nullptr || communicator->spec().id != id ||
      Communicators::Get().Find(-1) != nullptr)
    Fail("registry");
  RankWalk walk(layer, 0);
  Answer answer;
  // The registry still holds it while this thread is in it.
  Communicator& registered = *communicator;
  registered.Submit(0, {0, registered.NextSite(), run_id, 0}, walk.Op(RankWalk::kRoute),
                    [&answer, held = std::move(communicator)](const ErrorRecord& error) mutable {
                      held.reset();
                      answer.Set(error);
                    });
  Communicators::Get().Remove(id);
  Communicators::Get().Remove(id);
  if (answer.Get().code != ErrorCode::kNone || Communicators::Get().Find(id) != nullptr)
    Fail("registry");
}

// Communicators come and go, and callbacks drop the last reference.
int TestRegistry() {
  constexpr int kThreads = 4, kRounds = 50;
  const Layer layer = AnyLayer(SmallShape(1));
  std::vector<std::thread> threads;
  for (int64_t id = 0; id < kThreads; ++id)
    threads.emplace_back([&layer, id] {
      for (int64_t round = 0; round < kRounds; ++round) {
        CommunicatorSpec spec = LocalSpec(layer.shape);
        spec.id = id;
        Communicators::Get().Add(std::make_shared<Communicator>(spec));
        UseRegistered(layer, id, round);
      }
    });
  for (std::thread& thread : threads) thread.join();
  return kThreads * kRounds;
}

// --- Lanes and rows ---

cpu::LaneContent LaneContentOf(int64_t site, int64_t run_id, int64_t occurrence) {
  return {{0, site, run_id, occurrence}, Phase::kRoute, 1};
}

// Who finds that a lane holds a key sees the bytes that were written for it.
int TestLaneHandover() {
  constexpr int64_t kFills = 20000;
  cpu::LaneHeader header{};
  int64_t payload = -1;
  std::thread reader([&] {
    for (int64_t i = 0; i < kFills; ++i) {
      while (!header.Holds(LaneContentOf(i, 0, 0))) std::this_thread::yield();
      if (payload != i) Fail("lane: not the bytes of fill %d", static_cast<int>(i));
      header.Release();
    }
  });
  for (int64_t i = 0; i < kFills; ++i) {
    while (!header.IsFree()) std::this_thread::yield();
    header.SetContent(LaneContentOf(i, 0, 0));
    payload = i;
    header.Publish(1);
  }
  reader.join();
  return kFills;
}

// A lane that is filled with two keys in turn never seems to hold one mixed of both.
int TestLaneKeys() {
  constexpr int64_t kFills = 600000;
  // Over two cache lines, as many headers are: within one, a mixed key is hardly ever seen.
  struct alignas(64) {
    std::byte before[32];
    cpu::LaneHeader header;
  } line = {};
  cpu::LaneHeader& header = line.header;
  std::atomic<bool> is_over{false};
  std::thread bystander([&] {
    while (!is_over)
      for (int mix = 1; mix < 7; ++mix)
        if (header.Holds(LaneContentOf(mix >> 2, mix >> 1 & 1, mix & 1)))
          Fail("lane: held a key that nobody set");
  });
  for (int64_t i = 0; i < kFills; ++i) {
    const cpu::LaneContent content = LaneContentOf(i % 2, i % 2, i % 2);
    header.SetContent(content);
    header.Publish(1);
    if (!header.Holds(content)) Fail("lane: does not hold the key that was set");
    header.Release();  // as a reader would
  }
  is_over = true;
  bystander.join();
  return kFills;
}

// Every 16-bit number survives a copy, and is what numbers beside it are rounded to.
template <typename T>
void CheckRounding(DType dtype) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const T number{static_cast<uint16_t>(bits)};
    T copy;
    cpu::Scale(&copy, &number, 1.0f, 1);
    const double value = naive::Decode16(number.bits, naive::FormatOf(dtype));
    if (std::isnan(value) ? !std::isnan(naive::Decode16(copy.bits, naive::FormatOf(dtype)))
                          : copy.bits != bits)
      Fail("rows: %#x of dtype %d became %#x", bits, static_cast<int>(dtype), copy.bits);
    // The float halfway to the next number, and its neighbours.
    const double next = naive::Decode16(static_cast<uint16_t>(bits + 1), naive::FormatOf(dtype));
    const float middle = static_cast<float>(value / 2 + next / 2);
    for (const float x :
         {middle, std::nextafterf(middle, 0.0f), std::nextafterf(middle, 2 * middle)}) {
      T rounded;
      cpu::Store(&rounded, &x, 1);
      const uint16_t expected = naive::Encode(x, naive::FormatOf(dtype));
      if (!std::isnan(x) && rounded.bits != expected)
        Fail("rows: %a as dtype %d: expected %#x, got %#x", x, static_cast<int>(dtype), expected,
             rounded.bits);
    }
  }
}

int TestRounding() {
  CheckRounding<cpu::F16>(DType::kF16);
  CheckRounding<cpu::BF16>(DType::kBF16);
  return 2 << 16;
}

// Rows of every type of element and scale, with every 16-bit number, and blocks of every kind.
void CheckQuantize(DType dtype, int64_t block, const Bytes& rows, int64_t n) {
  for (const QuantDType to : {QuantDType::kE4M3, QuantDType::kE5M2, QuantDType::kInt8})
    for (const ScaleDType scale_dtype : {ScaleDType::kF32, ScaleDType::kE8M0}) {
      const naive::Quant naive_quant{block, to, scale_dtype};
      Bytes expected, expected_scales;
      naive::Quantize(dtype, rows, n, naive_quant, &expected, &expected_scales);
      QuantParams quant;
      quant.block = static_cast<int32_t>(block), quant.dtype = to, quant.scale_dtype = scale_dtype;
      Bytes elements(n), scales(expected_scales.size());
      Floats widened(n);
      cpu::QuantizeRow(dtype, quant, rows.data(), n, widened.data(), elements.data(),
                       scales.data());
      for (int64_t i = 0; i < n; ++i)
        if (!naive::SameElement(to, elements[i], expected[i]) ||
            !naive::SameScale(scale_dtype, scales, expected_scales, i / block))
          Fail("quantize: %a of dtype %d to %d, scale %d of %d: expected %#x, got %#x",
               naive::Get(dtype, rows.data(), i), static_cast<int>(dtype), static_cast<int>(to),
               static_cast<int>(i / block), static_cast<int>(scale_dtype),
               static_cast<int>(expected[i]), static_cast<int>(elements[i]));
    }
}

int TestQuantize() {
  constexpr int64_t kBlocks[] = {1, 2, 7, 16, 32, 100, 128, 1 << 12}, kNumbers = 1 << 16;
  Random random(10);
  int passed = 0;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    Bytes rows(2 * kNumbers);
    for (int bits = 0; bits < kNumbers; ++bits) {
      const auto number = static_cast<uint16_t>(bits);
      std::memcpy(rows.data() + 2 * bits, &number, 2);
    }
    for (const int64_t block : {1, 16, 1 << 12}) CheckQuantize(dtype, block, rows, kNumbers);
  }
  for (const DType dtype : kDTypes)
    for (const int64_t block : kBlocks) {
      const int64_t n = kNumbers / block * block;
      CheckQuantize(dtype, block, DrawRowsToQuantise(dtype, n, block, random), n);
      ++passed;
    }
  return passed;
}

// --- Processes as ranks ---

struct Topology {
  int processes, local, groups;
  bool interleaved;
};
constexpr Topology kTopologies[] = {
    {2, 1, 1, false}, {2, 2, 1, false}, {2, 2, 1, true}, {4, 1, 1, false}, {2, 1, 2, false}};

CommunicatorSpec SpecOf(const Topology& t, const MoEShape& shape, double timeout_s) {
  return MakeSpec(shape, t.processes, t.local, t.groups, timeout_s, t.interleaved);
}

int TestProcesses() {
  constexpr int kShapes = 8, kRounds = 120;
  for (const Topology& topology : kTopologies)
    RunProcesses(topology.processes, [&](Board& board, int process) {
      const int ranks = topology.processes * topology.local;
      Random random(6);  // all processes draw the same
      for (int i = 0; i < kShapes + 1; ++i) {
        const MoEShape shape =
            i < kShapes ? DrawShape(ranks, random, kAllFeatures) : SmallShape(ranks);
        const std::vector<Layer> layers = DrawLayers(shape, 4, random, kAllFeatures);
        const auto communicator =
            Connect(board, SpecOf(topology, shape, kNoTimeout), process, topology.processes);
        RunRounds(*communicator, layers, i < kShapes ? 3 : kRounds);
        // Ends while others may still read what it published.
      }
    });
  return static_cast<int>(std::size(kTopologies)) * (kShapes * 3 + kRounds);
}

// Transfers by all ranks of this process, each on a thread; the other processes draw the same.
void RunTransfers(Communicator& communicator, Random& random) {
  constexpr int kTransfers = 6;
  const CommunicatorSpec& spec = communicator.spec();
  for (int transfer = 0; transfer < kTransfers; ++transfer) {
    TransferWalk walk(spec.shape, random);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < spec.shape.num_ranks; ++rank) {
      const Member& member = spec.groups[0][rank];
      if (member.process != spec.process) continue;
      threads.emplace_back([&, rank] {
        const TransferParams params = walk.Params(rank);
        const int64_t laps = cpu::NumLaps(spec.shape, params);
        for (int64_t lap = 0; lap < laps; ++lap) {
          Answer answer;
          OpKey key;
          key.run_id = transfer;
          communicator.Submit(member.ordinal, key, cpu::TransferLap{params, lap},
                              answer.Callback());
          if (answer.Get().code != ErrorCode::kNone) Fail("a transfer failed");
        }
        walk.Check(rank);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

int TestTransfers() {
  constexpr int kShapes = 12;
  constexpr Topology kOneProcess[] = {{1, 1, 1, false}, {1, 3, 1, false}, {1, 8, 1, false}};
  int passed = 0;
  const auto run = [&](const Topology& t) {
    RunProcesses(t.processes, [&](Board& board, int process) {
      Random random(7);
      for (int i = 0; i < kShapes; ++i) {
        const MoEShape shape = DrawShape(t.processes * t.local, random);
        const auto communicator =
            Connect(board, SpecOf(t, shape, kNoTimeout), process, t.processes);
        RunTransfers(*communicator, random);
      }
    });
    passed += kShapes;
  };
  for (const Topology& topology : kTopologies)
    if (topology.groups == 1) run(topology);
  for (const Topology& topology : kOneProcess) run(topology);
  return passed;
}

// More executions in flight than there are lanes. Beyond the lanes, order has to be the same
// everywhere.
int TestMoreOpsThanLanes() {
  constexpr int kOps = cpu::kNumLanes * 3 / 2;
  RunProcesses(2, [&](Board& board, int process) {
    const Layer layer = AnyLayer(SmallShape(2));
    const auto communicator =
        Connect(board, MakeSpec(layer.shape, 2, 1, 1, kNoTimeout), process, 2);
    std::deque<RankWalk> walks;
    std::deque<Answer> answers(kOps);
    for (int i = 0; i < kOps; ++i)
      communicator->Submit(process * kOrdinalsPerProcess, {0, i, 0, 0},
                           walks.emplace_back(layer, process).Op(RankWalk::kRoute),
                           answers[i].Callback());
    for (Answer& answer : answers)
      if (answer.Get().code != ErrorCode::kNone) Fail("an op without a lane was not completed");
  });
  return kOps;
}

// Submits one step and waits for it.
ErrorRecord RunStep(Communicator& communicator, int32_t ordinal, RankWalk& walk,
                    RankWalk::Step step) {
  Answer answer;
  communicator.Submit(ordinal, {0, step, 0, 0}, walk.Op(step), answer.Callback());
  return answer.Get();
}

// One of three processes stops before `silent_step`: the others are told who, where and in time.
void RunWithSilentProcess(RankWalk::Step silent_step, Phase phase) {
  constexpr int kProcesses = 3, kSilent = 1;
  RunProcesses(kProcesses, [&](Board& board, int process) {
    const Layer layer = AnyLayer(SmallShape(kProcesses));
    auto communicator =
        Connect(board, MakeSpec(layer.shape, kProcesses, 1, 1, 0.5), process, kProcesses);
    RankWalk walk(layer, process);
    const int32_t ordinal = process * kOrdinalsPerProcess;
    for (int step = 0; step < silent_step; ++step)
      if (RunStep(*communicator, ordinal, walk, static_cast<RankWalk::Step>(step)).code !=
          ErrorCode::kNone)
        Fail("a step before process %d fell silent failed", kSilent);
    board.Meet(kProcesses);
    if (process != kSilent) {
      const auto start = Clock::now();
      ExpectTimeout(RunStep(*communicator, ordinal, walk, silent_step), process, kSilent, phase);
      ExpectBetween("the timeout", SecondsSince(start), 0.5, 5.0);
      ExpectTimeout(RunStep(*communicator, ordinal, walk, silent_step), process, kSilent, phase);
      ExpectTimeout(communicator->TakeError(), process, kSilent, phase);
    }
    communicator.reset();
    board.Meet(kProcesses);
  });
}

int TestSilentProcess() {
  RunWithSilentProcess(RankWalk::kRoute, Phase::kRoute);
  RunWithSilentProcess(RankWalk::kDispatch, Phase::kDispatch);
  RunWithSilentProcess(RankWalk::kCombine, Phase::kCombine);
  return 3;
}

// With more ops waiting than there are lanes, those without a lane fail like those with one.
int TestSilentProcessAndNoLaneLeft() {
  constexpr int kOps = cpu::kNumLanes + 10;
  RunProcesses(2, [&](Board& board, int process) {
    const Layer layer = AnyLayer(SmallShape(2));
    const auto communicator = Connect(board, MakeSpec(layer.shape, 2, 1, 1, 0.5), process, 2);
    if (process == 0) {
      std::deque<RankWalk> walks;
      std::deque<Answer> answers(kOps);
      for (int i = 0; i < kOps; ++i)
        communicator->Submit(0, {0, i, 0, 0}, walks.emplace_back(layer, 0).Op(RankWalk::kRoute),
                             answers[i].Callback());
      for (Answer& answer : answers) ExpectTimeout(answer.Get(), 0, 1, Phase::kRoute);
    }
    board.Meet(2);
  });
  return kOps;
}

// Processes whose programs differ must not take each other's bytes for their own.
void RunDifferentPrograms(const Layer (&layers)[2], RankWalk::Step step, Phase phase) {
  RunProcesses(2, [&](Board& board, int process) {
    const auto communicator = Connect(board, MakeSpec(SmallShape(2), 2, 1, 1, 0.5), process, 2);
    const int32_t ordinal = process * kOrdinalsPerProcess;
    RankWalk walk(layers[process], process);
    if (step != RankWalk::kRoute &&
        RunStep(*communicator, ordinal, walk, RankWalk::kRoute).code != ErrorCode::kNone)
      Fail("routing, which is the same, failed");
    ExpectTimeout(RunStep(*communicator, ordinal, walk, step), process, 1 - process, phase);
    board.Meet(2);
  });
}

int TestDifferentPrograms() {
  Random random(8);
  const MoEShape shape = SmallShape(2);
  const auto draw = [&](int64_t num_tokens) {
    return DrawLayer(shape, num_tokens, Draw::kUniform, random);
  };
  RunDifferentPrograms({draw(2), draw(3)}, RankWalk::kRoute, Phase::kRoute);
  const Layer plain = draw(2);
  Layer quantised = plain, came_quantised = plain;
  while (quantised.quant.block == 0 || quantised.came_quantised) DrawQuantised(random, &quantised);
  while (!came_quantised.came_quantised) DrawQuantised(random, &came_quantised);
  RunDifferentPrograms({plain, quantised}, RankWalk::kDispatch, Phase::kDispatch);
  RunDifferentPrograms({quantised, came_quantised}, RankWalk::kDispatch, Phase::kDispatch);
  return 3;
}

// Runs rounds until one fails.
void RunUntilFailure(Communicator& communicator, const std::vector<Layer>& layers,
                     std::atomic<int64_t>& rounds) {
  for (;; ++rounds)
    for (const ErrorRecord& error : RunRanks(communicator, layers, rounds, 1))
      if (error.code == ErrorCode::kTimeout) return;
}

// A process dies in the middle of its rounds: the rest learn that it was that one, and end cleanly.
int TestKilledProcess() {
  constexpr int kKillAfter[] = {0, 7, 30};
  constexpr Topology kTopology{3, 2, 1, false};
  constexpr int kVictim = 1;
  const auto body = [&](Board& board, int process) {
    Random random(9);
    const MoEShape shape = SmallShape(kTopology.processes * kTopology.local);
    const std::vector<Layer> layers = DrawLayers(shape, 3, random);
    const auto communicator =
        Connect(board, SpecOf(kTopology, shape, 2.0), process, kTopology.processes);
    RunUntilFailure(*communicator, layers, board.rounds[process]);
    const ErrorRecord error = communicator->TakeError();
    if (error.code != ErrorCode::kTimeout || error.peer / kTopology.local != kVictim)
      Fail("process %d died, but rank %d was blamed", kVictim, error.peer);
  };
  for (const int rounds : kKillAfter)
    RunProcesses(kTopology.processes, body, [&](Board& board, const std::vector<pid_t>& children) {
      // Past the bootstrap, which is not what this is about.
      while (board.num_come < 2 * kTopology.processes || board.rounds[kVictim] < rounds)
        usleep(100);
      kill(children[kVictim], SIGKILL);
      return kVictim;
    });
  return static_cast<int>(std::size(kKillAfter));
}

struct Test {
  const char* name;
  int (*run)();  // returns how many of what it repeats passed
};
constexpr Test kTests[] = {
    // Those that fork come before those that start threads.
    {"processes", TestProcesses},
    {"transfers", TestTransfers},
    {"more ops than lanes", TestMoreOpsThanLanes},
    {"silent process", TestSilentProcess},
    {"silent process and no lane left", TestSilentProcessAndNoLaneLeft},
    {"different programs", TestDifferentPrograms},
    {"killed process", TestKilledProcess},
    {"routings", TestRoutings},
    {"random shapes", TestRandomShapes},
    {"large shapes", TestLargeShapes},
    {"many rounds", TestManyRounds},
    {"groups", TestGroups},
    {"missing rank", TestMissingRank},
    {"infinite timeout", TestInfiniteTimeout},
    {"destroy with pending arrivals", TestDestroyWithPendingArrivals},
    {"destroy with callbacks outstanding", TestDestroyWithCallbacksOutstanding},
    {"registry", TestRegistry},
    {"lane handover", TestLaneHandover},
    {"lane keys", TestLaneKeys},
    {"rounding", TestRounding},
    {"quantize", TestQuantize},
};

}  // namespace
}  // namespace jax_ep::test

int main(int argc, char** argv) {
  using namespace jax_ep::test;
  alarm(600);  // whatever hangs; children end with their parent
  for (const Test& test : kTests) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const auto start = Clock::now();
    const int passed = test.run();
    std::printf("%-36s %6d passed  %6.2f s\n", test.name, passed, SecondsSince(start));
    std::fflush(stdout);
  }
  return 0;
}
