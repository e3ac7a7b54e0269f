#include "common/error.h"

#include <cstdio>

namespace jax_ep {

std::string DescribeTimeout(const ErrorRecord& error, double timeout_s) {
  static constexpr const char* kPhases[] = {"route", "dispatch", "combine", "transfer"};
  char text[256];
  std::snprintf(text, sizeof text,
                "rank %d waited %.3g s for rank %d in %s: expected %lld, got %lld. The peer died, "
                "failed, or runs another program. Destroy this communicator.",
                error.rank, timeout_s, error.peer, kPhases[static_cast<int>(error.phase)],
                static_cast<long long>(error.expected), static_cast<long long>(error.got));
  return text;
}

}  // namespace jax_ep
