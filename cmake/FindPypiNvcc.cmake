# Chooses the CUDA compiler; include it before check_language(CUDA) or enable_language(CUDA).
#
# In this order: CMAKE_CUDA_COMPILER or the environment's CUDACXX; nvcc on PATH, under CUDA_HOME, CUDA_PATH or
# /usr/local/cuda; NVIDIA's PyPI packages, installed where Python_EXECUTABLE sees them. Sets
# CMAKE_CUDA_COMPILER, which stays unset where there is none.
#
# The PyPI packages have no libcuda stub: reach the driver API through cudaGetDriverEntryPoint.

if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()

if(NOT CMAKE_CUDA_COMPILER)
  find_program(JAX_EP_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  mark_as_advanced(JAX_EP_NVCC)
  if(JAX_EP_NVCC)
    set(CMAKE_CUDA_COMPILER ${JAX_EP_NVCC})
  endif()
endif()

# The packages together fill one folder per CUDA major version, such as nvidia/cu13. Others than ours bring
# parts of it (jax[cuda13] has nvcc for its ptxas), so all that we need must be there.
if(NOT CMAKE_CUDA_COMPILER)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('nvidia'); print(*(s.submodule_search_locations if s else ()), sep=';')"
    OUTPUT_VARIABLE _nvidia_packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(TRANSFORM _nvidia_packages APPEND "/cu[0-9]*")
  file(GLOB _cuda_roots LIST_DIRECTORIES true ${_nvidia_packages})
  list(SORT _cuda_roots COMPARE NATURAL ORDER DESCENDING)
  foreach(_cuda_root IN LISTS _cuda_roots)
    set(_missing "")
    foreach(_file bin/nvcc nvvm/bin/cicc include/cuda_runtime.h include/crt/host_config.h include/cccl/cuda/atomic
                  include/nvtx3/nvToolsExt.h lib/libcudart_static.a)
      if(NOT EXISTS ${_cuda_root}/${_file})
        list(APPEND _missing ${_file})
      endif()
    endforeach()
    if(NOT _missing)
      set(CMAKE_CUDA_COMPILER ${_cuda_root}/bin/nvcc)
      break()
    endif()
    message(STATUS "No CUDA compiler in ${_cuda_root}: it lacks ${_missing}")
  endforeach()
endif()

# The PyPI nvcc looks for libraries in lib64 and finds them in lib; FindCUDAToolkit looks for libcudart.so and
# finds it under its versioned name only.
if(CMAKE_CUDA_COMPILER)
  get_filename_component(_cuda_root "${CMAKE_CUDA_COMPILER}" DIRECTORY)
  get_filename_component(_cuda_root "${_cuda_root}" DIRECTORY)
  if(NOT EXISTS ${_cuda_root}/lib64 AND EXISTS ${_cuda_root}/lib/libcudart_static.a)
    string(APPEND CMAKE_CUDA_FLAGS " -L${_cuda_root}/lib")
    file(GLOB _cudart ${_cuda_root}/lib/libcudart.so*)
    if(_cudart)
      list(GET _cudart 0 _cudart)
      set(CUDA_CUDART ${_cudart} CACHE FILEPATH "The CUDA runtime")
    endif()
  endif()
endif()
