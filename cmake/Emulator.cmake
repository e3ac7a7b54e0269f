# The CUDA kernels on the CPU: see tests/cpp/emulator/emulator.h.
set(_kernels ffi/cuda/ceilings.cu ffi/cuda/combine.cu ffi/cuda/dispatch.cu ffi/cuda/exchange.cu
  ffi/cuda/latency_combine.cu ffi/cuda/latency_dispatch.cu ffi/cuda/placement.cu ffi/cuda/transfer.cu)
set_source_files_properties(${_kernels} PROPERTIES LANGUAGE CXX)
add_executable(cuda_ops_emulated_test EXCLUDE_FROM_ALL
  ${_kernels} ffi/cuda/communicator.cc
  tests/cpp/cuda_ops_test.cc tests/cpp/emulator/cuda_runtime.cc tests/cpp/emulator/emulator.cc)
target_include_directories(cuda_ops_emulated_test PRIVATE tests/cpp/emulator tests/cpp)
target_compile_definitions(cuda_ops_emulated_test PRIVATE __CUDACC__)
# Kernels read rows as vectors of 16 bytes, and CUDA's pragmas are not ours to know.
target_compile_options(cuda_ops_emulated_test PRIVATE -O2 -fno-strict-aliasing -Wno-unknown-pragmas)
target_link_libraries(cuda_ops_emulated_test PRIVATE jax_ep_cpu_ops)
