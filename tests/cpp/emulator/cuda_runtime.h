// As much of the CUDA runtime as the kernels' hosts and their test use, for emulator.h. There are
// JAX_EP_EMULATED_GPUS devices, 4 by default, of three SMs each, which all share the host's memory.
#ifndef JAX_EP_TESTS_EMULATOR_RUNTIME_H_
#define JAX_EP_TESTS_EMULATOR_RUNTIME_H_

#include <cstdlib>

#include "emulator.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorPeerAccessAlreadyEnabled = 704 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaStreamNonBlocking = 1,
                   cudaIpcMemLazyEnablePeerAccess = 1;

struct dim3 {
  unsigned x;
  dim3(unsigned x) : x(x) {}
};
struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
};
struct cudaDeviceProp {
  int multiProcessorCount, major, minor;
  char name[16];
};
struct cudaIpcMemHandle_t {
  char reserved[64];
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

namespace emulator {

constexpr int kNumSms = 3;

class Stream;
Stream* NewStream();
void Launch(Stream* stream, std::shared_ptr<Kernel> kernel);
// Waits for the streams of this thread's device.
void Synchronize();
int& CurrentDevice();
int NumDevices();

}  // namespace emulator

using cudaStream_t = emulator::Stream*;
struct cudaLaunchConfig_t {
  dim3 grid_size, block_size;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const auto launched = std::make_shared<emulator::Kernel>();
  launched->num_blocks = config->grid_size.x;
  launched->num_threads = config->block_size.x;
  launched->shared_bytes = config->dynamicSmemBytes;
  launched->body = [=] { kernel(arguments...); };
  launched->may_overlap = config->numAttrs > 0;
  emulator::Launch(config->stream, launched);
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::CurrentDevice();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulator::CurrentDevice() = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::NumDevices();
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {emulator::kNumSms, 9, 0, "emulated"};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceCanAccessPeer(int* can_access, int, int) {
  *can_access = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() {
  emulator::Synchronize();
  return cudaSuccess;
}

// Filled with what nobody wrote.
template <typename T>
cudaError_t cudaMalloc(T** at, size_t bytes) {
  constexpr size_t kAlignment = 256;
  void* memory = std::aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
  *at = static_cast<T*>(std::memset(memory, 0x6b, bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* at) {
  std::free(at);
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaHostAlloc(T** at, size_t bytes, unsigned) {
  return cudaMalloc(at, bytes);
}
inline cudaError_t cudaFreeHost(void* at) { return cudaFree(at); }
inline cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = emulator::NewStream();
  return cudaSuccess;
}
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaSuccess; }
inline cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

#endif  // JAX_EP_TESTS_EMULATOR_RUNTIME_H_
