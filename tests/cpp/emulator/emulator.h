// Runs CUDA kernels on the CPU, so that their logic can be tested where there is no GPU: what they
// compute, in what order they wait, and that they stay inside their buffers. Asynchronous copies
// read and write as late as they may, so that who does not wait for them gets something else, and
// kernels and blocks are late now and then, so that others meet them anywhere. It shows nothing of
// the GPU's memory model or of speed.
//
// A block is a thread, and its CUDA threads are fibers that take turns there: a fiber gives up its
// turn only where it waits for others. So `__shared__` is a static variable of the thread.
#ifndef JAX_EP_TESTS_EMULATOR_H_
#define JAX_EP_TESTS_EMULATOR_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the emulator switches between fibers on x86-64 only"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

namespace emulator {

struct Index {
  unsigned x;
};

// Waits once in about `one_in` times: a microsecond, or up to 65 milliseconds.
void BeLateSometimes(unsigned one_in);

// Copies of one CUDA thread that are under way, in groups.
class AsyncCopies {
 public:
  void Add(void* to, const void* from, size_t bytes) {
    open_.push_back({static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes, {}});
  }
  void Commit() { groups_.push_back(std::move(open_)), open_.clear(); }
  // Does all but the last `pending` groups.
  void Finish(size_t pending);
  // Reads what is to be written, and leaves writing for later.
  void Read();
  bool IsIdle() const { return groups_.empty() && open_.empty(); }

 private:
  struct Copy {
    std::byte* to;
    const std::byte* from;
    size_t bytes;
    std::vector<std::byte> read;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

struct Fiber {
  Index thread;
  void* stack_pointer;
  uint64_t num_exchanges = 0;
  bool is_done = false;
  AsyncCopies loads, bulk_stores;
};

// Values that the lanes of a warp show each other, in two turns: nobody can be two ahead.
struct Warp {
  uint64_t values[2][32];
  uint64_t num_shown[2] = {};
};

struct NamedBarrier {
  int num_come = 0;
  uint64_t generation = 0;
  bool all = true, last_all = true;
};

// A kernel in its stream.
struct Kernel {
  unsigned num_blocks, num_threads;
  size_t shared_bytes;
  std::function<void()> body;
  bool may_overlap;                // the kernel before it
  std::shared_ptr<Kernel> before;  // null if nothing before it is running
  std::atomic<unsigned> num_blocks_that_let_next_start{0};
  std::atomic<bool> is_done{false};
};

class Block {
 public:
  Block(Kernel& kernel, Index index);
  // Returns when all its threads have.
  void Run();

  static Block*& Current();
  // Lets the others go on.
  void Yield() { SwitchFrom(current_); }
  // Shows `value` to the warp, and returns what its lanes show. All 32 lanes have to come.
  const uint64_t* Exchange(uint64_t value);
  // Returns once `num_threads` have come to barrier `id`: whether all of them brought true.
  bool Meet(int id, int num_threads, bool value);

  Fiber& fiber() { return fibers_[current_]; }
  std::byte* shared() { return shared_; }
  // What a kernel may do about the next and the last one, see Kernel.
  void LetNextStart();
  void WaitForKernelBefore();
  const Index index, grid, size;

 private:
  void SwitchFrom(size_t from);
  static void Start();

  Kernel& kernel_;
  bool let_next_start_ = false;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  NamedBarrier barriers_[16];
  std::unique_ptr<std::byte[]> stacks_;  // not cleared: few of their pages are touched
  std::vector<std::byte> memory_;
  std::byte* shared_;
  void* caller_ = nullptr;
  size_t current_ = 0, num_left_;
  int num_rounds_ = 0;
};

template <typename T>
uint64_t ToBits(T value) {
  static_assert(sizeof value <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// What lane `lane` of the warp brings.
template <typename T>
T FromLane(T value, int lane) {
  const uint64_t bits = Block::Current()->Exchange(ToBits(value))[lane & 31];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int Lane() { return static_cast<int>(Block::Current()->fiber().thread.x % 32); }

}  // namespace emulator

#define threadIdx (emulator::Block::Current()->fiber().thread)
#define blockIdx (emulator::Block::Current()->index)
#define gridDim (emulator::Block::Current()->grid)
#define blockDim (emulator::Block::Current()->size)

struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct float2 {
  float x, y;
};
using std::max;
using std::min;

inline void __syncwarp() { emulator::Block::Current()->Exchange(0); }
inline void __syncthreads() { emulator::Block::Current()->Meet(0, blockDim.x, true); }
inline bool __syncthreads_or(bool value) {
  return !emulator::Block::Current()->Meet(0, blockDim.x, !value);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::FromLane(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::FromLane(value, emulator::Lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = emulator::Lane();
  return emulator::FromLane(value, lane < delta ? lane : lane - delta);
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t mine = emulator::ToBits(value);
  const uint64_t* values = emulator::Block::Current()->Exchange(mine);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= static_cast<unsigned>(values[lane] == mine) << lane;
  return same;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* values = emulator::Block::Current()->Exchange(value);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __frcp_rn(float x) { return 1 / x; }
inline int __float2int_rn(float x) {
  return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(x));
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <typename T>
T atomicAdd(T* at, int value) {
  return __atomic_fetch_add(at, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline uint32_t atomicExch(uint32_t* at, uint32_t value) {
  return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}

#endif  // JAX_EP_TESTS_EMULATOR_H_
