#include "cuda_runtime.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace emulator {

// Runs kernels one after the other on a thread of its own, for as long as the process lives.
class Stream {
 public:
  explicit Stream(int device) : device(device) {
    std::thread([this] { RunKernels(); }).detach();
  }
  void Add(std::function<void()> kernel) {
    std::lock_guard<std::mutex> lock(mutex_);
    kernels_.push_back(std::move(kernel));
    changed_.notify_all();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return kernels_.empty(); });
  }
  const int device;

 private:
  void RunKernels() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !kernels_.empty(); });
      const std::function<void()> kernel = kernels_.front();
      lock.unlock();
      kernel();
      lock.lock();
      kernels_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> kernels_;
};

namespace {
std::vector<Stream*> all_streams;
}

Stream* NewStream() {
  all_streams.push_back(new Stream(CurrentDevice()));
  return all_streams.back();
}

void Launch(Stream* stream, unsigned blocks, unsigned threads, size_t shared_bytes,
            std::function<void()> kernel) {
  stream->Add([=, kernel = std::move(kernel)] {
    std::vector<std::thread> running;
    for (unsigned block = 0; block < blocks; ++block)
      running.emplace_back(
          [&, block] { Block({block}, {blocks}, threads, shared_bytes, kernel).Run(); });
    for (std::thread& thread : running) thread.join();
  });
}

void Synchronize() {
  for (Stream* stream : all_streams)
    if (stream->device == CurrentDevice()) stream->Wait();
}

int& CurrentDevice() {
  static thread_local int device = 0;
  return device;
}

int NumDevices() {
  const char* count = std::getenv("JAX_EP_EMULATED_GPUS");
  return count == nullptr ? 4 : std::atoi(count);
}

}  // namespace emulator
