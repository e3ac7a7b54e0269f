#include "cpu/communicator.h"

#include <algorithm>
#include <utility>

#include "cpu/threads.h"

namespace jax_ep::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A piece of work: small enough to share out evenly, large enough to hide the sharing.
constexpr int64_t kTokensPerPiece = 64;

Phase PhaseOf(const OpParams& params) { return static_cast<Phase>(params.index()); }

// Tells apart inputs of an op that lie in a lane in different ways; see LaneContent.
int64_t InputKind(const RouteParams&) { return 0; }
int64_t InputKind(const DispatchParams& p) {
  const QuantParams& quant = p.quant;
  const int64_t plain = int64_t{p.weights != nullptr} | int64_t{p.y != nullptr} << 1;
  if (quant.block == 0) return plain;
  return plain | int64_t{quant.scales != nullptr} << 2 | int64_t{1} << 3 |
         static_cast<int64_t>(quant.dtype) << 4 | static_cast<int64_t>(quant.scale_dtype) << 6 |
         int64_t{quant.block} << 8;
}
int64_t InputKind(const CombineParams& p) { return p.row_scalars != nullptr; }
int64_t InputKind(const TransferLap& lap) { return lap.number; }

template <typename Params>
int64_t InputSize(const Params& p) {
  return p.num_tokens;
}
int64_t InputSize(const TransferLap& lap) { return lap.params.slot_bytes; }

int64_t NumPieces(int64_t n, int64_t per_piece) { return (n + per_piece - 1) / per_piece; }

int MaxLocalRanks(const CommunicatorSpec& spec) {
  std::map<std::pair<size_t, int32_t>, int> ranks;
  int most = 0;
  for (size_t group = 0; group < spec.groups.size(); ++group)
    for (const Member& member : spec.groups[group])
      most = std::max(most, ++ranks[{group, member.process}]);
  return most;
}

Clock::time_point DeadlineAfter(double timeout_s) {
  const std::chrono::duration<double> timeout(std::min(timeout_s, kMaxTimeoutSeconds));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
}

// Waits by yielding at first, then by sleeping: on few cores, what is waited for needs this one.
class Backoff {
 public:
  void Pause() {
    turns_ = std::min(turns_ + 1, 200);
    if (turns_ < 32)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(turns_));
  }

 private:
  int turns_ = 0;
};

// Loops over (index, begin, end) pieces of several ranges at once.
class Pieces {
 public:
  explicit Pieces(int64_t per_piece) : per_piece_(per_piece) {}
  void Add(int64_t index, int64_t n) {
    for (int64_t i = 0; i < NumPieces(n, per_piece_); ++i)
      pieces_.push_back({index, i * per_piece_, std::min(n, (i + 1) * per_piece_)});
  }
  template <typename F>
  void ForEach(F&& f) const {
    ParallelFor(static_cast<int64_t>(pieces_.size()), [&](int64_t i) {
      const auto& [index, begin, end] = pieces_[i];
      f(index, begin, end);
    });
  }

 private:
  struct Piece {
    int64_t index, begin, end;
  };
  const int64_t per_piece_;
  std::vector<Piece> pieces_;
};

}  // namespace

Communicator::Communicator(CommunicatorSpec spec)
    : spec_(std::move(spec)), layout_(spec_.shape, MaxLocalRanks(spec_)) {
  watchdog_ = std::thread([this] { WatchDeadlines(); });
}

Communicator::~Communicator() {
  std::unique_lock<std::mutex> lock(mutex_);
  closing_ = true;
  changed_.notify_all();
  // Whatever runs ends within its timeout.
  changed_.wait(lock, [this] { return num_running_ == 0 && waiting_.empty(); });
  lock.unlock();
  watchdog_.join();
}

std::string Communicator::Prepare() { return segment_.Create(layout_.segment_bytes); }

std::string Communicator::Connect(int32_t process, PeerSegment segment) {
  return peers_[process].Open(segment.pid, segment.fd, layout_.segment_bytes);
}

LaneContent Communicator::Job::content() const {
  const OpParams& params = arrivals[0].params;
  return std::visit(
      [&](const auto& op) {
        return LaneContent{key, PhaseOf(params), InputSize(op), InputKind(op)};
      },
      params);
}

int Communicator::NumLocal(int group) const {
  const Group& members = spec_.groups[group];
  return static_cast<int>(std::count_if(members.begin(), members.end(), [this](const Member& m) {
    return m.process == spec_.process;
  }));
}

int Communicator::LocalIndex(int group, int rank) const {
  const Group& members = spec_.groups[group];
  return static_cast<int>(
      std::count_if(members.begin(), members.begin() + rank,
                    [&](const Member& m) { return m.process == members[rank].process; }));
}

std::vector<int32_t> Communicator::RemoteProcesses(int group) const {
  std::vector<int32_t> remote;
  for (const Member& member : spec_.groups[group])
    if (member.process != spec_.process &&
        std::find(remote.begin(), remote.end(), member.process) == remote.end())
      remote.push_back(member.process);
  return remote;
}

void Communicator::Submit(int32_t ordinal, const OpKey& key_without_group, const OpParams& params,
                          DoneCallback done) {
  const Place place = FindPlace(spec_, ordinal);
  OpKey key = key_without_group;
  key.group = place.group;
  std::unique_lock<std::mutex> lock(mutex_);
  if (closing_ || failed_) {
    const ErrorRecord error = failed_ ? error_ : ErrorRecord{ErrorCode::kTimeout, place.rank};
    lock.unlock();
    return RunOnOwnThread([done = std::move(done), error] { done(error); });
  }
  Job& job = waiting_[key];
  if (job.arrivals.empty()) {
    job.key = key;
    job.deadline = DeadlineAfter(spec_.timeout_s);
    changed_.notify_all();
  }
  job.arrivals.push_back({place.rank, params, std::move(done)});
  if (static_cast<int>(job.arrivals.size()) < NumLocal(place.group)) return;
  auto ready = std::make_shared<Job>(std::move(job));
  waiting_.erase(key);
  ++num_running_;
  lock.unlock();
  RunOnOwnThread([this, ready] { Run(*ready); });
}

void Communicator::Run(Job& job) {
  const std::vector<int32_t> remote = RemoteProcesses(static_cast<int>(job.key.group));
  ErrorRecord error;
  if (remote.empty())
    Compute(job, RemoteRanks(spec_.shape.num_ranks));
  else
    error = RunAcrossProcesses(job, remote);
  Finish(job, error);
  std::lock_guard<std::mutex> lock(mutex_);
  --num_running_;
  changed_.notify_all();
}

// Tells all local ranks that the op is over. A continuation may block until another rank's has run,
// so each gets a thread of its own.
void Communicator::Finish(Job& job, const ErrorRecord& error) {
  Record(error);
  for (Arrival& arrival : job.arrivals)
    RunOnOwnThread([done = std::move(arrival.done), error] { done(error); });
}

void Communicator::Record(const ErrorRecord& error) {
  if (error.code == ErrorCode::kNone) return;
  std::lock_guard<std::mutex> lock(mutex_);
  // The first timeout names who is at fault: later ones may be of ranks that wait for us in vain.
  const bool first_timeout = error.code == ErrorCode::kTimeout && !failed_;
  if (first_timeout || error_.code == ErrorCode::kNone) error_ = error;
  failed_ = failed_ || first_timeout;
}

ErrorRecord Communicator::TakeError() {
  std::lock_guard<std::mutex> lock(mutex_);
  return failed_ ? error_ : std::exchange(error_, ErrorRecord{});
}

ErrorRecord Communicator::MissingArrival(const Job& job) const {
  const Group& members = spec_.groups[job.key.group];
  int missing = 0;
  const auto has_come = [&](int rank) {
    return std::any_of(job.arrivals.begin(), job.arrivals.end(),
                       [&](const Arrival& a) { return a.rank == rank; });
  };
  while (members[missing].process != spec_.process || has_come(missing)) ++missing;
  return {ErrorCode::kTimeout,
          job.arrivals[0].rank,
          missing,
          PhaseOf(job.arrivals[0].params),
          NumLocal(static_cast<int>(job.key.group)),
          static_cast<int64_t>(job.arrivals.size())};
}

void Communicator::WatchDeadlines() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto late = std::min_element(
        waiting_.begin(), waiting_.end(),
        [](const auto& a, const auto& b) { return a.second.deadline < b.second.deadline; });
    if (late == waiting_.end()) {
      if (closing_) return;
      changed_.wait(lock);
    } else if (closing_ || late->second.deadline <= Clock::now()) {
      Job job = std::move(late->second);
      waiting_.erase(late);
      lock.unlock();
      Finish(job, MissingArrival(job));
      lock.lock();
      changed_.notify_all();
    } else {
      // A copy: the job may be gone before the wait is over.
      const Clock::time_point deadline = late->second.deadline;
      changed_.wait_until(lock, deadline);
    }
  }
}

ErrorRecord Communicator::RunAcrossProcesses(const Job& job,
                                             const std::vector<int32_t>& processes) {
  ErrorRecord error = Publish(job, processes);
  if (error.code != ErrorCode::kNone) return error;
  std::map<int32_t, int> lane_of;
  for (const int32_t process : processes) {
    error = WaitForPeer(job, process, &lane_of[process]);
    if (error.code != ErrorCode::kNone) return error;
  }
  const Group& members = spec_.groups[job.key.group];
  RemoteRanks remote(members.size());
  for (int rank = 0; rank < static_cast<int>(members.size()); ++rank) {
    const int32_t process = members[rank].process;
    if (process != spec_.process)
      remote[rank] = layout_.Rank(peers_.at(process).data(), lane_of[process],
                                  LocalIndex(static_cast<int>(job.key.group), rank));
  }
  Compute(job, remote);
  for (const auto& [process, lane] : lane_of)
    layout_.Header(peers_.at(process).data(), lane)->Release();
  return {};
}

int Communicator::AcquireLane() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int lane = 0; lane < kNumLanes; ++lane) {
    if (lane_taken_[lane] || !layout_.Header(segment_.data(), lane)->IsFree()) continue;
    lane_taken_[lane] = true;
    return lane;
  }
  return -1;
}

ErrorRecord Communicator::Publish(const Job& job, const std::vector<int32_t>& readers) {
  Backoff backoff;
  int lane = AcquireLane();
  for (; lane < 0; lane = AcquireLane()) {
    if (Clock::now() > job.deadline) {
      // Who keeps our lanes from being free is likely who has not come here either.
      const auto absent = std::find_if(readers.begin(), readers.end(),
                                       [&](int32_t process) { return FindLane(job, process) < 0; });
      return MissingPeer(job, absent == readers.end() ? readers[0] : *absent);
    }
    backoff.Pause();
  }
  LaneHeader* header = layout_.Header(segment_.data(), lane);
  header->SetContent(job.content());
  for (const Arrival& arrival : job.arrivals)
    PublishRank(job, arrival,
                layout_.Rank(segment_.data(), lane,
                             LocalIndex(static_cast<int>(job.key.group), arrival.rank)));
  header->Publish(static_cast<uint32_t>(readers.size()));
  std::lock_guard<std::mutex> lock(mutex_);
  lane_taken_[lane] = false;
  return {};
}

void Communicator::PublishRank(const Job& job, const Arrival& arrival, std::byte* at) {
  const MoEShape& shape = spec_.shape;
  const auto put = [at](int64_t offset, const void* from, int64_t bytes) {
    std::copy_n(static_cast<const std::byte*>(from), bytes, at + offset);
  };
  if (const auto* route = std::get_if<RouteParams>(&arrival.params)) {
    put(layout_.topk_ids, route->topk_ids, route->num_tokens * shape.topk * 4);
  } else if (const auto* dispatch = std::get_if<DispatchParams>(&arrival.params)) {
    const int64_t tokens = dispatch->num_tokens;
    put(layout_.x, dispatch->x, tokens * dispatch->x_row_bytes(shape));
    if (dispatch->quant.scales != nullptr)
      put(layout_.scales, dispatch->quant.scales, tokens * dispatch->scale_row_bytes(shape));
    if (dispatch->weights != nullptr)
      put(layout_.weights, dispatch->weights, tokens * shape.topk * 4);
  } else if (const auto* combine = std::get_if<CombineParams>(&arrival.params)) {
    // Summed before they travel: one row per (token, rank) instead of up to K.
    Pieces pieces(kTokensPerPiece);
    for (const int source : RemoteRanksOf(job)) pieces.Add(source, combine->num_tokens);
    pieces.ForEach([&](int64_t source, int64_t begin, int64_t end) {
      const CombineSource from{
          static_cast<const std::byte*>(combine->y), combine->row_weights, combine->row_scalars,
          combine->tables.recv_rows + source * combine->num_tokens * shape.rows_per_token()};
      SumTokens(shape, from, begin, end, at + layout_.partial + source * layout_.partial_stride,
                reinterpret_cast<float*>(at + layout_.partial_scalars +
                                         source * layout_.partial_scalars_stride));
    });
  } else {
    const auto& lap = std::get<TransferLap>(arrival.params);
    const std::vector<int> remote = RemoteRanksOf(job);
    ParallelFor(static_cast<int64_t>(remote.size()), [&](int64_t i) {
      GatherRows(shape, lap, remote[i], at + layout_.partial + remote[i] * layout_.partial_stride);
    });
  }
}

std::vector<int> Communicator::RemoteRanksOf(const Job& job) const {
  const Group& members = spec_.groups[job.key.group];
  std::vector<int> ranks;
  for (int rank = 0; rank < static_cast<int>(members.size()); ++rank)
    if (members[rank].process != spec_.process) ranks.push_back(rank);
  return ranks;
}

int Communicator::FindLane(const Job& job, int32_t process) const {
  std::byte* segment = peers_.at(process).data();
  const LaneContent content = job.content();
  for (int lane = 0; lane < kNumLanes; ++lane)
    if (layout_.Header(segment, lane)->Holds(content)) return lane;
  return -1;
}

ErrorRecord Communicator::WaitForPeer(const Job& job, int32_t process, int* lane) const {
  Backoff backoff;
  while ((*lane = FindLane(job, process)) < 0) {
    if (Clock::now() > job.deadline) return MissingPeer(job, process);
    backoff.Pause();
  }
  return {};
}

ErrorRecord Communicator::MissingPeer(const Job& job, int32_t process) const {
  const Group& members = spec_.groups[job.key.group];
  const auto peer = std::find_if(members.begin(), members.end(),
                                 [&](const Member& m) { return m.process == process; });
  return {ErrorCode::kTimeout,
          job.arrivals[0].rank,
          static_cast<int32_t>(peer - members.begin()),
          PhaseOf(job.arrivals[0].params),
          1,
          0};
}

void Communicator::Compute(const Job& job, const RemoteRanks& remote) {
  switch (PhaseOf(job.arrivals[0].params)) {
    case Phase::kRoute:
      return ComputeRoute(job, remote);
    case Phase::kDispatch:
      return ComputeDispatch(job, remote);
    case Phase::kCombine:
      return ComputeCombine(job, remote);
    case Phase::kTransfer:
      return ComputeTransfer(job, remote);
  }
}

void Communicator::ComputeRoute(const Job& job, const RemoteRanks& remote) {
  std::vector<const int32_t*> topk_ids(remote.size());
  for (size_t rank = 0; rank < remote.size(); ++rank)
    if (remote[rank] != nullptr)
      topk_ids[rank] = reinterpret_cast<const int32_t*>(remote[rank] + layout_.topk_ids);
  for (const Arrival& arrival : job.arrivals)
    topk_ids[arrival.rank] = std::get<RouteParams>(arrival.params).topk_ids;
  ParallelFor(static_cast<int64_t>(job.arrivals.size()), [&](int64_t i) {
    const Arrival& arrival = job.arrivals[i];
    Record(Route(spec_.shape, arrival.rank, topk_ids, std::get<RouteParams>(arrival.params)));
  });
}

void Communicator::ComputeDispatch(const Job& job, const RemoteRanks& remote) {
  std::vector<DispatchSource> sources(remote.size());
  std::vector<const DispatchParams*> local;
  for (const Arrival& arrival : job.arrivals) {
    const auto* params = local.emplace_back(&std::get<DispatchParams>(arrival.params));
    sources[arrival.rank] = {static_cast<const std::byte*>(params->x),
                             static_cast<const std::byte*>(params->quant.scales), params->weights};
  }
  const DispatchParams& any = *local.front();
  for (size_t rank = 0; rank < remote.size(); ++rank)
    if (const std::byte* at = remote[rank]; at != nullptr)
      sources[rank] = {
          at + layout_.x, any.quant.scales == nullptr ? nullptr : at + layout_.scales,
          any.weights == nullptr ? nullptr : reinterpret_cast<const float*>(at + layout_.weights)};
  const auto num_local = static_cast<int64_t>(local.size());
  // Poisoned are all ranks or none.
  if (any.tables.status[kCode] != 0)
    return ParallelFor(num_local, [&](int64_t i) { PoisonDispatch(spec_.shape, *local[i]); });
  // A token goes to all local ranks at a time, so that it is read, or quantised, once.
  Pieces pieces(std::max<int64_t>(1, kTokensPerPiece / num_local));
  for (size_t source = 0; source < sources.size(); ++source)
    pieces.Add(static_cast<int64_t>(source), any.num_tokens);
  pieces.ForEach([&](int64_t source, int64_t begin, int64_t end) {
    ExpandTokens(spec_.shape, static_cast<int>(source), sources[source], local, begin, end);
  });
  ParallelFor(num_local, [&](int64_t i) { FillPadding(spec_.shape, *local[i]); });
}

void Communicator::ComputeCombine(const Job& job, const RemoteRanks& remote) {
  const MoEShape& shape = spec_.shape;
  Pieces pieces(kTokensPerPiece);
  for (size_t i = 0; i < job.arrivals.size(); ++i)
    pieces.Add(static_cast<int64_t>(i), std::get<CombineParams>(job.arrivals[i].params).num_tokens);
  pieces.ForEach([&](int64_t index, int64_t begin, int64_t end) {
    const int me = job.arrivals[index].rank;
    const auto& params = std::get<CombineParams>(job.arrivals[index].params);
    std::vector<CombineSource> sources(shape.num_ranks);
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      if (remote[rank] == nullptr) continue;
      sources[rank].partial = remote[rank] + layout_.partial + me * layout_.partial_stride;
      sources[rank].partial_scalars = reinterpret_cast<const float*>(
          remote[rank] + layout_.partial_scalars + me * layout_.partial_scalars_stride);
    }
    for (const Arrival& expert : job.arrivals) {
      const auto& from = std::get<CombineParams>(expert.params);
      sources[expert.rank] = {
          static_cast<const std::byte*>(from.y), from.row_weights, from.row_scalars,
          from.tables.recv_rows + me * params.num_tokens * shape.rows_per_token()};
    }
    CombineTokens(shape, sources, params, begin, end);
  });
  for (const Arrival& arrival : job.arrivals) {
    const auto& params = std::get<CombineParams>(arrival.params);
    if (params.tables.status[kCode] != 0) PoisonCombine(shape, params);
  }
}

void Communicator::ComputeTransfer(const Job& job, const RemoteRanks& remote) {
  const MoEShape& shape = spec_.shape;
  const auto lap_of = [&](int64_t arrival) -> const TransferLap& {
    return std::get<TransferLap>(job.arrivals[arrival].params);
  };
  std::vector<const TransferParams*> local(shape.num_ranks);
  const auto num_local = static_cast<int64_t>(job.arrivals.size());
  for (int64_t i = 0; i < num_local; ++i) local[job.arrivals[i].rank] = &lap_of(i).params;
  Pieces rows(kTokensPerPiece), slots(1);
  for (int64_t i = 0; i < num_local; ++i) {
    for (int src = 0; src < shape.num_ranks; ++src)
      rows.Add(i * shape.num_ranks + src, NumReceived(shape, lap_of(i), src));
    if (lap_of(i).number == 0) slots.Add(i, lap_of(i).params.num_slots);
  }
  rows.ForEach([&](int64_t pair, int64_t begin, int64_t end) {
    const int64_t i = pair / shape.num_ranks;
    const int src = static_cast<int>(pair % shape.num_ranks), me = job.arrivals[i].rank;
    const std::byte* published = remote[src];
    const TransferSource from{
        local[src],
        published == nullptr ? nullptr : published + layout_.partial + me * layout_.partial_stride};
    PlaceRows(shape, lap_of(i), src, from, me, begin, end);
  });
  slots.ForEach([&](int64_t i, int64_t slot, int64_t) { FillSlot(lap_of(i).params, slot); });
}

}  // namespace jax_ep::cpu
