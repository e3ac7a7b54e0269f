// Transfer: slots, such as the weights of experts, from rank to rank. A slot travels as rows,
// through the windows that dispatch uses. All rows that go to one rank are numbered; the windows
// hold a lap of them at a time, in turns of two, so that the memory does not grow with what is
// moved, and nothing is put together before it leaves: sending blocks read rows from the slots
// themselves, and receiving blocks put them where they belong. Those also copy the slots that stay
// on their rank, which fills the time until others arrive.
//
// Nobody waits in a circle: all ranks work on chunks in the order of their numbers, a sender waits
// only until its peer has read the chunk of two laps before, and has announced by then all that it
// has sent.
#include <type_traits>

#include "cuda/bulk.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/request.cuh"
#include "cuda/rows.cuh"
#include "cuda/sync.cuh"

namespace jax_ep::cuda {
namespace {

constexpr int kThreads = 2 * kTeamThreads;
constexpr int kWarps = kThreads / 32;

// A few rows of one pair of ranks, which share a flag.
struct Chunk {
  int64_t first, last;  // of the pair's rows
  int64_t in_lap;
  uint32_t lap;
};

// One rank's side of a transfer.
struct Transfer {
  const Arena& arena;
  const TransferParams& p;
  uint32_t epoch;  // of the first lap
  int64_t row_bytes, rows_per_slot;

  __device__ Transfer(const Arena& arena, const TransferParams& p, uint32_t epoch)
      : arena(arena),
        p(p),
        epoch(epoch),
        row_bytes(arena.layout.row_bytes),
        rows_per_slot(CeilDiv(p.slot_bytes, row_bytes)) {}

  __device__ int peers() const { return arena.layout.num_ranks - 1; }
  __device__ int64_t most_rows() const { return *p.tables.most * rows_per_slot; }
  __device__ uint32_t laps() const {
    const int64_t laps = CeilDiv(most_rows(), arena.layout.max_tokens);
    return static_cast<uint32_t>(laps > 1 ? laps : 1);
  }
  // Of a pair with as many rows as any.
  __device__ int64_t num_chunks() const {
    const ArenaLayout& layout = arena.layout;
    return most_rows() / layout.max_tokens * layout.max_chunks +
           CeilDiv(most_rows() % layout.max_tokens, layout.tokens_per_chunk);
  }
  // Of a pair of `slots` slots; past its end, the chunk is empty.
  __device__ Chunk ChunkOf(int64_t number, int64_t slots) const {
    const ArenaLayout& layout = arena.layout;
    Chunk chunk;
    chunk.lap = static_cast<uint32_t>(number / layout.max_chunks);
    chunk.in_lap = number % layout.max_chunks;
    const int64_t lap = int64_t{chunk.lap} * layout.max_tokens,
                  first = lap + chunk.in_lap * layout.tokens_per_chunk;
    chunk.first = first;
    chunk.last =
        min(min(first + layout.tokens_per_chunk, lap + layout.max_tokens), slots * rows_per_slot);
    return chunk;
  }
  // The place of a row in the window at `owner`.
  __device__ int4* Window(const Chunk& chunk, int owner, int source, int64_t row) const {
    return arena.Row(epoch + chunk.lap, owner, source,
                     row - int64_t{chunk.lap} * arena.layout.max_tokens);
  }
  __device__ int64_t Offset(int64_t row) const { return row % rows_per_slot * row_bytes; }
  __device__ int64_t BytesFrom(int64_t offset) const {
    return min(row_bytes, p.slot_bytes - offset);
  }
  __device__ const std::byte* Source(int64_t slot, int64_t offset) const {
    return static_cast<const std::byte*>(p.source) + slot * p.slot_bytes + offset;
  }
  __device__ std::byte* Dest(int64_t slot, int64_t offset) const {
    return static_cast<std::byte*>(p.dest) + slot * p.slot_bytes + offset;
  }
};

// Moves a row to the `to` of each lane that has one; a warp. Units are what slots are a whole
// number of: bulk copies take vectors of 16 bytes.
template <typename Unit>
__device__ void CopyRow(RowBuffer& buffer, std::byte* to, const void* from, int64_t bytes) {
  const int units = static_cast<int>(bytes / static_cast<int64_t>(sizeof(Unit)));
  if constexpr (std::is_same_v<Unit, int4>) {
    buffer.Copy(reinterpret_cast<int4*>(to), static_cast<const int4*>(from), units);
  } else {
    const unsigned lanes = __ballot_sync(kAllLanes, to != nullptr);
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      auto* row = reinterpret_cast<Unit*>(
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(to), __ffs(rest) - 1));
      for (int i = threadIdx.x % 32; i < units; i += 32) row[i] = static_cast<const Unit*>(from)[i];
    }
  }
}

// Fills a row with one byte: 0 in an empty slot, and 0xff, a NaN to floats, where nothing came; a
// warp.
template <typename Unit>
__device__ void FillRowWith(std::byte* row, int64_t bytes, int byte) {
  Unit value;
  for (size_t i = 0; i < sizeof(Unit); ++i) reinterpret_cast<uint8_t*>(&value)[i] = byte;
  for (int64_t i = threadIdx.x % 32; i < bytes / static_cast<int64_t>(sizeof(Unit)); i += 32)
    reinterpret_cast<Unit*>(row)[i] = value;
}

// What a team has sent and not announced: the next chunk's stores are begun first, so that nobody
// waits for them.
struct Unannounced {
  uint32_t* flag = nullptr;
  uint32_t epoch = 0;

  __device__ void Announce(const Team& team) {
    if (flag != nullptr && team.thread == 0) ptx::st_release_sys(flag, epoch);
    flag = nullptr;
  }
};

// The flag that says that there is room for a chunk at `peer`, and what it has to reach. None is
// needed in the first lap.
struct Room {
  const uint32_t* flag = nullptr;
  uint32_t epoch = 0;

  __device__ Room(const Transfer& t, const Chunk& chunk, int peer) {
    if (chunk.lap == 0) return;
    const bool is_second = chunk.lap == 1;
    epoch = t.epoch + chunk.lap - (is_second ? 1 : 2);
    // The windows of the second lap are those of the exchange before.
    flag = is_second ? t.arena.Ready(t.arena.rank, peer)
                     : t.arena.LapRoom(epoch, t.arena.rank, peer, chunk.in_lap);
  }
  __device__ bool is_there() const {
    return flag == nullptr || Reached(ptx::ld_acquire_sys(flag), epoch);
  }
};

template <typename Unit>
__device__ void Send(const Transfer& t, const Team& team, RowBuffer& buffer) {
  const Arena& arena = t.arena;
  const TransferTables& tables = t.p.tables;
  const int64_t num_tasks = t.num_chunks() * t.peers();
  Unannounced sent;
  Tasks tasks(team, &arena.Header()->send_tasks);
  while (tasks.current() < num_tasks) {
    const int distance = 1 + static_cast<int>(tasks.current() % t.peers()),
              peer = (arena.rank + distance) % arena.layout.num_ranks;
    const int64_t begin = tables.send_begin[peer];
    const Chunk chunk = t.ChunkOf(tasks.current() / t.peers(), tables.send_begin[peer + 1] - begin);
    tasks.Ask();
    if (chunk.first >= chunk.last) {
      tasks.Advance();
      continue;
    }
    const Room room(t, chunk, peer);
    bool is_free = team.SyncAnd(team.thread != 0 || room.is_there());
    if (!is_free) {
      buffer.WaitForStores();
      team.Sync();
      sent.Announce(team);
      is_free = team.SyncAnd(team.thread != 0 ||
                             Wait(arena, room.flag, room.epoch, peer, Phase::kTransfer));
    }
    ptx::fence_proxy_async();  // what was read there is overwritten by bulk copies
    for (int64_t row = chunk.first + team.warp; is_free && row < chunk.last; row += kTeamWarps) {
      const int64_t slot = tables.send_slots[begin + row / t.rows_per_slot], offset = t.Offset(row);
      int4* window = t.Window(chunk, peer, arena.rank, row);
      CopyRow<Unit>(buffer, threadIdx.x % 32 == 0 ? reinterpret_cast<std::byte*>(window) : nullptr,
                    t.Source(slot, offset), t.BytesFrom(offset));
    }
    buffer.WaitForEarlierStores();
    tasks.Advance();
    sent.Announce(team);
    if (is_free) {
      const uint32_t epoch = t.epoch + chunk.lap;
      sent = {arena.LapFlag(epoch, peer, arena.rank, chunk.in_lap), epoch};
    }
  }
  buffer.WaitForStores();
  team.Sync();
  sent.Announce(team);
}

// A row that arrived goes to all slots from `slot` on; a warp. Null if it did not come.
template <typename Unit>
__device__ void Place(const Transfer& t, RowBuffer& buffer, const void* from, int slot,
                      int64_t offset) {
  const int lane = threadIdx.x % 32;
  const int64_t bytes = t.BytesFrom(offset);
  while (slot >= 0) {
    int mine = -1;
    for (int i = 0; i < 32 && slot >= 0; ++i, slot = t.p.tables.next[slot]) {
      if (lane == i) mine = slot;
      if (from == nullptr) FillRowWith<Unit>(t.Dest(slot, offset), bytes, 0xff);
    }
    if (from != nullptr)
      CopyRow<Unit>(buffer, mine >= 0 ? t.Dest(mine, offset) : nullptr, from, bytes);
  }
}

template <typename Unit>
__device__ void ReceiveChunk(const Transfer& t, const Team& team, RowBuffer& buffer, Tasks& tasks,
                             int64_t number) {
  const Arena& arena = t.arena;
  const TransferTables& tables = t.p.tables;
  const int ranks = arena.layout.num_ranks, distance = 1 + static_cast<int>(number % t.peers()),
            source = (arena.rank + ranks - distance) % ranks;
  const int64_t begin = tables.recv_begin[source];
  const Chunk chunk = t.ChunkOf(number / t.peers(), tables.recv_begin[source + 1] - begin);
  const uint32_t epoch = t.epoch + chunk.lap;
  bool arrived = true;
  if (team.thread == 0 && chunk.first < chunk.last)
    arrived = Wait(arena, arena.LapFlag(epoch, arena.rank, source, chunk.in_lap), epoch, source,
                   Phase::kTransfer);
  arrived = tasks.Advance(arrived);
  if (chunk.first >= chunk.last) return;
  ptx::fence_proxy_async();  // what arrived is read by bulk copies
  for (int64_t row = chunk.first + team.warp; row < chunk.last; row += kTeamWarps)
    Place<Unit>(t, buffer, arrived ? t.Window(chunk, arena.rank, source, row) : nullptr,
                tables.recv_slots[begin + row / t.rows_per_slot], t.Offset(row));
  team.Sync();  // all of it has been read
  if (team.thread == 0)
    ptx::st_release_sys(arena.LapRoom(epoch, source, arena.rank, chunk.in_lap), epoch);
}

// Rows of slots that nothing arrives for, as many as there are in a chunk.
template <typename Unit>
__device__ void FillChunk(const Transfer& t, const Team& team, RowBuffer& buffer, int64_t number) {
  const int per_chunk = t.arena.layout.tokens_per_chunk, lane = threadIdx.x % 32;
  const int64_t first = number * per_chunk,
                last = min(first + per_chunk, t.p.num_slots * t.rows_per_slot);
  for (int64_t row = first + team.warp; row < last; row += kTeamWarps) {
    const int64_t slot = row / t.rows_per_slot, offset = t.Offset(row);
    const int32_t source = t.p.tables.source[slot];
    if (source == kArrives) continue;
    std::byte* to = t.Dest(slot, offset);
    if (source == kEmpty)
      FillRowWith<Unit>(to, t.BytesFrom(offset), 0);
    else
      CopyRow<Unit>(buffer, lane == 0 ? to : nullptr, t.Source(source, offset),
                    t.BytesFrom(offset));
  }
}

// What arrives and what stays, in turns.
template <typename Unit>
__device__ void Receive(const Transfer& t, const Team& team, RowBuffer& buffer) {
  const int64_t arriving = t.num_chunks() * t.peers(),
                staying = CeilDiv(t.p.num_slots * t.rows_per_slot, t.arena.layout.tokens_per_chunk),
                all = arriving + staying;
  Tasks tasks(team, &t.arena.Header()->receive_tasks);
  while (tasks.current() < all) {
    const int64_t task = tasks.current(), before = task * staying / all;
    tasks.Ask();
    if ((task + 1) * staying / all == before) {
      ReceiveChunk<Unit>(t, team, buffer, tasks, task - before);
    } else {
      FillChunk<Unit>(t, team, buffer, before);
      tasks.Advance();
    }
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads, 1)
    TransferKernel(Arena arena, TransferParams p, int senders) {
  const Team team;
  const WarpMemory memory(ptx::dynamic_shared());
  RowBuffer buffer(memory);
  const Request whole(arena);
  const uint32_t epoch = EnterEpoch(arena);
  const Transfer transfer(arena, p, epoch);
  if (static_cast<int>(blockIdx.x) < senders) Send<Unit>(transfer, team, buffer);
  Receive<Unit>(transfer, team, buffer);
  buffer.WaitForStores();
  LeaveEpoch(arena, whole, epoch, Phase::kTransfer, epoch + transfer.laps() - 1);
}

// Calls `visit` with the kernel for slots of so many bytes.
template <typename F>
cudaError_t VisitKernel(int64_t slot_bytes, const F& visit) {
  if (slot_bytes % 16 == 0) return visit(TransferKernel<int4>);
  if (slot_bytes % 8 == 0) return visit(TransferKernel<uint64_t>);
  if (slot_bytes % 4 == 0) return visit(TransferKernel<uint32_t>);
  return slot_bytes % 2 == 0 ? visit(TransferKernel<uint16_t>) : visit(TransferKernel<uint8_t>);
}

}  // namespace

cudaError_t LaunchTransfer(const Arena& arena, const TransferParams& params, Blocks blocks,
                           cudaStream_t stream) {
  const Grid grid{blocks.total, kThreads, WarpMemory::SharedBytes(kWarps)};
  return VisitKernel(params.slot_bytes, [&](auto* kernel) {
    return Launch(kernel, grid, stream, arena, params, blocks.senders);
  });
}

cudaError_t LoadTransfer(const MoEShape&) {
  cudaError_t error = cudaSuccess;
  for (const int64_t slot_bytes : {16, 8, 4, 2, 1})
    if (error == cudaSuccess)
      error = VisitKernel(slot_bytes, [](auto* kernel) {
        return AllowSharedMemory(kernel, WarpMemory::SharedBytes(kWarps));
      });
  return error;
}

}  // namespace jax_ep::cuda
