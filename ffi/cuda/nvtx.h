// Names the launches of ops in Nsight Systems.
#ifndef JAX_EP_CUDA_NVTX_H_
#define JAX_EP_CUDA_NVTX_H_

#include <nvtx3/nvToolsExt.h>

namespace jax_ep::cuda {

// What the host does while this lives, in the domain jax_ep. Without a profiler it costs a branch.
class NvtxRange {
 public:
  explicit NvtxRange(const char* name) {
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = name;
    nvtxDomainRangePushEx(Domain(), &event);
  }
  NvtxRange(const NvtxRange&) = delete;
  ~NvtxRange() { nvtxDomainRangePop(Domain()); }

 private:
  static nvtxDomainHandle_t Domain() {
    static const nvtxDomainHandle_t domain = nvtxDomainCreateA("jax_ep");
    return domain;
  }
};

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_NVTX_H_
