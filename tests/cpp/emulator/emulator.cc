#include "emulator.h"

#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kAlignment = 256;
// What shared memory holds before anybody writes it: as floats, large numbers.
constexpr std::byte kGarbage{0x6b};
constexpr int kSavedRegisters = 6;
constexpr int kRoundsPerYield = 8;
constexpr unsigned kYieldsPerLateBlock = 256;

std::byte* AlignUp(std::byte* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  return at + (kAlignment - address % kAlignment) % kAlignment;
}

}  // namespace

// Saves what the caller of a function may expect to keep, and goes on where `to` was left.
extern "C" void jax_ep_switch_stack(void** from, void* to);
asm(R"(
.text
jax_ep_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void BeLateSometimes(unsigned one_in) {
  static std::atomic<unsigned> num_threads{0};
  static thread_local std::mt19937 random(++num_threads);
  if (random() % one_in == 0)
    std::this_thread::sleep_for(std::chrono::microseconds(1 << random() % 17));
}

void AsyncCopies::Finish(size_t pending) {
  for (; groups_.size() > pending; groups_.pop_front())
    for (const Copy& copy : groups_.front())
      std::copy_n(copy.read.empty() ? copy.from : copy.read.data(), copy.bytes, copy.to);
}

void AsyncCopies::Read() {
  for (std::vector<Copy>& group : groups_)
    for (Copy& copy : group)
      if (copy.read.empty()) copy.read.assign(copy.from, copy.from + copy.bytes);
}

Block*& Block::Current() {
  static thread_local Block* current = nullptr;
  return current;
}

Block::Block(Kernel& kernel, Index index)
    : index(index),
      grid{kernel.num_blocks},
      size{kernel.num_threads},
      kernel_(kernel),
      fibers_(kernel.num_threads),
      warps_((kernel.num_threads + 31) / 32),
      stacks_(new std::byte[kStackBytes * kernel.num_threads + kAlignment]),
      memory_(kernel.shared_bytes + kAlignment, kGarbage),
      shared_(AlignUp(memory_.data())),
      num_left_(kernel.num_threads) {
  std::byte* stack = AlignUp(stacks_.get());
  for (unsigned thread = 0; thread < size.x; ++thread) {
    stack += kStackBytes;
    // As if Start had been called from nowhere: registers, where to return to, and alignment.
    void** top = reinterpret_cast<void**>(stack - kAlignment);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Block::Start);
    top -= kSavedRegisters;
    std::fill_n(top, kSavedRegisters, nullptr);
    fibers_[thread].thread = {thread};
    fibers_[thread].stack_pointer = top;
  }
}

void Block::Run() {
  Current() = this;
  jax_ep_switch_stack(&caller_, fibers_[0].stack_pointer);
  Current() = nullptr;
  LetNextStart();
}

void Block::LetNextStart() {
  if (!let_next_start_) ++kernel_.num_blocks_that_let_next_start;
  let_next_start_ = true;
}

void Block::WaitForKernelBefore() {
  while (kernel_.before != nullptr && !kernel_.before->is_done) Yield();
}

void Block::Start() {
  Block* block = Current();
  block->kernel_.body();
  if (!block->fiber().bulk_stores.IsIdle()) {
    std::fputs("FAILED: a thread ended before its bulk stores\n", stderr);
    std::abort();
  }
  block->fiber().is_done = true;
  --block->num_left_;
  block->SwitchFrom(block->current_);
}

void Block::SwitchFrom(size_t from) {
  if (num_left_ == 0) return jax_ep_switch_stack(&fibers_[from].stack_pointer, caller_);
  do {
    current_ = (current_ + 1) % fibers_.size();
    // After a few times around, other blocks may have what is waited for.
    if (current_ != 0 || ++num_rounds_ % kRoundsPerYield != 0) continue;
    sched_yield();
    BeLateSometimes(kYieldsPerLateBlock);
  } while (fibers_[current_].is_done);
  if (current_ != from)
    jax_ep_switch_stack(&fibers_[from].stack_pointer, fibers_[current_].stack_pointer);
}

const uint64_t* Block::Exchange(uint64_t value) {
  Fiber& mine = fiber();
  Warp& warp = warps_[mine.thread.x / 32];
  const int turn = static_cast<int>(mine.num_exchanges % 2);
  const uint64_t all_shown = 32 * (mine.num_exchanges / 2 + 1);
  ++mine.num_exchanges;
  warp.values[turn][mine.thread.x % 32] = value;
  ++warp.num_shown[turn];
  while (warp.num_shown[turn] < all_shown) Yield();
  return warp.values[turn];
}

bool Block::Meet(int id, int num_threads, bool value) {
  NamedBarrier& barrier = barriers_[id];
  const uint64_t generation = barrier.generation;
  barrier.all &= value;
  if (++barrier.num_come == num_threads) {
    barrier.last_all = barrier.all;
    barrier.all = true;
    barrier.num_come = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) Yield();
  return barrier.last_all;
}

}  // namespace emulator
