// The CUDA ops against the oracle of the CPU ops' test, without Python or XLA in the process, so
// that compute-sanitizer sees only our kernels. As many ranks as there are GPUs, and each smaller
// number.
//
//   cmake -S . -B build/cuda-test -DJAX_EP_CUDA=ON
//   cmake --build build/cuda-test --target cuda_ops_test
//   compute-sanitizer --tool memcheck build/cuda-test/cuda_ops_test 20
//   make emulate        # the same on the CPU, see emulator/emulator.h
//
// The arguments are the number of shapes per number of ranks, and the only number of ranks to test.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <variant>
#include <vector>

#include "cuda/communicator.h"
#include "layer.h"
#include "rounds.h"
#include "transfer.h"

namespace jax_ep::test {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Fail("%s: %s", what, cudaGetErrorString(error));
}

// Device copies of one op's buffers, of exactly their size: what is written past an end is seen.
class Mirror {
 public:
  Mirror() = default;
  Mirror(const Mirror&) = delete;
  ~Mirror() {
    for (const Copy& copy : copies_) cudaFree(copy.device);
  }

  template <typename T>
  T* operator()(T* host, int64_t bytes) {
    if (host == nullptr || bytes == 0) return nullptr;
    void* device = nullptr;
    void* from = const_cast<void*>(static_cast<const void*>(host));
    Check(cudaMalloc(&device, bytes), "cudaMalloc");
    Check(cudaMemcpy(device, from, bytes, cudaMemcpyHostToDevice), "upload");
    copies_.push_back({from, device, bytes, std::is_const_v<T>});
    return static_cast<T*>(device);
  }
  // Puts back what was there before anything was written.
  void Reset() {
    for (const Copy& copy : copies_)
      Check(cudaMemcpy(copy.device, copy.host, copy.bytes, cudaMemcpyHostToDevice), "upload");
  }
  void Download() {
    for (const Copy& copy : copies_)
      if (!copy.read_only)
        Check(cudaMemcpy(copy.host, copy.device, copy.bytes, cudaMemcpyDeviceToHost), "download");
  }

 private:
  struct Copy {
    void* host;
    void* device;
    int64_t bytes;
    bool read_only;
  };
  std::vector<Copy> copies_;
};

RouteTables OnDevice(const MoEShape& shape, int64_t tokens, const RouteTables& host,
                     Mirror& mirror) {
  const RouteTablesLayout layout(shape, tokens);
  // The first table starts the buffer.
  return layout.At(mirror(host.send_ranks, layout.size * 4));
}

RouteParams OnDevice(const MoEShape& shape, RouteParams p, Mirror& mirror) {
  p.topk_ids = mirror(p.topk_ids, p.num_tokens * shape.topk * 4);
  p.tables = OnDevice(shape, p.num_tokens, p.tables, mirror);
  p.num_tokens_per_expert = mirror(p.num_tokens_per_expert, shape.local_experts() * 4);
  p.offsets = mirror(p.offsets, (shape.num_row_groups() + 1) * 4);
  p.num_dropped = mirror(p.num_dropped, 4);
  const bool rank_major = shape.layout == OutputLayout::kRankMajor;
  p.recv_topk_ids = mirror(p.recv_topk_ids, rank_major ? shape.capacity * shape.topk * 4 : 0);
  return p;
}

DispatchParams OnDevice(const MoEShape& shape, DispatchParams p, const RouteTables& tables,
                        Mirror& mirror) {
  const int64_t rows = shape.capacity, scale_bytes = p.scale_row_bytes(shape);
  const int64_t scalars = p.y != nullptr ? 1 : shape.weights_per_row();
  const int64_t x_row_bytes = p.x_row_bytes(shape);
  p.quant.scales = mirror(p.quant.scales, p.num_tokens * scale_bytes);
  p.quant.row_scales = mirror(p.quant.row_scales, rows * scale_bytes);
  p.x = mirror(p.x, p.num_tokens * x_row_bytes);
  p.weights = mirror(p.weights, p.num_tokens * shape.topk * 4);
  p.tables = tables;
  p.y = mirror(p.y, rows * shape.row_bytes());
  p.row_weights = mirror(p.row_weights, rows * 4);
  p.tokens = mirror(p.tokens, rows * p.row_bytes(shape));
  p.row_scalars = mirror(p.row_scalars, rows * scalars * 4);
  return p;
}

DispatchParams OnDevice(const MoEShape& shape, const DispatchParams& p, Mirror& mirror) {
  return OnDevice(shape, p, OnDevice(shape, p.num_tokens, p.tables, mirror), mirror);
}

CombineParams OnDevice(const MoEShape& shape, CombineParams p, Mirror& mirror) {
  const int64_t rows = shape.capacity, row_bytes = shape.row_bytes();
  p.y = mirror(p.y, rows * row_bytes);
  p.row_weights = mirror(p.row_weights, rows * 4);
  p.row_scalars = mirror(p.row_scalars, rows * shape.weights_per_row() * 4);
  p.tables = OnDevice(shape, p.num_tokens, p.tables, mirror);
  p.out = mirror(p.out, p.num_tokens * row_bytes);
  p.token_scalars = mirror(p.token_scalars, p.num_tokens * shape.topk * 4);
  return p;
}

FreshDispatchParams OnDevice(const MoEShape& shape, const FreshDispatchParams& p, Mirror& mirror) {
  const RouteParams route = OnDevice(shape, p.route, mirror);
  DispatchParams dispatch = OnDevice(shape, p.dispatch, route.tables, mirror);
  return {route, dispatch};
}

// What runs on the GPU for one op of one rank.
using CudaParams = std::variant<FreshDispatchParams, DispatchParams, CombineParams>;

enum class Step { kFresh, kCached, kScaled, kCombine };

CudaParams ParamsOf(RankWalk& walk, Step step) {
  const auto dispatch = [&](RankWalk::Step s) { return std::get<DispatchParams>(walk.Op(s)); };
  switch (step) {
    case Step::kFresh:
      return FreshDispatchParams{std::get<RouteParams>(walk.Op(RankWalk::kRoute)),
                                 dispatch(RankWalk::kDispatch)};
    case Step::kCached:
      return dispatch(RankWalk::kDispatchCached);
    case Step::kScaled:
      return dispatch(RankWalk::kDispatchScaled);
    case Step::kCombine:
      break;
  }
  return std::get<CombineParams>(walk.Op(RankWalk::kCombine));
}

// A stream on each GPU, as XLA has: the default one knows no overlap; and one beside it.
class Streams {
 public:
  explicit Streams(int gpus) : streams_(gpus), beside_(gpus) {
    for (int gpu = 0; gpu < gpus; ++gpu) {
      Check(cudaSetDevice(gpu), "cudaSetDevice");
      for (cudaStream_t* stream : {&streams_[gpu], &beside_[gpu]})
        Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
    }
  }
  // Where sending halves run from now on.
  void StartBeside(bool is_beside) { starts_are_beside_ = is_beside; }
  // The sending half of an op, and the op as the receiving half of that.
  std::string Start(cuda::Communicator& communicator, int rank, const FreshDispatchParams& p,
                    int32_t* ticket) {
    return Start(communicator, rank, p.dispatch, p.route.topk_ids, ticket);
  }
  std::string Start(cuda::Communicator& communicator, int rank, const DispatchParams& p,
                    int32_t* ticket) {
    return Start(communicator, rank, p, nullptr, ticket);
  }
  std::string Start(cuda::Communicator& communicator, int rank, const CombineParams& p,
                    int32_t* ticket) {
    return communicator.CombineStart(rank, {p, ticket}, StreamOfStarts(rank));
  }
  static FreshDispatchParams WithTicket(FreshDispatchParams p, const int32_t* ticket) {
    p.dispatch.ticket = ticket;
    return p;
  }
  std::string Launch(cuda::Communicator& communicator, int rank, const TransferParams& p) {
    return communicator.Transfer(rank, p, streams_[rank]);
  }
  template <typename Params>
  static Params WithTicket(Params p, const int32_t* ticket) {
    p.ticket = ticket;
    return p;
  }
  std::string Launch(cuda::Communicator& communicator, int rank, const FreshDispatchParams& p) {
    return communicator.Dispatch(rank, p, streams_[rank]);
  }
  std::string Launch(cuda::Communicator& communicator, int rank, const DispatchParams& p) {
    return communicator.DispatchCached(rank, p, streams_[rank]);
  }
  std::string Launch(cuda::Communicator& communicator, int rank, const CombineParams& p) {
    return communicator.Combine(rank, p, streams_[rank]);
  }

 private:
  std::string Start(cuda::Communicator& communicator, int rank, const DispatchParams& p,
                    const int32_t* topk_ids, int32_t* ticket) {
    DispatchParams sent = p;
    sent.tokens = sent.row_scalars = nullptr;
    sent.quant.row_scales = nullptr;
    if (topk_ids != nullptr) sent.tables = {};
    return communicator.DispatchStart(rank, {topk_ids, sent, ticket}, StreamOfStarts(rank));
  }
  cudaStream_t StreamOfStarts(int rank) const {
    return (starts_are_beside_ ? beside_ : streams_)[rank];
  }

  std::vector<cudaStream_t> streams_, beside_;
  bool starts_are_beside_ = false;
};

using Walks = std::vector<std::unique_ptr<RankWalk>>;

constexpr int kMaxRequests = 2;

// One op of all ranks, whose launches are all made before any is waited for.
class Op {
 public:
  Op(cuda::Communicator& communicator, Streams& streams, const MoEShape& shape, Walks& walks,
     Step step)
      : communicator_(communicator), streams_(streams), shape_(shape) {
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      Check(cudaSetDevice(rank), "cudaSetDevice");
      mirrors_.push_back(std::make_unique<Mirror>());
      std::visit([&](const auto& p) { on_device_.push_back(OnDevice(shape, p, *mirrors_.back())); },
                 ParamsOf(*walks[rank], step));
      host_tickets_.emplace_back(2 * (kMaxRequests + 1), -7);
      // A mirror of its own, which is not reset.
      ticket_mirrors_.push_back(std::make_unique<Mirror>());
      std::vector<int32_t>& host = host_tickets_.back();
      tickets_.push_back((*ticket_mirrors_.back())(host.data(), host.size() * 4));
      // The copy of an upload may still be under way, on a stream that ours do not wait for.
      Check(cudaDeviceSynchronize(), "uploads");
    }
  }
  void Whole() {
    ForAll([&](int rank, const auto& p) { return streams_.Launch(communicator_, rank, p); });
  }
  void Start(int request) {
    ForAll([&](int rank, const auto& p) {
      return streams_.Start(communicator_, rank, p, tickets_[rank] + 2 * request);
    });
  }
  void Receive(int request) {
    ForAll([&](int rank, const auto& p) {
      return streams_.Launch(communicator_, rank,
                             Streams::WithTicket(p, tickets_[rank] + 2 * request));
    });
  }
  void Wait() {
    ForEach([](Mirror&) {});
  }
  // As if nothing had been received.
  void Reset() {
    ForEach([](Mirror& mirror) { mirror.Reset(); });
    Wait();  // for the uploads
  }
  void Download() {
    ForEach([](Mirror& mirror) { mirror.Download(); });
  }

 private:
  template <typename F>
  void ForAll(const F& launch) {
    for (int rank = 0; rank < shape_.num_ranks; ++rank) {
      const std::string error =
          std::visit([&](const auto& p) { return launch(rank, p); }, on_device_[rank]);
      if (!error.empty()) Fail("%s: %s", Describe(shape_).c_str(), error.c_str());
    }
  }
  // What each rank has, once what it was given to do is done.
  template <typename F>
  void ForEach(const F& visit) {
    for (int rank = 0; rank < shape_.num_ranks; ++rank) {
      Check(cudaSetDevice(rank), "cudaSetDevice");
      Check(cudaDeviceSynchronize(), "an op");
      visit(*mirrors_[rank]);
    }
  }

  cuda::Communicator& communicator_;
  Streams& streams_;
  const MoEShape& shape_;
  std::vector<CudaParams> on_device_;
  std::vector<std::unique_ptr<Mirror>> mirrors_, ticket_mirrors_;
  std::vector<std::vector<int32_t>> host_tickets_;
  std::vector<int32_t*> tickets_;
};

// By halves: more requests than can be in flight are sent, so that one is refused; one is received
// once more; and the results are those of the one that is received last, 0 to kMaxRequests + 1.
void RunHalves(Op& op, int last) {
  for (int request = 0; request <= kMaxRequests; ++request) op.Start(request);
  // The first request is received twice.
  constexpr int kReceives = kMaxRequests + 2;
  for (int i = 1; i <= kReceives; ++i) {
    if (i == kReceives) {
      op.Wait();
      op.Reset();
    }
    op.Receive((last + i) % kReceives % (kMaxRequests + 1));
  }
}

// The same, where the one too many is sent while the first is received. The results are those of
// the former, or of the latter.
void RunHalvesAtOnce(Op& op, Streams& streams, bool of_last) {
  for (int request = 0; request < kMaxRequests; ++request) op.Start(request);
  op.Wait();
  streams.StartBeside(true);
  op.Start(kMaxRequests);
  streams.StartBeside(false);
  op.Receive(0);
  op.Wait();
  if (!of_last) op.Download();
  for (int request = 1; request <= kMaxRequests; ++request) {
    if (request == kMaxRequests) op.Reset();
    op.Receive(request);
  }
  op.Wait();
  if (of_last) op.Download();
}

void RunLayer(cuda::Communicator& communicator, Streams& streams, const Layer& layer,
              Random& random) {
  Walks walks;
  for (int rank = 0; rank < layer.shape.num_ranks; ++rank)
    walks.push_back(std::make_unique<RankWalk>(layer, rank));
  for (const Step step : {Step::kFresh, Step::kCached, Step::kScaled, Step::kCombine}) {
    // What only gradients need has no halves, nor do no tokens, which no program asks for.
    const bool has_halves = layer.num_tokens > 0 && step != Step::kScaled &&
                            !(step == Step::kCombine && layer.returns_scalars);
    Op op(communicator, streams, layer.shape, walks, step);
    // Several ranks could disagree on whether the request too many is one.
    const bool may_overlap = layer.shape.num_ranks == 1 && !layer.shape.low_latency;
    if (has_halves && may_overlap && Between(random, 0, 2) == 0) {
      for (const bool of_last : {false, true}) RunHalvesAtOnce(op, streams, of_last);
      continue;
    }
    const int last = has_halves ? Between(random, -20, kMaxRequests + 1) : -1;
    if (last >= 0)
      RunHalves(op, last);
    else
      op.Whole();
    op.Download();
  }
  for (const auto& walk : walks) walk->Check();
  const ErrorRecord error = communicator.TakeError();
  if (error.code != layer.error.code)
    Fail("%s: error %d, expected %d", Describe(layer.shape).c_str(), static_cast<int>(error.code),
         static_cast<int>(layer.error.code));
}

// A few transfers of all ranks, all started before any is waited for: a rank may still be in one
// while its peers are in the next.
void RunTransfers(cuda::Communicator& communicator, Streams& streams, const MoEShape& shape,
                  Random& random) {
  struct Started {
    TransferWalk walk;
    std::vector<Mirror> mirrors;  // of each rank
    std::vector<TransferParams> on_device;
  };
  std::vector<std::unique_ptr<Started>> all;
  for (int64_t i = Between(random, 1, 3); i > 0; --i) {
    all.push_back(std::make_unique<Started>(
        Started{TransferWalk(shape, random), std::vector<Mirror>(shape.num_ranks), {}}));
    Started& transfer = *all.back();
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      Check(cudaSetDevice(rank), "cudaSetDevice");
      Mirror& mirror = transfer.mirrors[rank];
      TransferParams p = transfer.walk.Params(rank);
      TransferWalk::Rank& host = transfer.walk.rank(rank);
      p.source = mirror(p.source, static_cast<int64_t>(host.source.size()));
      p.dest = mirror(p.dest, static_cast<int64_t>(host.dest.size()));
      const int32_t* tables = host.tables.data();
      p.tables =
          transfer.walk.layout().At(mirror(tables, static_cast<int64_t>(host.tables.size()) * 4));
      transfer.on_device.push_back(p);
      Check(cudaDeviceSynchronize(), "uploads");
    }
  }
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    for (const auto& transfer : all)
      if (const std::string error = streams.Launch(communicator, rank, transfer->on_device[rank]);
          !error.empty())
        Fail("%s: %s", Describe(shape).c_str(), error.c_str());
  for (int rank = 0; rank < shape.num_ranks; ++rank) {
    Check(cudaSetDevice(rank), "cudaSetDevice");
    Check(cudaDeviceSynchronize(), "transfers");
  }
  if (communicator.TakeError().code != ErrorCode::kNone)
    Fail("%s: a transfer failed", Describe(shape).c_str());
  for (const auto& transfer : all)
    for (int rank = 0; rank < shape.num_ranks; ++rank) {
      Check(cudaSetDevice(rank), "cudaSetDevice");
      transfer->mirrors[rank].Download();
      transfer->walk.Check(rank);
    }
}

// Rows are multiples of 16 bytes here, quantised ones too, over one warp's turn and over several.
MoEShape DrawCudaShape(int ranks, Random& random) {
  MoEShape shape = DrawShape(ranks, random, kAllFeatures);
  shape.hidden_size = OneOf<int32_t>(random, {16, 48, 768, 2064});
  if (shape.layout != OutputLayout::kExpertMajor) shape.low_latency = Between(random, 0, 1) > 0;
  if (ranks <= 4 && Between(random, 0, 3) == 0) {
    shape.max_tokens_per_rank = 300;  // more than one block routes
    const int64_t tokens = int64_t{ranks} * shape.max_tokens_per_rank;
    shape.capacity = shape.layout == OutputLayout::kExpertMajor
                         ? tokens * shape.local_experts()
                         : tokens * shape.rows_per_token() +
                               shape.local_experts() * (shape.expert_alignment - 1);
  }
  return shape;
}

// A quantised row and its scales travel in the place of a plain one.
bool Fits(const Layer& layer) {
  if (layer.quant.block == 0) return true;
  const int64_t scales = layer.shape.hidden_size / layer.quant.block;
  const int64_t bytes = layer.quant.scale_dtype == ScaleDType::kF32 ? 4 : 1;
  return layer.shape.hidden_size + scales * bytes <= layer.shape.row_bytes();
}

int Main(int shapes, int only_ranks) {
  int gpus = 0;
  Check(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
  Streams streams(gpus);
  for (int ranks = 1; ranks <= gpus; ++ranks) {
    if (only_ranks != 0 && ranks != only_ranks) continue;
    Random random(ranks);
    for (int i = 0; i < shapes; ++i) {
      const MoEShape shape = DrawCudaShape(ranks, random);
      CommunicatorSpec spec;
      spec.shape = shape;
      spec.max_requests = kMaxRequests;
      spec.groups.emplace_back();
      for (int rank = 0; rank < ranks; ++rank) spec.groups[0].push_back({0, rank});
      cuda::Communicator communicator(spec);
      if (const std::string error = communicator.Prepare(); !error.empty())
        Fail("%s", error.c_str());
      for (const Layer& layer : DrawLayers(shape, 6, random, kAllFeatures)) {
        if (Fits(layer)) RunLayer(communicator, streams, layer, random);
        // On windows that other exchanges use, too.
        if (!shape.low_latency) RunTransfers(communicator, streams, shape, random);
      }
    }
    std::printf("%d ranks: %d passed\n", ranks, shapes);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace jax_ep::test

int main(int argc, char** argv) {
  return jax_ep::test::Main(argc > 1 ? std::atoi(argv[1]) : 50, argc > 2 ? std::atoi(argv[2]) : 0);
}
