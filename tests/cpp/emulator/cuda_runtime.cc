#include "cuda_runtime.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace emulator {

constexpr unsigned kKernelsPerLateOne = 4;

// Starts kernels in their order, one when the last is over or has let it start.
class Stream {
 public:
  explicit Stream(int device) : device(device) {}
  void Add(std::shared_ptr<Kernel> kernel) {
    std::lock_guard<std::mutex> lock(mutex_);
    kernel->before = last_;
    last_ = kernel;
    ++num_running_;
    std::thread([this, kernel] { Run(kernel); }).detach();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return num_running_ == 0; });
  }
  const int device;

 private:
  static bool MayStart(const Kernel& kernel) {
    const Kernel* before = kernel.before.get();
    return before == nullptr || before->is_done ||
           (kernel.may_overlap && before->num_blocks_that_let_next_start == before->num_blocks);
  }
  void Run(const std::shared_ptr<Kernel>& kernel) {
    while (!MayStart(*kernel)) std::this_thread::yield();
    BeLateSometimes(kKernelsPerLateOne);
    std::vector<std::thread> blocks;
    for (unsigned block = 0; block < kernel->num_blocks; ++block)
      blocks.emplace_back([&, block] { Block(*kernel, {block}).Run(); });
    for (std::thread& block : blocks) block.join();
    kernel->is_done = true;
    kernel->before.reset();
    std::lock_guard<std::mutex> lock(mutex_);
    --num_running_;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Kernel> last_;
  int num_running_ = 0;
};

namespace {
std::vector<Stream*> all_streams;
}

Stream* NewStream() {
  all_streams.push_back(new Stream(CurrentDevice()));
  return all_streams.back();
}

void Launch(Stream* stream, std::shared_ptr<Kernel> kernel) { stream->Add(std::move(kernel)); }

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
