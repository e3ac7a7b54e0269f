#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace jax_ep::cpu {
namespace {

// Tasks in order of arrival. The queues live as long as the process: threads may still wait on them
// while static objects are destroyed.
struct TaskQueue {
  std::mutex mutex;
  std::condition_variable ready;
  std::deque<std::function<void()>> tasks;
  int idle = 0;
};

void Serve(TaskQueue& queue) {
  std::unique_lock<std::mutex> lock(queue.mutex);
  for (;;) {
    ++queue.idle;
    queue.ready.wait(lock, [&] { return !queue.tasks.empty(); });
    --queue.idle;
    std::function<void()> task = std::move(queue.tasks.front());
    queue.tasks.pop_front();
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
  }
}

// XLA's threads flush subnormal numbers to zero, and a thread starts out as its creator does. That
// would make results depend on who made a thread, and lose halves that are subnormal only as such.
class ExactSubnormals {
 public:
  ExactSubnormals() {
    std::fegetenv(&outer_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~ExactSubnormals() { std::fesetenv(&outer_); }
  ExactSubnormals(const ExactSubnormals&) = delete;

 private:
  std::fenv_t outer_;
};

struct Loop {
  explicit Loop(int64_t count, const std::function<void(int64_t)>& f) : n(count), body(f) {}

  // Returns after this thread found nothing left to start. A worker that comes late touches no
  // `body`.
  void Work() {
    const ExactSubnormals subnormals;
    int64_t finished = 0;
    for (int64_t i = next++; i < n; i = next++, ++finished) body(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    done += finished;
    if (done == n) all_done.notify_all();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == n; });
  }

  const int64_t n;
  const std::function<void(int64_t)>& body;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;
};

int NumCores() { return std::max(1u, std::thread::hardware_concurrency()); }

TaskQueue& Workers() {
  static TaskQueue* queue = [] {
    auto* q = new TaskQueue;
    for (int i = 1; i < NumCores(); ++i) std::thread([q] { Serve(*q); }).detach();
    return q;
  }();
  return *queue;
}

}  // namespace

void RunOnOwnThread(std::function<void()> task) {
  static TaskQueue* queue = new TaskQueue;
  std::lock_guard<std::mutex> lock(queue->mutex);
  queue->tasks.push_back(std::move(task));
  if (queue->idle < static_cast<int>(queue->tasks.size()))
    std::thread([] { Serve(*queue); }).detach();
  else
    queue->ready.notify_one();
}

void ParallelFor(int64_t n, const std::function<void(int64_t)>& body) {
  if (n <= 0) return;
  const auto loop = std::make_shared<Loop>(n, body);
  const int helpers = static_cast<int>(std::min<int64_t>(NumCores(), n)) - 1;
  if (helpers > 0) {
    TaskQueue& workers = Workers();
    std::lock_guard<std::mutex> lock(workers.mutex);
    for (int i = 0; i < helpers; ++i) workers.tasks.push_back([loop] { loop->Work(); });
    workers.ready.notify_all();
  }
  loop->Work();
  loop->Wait();
}

}  // namespace jax_ep::cpu
