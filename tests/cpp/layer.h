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
#include <type_traits>
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

// What is drawn beyond what every backend does.
struct Features {
  bool expert_major = false, quantised = false;
};
constexpr Features kAllFeatures = {true, true};

struct Layer {
  MoEShape shape;
  int64_t num_tokens = 0;
  bool weighted = false, returns_scalars = false, fill = true;
  // How rows are quantised, and if it is before dispatch: then `elements` and `scales` are inputs.
  naive::Quant quant;
  bool came_quantised = false;
  // Inputs by rank. Rows that hold no token are NaN: nobody may read them.
  naive::TopkIds topk_ids;
  std::vector<Bytes> x, y;
  std::vector<Bytes> x_to_quantise;
  std::vector<Floats> weights, row_weights, row_scalars;
  // What must come of them, by rank.
  std::vector<Bytes> elements, scales;  // the quantised rows, before they are dispatched
  std::vector<naive::Routing> routing;
  ErrorRecord error;
  std::vector<std::vector<naive::Bounded>> combined;
  std::vector<Floats> token_scalars;
};

inline int64_t ElementBytes(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}

inline Bytes DrawRows(DType dtype, int64_t elements, Random& random) {
  Bytes rows(elements * ElementBytes(dtype));
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

// Of all magnitudes, block by block, with everything that is no number or hardly one.
inline Bytes DrawRowsToQuantise(DType dtype, int64_t elements, int64_t block, Random& random) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  Bytes rows(elements * ElementBytes(dtype));
  int exponent = 0, num_specials = 0;
  for (int64_t i = 0; i < elements; ++i) {
    if (i % block == 0) {
      exponent = OneOf(random, {0, 0, -12, -24, 15, 60, -60, -88, -91, -110, -130, -148, 126, 200});
      num_specials = OneOf(random, {0, 0, 0, 1, 100});
    }
    double x = std::ldexp(std::uniform_real_distribution<double>(-2, 2)(random), exponent);
    if (Between(random, 0, 199) < num_specials)
      x = OneOf(random, {0.0, -0.0, kNaN, -kNaN, kInfinity, -kInfinity, 0x1p-149, -0x1p-127});
    naive::Put(dtype, x, rows.data(), i);
  }
  return rows;
}

inline Bytes DrawBytes(int64_t size, Random& random) {
  Bytes bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(Between(random, 0, 255));
  return bytes;
}

// Any block that divides the rows, any dtypes.
inline naive::Quant DrawQuant(int32_t hidden_size, Random& random) {
  naive::Quant quant;
  do quant.block = Between(random, 1, hidden_size);
  while (hidden_size % quant.block != 0);
  quant.dtype = OneOf(random, {QuantDType::kE4M3, QuantDType::kE5M2, QuantDType::kInt8});
  quant.scale_dtype = OneOf(random, {ScaleDType::kF32, ScaleDType::kE8M0});
  return quant;
}

inline void DrawQuantised(Random& random, Layer* layer) {
  const MoEShape& shape = layer->shape;
  const int64_t size = layer->num_tokens * shape.hidden_size;
  layer->quant = DrawQuant(shape.hidden_size, random);
  layer->came_quantised = Between(random, 0, 2) == 0;
  layer->x_to_quantise.resize(shape.num_ranks);
  layer->elements.resize(shape.num_ranks), layer->scales.resize(shape.num_ranks);
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    const naive::Quant& quant = layer->quant;
    if (layer->came_quantised) {
      // Not looked into.
      layer->elements[rank] = DrawBytes(size, random);
      layer->scales[rank] =
          DrawBytes(size / quant.block * naive::ScaleBytes(quant.scale_dtype), random);
      continue;
    }
    layer->x_to_quantise[rank] = DrawRowsToQuantise(shape.dtype, size, quant.block, random);
    naive::Quantize(shape.dtype, layer->x_to_quantise[rank], size, quant, &layer->elements[rank],
                    &layer->scales[rank]);
  }
}

inline Layer DrawLayer(const MoEShape& shape, int64_t num_tokens, Draw draw, Random& random,
                       Features features = {}) {
  const int ranks = shape.num_ranks;
  Layer layer;
  layer.shape = shape;
  layer.num_tokens = num_tokens;
  layer.weighted = Between(random, 0, 2) > 0;
  layer.returns_scalars = Between(random, 0, 1) > 0;
  if (shape.layout == OutputLayout::kExpertMajor) layer.fill = Between(random, 0, 1) > 0;
  if (features.quantised && Between(random, 0, 1) > 0) DrawQuantised(random, &layer);
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
// routing first, then four ops that need nothing but its tables, in an order of this rank's own.
class RankWalk {
 public:
  RankWalk(const Layer& layer, int rank);
  RankWalk(const RankWalk&) = delete;

  // Takes call sites key.site ... key.site + kCombine. As in the op that does both, routing and the
  // first dispatch share one.
  void Start(Communicator& communicator, int32_t ordinal, const OpKey& key, uint32_t order_seed);
  // Returns the first error that an op was given.
  ErrorRecord Wait();
  // Compares everything written with the oracle; the cached dispatch only if there was one.
  void Check() const;

  // The ops, for tests that take single steps.
  enum Step { kRoute, kDispatch, kDispatchCached, kDispatchScaled, kCombine, kNumSteps };
  cpu::OpParams Op(Step step);

 private:
  // What a dispatch writes.
  struct Received {
    Bytes tokens, row_scales;
    Floats row_scalars;
  };

  RouteTables Tables();
  RouteParams Route();
  DispatchParams Dispatch(Received* received);
  // The gradient of combine, with x in the place of the gradient.
  DispatchParams DispatchScaled();
  CombineParams Combine();

  void AfterRoute(const ErrorRecord& error);
  void Finish(int num_ops, const ErrorRecord& error);

  void CheckRoute() const;
  void CheckDispatch(const Received& received) const;
  void CheckPoisoned(const Received& received) const;
  Received ExpectedOf(const Received& received) const;
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
  Received fresh_, cached_;
  Bytes scaled_, out_;
  Floats dots_, token_scalars_;

  Communicator* communicator_ = nullptr;
  int32_t ordinal_ = 0;
  OpKey key_;
  std::array<Step, 4> order_ = {kDispatch, kDispatchCached, kDispatchScaled, kCombine};

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
  scaled_.assign(rows * row_bytes, std::byte{0x5a});
  out_.assign(layer.num_tokens * row_bytes, std::byte{0x5a});
  dots_.assign(rows, 1e30f);
  if (layer.returns_scalars) token_scalars_.assign(layer.num_tokens * shape.topk, 1e30f);
}

inline RouteTables RankWalk::Tables() {
  return RouteTablesLayout(layer_.shape, layer_.num_tokens).At(tables_.data());
}

inline RouteParams RankWalk::Route() {
  return {layer_.num_tokens,
          layer_.topk_ids[rank_].data(),
          Tables(),
          num_tokens_per_expert_.data(),
          offsets_.data(),
          &num_dropped_,
          recv_topk_ids_.data()};
}

inline DispatchParams RankWalk::Dispatch(Received* received) {
  const MoEShape& shape = layer_.shape;
  const naive::Quant& quant = layer_.quant;
  DispatchParams p{};
  p.num_tokens = layer_.num_tokens;
  p.x = layer_.x[rank_].data();
  if (layer_.weighted) p.weights = layer_.weights[rank_].data();
  p.tables = Tables();
  p.fill = layer_.fill;
  if (quant.block > 0) {
    p.quant.block = static_cast<int32_t>(quant.block);
    p.quant.dtype = quant.dtype;
    p.quant.scale_dtype = quant.scale_dtype;
    if (layer_.came_quantised) p.quant.scales = layer_.scales[rank_].data();
    p.x = (layer_.came_quantised ? layer_.elements : layer_.x_to_quantise)[rank_].data();
  }
  const int64_t rows = shape.capacity;
  received->tokens.assign(rows * p.row_bytes(shape), std::byte{0x5a});
  received->row_scales.assign(rows * p.scale_row_bytes(shape), std::byte{0x5a});
  if (layer_.weighted) received->row_scalars.assign(rows * shape.weights_per_row(), 1e30f);
  p.tokens = received->tokens.data();
  if (layer_.weighted) p.row_scalars = received->row_scalars.data();
  if (quant.block > 0) p.quant.row_scales = received->row_scales.data();
  return p;
}

inline DispatchParams RankWalk::DispatchScaled() {
  DispatchParams p{};
  p.num_tokens = layer_.num_tokens;
  p.x = layer_.x[rank_].data();
  p.tables = Tables();
  p.y = layer_.y[rank_].data();
  p.row_weights = layer_.row_weights[rank_].data();
  p.tokens = scaled_.data();
  p.row_scalars = dots_.data();
  p.fill = true;
  return p;
}

inline CombineParams RankWalk::Combine() {
  return {layer_.num_tokens,
          layer_.y[rank_].data(),
          layer_.weighted ? layer_.row_weights[rank_].data() : nullptr,
          layer_.returns_scalars ? layer_.row_scalars[rank_].data() : nullptr,
          Tables(),
          out_.data(),
          layer_.returns_scalars ? token_scalars_.data() : nullptr};
}

inline cpu::OpParams RankWalk::Op(Step step) {
  if (step == kRoute) return Route();
  if (step == kDispatch) return Dispatch(&fresh_);
  if (step == kDispatchCached) return Dispatch(&cached_);
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
  CheckDispatch(fresh_);
  if (!cached_.tokens.empty()) CheckDispatch(cached_);
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

// What must be in `received`; itself where anything may be.
inline RankWalk::Received RankWalk::ExpectedOf(const Received& received) const {
  const MoEShape& shape = layer_.shape;
  const std::vector<Bytes>& elements = layer_.quant.block > 0 ? layer_.elements : layer_.x;
  const int64_t rows = shape.capacity, topk = shape.topk;
  const int64_t row_bytes = static_cast<int64_t>(received.tokens.size()) / rows;
  const int64_t scale_bytes = static_cast<int64_t>(received.row_scales.size()) / rows;
  Received expected{Bytes(received.tokens.size()), Bytes(received.row_scales.size()),
                    Floats(received.row_scalars.size())};
  if (!layer_.fill) expected = received;
  for (int64_t row = 0; row < rows; ++row) {
    const naive::Origin& origin = layer_.routing[rank_].rows[row];
    if (origin.source < 0) continue;
    std::copy_n(elements[origin.source].begin() + origin.token * row_bytes, row_bytes,
                expected.tokens.begin() + row * row_bytes);
    if (scale_bytes > 0)
      std::copy_n(layer_.scales[origin.source].begin() + origin.token * scale_bytes, scale_bytes,
                  expected.row_scales.begin() + row * scale_bytes);
    if (!layer_.weighted) continue;
    const float* weights = layer_.weights[origin.source].data() + origin.token * topk;
    if (shape.layout == OutputLayout::kRankMajor)
      std::copy_n(weights, topk, expected.row_scalars.begin() + row * topk);
    else
      expected.row_scalars[row] = weights[origin.k];
  }
  return expected;
}

inline void RankWalk::CheckDispatch(const Received& received) const {
  if (layer_.error.code != ErrorCode::kNone) return CheckPoisoned(received);
  const Received expected = ExpectedOf(received);
  ExpectEqual("row_weights", received.row_scalars, expected.row_scalars);
  const naive::Quant& quant = layer_.quant;
  if (quant.block == 0) return ExpectEqual("tokens", received.tokens, expected.tokens);
  const auto fail = [&](const char* name, size_t at, std::byte got, std::byte wanted) {
    Fail("rank %d: %s[%zu] of blocks of %lld: expected byte %#x, got %#x; %s", rank_, name, at,
         static_cast<long long>(quant.block), static_cast<int>(wanted), static_cast<int>(got),
         Describe(layer_.shape).c_str());
  };
  const auto same_elements = [&](std::byte a, std::byte b) {
    return layer_.came_quantised ? a == b : naive::SameElement(quant.dtype, a, b);
  };
  for (size_t i = 0; i < received.tokens.size(); ++i)
    if (!same_elements(received.tokens[i], expected.tokens[i]))
      fail("tokens", i, received.tokens[i], expected.tokens[i]);
  const size_t bytes = naive::ScaleBytes(quant.scale_dtype);
  for (size_t i = 0; i < received.row_scales.size() / bytes; ++i)
    if (!naive::SameScale(quant.scale_dtype, received.row_scales, expected.row_scales, i))
      fail("row_scales", i, received.row_scales[i * bytes], expected.row_scales[i * bytes]);
}

// Rows that hold anything at other times are not looked at.
inline void RankWalk::CheckPoisoned(const Received& received) const {
  const MoEShape& shape = layer_.shape;
  const auto of_row = [&](const auto& all, int64_t row) {
    const auto size = static_cast<int64_t>(all.size()) / shape.capacity;
    return std::decay_t<decltype(all)>(all.begin() + row * size, all.begin() + (row + 1) * size);
  };
  for (int64_t row = 0; row < shape.capacity; ++row) {
    if (!layer_.fill && layer_.routing[rank_].rows[row].source < 0) continue;
    ExpectNaN("row_weights", of_row(received.row_scalars, row));
    const Bytes tokens = of_row(received.tokens, row), scales = of_row(received.row_scales, row);
    if (layer_.quant.block == 0) {
      ExpectNaN("tokens", tokens);
      continue;
    }
    ExpectEqual("tokens", tokens, Bytes(tokens.size()));
    Bytes nans(scales.size(), std::byte{0xff});  // a float's as well
    const auto bytes = naive::ScaleBytes(layer_.quant.scale_dtype);
    for (int64_t i = 0; i < static_cast<int64_t>(scales.size()) / bytes; ++i)
      if (!naive::SameScale(layer_.quant.scale_dtype, scales, nans, i))
        Fail("rank %d: row_scales: expected NaN; %s", rank_, Describe(shape).c_str());
  }
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
