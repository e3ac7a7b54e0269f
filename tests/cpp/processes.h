// Forks processes as ranks for cpu_ops_test.cc, and lets them meet and connect.
#ifndef JAX_EP_TESTS_PROCESSES_H_
#define JAX_EP_TESTS_PROCESSES_H_

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "layer.h"

namespace jax_ep::test {

constexpr int kMaxProcesses = 4;

// What the processes of one test share; made before they fork.
struct Board {
  static Board* Make() {
    void* at =
        mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) Fail("mmap");
    return new (at) Board;
  }

  // Returns when all `processes` have come. What they wrote to the board before, they all see.
  void Meet(int processes) {
    const int meeting = num_come.fetch_add(1) / processes;
    while (num_come.load() < (meeting + 1) * processes)
      std::this_thread::sleep_for(std::chrono::microseconds(100));
  }

  std::atomic<int> num_come{0};
  std::atomic<int64_t> rounds[kMaxProcesses] = {};
  Communicator::PeerSegment segments[kMaxProcesses] = {};
};

// Runs body(board, process) in each of `processes` children, which must all return. `meanwhile`
// runs here; it returns the process that it killed, or -1.
inline void RunProcesses(
    int processes, const std::function<void(Board&, int)>& body,
    const std::function<int(Board&, const std::vector<pid_t>&)>& meanwhile = {}) {
  Board* board = Board::Make();
  std::fflush(stdout);
  const pid_t parent = getpid();
  std::vector<pid_t> children;
  for (int process = 0; process < processes; ++process) {
    const pid_t child = fork();
    if (child < 0) Fail("fork");
    if (child > 0) {
      children.push_back(child);
      continue;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) std::_Exit(1);
    body(*board, process);
    std::exit(0);  // with what a leak checker does at exit
  }
  const int victim = meanwhile ? meanwhile(*board, children) : -1;
  for (int process = 0; process < processes; ++process) {
    int status = 0;
    if (waitpid(children[process], &status, 0) != children[process]) Fail("waitpid");
    const bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    if (process == victim ? !killed : status != 0)
      Fail("process %d of %d ended with status %d", process, processes, status);
  }
  munmap(board, sizeof(Board));
}

// Builds this process's communicator and connects it to all others, as the Python bootstrap does.
inline std::unique_ptr<Communicator> Connect(Board& board, CommunicatorSpec spec, int process,
                                             int processes) {
  spec.process = process;
  auto communicator = std::make_unique<Communicator>(spec);
  if (const std::string error = communicator->Prepare(); !error.empty()) Fail("%s", error.c_str());
  board.segments[process] = {static_cast<int32_t>(getpid()), communicator->segment_fd()};
  board.Meet(processes);
  for (int peer = 0; peer < processes; ++peer) {
    if (peer == process) continue;
    if (const std::string error = communicator->Connect(peer, board.segments[peer]); !error.empty())
      Fail("%s", error.c_str());
  }
  board.Meet(processes);
  return communicator;
}

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_PROCESSES_H_
