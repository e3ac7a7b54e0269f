// Rows on their way through shared memory, by bulk copies: one instruction moves kilobytes, and no
// register holds them, so that few SMs keep enough in flight to fill a link.
#ifndef JAX_EP_CUDA_BULK_CUH_
#define JAX_EP_CUDA_BULK_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/ptx.cuh"

namespace jax_ep::cuda {

// One warp's part of a block's shared memory, with the barrier of its loads. All lanes call all
// functions together, unless they say otherwise.
class RowBuffer {
 public:
  // With 16 warps, as much as an SM has.
  static constexpr int kVectors = 896;
  static constexpr int kBytes = kVectors * 16;

  static constexpr size_t SharedBytes(int warps) { return warps * (kBytes + sizeof(uint64_t)); }

  __device__ RowBuffer(std::byte* shared, int warps)
      : data_(reinterpret_cast<int4*>(shared + threadIdx.x / 32 * kBytes)),
        loaded_(reinterpret_cast<uint64_t*>(shared + warps * kBytes) + threadIdx.x / 32) {
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_init(loaded_);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  // Copies a row of `vectors` times 16 bytes to the `to` of each lane that has one. Returns once
  // its stores are under way.
  __device__ void Copy(int4* to, const int4* from, int vectors) {
    for (int begin = 0; begin < vectors; begin += kVectors) {
      const uint32_t bytes = min(kVectors, vectors - begin) * 16;
      WaitForRoom();
      if (threadIdx.x % 32 == 0) {
        ptx::mbarrier_arrive_expect_tx(loaded_, bytes);
        ptx::cp_async_bulk_load(data_, from + begin, bytes, loaded_);
      }
      ptx::mbarrier_wait_parity(loaded_, parity_);
      parity_ ^= 1;
      if (to != nullptr) ptx::cp_async_bulk_store(to + begin, data_, bytes);
    }
  }

  // Fills the buffer, up to a row's length, for Store.
  __device__ void Fill(const int4& value, int vectors) {
    WaitForRoom();
    for (int v = threadIdx.x % 32; v < min(kVectors, vectors); v += 32) data_[v] = value;
    ptx::fence_proxy_async();
    __syncwarp();
  }
  // Stores what Fill put there over a whole row. By one lane.
  __device__ void Store(int4* to, int vectors) const {
    for (int begin = 0; begin < vectors; begin += kVectors)
      ptx::cp_async_bulk_store(to + begin, data_, min(kVectors, vectors - begin) * 16);
  }

  // Waits until all stores are done. A release by this thread, or by one that it synchronises with
  // next, then tells of them.
  __device__ void WaitForStores() const {
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
    ptx::fence_proxy_async();
  }
  // The same for those before the last call of this function.
  __device__ void WaitForEarlierStores() const {
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<1>();
    ptx::fence_proxy_async();
  }

 private:
  __device__ void WaitForRoom() const {
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read();
    __syncwarp();
  }

  int4* const data_;
  uint64_t* const loaded_;
  uint32_t parity_ = 0;
};

// One warp's ring of pieces on their way from global memory, used in the order in which they were
// asked for. All lanes call all functions together.
class PieceRing {
 public:
  // Four vectors per lane, and with 16 warps as many pieces as an SM has room for.
  static constexpr int kVectors = 128;
  static constexpr int kPieces = 7;

  static constexpr size_t SharedBytes(int warps) {
    return warps * kPieces * (kVectors * sizeof(int4) + sizeof(uint64_t));
  }

  __device__ PieceRing(std::byte* shared, int warps)
      : pieces_(reinterpret_cast<int4*>(shared) + threadIdx.x / 32 * kPieces * kVectors),
        loaded_(reinterpret_cast<uint64_t*>(shared + warps * kPieces * kVectors * sizeof(int4)) +
                threadIdx.x / 32 * kPieces) {
    if (threadIdx.x % 32 < kPieces) {
      ptx::mbarrier_init(&loaded_[threadIdx.x % 32]);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }

  // Asks for up to kVectors; there must be room.
  __device__ void Load(const int4* from, int vectors) {
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive_expect_tx(&loaded_[next_load_], vectors * 16);
      ptx::cp_async_bulk_load(pieces_ + next_load_ * kVectors, from, vectors * 16,
                              &loaded_[next_load_]);
    }
    if (++next_load_ == kPieces) next_load_ = 0;
  }
  // Waits for the oldest piece.
  __device__ const int4* Front() const {
    ptx::mbarrier_wait_parity(&loaded_[front_], parity_);
    return pieces_ + front_ * kVectors;
  }
  // Makes room: the oldest piece has been used.
  __device__ void Pop() {
    __syncwarp();
    if (++front_ == kPieces) front_ = 0, parity_ ^= 1;
  }

 private:
  int4* const pieces_;
  uint64_t* const loaded_;
  int next_load_ = 0, front_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_BULK_CUH_
