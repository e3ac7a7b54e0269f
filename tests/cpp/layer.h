// One MoE layer of all ranks for cpu_ops_test.cc: inputs drawn from a seed, what must come of them,
// and one rank's walk through its ops.
#ifndef JAX_EP_TESTS_LAYER_H_
#define JAX_EP_TESTS_LAYER_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/communicator.h"
#include "naive.h"

namespace jax_ep::test {

using cpu::Communicator;
using cpu::OpKey;
using naive::Bytes;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;
using Random = std::mt19937;

// Ends the process at once: other threads may still use what destructors would take from them.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void Fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fflush(stdout);
  std::fprintf(stderr, "FAILED: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::_Exit(1);
}

inline int64_t Between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}
template <typename T>
T OneOf(Random& random, std::initializer_list<T> choices) {
  return *(choices.begin() + Between(random, 0, static_cast<int64_t>(choices.size()) - 1));
}
// Of many magnitudes: the smallest are subnormal as halves.
inline float DrawNumber(Random& random) {
  const float uniform = std::uniform_real_distribution<float>(-2.0f, 2.0f)(random);
  return std::ldexp(uniform, -static_cast<int>(Between(random, 0, 3) * 6));
}

inline std::string Describe(const MoEShape& s) {
  char text[256];
  std::snprintf(text, sizeof text,
                "R=%d E=%d K=%d H=%d Tmax=%d alignment=%d C=%lld layout=%d dtype=%d drop=%d",
                s.num_ranks, s.num_experts, s.topk, s.hidden_size, s.max_tokens_per_rank,
                s.expert_alignment, static_cast<long long>(s.capacity), static_cast<int>(s.layout),
                static_cast<int>(s.dtype), s.drop_overflow);
  return text;
}

// How topk_ids are drawn.
enum class Draw { kUniform, kSkewed, kSingleExpert, kNone, kDuplicates, kBadIds };
constexpr int kNumDraws = 6;

inline int32_t DrawId(const MoEShape& shape, Draw draw, Random& random) {
  const int32_t experts = shape.num_experts;
  switch (draw) {
    case Draw::kUniform:
      return static_cast<int32_t>(Between(random, -1, experts - 1));
    case Draw::kSkewed:
      return static_cast<int32_t>(
          Between(random, 0, Between(random, 0, Between(random, 0, experts - 1))));
    case Draw::kSingleExpert:
      return experts / 2;
    case Draw::kNone:
      return -1;
    case Draw::kDuplicates:
      return static_cast<int32_t>(Between(random, 0, 1)) * (experts - 1);
    case Draw::kBadIds:
      return Between(random, 0, 7) > 0
                 ? DrawId(shape, Draw::kUniform, random)
                 : OneOf<int32_t>(random, {-2, experts, INT32_MIN, INT32_MAX});
  }
  return -1;
}

struct Layer {
  MoEShape shape;
  int64_t num_tokens = 0;
  bool weighted = false, returns_scalars = false;
  // Inputs by rank. Rows that hold no token are NaN: nobody may read them.
  naive::TopkIds topk_ids;
  std::vector<Bytes> x, y;
  std::vector<Floats> weights, row_weights, row_scalars;
  // What must come of them, by rank.
  std::vector<naive::Routing> routing;
  ErrorRecord error;
  std::vector<std::vector<naive::Bounded>> combined;
  std::vector<Floats> token_scalars;
};

inline Bytes DrawRows(DType dtype, int64_t elements, Random& random) {
  Bytes rows(elements * (dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2));
  for (int64_t i = 0; i < elements; ++i) naive::Put(dtype, DrawNumber(random), rows.data(), i);
  return rows;
}

inline void DrawTokens(int rank, Draw draw, Random& random, Layer* layer) {
  const MoEShape& shape = layer->shape;
  const int64_t ids = layer->num_tokens * shape.topk;
  layer->x[rank] = DrawRows(shape.dtype, layer->num_tokens * shape.hidden_size, random);
  for (int64_t i = 0; i < ids; ++i) layer->topk_ids[rank].push_back(DrawId(shape, draw, random));
  for (int64_t i = 0; i < ids; ++i) layer->weights[rank].push_back(DrawNumber(random));
}

inline void DrawExpertRows(int rank, Random& random, Layer* layer) {
  const MoEShape& shape = layer->shape;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t hidden = shape.hidden_size, scalars = shape.weights_per_row();
  layer->y[rank] = DrawRows(shape.dtype, shape.capacity * hidden, random);
  for (int64_t row = 0; row < shape.capacity; ++row) {
    const bool is_token = layer->routing[rank].rows[row].source >= 0;
    for (int64_t h = 0; h < hidden && !is_token; ++h)
      naive::Put(shape.dtype, nan, layer->y[rank].data(), row * hidden + h);
    layer->row_weights[rank].push_back(is_token ? DrawNumber(random) : nan);
    // Whole numbers, whose sums are exact in any order.
    for (int64_t i = 0; i < scalars; ++i)
      layer->row_scalars[rank].push_back(is_token ? static_cast<float>(Between(random, -99, 99))
                                                  : nan);
  }
}

inline Layer DrawLayer(const MoEShape& shape, int64_t num_tokens, Draw draw, Random& random) {
  const int ranks = shape.num_ranks;
  Layer layer;
  layer.shape = shape;
  layer.num_tokens = num_tokens;
  layer.weighted = Between(random, 0, 2) > 0;
  layer.returns_scalars = Between(random, 0, 1) > 0;
  layer.topk_ids.resize(ranks), layer.x.resize(ranks), layer.y.resize(ranks);
  layer.weights.resize(ranks), layer.row_weights.resize(ranks), layer.row_scalars.resize(ranks);
  for (int rank = 0; rank < ranks; ++rank) DrawTokens(rank, draw, random, &layer);
  for (int rank = 0; rank < ranks; ++rank)
    layer.routing.push_back(naive::Route(shape, rank, layer.topk_ids, num_tokens));
  layer.error = naive::FindError(shape, layer.topk_ids, layer.routing);
  for (int rank = 0; rank < ranks; ++rank) DrawExpertRows(rank, random, &layer);
  const std::vector<Floats> unweighted;
  for (int rank = 0; rank < ranks; ++rank) {
    layer.combined.push_back(naive::Combine(shape, rank, num_tokens, layer.routing, layer.y,
                                            layer.weighted ? layer.row_weights : unweighted));
    layer.token_scalars.push_back(
        naive::ReturnScalars(shape, rank, num_tokens, layer.routing, layer.row_scalars));
  }
  return layer;
}

// One rank's walk through a layer, driven by the completion callbacks as XLA drives a program:
// routing first, then three ops that need nothing but its tables, in an order of this rank's own.
class RankWalk {
 public:
  RankWalk(const Layer& layer, int rank);
  RankWalk(const RankWalk&) = delete;

  // Takes call sites key.site ... key.site + kCombine. As in the op that does both, routing and the
  // first dispatch share one.
  void Start(Communicator& communicator, int32_t ordinal, const OpKey& key, uint32_t order_seed);
  // Returns the first error that an op was given.
  ErrorRecord Wait();
  // Compares everything written with the oracle.
  void Check() const;

  // The ops, for tests that take single steps.
  enum Step { kRoute, kDispatch, kDispatchScaled, kCombine, kNumSteps };
  cpu::OpParams Op(Step step);

 private:
  RouteParams Route();
  DispatchParams Dispatch();
  // The gradient of combine, with x in the place of the gradient.
  DispatchParams DispatchScaled();
  CombineParams Combine();

  void AfterRoute(const ErrorRecord& error);
  void Finish(int num_ops, const ErrorRecord& error);

  void CheckRoute() const;
  void CheckDispatch() const;
  void CheckDispatchScaled() const;
  void CheckCombine() const;
  void ExpectNaN(const char* name, const Bytes& rows) const;
  void ExpectNaN(const char* name, const Floats& values) const;
  void ExpectNear(const char* name, int64_t at, double got, double expected,
                  double tolerance) const;
  template <typename T>
  void ExpectEqual(const char* name, const std::vector<T>& got,
                   const std::vector<T>& expected) const;

  const Layer& layer_;
  const int rank_;

  // Outputs, of exactly the size that XLA would give them, full of what nobody wrote.
  Ints tables_, num_tokens_per_expert_, offsets_, recv_topk_ids_;
  int32_t num_dropped_ = -1;
  Bytes tokens_, scaled_, out_;
  Floats row_scalars_, dots_, token_scalars_;

  Communicator* communicator_ = nullptr;
  int32_t ordinal_ = 0;
  OpKey key_;
  std::array<Step, 3> order_ = {kDispatch, kDispatchScaled, kCombine};

  std::mutex mutex_;
  std::condition_variable all_done_;
  int num_left_ = kNumSteps;
  ErrorRecord error_;
};

inline RankWalk::RankWalk(const Layer& layer, int rank) : layer_(layer), rank_(rank) {
  constexpr int32_t kGarbage = 0x5a5a5a5a;
  const MoEShape& shape = layer.shape;
  const int64_t rows = shape.capacity, row_bytes = shape.row_bytes();
  tables_.assign(RouteTablesLayout(shape, layer.num_tokens).size, kGarbage);
  num_tokens_per_expert_.assign(shape.local_experts(), kGarbage);
  offsets_.assign(shape.num_row_groups() + 1, kGarbage);
  if (shape.layout == OutputLayout::kRankMajor) recv_topk_ids_.assign(rows * shape.topk, kGarbage);
  tokens_.assign(rows * row_bytes, std::byte{0x5a});
  scaled_ = tokens_;
  out_.assign(layer.num_tokens * row_bytes, std::byte{0x5a});
  if (layer.weighted) row_scalars_.assign(rows * shape.weights_per_row(), 1e30f);
  dots_.assign(rows, 1e30f);
  if (layer.returns_scalars) token_scalars_.assign(layer.num_tokens * shape.topk, 1e30f);
}

inline RouteParams RankWalk::Route() {
  const RouteTables tables = RouteTablesLayout(layer_.shape, layer_.num_tokens).At(tables_.data());
  return {layer_.num_tokens,
          layer_.topk_ids[rank_].data(),
          tables,
          num_tokens_per_expert_.data(),
          offsets_.data(),
          &num_dropped_,
          recv_topk_ids_.data()};
}

inline DispatchParams RankWalk::Dispatch() {
  const RouteTables tables = RouteTablesLayout(layer_.shape, layer_.num_tokens).At(tables_.data());
  return {layer_.num_tokens,
          layer_.x[rank_].data(),
          layer_.weighted ? layer_.weights[rank_].data() : nullptr,
          tables,
          nullptr,
          nullptr,
          tokens_.data(),
          layer_.weighted ? row_scalars_.data() : nullptr};
}

inline DispatchParams RankWalk::DispatchScaled() {
  const RouteTables tables = RouteTablesLayout(layer_.shape, layer_.num_tokens).At(tables_.data());
  return {layer_.num_tokens,      layer_.x[rank_].data(),           nullptr,        tables,
          layer_.y[rank_].data(), layer_.row_weights[rank_].data(), scaled_.data(), dots_.data()};
}

inline CombineParams RankWalk::Combine() {
  const RouteTables tables = RouteTablesLayout(layer_.shape, layer_.num_tokens).At(tables_.data());
  return {layer_.num_tokens,
          layer_.y[rank_].data(),
          layer_.weighted ? layer_.row_weights[rank_].data() : nullptr,
          layer_.returns_scalars ? layer_.row_scalars[rank_].data() : nullptr,
          tables,
          out_.data(),
          layer_.returns_scalars ? token_scalars_.data() : nullptr};
}

inline cpu::OpParams RankWalk::Op(Step step) {
  if (step == kRoute) return Route();
  if (step == kDispatch) return Dispatch();
  if (step == kDispatchScaled) return DispatchScaled();
  return Combine();
}

inline void RankWalk::Start(Communicator& communicator, int32_t ordinal, const OpKey& key,
                            uint32_t order_seed) {
  communicator_ = &communicator;
  ordinal_ = ordinal;
  key_ = key;
  std::shuffle(order_.begin(), order_.end(), Random(order_seed));
  communicator.Submit(ordinal, key, Op(kRoute),
                      [this](const ErrorRecord& error) { AfterRoute(error); });
}

inline void RankWalk::AfterRoute(const ErrorRecord& error) {
  if (error.code != ErrorCode::kNone) return Finish(kNumSteps, error);
  for (const Step step : order_) {
    OpKey key = key_;
    if (step != kDispatch) key.site += step;
    communicator_->Submit(ordinal_, key, Op(step), [this](const ErrorRecord& e) { Finish(1, e); });
  }
  Finish(1, error);
}

inline void RankWalk::Finish(int num_ops, const ErrorRecord& error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_.code == ErrorCode::kNone) error_ = error;
  num_left_ -= num_ops;
  if (num_left_ < 0) Fail("rank %d: an op was completed twice", rank_);
  if (num_left_ == 0) all_done_.notify_all();
}

inline ErrorRecord RankWalk::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  all_done_.wait(lock, [this] { return num_left_ == 0; });
  return error_;
}

inline void RankWalk::Check() const {
  CheckRoute();
  CheckDispatch();
  CheckDispatchScaled();
  CheckCombine();
}

inline void RankWalk::CheckRoute() const {
  const naive::Routing& expected = layer_.routing[rank_];
  ExpectEqual("num_tokens_per_expert", num_tokens_per_expert_, expected.num_tokens_per_expert);
  ExpectEqual("offsets", offsets_, expected.offsets);
  ExpectEqual("recv_topk_ids", recv_topk_ids_, expected.recv_topk_ids);
  ExpectEqual("num_dropped", Ints{num_dropped_}, Ints{expected.num_dropped});
  const RouteTablesLayout layout(layer_.shape, layer_.num_tokens);
  const Ints send_ranks(tables_.begin() + layout.send_ranks, tables_.begin() + layout.recv_rows);
  ExpectEqual("send_ranks", send_ranks,
              naive::SendRanks(layer_.shape, layer_.topk_ids[rank_], layer_.num_tokens));
  // What is poisoned is not read.
  if (layer_.error.code == ErrorCode::kNone) {
    const Ints recv_rows(tables_.begin() + layout.recv_rows, tables_.begin() + layout.group_counts);
    ExpectEqual("recv_rows", recv_rows,
                naive::RecvRows(layer_.shape, rank_, layer_.topk_ids, expected, layer_.num_tokens));
  }
  const Ints status(tables_.begin() + layout.status, tables_.begin() + layout.status + kStatusSize);
  ExpectEqual("status", status,
              {expected.num_dropped, static_cast<int32_t>(layer_.error.code), layer_.error.rank,
               static_cast<int32_t>(layer_.error.got)});
}

inline void RankWalk::CheckDispatch() const {
  if (layer_.error.code != ErrorCode::kNone)
    return ExpectNaN("tokens", tokens_), ExpectNaN("row_weights", row_scalars_);
  const MoEShape& shape = layer_.shape;
  const int64_t row_bytes = shape.row_bytes(), topk = shape.topk;
  Bytes tokens(tokens_.size());
  Floats row_scalars(row_scalars_.size());
  for (int64_t row = 0; row < shape.capacity; ++row) {
    const naive::Origin& origin = layer_.routing[rank_].rows[row];
    if (origin.source < 0) continue;
    std::copy_n(layer_.x[origin.source].begin() + origin.token * row_bytes, row_bytes,
                tokens.begin() + row * row_bytes);
    if (!layer_.weighted) continue;
    const float* weights = layer_.weights[origin.source].data() + origin.token * topk;
    if (shape.layout == OutputLayout::kRankMajor)
      std::copy_n(weights, topk, row_scalars.begin() + row * topk);
    else
      row_scalars[row] = weights[origin.k];
  }
  ExpectEqual("tokens", tokens_, tokens);
  ExpectEqual("row_weights", row_scalars_, row_scalars);
}

inline void RankWalk::CheckDispatchScaled() const {
  if (layer_.error.code != ErrorCode::kNone)
    return ExpectNaN("scaled", scaled_), ExpectNaN("dots", dots_);
  const MoEShape& shape = layer_.shape;
  const int64_t hidden = shape.hidden_size;
  for (int64_t row = 0; row < shape.capacity; ++row) {
    const naive::Origin& origin = layer_.routing[rank_].rows[row];
    naive::Bounded dot;
    for (int64_t h = 0; h < hidden; ++h) {
      double expected = 0;
      if (origin.source >= 0) {
        const double g =
            naive::Get(shape.dtype, layer_.x[origin.source].data(), origin.token * hidden + h);
        expected = layer_.row_weights[rank_][row] * g;
        dot.Add(g * naive::Get(shape.dtype, layer_.y[rank_].data(), row * hidden + h));
      }
      ExpectNear(
          "scaled", row * hidden + h, naive::Get(shape.dtype, scaled_.data(), row * hidden + h),
          expected,
          1.01 * naive::Epsilon(shape.dtype) * std::fabs(expected) + naive::Tiny(shape.dtype));
    }
    ExpectNear("dots", row, dots_[row], dot.value,
               dot.magnitude * (hidden + 2) * naive::Epsilon(DType::kF32));
  }
}

inline void RankWalk::CheckCombine() const {
  if (layer_.error.code != ErrorCode::kNone)
    return ExpectNaN("out", out_), ExpectNaN("token_scalars", token_scalars_);
  const MoEShape& shape = layer_.shape;
  const DType dtype = shape.dtype, sum_dtype = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  // Each rank's sum is rounded once, and their sum; within a sum each addition rounds.
  const double relative =
      2.1 * naive::Epsilon(dtype) + (shape.topk + shape.num_ranks + 2) * naive::Epsilon(sum_dtype);
  const std::vector<naive::Bounded>& expected = layer_.combined[rank_];
  for (int64_t i = 0; i < static_cast<int64_t>(expected.size()); ++i)
    ExpectNear("out", i, naive::Get(dtype, out_.data(), i), expected[i].value,
               relative * expected[i].magnitude + (shape.num_ranks + 1) * naive::Tiny(dtype));
  if (layer_.returns_scalars)
    ExpectEqual("token_scalars", token_scalars_, layer_.token_scalars[rank_]);
}

inline void RankWalk::ExpectNaN(const char* name, const Bytes& rows) const {
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()) / layer_.shape.element_bytes(); ++i)
    if (!std::isnan(naive::Get(layer_.shape.dtype, rows.data(), i)))
      Fail("rank %d: %s[%lld]: expected NaN; %s", rank_, name, static_cast<long long>(i),
           Describe(layer_.shape).c_str());
}
inline void RankWalk::ExpectNaN(const char* name, const Floats& values) const {
  for (const float value : values)
    if (!std::isnan(value))
      Fail("rank %d: %s: expected NaN, got %g; %s", rank_, name, value,
           Describe(layer_.shape).c_str());
}

inline void RankWalk::ExpectNear(const char* name, int64_t at, double got, double expected,
                                 double tolerance) const {
  if (std::fabs(got - expected) <= tolerance) return;
  Fail("rank %d: %s[%lld]: expected %.9g +- %.3g, got %.9g; %s", rank_, name,
       static_cast<long long>(at), expected, tolerance, got, Describe(layer_.shape).c_str());
}

template <typename T>
void RankWalk::ExpectEqual(const char* name, const std::vector<T>& got,
                           const std::vector<T>& expected) const {
  if (got == expected) return;
  const size_t at =
      std::mismatch(got.begin(), got.end(), expected.begin(), expected.end()).first - got.begin();
  Fail("rank %d: %s differs at %zu of %zu (expected %zu); %s", rank_, name, at, got.size(),
       expected.size(), Describe(layer_.shape).c_str());
}

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_LAYER_H_
