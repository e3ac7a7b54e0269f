// Who takes part in a communicator, as every process is told by the Python bootstrap.
#ifndef JAX_EP_COMMON_PEERS_H_
#define JAX_EP_COMMON_PEERS_H_

#include <cstdint>
#include <vector>

#include "common/layout.h"

namespace jax_ep {

struct Member {
  int32_t process;
  int32_t ordinal;  // what XLA's DeviceOrdinal says of the device in its own process, -1 elsewhere
                    // if unknown
};

// Some 30 years: what users mean by an infinite timeout, and still counted in nanoseconds.
constexpr double kMaxTimeoutSeconds = 1e9;

// The members of one expert-parallel group, by rank.
using Group = std::vector<Member>;

// Thread blocks of an exchange, by role.
struct BlockCounts {
  int32_t senders = 0;
  int32_t receivers = 0;
};

struct CommunicatorSpec {
  int64_t id = 0;  // equal in all processes
  MoEShape shape;
  std::vector<Group> groups;  // all of the mesh, in an order equal in all processes
  int32_t process = 0;
  double timeout_s = 30.0;
  // For the CUDA backend; 0 lets it choose.
  int32_t num_sms = 0;
  BlockCounts dispatch_blocks, combine_blocks;
  int32_t max_requests = 0;  // started and not yet waited for, at a time
};

struct Place {
  int group = -1;
  int rank = -1;
};

// Where a device of this process stands; rank -1 if it takes no part.
inline Place FindPlace(const CommunicatorSpec& spec, int32_t ordinal) {
  for (int group = 0; group < static_cast<int>(spec.groups.size()); ++group)
    for (int rank = 0; rank < static_cast<int>(spec.groups[group].size()); ++rank) {
      const Member& member = spec.groups[group][rank];
      if (member.process == spec.process && member.ordinal == ordinal) return {group, rank};
    }
  return {};
}

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_PEERS_H_
