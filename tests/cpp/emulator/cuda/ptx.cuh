// The instructions of ffi/cuda/ptx.cuh, for emulator.h. Copies are done at once, and kernels of a
// stream never overlap.
#ifndef JAX_EP_CUDA_PTX_CUH_
#define JAX_EP_CUDA_PTX_CUH_

#include <chrono>
#include <cstdint>
#include <cstdlib>

#include "emulator.h"

namespace jax_ep::cuda::ptx {

inline std::byte* dynamic_shared() { return emulator::Block::Current()->shared(); }

inline void st_release_sys(uint32_t* at, uint32_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
}
// What polls has to let others go on.
inline uint32_t ld_acquire_sys(const uint32_t* at) {
  emulator::Block::Current()->Yield();
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
inline uint32_t ld_relaxed_sys(const uint32_t* at) {
  emulator::Block::Current()->Yield();
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}
inline uint32_t ld_volatile(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline bool barrier_red_and(int id, int threads, bool value) {
  return emulator::Block::Current()->Meet(id, threads, value);
}
inline void barrier_sync(int id, int threads) {
  emulator::Block::Current()->Meet(id, threads, true);
}

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}

inline void CopyAligned(void* to, const void* from, uint32_t bytes) {
  const auto all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (all % 16 != 0) std::abort();
  std::memcpy(to, from, bytes);
}
inline void cp_async_cg(void* shared, const void* global) { CopyAligned(shared, global, 16); }
inline void cp_async_commit_group() {}
template <int kPending>
void cp_async_wait_group() {}

inline void mbarrier_init(uint64_t*) {}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint64_t*, uint32_t) {}
// The lane that copies may not have come yet.
inline void mbarrier_wait_parity(uint64_t*, uint32_t) { __syncwarp(); }
inline void cp_async_bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t*) {
  CopyAligned(shared, global, bytes);
}
inline void cp_async_bulk_store(void* global, const void* shared, uint32_t bytes) {
  CopyAligned(global, shared, bytes);
}
inline void cp_async_bulk_commit_group() {}
template <int kPending>
void cp_async_bulk_wait_group() {}
inline void cp_async_bulk_wait_group_read() {}
inline void fence_proxy_async() {}

inline int4 ld_nc_no_allocate(const int4* at) { return *at; }
inline int4 ld_no_allocate(const int4* at) { return *at; }
inline void st_no_allocate(int4* at, const int4& value) { *at = value; }

inline uint64_t globaltimer() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace jax_ep::cuda::ptx

#endif  // JAX_EP_CUDA_PTX_CUH_
