// Rows on their way through shared memory, by bulk copies: one instruction moves kilobytes, and no
// register holds them, so that few SMs keep enough in flight to fill a link.
#ifndef JAX_EP_CUDA_BULK_CUH_
#define JAX_EP_CUDA_BULK_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/ptx.cuh"

namespace jax_ep::cuda {

// One warp's part of a block's shared memory. With 16 warps, all that an SM has.
struct WarpMemory {
  static constexpr int kVectors = 896;

  int4* data;         // [kVectors]
  uint64_t* barrier;  // of bulk loads

  static constexpr size_t SharedBytes(int warps) {
    return warps * (kVectors * sizeof(int4) + sizeof(uint64_t));
  }

  // To be called by all warps of the block.
  __device__ explicit WarpMemory(std::byte* shared) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int4* rows = reinterpret_cast<int4*>(shared);
    data = rows + warp * kVectors;
    barrier = reinterpret_cast<uint64_t*>(rows + warps * kVectors) + warp;
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_init(barrier);
      ptx::fence_mbarrier_init();
    }
    __syncwarp();
  }
};

// Moves whole rows. All lanes of the warp call all functions together, unless they say otherwise.
class RowBuffer {
 public:
  static constexpr int kVectors = WarpMemory::kVectors;

  __device__ explicit RowBuffer(const WarpMemory& memory)
      : data_(memory.data), loaded_(memory.barrier) {}

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

  // A row of at most kVectors can also be put together here, and parts of it stored.
  static __device__ bool Fits(int64_t bytes) { return bytes <= kVectors * int64_t{sizeof(int4)}; }
  // Copies `bytes` here, and so many more behind them from elsewhere.
  __device__ void Load(const void* from, uint32_t bytes, const void* behind = nullptr,
                       uint32_t bytes_behind = 0) {
    WaitForRoom();
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive_expect_tx(loaded_, bytes + bytes_behind);
      ptx::cp_async_bulk_load(data_, from, bytes, loaded_);
      if (bytes_behind != 0)
        ptx::cp_async_bulk_load(data_ + bytes / sizeof(int4), behind, bytes_behind, loaded_);
    }
    ptx::mbarrier_wait_parity(loaded_, parity_);
    parity_ ^= 1;
  }
  // Has `make` write here, by all lanes.
  template <typename F>
  __device__ void Make(const F& make) {
    WaitForRoom();
    make(reinterpret_cast<std::byte*>(data_));
    ptx::fence_proxy_async();
    __syncwarp();
  }
  // Stores bytes from `offset` on to the `to` of each lane that has one.
  __device__ void StorePart(void* to, int64_t offset, int64_t bytes) const {
    if (to != nullptr)
      ptx::cp_async_bulk_store(to, data_ + offset / static_cast<int64_t>(sizeof(int4)),
                               static_cast<uint32_t>(bytes));
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

// A ring of pieces on their way from global memory, used in the order in which they were asked for.
// Each lane copies what it will use itself, vectors l, l + 32, ... of a piece, so nobody waits for
// other lanes. Small pieces as bulk copies would take 60 ns each of an SM. Takes the memory from a
// RowBuffer whose stores are done.
class PieceRing {
 public:
  // Eight warps share a row of 7168 16-bit elements without a rest.
  static constexpr int kVectors = 112;
  static constexpr int kPerLane = (kVectors + 31) / 32;
  static constexpr int kPieces = 6;
  // Room for all lanes, so that reading a piece needs no condition.
  static constexpr int kStride = 32 * kPerLane;

  __device__ explicit PieceRing(const WarpMemory& memory)
      : begin_(memory.data + threadIdx.x % 32), next_load_(begin_), front_(begin_) {}

  // Asks for vectors of a piece, given what this lane begins with and how many are left from there:
  // none at all is fine. There must be room, and always is after Pop.
  __device__ void Load(const int4* mine, int left) {
#pragma unroll
    for (int u = 0; u < kPerLane; ++u)
      if (32 * u < left) ptx::cp_async_cg(next_load_ + 32 * u, mine + 32 * u);
    ptx::cp_async_commit_group();
    next_load_ = After(next_load_);
  }
  // Waits for the oldest of kPieces pieces, and reads this lane's vectors: past the end of the
  // piece, whatever was there.
  __device__ void Front(int4 (&v)[kPerLane]) const {
    ptx::cp_async_wait_group<kPieces - 1>();
#pragma unroll
    for (int u = 0; u < kPerLane; ++u) v[u] = front_[32 * u];
  }
  // Makes room: the oldest piece has been read.
  __device__ void Pop() { front_ = After(front_); }

 private:
  __device__ int4* After(int4* piece) const {
    return piece == begin_ + (kPieces - 1) * kStride ? begin_ : piece + kStride;
  }

  int4* const begin_;
  int4 *next_load_, *front_;
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_BULK_CUH_
