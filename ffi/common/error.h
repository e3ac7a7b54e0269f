// What went wrong on a device, in a form that kernels can write and hosts can read.
#ifndef JAX_EP_COMMON_ERROR_H_
#define JAX_EP_COMMON_ERROR_H_

#include <cstdint>
#include <string>

#include "common/layout.h"

namespace jax_ep {

enum class Phase : int32_t { kRoute = 0, kDispatch = 1, kCombine = 2, kTransfer = 3 };

struct ErrorRecord {
  ErrorCode code = ErrorCode::kNone;
  int32_t rank = -1;  // who reports (timeout), or where it happened (overflow, expert id)
  int32_t peer = -1;  // who was waited for
  Phase phase = Phase::kRoute;
  int64_t expected = 0;  // epoch or arrivals (timeout), capacity (overflow), number of experts
  int64_t got = 0;       // what had come, rows needed, ids out of range
};

// The sentence a user reads when a peer did not come. What routing found wrong is worded in Python.
std::string DescribeTimeout(const ErrorRecord& error, double timeout_s);

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_ERROR_H_
