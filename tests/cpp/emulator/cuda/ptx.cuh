// The instructions of ffi/cuda/ptx.cuh, for emulator.h.
#ifndef JAX_EP_CUDA_PTX_CUH_
#define JAX_EP_CUDA_PTX_CUH_

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

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
inline void st_relaxed_sys(uint32_t* at, uint32_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
inline uint64_t ld_relaxed_sys(const uint64_t* at) {
  emulator::Block::Current()->Yield();
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}
inline void st_relaxed_sys(uint64_t* at, uint64_t value) {
  __atomic_store_n(at, value, __ATOMIC_RELAXED);
}
inline uint32_t ld_volatile(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline bool barrier_red_and(int id, int threads, bool value) {
  return emulator::Block::Current()->Meet(id, threads, value);
}
inline void barrier_sync(int id, int threads) {
  emulator::Block::Current()->Meet(id, threads, true);
}

inline void griddepcontrol_launch_dependents() { emulator::Block::Current()->LetNextStart(); }
inline void griddepcontrol_wait() { emulator::Block::Current()->WaitForKernelBefore(); }

inline void ExpectAligned(const void* to, const void* from, uint32_t bytes) {
  const auto all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (all % 16 != 0) std::abort();
}
inline emulator::Fiber& ThisThread() { return emulator::Block::Current()->fiber(); }

inline void cp_async_cg(void* shared, const void* global) {
  ExpectAligned(shared, global, 16);
  ThisThread().loads.Add(shared, global, 16);
}
inline void cp_async_commit_group() { ThisThread().loads.Commit(); }
template <int kPending>
void cp_async_wait_group() {
  ThisThread().loads.Finish(kPending);
}

// A barrier holds the loads that it waits for, the last one first.
struct BulkLoad {
  void* to;
  const void* from;
  uint32_t bytes;
  const BulkLoad* before;
};
inline void mbarrier_init(uint64_t* barrier) { *barrier = 0; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint64_t*, uint32_t) {}
inline void cp_async_bulk_load(void* shared, const void* global, uint32_t bytes,
                               uint64_t* barrier) {
  ExpectAligned(shared, global, bytes);
  const auto* before = reinterpret_cast<const BulkLoad*>(*barrier);
  *barrier = reinterpret_cast<uint64_t>(new BulkLoad{shared, global, bytes, before});
}
inline void mbarrier_wait_parity(uint64_t* barrier, uint32_t) {
  __syncwarp();  // the lane that loads may not have come yet
  while (*barrier != 0) {
    const auto* load = reinterpret_cast<const BulkLoad*>(*barrier);
    std::memcpy(load->to, load->from, load->bytes);
    *barrier = reinterpret_cast<uint64_t>(load->before);
    delete load;
  }
}
inline void cp_async_bulk_store(void* global, const void* shared, uint32_t bytes) {
  ExpectAligned(global, shared, bytes);
  ThisThread().bulk_stores.Add(global, shared, bytes);
}
inline void cp_async_bulk_commit_group() { ThisThread().bulk_stores.Commit(); }
template <int kPending>
void cp_async_bulk_wait_group() {
  ThisThread().bulk_stores.Finish(kPending);
}
inline void cp_async_bulk_wait_group_read() { ThisThread().bulk_stores.Read(); }
inline void fence_proxy_async() {}

inline int4 ld_nc_no_allocate(const int4* at) { return *at; }
inline int4 ld_no_allocate(const int4* at) { return *at; }
inline void st_no_allocate(int4* at, const int4& value) { *at = value; }

// An 8-bit float of `mantissa_bits`, at most `largest`, from its magnitude in steps of its
// exponent.
inline uint8_t CvtFp8(float x, int mantissa_bits, int bias, float largest) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  const float magnitude = std::min(std::fabs(x), largest);
  int exponent = 1 - bias;
  if (magnitude > 0) exponent = std::max(std::ilogb(magnitude), exponent);
  const int steps =
      static_cast<int>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  return sign | static_cast<uint8_t>(((exponent + bias - 1) << mantissa_bits) + steps);
}
inline float max_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::max(a, b);
}
inline uint32_t min_u16x2(uint32_t a, uint32_t b) {
  return std::min(a & 0xffff, b & 0xffff) | std::min(a >> 16, b >> 16) << 16;
}
inline uint16_t cvt_e4m3x2(float low, float high) {
  return CvtFp8(low, 3, 7, 448.0f) | CvtFp8(high, 3, 7, 448.0f) << 8;
}
inline uint16_t cvt_e5m2x2(float low, float high) {
  return CvtFp8(low, 2, 15, 57344.0f) | CvtFp8(high, 2, 15, 57344.0f) << 8;
}

inline uint64_t globaltimer() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace jax_ep::cuda::ptx

#endif  // JAX_EP_CUDA_PTX_CUH_
