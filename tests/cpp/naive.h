// The three ops written as plainly as possible: the oracle of cpu_ops_test.cc. Everything is a loop
// over (source, token, k), sums are kept in double, and no code is shared with ffi/cpu.
#ifndef JAX_EP_TESTS_NAIVE_H_
#define JAX_EP_TESTS_NAIVE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/error.h"
#include "common/layout.h"

namespace naive {

using jax_ep::DType;
using jax_ep::ErrorCode;
using jax_ep::ErrorRecord;
using jax_ep::MoEShape;
using jax_ep::OutputLayout;
using jax_ep::Phase;
using jax_ep::QuantDType;
using jax_ep::ScaleDType;

using Bytes = std::vector<std::byte>;

// Binary floating point formats by their numbers of bits.
struct Format {
  int mantissa_bits, min_exponent, max_exponent, bits;
};

inline Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {10, -14, 15, 16};
    case DType::kBF16:
      return {7, -126, 127, 16};
    case DType::kF32:
      return {23, -126, 127, 32};
    case DType::kF64:
      return {52, -1022, 1023, 64};
  }
  return {};
}

// Half the distance of two neighbours near 1: the most that rounding changes a number, relative to
// it.
inline double Epsilon(DType dtype) { return std::ldexp(1.0, -FormatOf(dtype).mantissa_bits - 1); }
// The smallest positive number: what rounding loses at most near 0.
inline double Tiny(DType dtype) {
  return std::ldexp(1.0, FormatOf(dtype).min_exponent - FormatOf(dtype).mantissa_bits);
}

// Encodes in up to 16 bits, to nearest and ties to even, which is how nearbyint rounds.
inline uint16_t Encode(double x, const Format& format) {
  const int exponent_bits = format.bits - 1 - format.mantissa_bits;
  const uint16_t sign = static_cast<uint16_t>(std::signbit(x) << (format.bits - 1));
  const uint16_t infinity =
      static_cast<uint16_t>(((1 << exponent_bits) - 1) << format.mantissa_bits);
  if (std::isnan(x)) return infinity | 1 << (format.mantissa_bits - 1);
  if (x == 0) return sign;
  int exponent = 0;
  std::frexp(x, &exponent);
  exponent = std::max(exponent - 1, format.min_exponent);
  const double places = std::nearbyint(std::ldexp(std::fabs(x), format.mantissa_bits - exponent));
  const double rounded = std::ldexp(places, exponent - format.mantissa_bits);
  if (std::isinf(x) || rounded >= std::ldexp(2.0, format.max_exponent)) return sign | infinity;
  // Rounding up to the next power of two carries into the exponent, as it should.
  const int biased = exponent - format.min_exponent;
  return sign | static_cast<uint16_t>((biased << format.mantissa_bits) + static_cast<int>(places));
}

inline double Decode16(uint16_t bits, const Format& format) {
  const int exponent_bits = 15 - format.mantissa_bits;
  const int biased = bits >> format.mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (biased == (1 << exponent_bits) - 1)
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  const int hidden = biased == 0 ? 0 : 1 << format.mantissa_bits;
  return sign * std::ldexp(hidden + mantissa,
                           std::max(biased, 1) - 1 + format.min_exponent - format.mantissa_bits);
}

template <typename T>
T LoadAs(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Element i of a row.
inline double Get(DType dtype, const std::byte* row, int64_t i) {
  if (dtype == DType::kF64) return LoadAs<double>(row + 8 * i);
  if (dtype == DType::kF32) return LoadAs<float>(row + 4 * i);
  return Decode16(LoadAs<uint16_t>(row + 2 * i), FormatOf(dtype));
}

inline void Put(DType dtype, double value, std::byte* row, int64_t i) {
  const float single = static_cast<float>(value);
  if (dtype == DType::kF64) {
    std::memcpy(row + 8 * i, &value, 8);
  } else if (dtype == DType::kF32) {
    std::memcpy(row + 4 * i, &single, 4);
  } else {
    const uint16_t half = Encode(value, FormatOf(dtype));
    std::memcpy(row + 2 * i, &half, 2);
  }
}

// How rows are quantised; block 0: not at all.
struct Quant {
  int64_t block = 0;
  QuantDType dtype = QuantDType::kE4M3;
  ScaleDType scale_dtype = ScaleDType::kF32;
};

inline double MaxElement(QuantDType dtype) {
  return dtype == QuantDType::kE4M3 ? 448 : dtype == QuantDType::kE5M2 ? 57344 : 127;
}

inline int64_t ScaleBytes(ScaleDType dtype) { return dtype == ScaleDType::kF32 ? 4 : 1; }

// Takes numbers up to the largest.
inline std::byte EncodeElement(double x, QuantDType dtype) {
  const bool is_int = dtype == QuantDType::kInt8;
  if (std::isnan(x)) return std::byte{is_int ? uint8_t{0} : uint8_t{0x7f}};
  if (is_int) return static_cast<std::byte>(static_cast<int8_t>(std::nearbyint(x)));
  return static_cast<std::byte>(
      Encode(x, dtype == QuantDType::kE4M3 ? Format{3, -6, 8, 8} : Format{2, -14, 15, 8}));
}

struct Scale {
  double inverse;
  float as_float;  // for kF32
  uint8_t as_e8m0;
};

// Of a block whose largest magnitude is `amax`. Rounding the double result of one operation to
// float gives what that operation in float would: a double has more than twice a float's bits.
inline Scale ScaleOf(double amax, const Quant& quant) {
  const double max = MaxElement(quant.dtype);
  if (quant.scale_dtype == ScaleDType::kF32) {
    const float scale = static_cast<float>(amax * static_cast<float>(1 / max));
    return {static_cast<float>(1.0 / scale), scale, 0};
  }
  if (!std::isfinite(amax)) return {std::numeric_limits<double>::quiet_NaN(), 0, 255};
  const int exponent = std::ilogb(amax) - std::ilogb(max);
  return {std::ldexp(1.0, -exponent), 0, static_cast<uint8_t>(exponent + 127)};
}

// Quantises all `rows`, adding to the ends of `elements` and `scales`.
inline void Quantize(DType dtype, const Bytes& rows, int64_t num_elements, const Quant& quant,
                     Bytes* elements, Bytes* scales) {
  const double max = MaxElement(quant.dtype), nan = std::numeric_limits<double>::quiet_NaN();
  for (int64_t begin = 0; begin < num_elements; begin += quant.block) {
    std::vector<float> block;
    double amax = std::ldexp(1.0, -90);
    for (int64_t i = begin; i < begin + quant.block; ++i) {
      const float x = static_cast<float>(Get(dtype, rows.data(), i));
      block.push_back(x);
      amax = std::isnan(x) || std::isnan(amax) ? nan : std::max(amax, std::fabs(double{x}));
    }
    const Scale scale = ScaleOf(amax, quant);
    const auto* bytes = quant.scale_dtype == ScaleDType::kF32
                            ? reinterpret_cast<const std::byte*>(&scale.as_float)
                            : reinterpret_cast<const std::byte*>(&scale.as_e8m0);
    scales->insert(scales->end(), bytes, bytes + ScaleBytes(quant.scale_dtype));
    for (const float x : block) {
      const double scaled = static_cast<float>(x * scale.inverse);
      elements->push_back(EncodeElement(scaled > max    ? max
                                        : scaled < -max ? -max
                                                        : scaled,
                                        quant.dtype));
    }
  }
}

// Whether elements are the same bits, or NaN both.
inline bool SameElement(QuantDType dtype, std::byte a, std::byte b) {
  const auto is_nan = [&](std::byte x) {
    const int magnitude = static_cast<int>(x & std::byte{0x7f});
    return dtype == QuantDType::kE4M3 ? magnitude == 0x7f
                                      : dtype == QuantDType::kE5M2 && magnitude > 0x7c;
  };
  return a == b || (is_nan(a) && is_nan(b));
}

// The same for scale i.
inline bool SameScale(ScaleDType dtype, const Bytes& a, const Bytes& b, int64_t i) {
  if (dtype == ScaleDType::kE8M0) return a[i] == b[i];
  const auto x = LoadAs<uint32_t>(a.data() + 4 * i), y = LoadAs<uint32_t>(b.data() + 4 * i);
  const auto is_nan = [](uint32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; };
  return x == y || (is_nan(x) && is_nan(y));
}

// Where an output row comes from; source -1 is a row that holds no token.
struct Origin {
  int source = -1;
  int64_t token = -1;
  int k = -1;  // the first k on this rank for kRankMajor
};

// What routing makes of one rank.
struct Routing {
  std::vector<Origin> rows;  // [C]
  std::vector<int32_t> offsets, num_tokens_per_expert, recv_topk_ids;
  int32_t num_dropped = 0;
  int64_t rows_needed = 0;  // by the rank or, for kExpertMajor, by its neediest expert
};

// By source rank, each [T, K].
using TopkIds = std::vector<std::vector<int32_t>>;

inline int64_t AlignUp(int64_t n, int64_t alignment) {
  while (n % alignment != 0) ++n;
  return n;
}

inline int64_t SlotsPerExpert(const MoEShape& shape) {
  return shape.capacity / (shape.num_experts / shape.num_ranks);
}

inline bool IsLocal(const MoEShape& shape, int rank, int32_t id) {
  return id >= 0 && id < shape.num_experts && id / (shape.num_experts / shape.num_ranks) == rank;
}

// Whether (source, token, k) makes a row in `group` of `rank`.
inline bool MakesRow(const MoEShape& shape, int rank, int group, int source, const int32_t* ids,
                     int k) {
  if (!IsLocal(shape, rank, ids[k])) return false;
  if (shape.layout != OutputLayout::kRankMajor)
    return ids[k] % (shape.num_experts / shape.num_ranks) == group;
  for (int earlier = 0; earlier < k; ++earlier)
    if (IsLocal(shape, rank, ids[earlier])) return false;
  return source == group;
}

// Enters a row that fits: `ids` are those of its token.
inline void FillRow(const MoEShape& shape, int rank, int64_t row, const Origin& origin,
                    const int32_t* ids, Routing* routing) {
  const int local = shape.num_experts / shape.num_ranks;
  routing->rows[row] = origin;
  if (shape.layout != OutputLayout::kRankMajor) {
    ++routing->num_tokens_per_expert[ids[origin.k] % local];
    return;
  }
  for (int k = 0; k < shape.topk; ++k) {
    if (!IsLocal(shape, rank, ids[k])) continue;
    ++routing->num_tokens_per_expert[ids[k] % local];
    routing->recv_topk_ids[row * shape.topk + k] = ids[k] % local;
  }
}

inline Routing Route(const MoEShape& shape, int rank, const TopkIds& topk_ids, int64_t num_tokens) {
  const int local = shape.num_experts / shape.num_ranks;
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  const bool expert_major = shape.layout == OutputLayout::kExpertMajor;
  Routing routing;
  routing.rows.resize(shape.capacity);
  routing.num_tokens_per_expert.resize(local);
  if (rank_major) routing.recv_topk_ids.assign(shape.capacity * shape.topk, -1);
  int64_t next = 0;
  for (int group = 0; group < (rank_major ? shape.num_ranks : local); ++group) {
    const int64_t slots = SlotsPerExpert(shape);
    if (expert_major) next = group * slots;
    const int64_t end = expert_major ? next + slots : shape.capacity;
    routing.offsets.push_back(static_cast<int32_t>(std::min(next, shape.capacity)));
    for (int source = 0; source < shape.num_ranks; ++source)
      for (int64_t token = 0; token < num_tokens; ++token)
        for (int k = 0; k < shape.topk; ++k) {
          const int32_t* ids = topk_ids[source].data() + token * shape.topk;
          if (!MakesRow(shape, rank, group, source, ids, k)) continue;
          if (next < end)
            FillRow(shape, rank, next, {source, token, k}, ids, &routing);
          else
            ++routing.num_dropped;
          ++next;
        }
    if (shape.layout == OutputLayout::kFlat) next = AlignUp(next, shape.expert_alignment);
    routing.rows_needed = std::max(routing.rows_needed, expert_major ? next - group * slots : next);
  }
  routing.offsets.push_back(
      static_cast<int32_t>(expert_major ? shape.capacity : std::min(next, shape.capacity)));
  return routing;
}

// The ranks that each token of one source goes to, [T, K]: ascending, then -1.
inline std::vector<int32_t> SendRanks(const MoEShape& shape, const std::vector<int32_t>& topk_ids,
                                      int64_t num_tokens) {
  std::vector<int32_t> send_ranks;
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t* ids = topk_ids.data() + token * shape.topk;
    for (int rank = 0; rank < shape.num_ranks; ++rank)
      if (std::any_of(ids, ids + shape.topk, [&](int32_t id) { return IsLocal(shape, rank, id); }))
        send_ranks.push_back(rank);
    send_ranks.resize((token + 1) * shape.topk, -1);
  }
  return send_ranks;
}

// The row on `rank` of each (source, token, k), or of each (source, token) for kRankMajor, [R, T, 1
// or K]: -1 if it has none, -2 if it was dropped.
inline std::vector<int32_t> RecvRows(const MoEShape& shape, int rank, const TopkIds& topk_ids,
                                     const Routing& routing, int64_t num_tokens) {
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  std::vector<int32_t> recv_rows;
  for (const std::vector<int32_t>& ids : topk_ids)
    for (int64_t i = 0; i < num_tokens * shape.topk; ++i) {
      const bool is_mine = IsLocal(shape, rank, ids[i]);
      if (!rank_major || i % shape.topk == 0) recv_rows.push_back(-1);
      if (is_mine) recv_rows.back() = -2;
    }
  for (int64_t row = 0; row < shape.capacity; ++row) {
    const Origin& origin = routing.rows[row];
    if (origin.source < 0) continue;
    const int64_t token = origin.source * num_tokens + origin.token;
    recv_rows[rank_major ? token : token * shape.topk + origin.k] = static_cast<int32_t>(row);
  }
  return recv_rows;
}

// What all ranks are to report of a step.
inline ErrorRecord FindError(const MoEShape& shape, const TopkIds& topk_ids,
                             const std::vector<Routing>& routing) {
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    const auto bad = std::count_if(topk_ids[rank].begin(), topk_ids[rank].end(),
                                   [&](int32_t id) { return id < -1 || id >= shape.num_experts; });
    if (bad > 0) return {ErrorCode::kBadExpertId, rank, -1, Phase::kRoute, shape.num_experts, bad};
  }
  const int64_t limit =
      shape.layout == OutputLayout::kExpertMajor ? SlotsPerExpert(shape) : shape.capacity;
  for (int rank = 0; rank < shape.num_ranks && !shape.drop_overflow; ++rank)
    if (const int64_t rows = routing[rank].rows_needed; rows > limit)
      return {ErrorCode::kOverflow, rank, -1, Phase::kRoute, limit, rows};
  return {};
}

// A sum in double, and the sum of magnitudes that bounds what rounding did to it.
struct Bounded {
  double value = 0, magnitude = 0;
  void Add(double x) { value += x, magnitude += std::fabs(x); }
};

// Combine for rank `me`, [T, H]: `y` and `row_weights` (empty if unweighted) by expert rank.
inline std::vector<Bounded> Combine(const MoEShape& shape, int me, int64_t num_tokens,
                                    const std::vector<Routing>& routing,
                                    const std::vector<Bytes>& y,
                                    const std::vector<std::vector<float>>& row_weights) {
  const int64_t hidden = shape.hidden_size;
  std::vector<Bounded> out(num_tokens * hidden);
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Origin& origin = routing[rank].rows[row];
      if (origin.source != me) continue;
      const double weight = row_weights.empty() ? 1.0 : row_weights[rank][row];
      for (int64_t h = 0; h < hidden; ++h)
        out[origin.token * hidden + h].Add(weight *
                                           Get(shape.dtype, y[rank].data(), row * hidden + h));
    }
  return out;
}

// The scalars of the rows, [C] or [C, K] by expert rank, back at rank `me`'s (token, k).
inline std::vector<float> ReturnScalars(const MoEShape& shape, int me, int64_t num_tokens,
                                        const std::vector<Routing>& routing,
                                        const std::vector<std::vector<float>>& row_scalars) {
  std::vector<float> out(num_tokens * shape.topk);
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Origin& origin = routing[rank].rows[row];
      if (origin.source != me) continue;
      for (int k = 0; k < shape.topk; ++k) {
        if (shape.layout == OutputLayout::kRankMajor)
          out[origin.token * shape.topk + k] += row_scalars[rank][row * shape.topk + k];
        else if (k == origin.k)
          out[origin.token * shape.topk + k] += row_scalars[rank][row];
      }
    }
  return out;
}

}  // namespace naive

#endif  // JAX_EP_TESTS_NAIVE_H_
