// How kernels are loaded and launched.
#ifndef JAX_EP_CUDA_LAUNCH_H_
#define JAX_EP_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstddef>

namespace jax_ep::cuda {

// Communicators of several shapes share the kernels: the limit only ever rises.
template <typename Kernel>
cudaError_t AllowSharedMemory(Kernel* kernel, size_t bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.maxDynamicSharedSizeBytes >= static_cast<int>(bytes))
    return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

struct Grid {
  int blocks, threads;
  size_t shared_bytes = 0;
};

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   Arguments... arguments) {
  const cudaLaunchConfig_t config = {
      dim3(grid.blocks), dim3(grid.threads), grid.shared_bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Launches a kernel that may start while the one before it in the stream still runs, and calls
// griddepcontrol_wait before it reads what that one writes.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOverlapping(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                              Arguments... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = {
      dim3(grid.blocks), dim3(grid.threads), grid.shared_bytes, stream, &attribute, 1};
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace jax_ep::cuda

#endif  // JAX_EP_CUDA_LAUNCH_H_
