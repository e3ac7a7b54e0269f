// Lists of rows that all warps of a team work through together, each on its own columns. Tokens
// differ in how many rows they have: with a warp for each, all would wait for the one with the
// most.
#ifndef JAX_EP_CUDA_TERMS_CUH_
#define JAX_EP_CUDA_TERMS_CUH_

#include <cstdint>

#include "cuda/arena.h"
#include "cuda/bulk.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {

struct Term {
  const int4* row;
  float weight;
  int32_t tag;  // what else the op has to know of it
};

// The terms of up to kTeamWarps tokens, in shared memory. Warp w of the team lists those of token
// w.
struct TermList {
  static constexpr int kCapacity = 80;

  Term terms[kCapacity];
  // Apart, because the compiler reads counts 16 bytes at a time while begins are written.
  alignas(16) int32_t counts[kTeamWarps];
  alignas(16) int32_t begins[kTeamWarps + 1];  // first term of each token
  bool is_wanted[kTeamWarps];

  // As many tokens as fit for sure.
  static __device__ int MaxTokens(int terms_per_token) {
    return min(kCapacity / terms_per_token, kTeamWarps);
  }
  __device__ int size() const { return begins[kTeamWarps]; }

  // Makes room for `count` terms of this warp's token, and returns the first one's place. The
  // caller writes them, and synchronises the team before it reads any.
  __device__ Term* Reserve(const Team& team, int count, bool wanted) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) counts[team.warp] = count;
    team.Sync();  // what was listed before has been used
    int begin = 0;
    for (int warp = 0; warp < team.warp; ++warp) begin += counts[warp];
    if (lane == 0) {
      begins[team.warp] = begin;
      is_wanted[team.warp] = wanted;
      if (team.warp == kTeamWarps - 1) begins[kTeamWarps] = begin + count;
    }
    return terms + begin;
  }
};

// The columns of one warp: vectors [begin, end), of which there may be several stretches in a long
// row.
struct Columns {
  int begin, end;

  static __device__ int NumStretches(int vectors) {
    constexpr int kMost = kTeamWarps * PieceRing::kVectors;
    return (vectors + kMost - 1) / kMost;
  }
  __device__ Columns(const Team& team, int vectors, int stretch) {
    const int parts = NumStretches(vectors) * kTeamWarps, width = (vectors + parts - 1) / parts;
    begin = min((stretch * kTeamWarps + team.warp) * width, vectors);
    end = min(begin + width, vectors);
  }
  __device__ int size() const { return end - begin; }
};

// One warp's columns of all terms of a list, in order, as many ahead as the ring holds.
class TermStream {
 public:
  __device__ TermStream(const TermList& list, const Columns& columns, PieceRing& ring)
      : ring_(ring),
        next_(list.terms),
        end_(list.terms + list.size()),
        begin_(columns.begin + threadIdx.x % 32),
        left_(columns.size() - static_cast<int>(threadIdx.x % 32)) {
    for (int i = 0; i < PieceRing::kPieces; ++i) LoadNext();
  }
  // This lane's vectors of the oldest term, 32 apart.
  __device__ void Take(int4 (&v)[PieceRing::kPerLane]) {
    ring_.Front(v);
    ring_.Pop();
    LoadNext();
  }

 private:
  __device__ void LoadNext() {
    const bool more = next_ < end_;
    ring_.Load(more ? next_->row + begin_ : nullptr, more ? left_ : 0);
    ++next_;
  }

  PieceRing& ring_;
  const Term *next_, *const end_;
  const int begin_, left_;
};

// What a team keeps in the memory of its warps behind their rings.
struct TeamMemory {
  WarpMemory warp;  // this warp's
  int warp_of_team;

  static constexpr int kRingVectors = PieceRing::kPieces * PieceRing::kStride;
  static constexpr size_t kBytesBehind = (WarpMemory::kVectors - kRingVectors) * sizeof(int4);
  static_assert(sizeof(TermList) + TermList::kCapacity * sizeof(float) <= kBytesBehind);

  __device__ TermList& list() const {
    return *reinterpret_cast<TermList*>(Behind(0) + TermList::kCapacity * sizeof(float));
  }
  // A number for each term, from each warp of the team.
  __device__ float* numbers(int of_warp) const { return reinterpret_cast<float*>(Behind(of_warp)); }

 private:
  __device__ std::byte* Behind(int of_warp) const {
    int4* data = warp.data + (of_warp - warp_of_team) * WarpMemory::kVectors;
    return reinterpret_cast<std::byte*>(data + kRingVectors);
  }
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_TERMS_CUH_
