#ifndef JAX_EP_CPU_COMMUNICATOR_H_
#define JAX_EP_CPU_COMMUNICATOR_H_

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "common/error.h"
#include "common/ops.h"
#include "common/peers.h"
#include "cpu/lanes.h"
#include "cpu/ops.h"
#include "cpu/shared_memory.h"

namespace jax_ep::cpu {

// In the order of Phase.
using OpParams = std::variant<RouteParams, DispatchParams, CombineParams, TransferLap>;
using DoneCallback = std::function<void(const ErrorRecord&)>;

// Brings the ranks of a group together for one op at a time. Nothing blocks the caller: when the
// last local rank has come, a thread of the op's own exchanges with other processes, computes on
// all cores, and calls every rank's `done`. Safe to call from any thread.
class Communicator {
 public:
  explicit Communicator(CommunicatorSpec spec);
  ~Communicator();

  // Sets up what other processes map; not needed when all members are local. Both return an error
  // text.
  std::string Prepare();
  struct PeerSegment {
    int32_t pid, fd;
  };
  std::string Connect(int32_t process, PeerSegment segment);
  int32_t segment_fd() const { return segment_.fd(); }
  // Address space reserved for other processes; memory is taken as it is written.
  int64_t arena_bytes() const { return segment_.data() == nullptr ? 0 : layout_.segment_bytes; }

  // `ordinal` names the device. `done` is called once, on a thread where it may block.
  void Submit(int32_t ordinal, const OpKey& key_without_group, const OpParams& params,
              DoneCallback done);

  // Returns the first error since the last call, and forgets it unless the communicator is beyond
  // use.
  ErrorRecord TakeError();
  int64_t NextSite() { return next_site_++; }
  const CommunicatorSpec& spec() const { return spec_; }

 private:
  struct Arrival {
    int rank;
    OpParams params;
    DoneCallback done;
  };
  struct Job {
    OpKey key;
    std::vector<Arrival> arrivals;
    std::chrono::steady_clock::time_point deadline;

    LaneContent content() const;
  };
  // By rank: what a rank of another process published, null for local ranks.
  using RemoteRanks = std::vector<std::byte*>;

  int NumLocal(int group) const;
  int LocalIndex(int group, int rank) const;
  std::vector<int32_t> RemoteProcesses(int group) const;

  void Run(Job& job);
  ErrorRecord RunAcrossProcesses(const Job& job, const std::vector<int32_t>& remote);
  std::vector<int> RemoteRanksOf(const Job& job) const;
  int AcquireLane();
  ErrorRecord Publish(const Job& job, const std::vector<int32_t>& readers);
  void PublishRank(const Job& job, const Arrival& arrival, std::byte* at);
  int FindLane(const Job& job, int32_t process) const;
  ErrorRecord WaitForPeer(const Job& job, int32_t process, int* lane) const;
  ErrorRecord MissingPeer(const Job& job, int32_t process) const;
  void Compute(const Job& job, const RemoteRanks& remote);
  void ComputeRoute(const Job& job, const RemoteRanks& remote);
  void ComputeDispatch(const Job& job, const RemoteRanks& remote);
  void ComputeCombine(const Job& job, const RemoteRanks& remote);
  void ComputeTransfer(const Job& job, const RemoteRanks& remote);

  void Record(const ErrorRecord& error);
  void Finish(Job& job, const ErrorRecord& error);
  ErrorRecord MissingArrival(const Job& job) const;
  void WatchDeadlines();

  const CommunicatorSpec spec_;
  const LaneLayout layout_;
  SharedMemory segment_;
  std::map<int32_t, SharedMemory> peers_;  // by process
  std::atomic<int64_t> next_site_{0};

  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_map<OpKey, Job, OpKeyHash> waiting_;  // not all local ranks have come
  int num_running_ = 0;
  bool closing_ = false;
  ErrorRecord error_;
  bool failed_ = false;              // a peer was lost: no later op can succeed
  bool lane_taken_[kNumLanes] = {};  // from before it is written until after it is published
  std::thread watchdog_;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_COMMUNICATOR_H_
