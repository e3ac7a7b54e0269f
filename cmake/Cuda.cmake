# The CUDA extension: built where a compiler is found, unless JAX_EP_CUDA says otherwise.
if(JAX_EP_CUDA STREQUAL "OFF")
  return()
endif()
include(${CMAKE_CURRENT_LIST_DIR}/FindPypiNvcc.cmake)
if(NOT CMAKE_CUDA_COMPILER)
  if(JAX_EP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "JAX_EP_CUDA=ON, but no CUDA compiler was found: set CUDACXX or CUDA_HOME, or install nvidia-cuda-nvcc")
  endif()
  message(STATUS "jax_ep: no CUDA compiler found, building for CPU only")
  return()
endif()

# Machine code for the architectures that this compiler knows, and PTX of the newest for those to come.
set(JAX_EP_CUDA_ARCHITECTURES "" CACHE STRING "CUDA architectures; default: 9.0 and what the compiler knows of 10.0")
if(NOT JAX_EP_CUDA_ARCHITECTURES)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE _known ERROR_QUIET)
  set(JAX_EP_CUDA_ARCHITECTURES 90)
  if(_known MATCHES "sm_100")
    set(JAX_EP_CUDA_ARCHITECTURES "90-real;100")
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES ${JAX_EP_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# XLA brings a runtime of its own; a static one needs nothing but the driver.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(jax_ep_cuda_ops STATIC
  ffi/common/error.cc
  ffi/cuda/ceilings.cu ffi/cuda/combine.cu ffi/cuda/communicator.cc ffi/cuda/dispatch.cu
  ffi/cuda/exchange.cu ffi/cuda/latency_combine.cu ffi/cuda/latency_dispatch.cu
  ffi/cuda/placement.cu ffi/cuda/transfer.cu)
target_include_directories(jax_ep_cuda_ops PUBLIC ffi)
target_link_libraries(jax_ep_cuda_ops PUBLIC CUDA::cudart_static)
target_compile_options(jax_ep_cuda_ops PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)

nanobind_add_module(_cuda NB_STATIC STABLE_ABI NB_DOMAIN jax_ep_cuda ffi/xla/args.cc ffi/xla/cuda_module.cc)
target_include_directories(_cuda SYSTEM PRIVATE ${XLA_FFI_INCLUDE})
target_link_libraries(_cuda PRIVATE jax_ep_cuda_ops ${CMAKE_DL_LIBS})
install(TARGETS _cuda LIBRARY DESTINATION jax_ep)

# For compute-sanitizer: the kernels without Python or XLA around them.
add_executable(cuda_ops_test EXCLUDE_FROM_ALL tests/cpp/cuda_ops_test.cc)
target_link_libraries(cuda_ops_test PRIVATE jax_ep_cpu_ops jax_ep_cuda_ops)
