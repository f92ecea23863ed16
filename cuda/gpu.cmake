# The GPU kernels, for CMakeLists.txt: looks for nvcc as PAGEDCORE_CUDA says, and makes of cuda/gpu/*.cu the object library
# pagedcore_gpu, if they are to be built. Sets PAGEDCORE_NVCC, empty if not.
#
#   PAGEDCORE_CUDA                AUTO (where an nvcc is found), ON (an error where none is), OFF
#   PAGEDCORE_CUDA_ARCHITECTURES  as CMAKE_CUDA_ARCHITECTURES: each an image, one without -real also as PTX for newer GPUs
#
# What is done here by hand and why: the compiler's libraries are named because nvcc from PyPI has them in lib and looks in
# lib64; the architectures are set before the language is enabled, which would else choose one; CUDAToolkit is not looked
# for, whose targets would link the shared runtime.
set(PAGEDCORE_CUDA AUTO CACHE STRING "GPU kernels: AUTO (where an nvcc is found), ON, OFF")
set(PAGEDCORE_CUDA_ARCHITECTURES "80;89-real;90a-real" CACHE STRING "Images of the GPU kernels")
set_property(CACHE PAGEDCORE_CUDA PROPERTY STRINGS AUTO ON OFF)

string(TOUPPER "${PAGEDCORE_CUDA}" wanted)
set(PAGEDCORE_NVCC "")
if(NOT wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PAGEDCORE_CUDA is ${PAGEDCORE_CUDA}: use AUTO, ON or OFF")
elseif(NOT wanted STREQUAL "OFF")
  execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/python/_build/nvcc.py"
    OUTPUT_VARIABLE PAGEDCORE_NVCC)
  if(NOT PAGEDCORE_NVCC AND wanted STREQUAL "ON")
    message(FATAL_ERROR "PAGEDCORE_CUDA is ON and no nvcc of CUDA 12.4 or newer was found: set CUDACXX, or run "
      "python python/_build/nvcc.py --install")
  elseif(NOT PAGEDCORE_NVCC)
    message(STATUS "GPU kernels: left out, no nvcc was found")
  endif()
endif()

if(PAGEDCORE_NVCC)
  set(CMAKE_CUDA_COMPILER "${PAGEDCORE_NVCC}")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  set(CMAKE_CUDA_ARCHITECTURES "${PAGEDCORE_CUDA_ARCHITECTURES}")
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
  get_filename_component(toolkit "${PAGEDCORE_NVCC}" DIRECTORY)
  get_filename_component(toolkit "${toolkit}" DIRECTORY)
  if(EXISTS "${toolkit}/lib/libcudart_static.a")
    string(APPEND CMAKE_CUDA_FLAGS " -L${toolkit}/lib")
  endif()
  enable_language(CUDA)
  message(STATUS "GPU kernels: ${PAGEDCORE_NVCC}, ${CMAKE_CUDA_ARCHITECTURES}")

  # What takes long first, two images of a file at a time: the last files of a build would else leave cores idle.
  file(GLOB kernels CONFIGURE_DEPENDS cuda/gpu/*.cu)
  file(GLOB tiled CONFIGURE_DEPENDS cuda/gpu/mixed_*.cu cuda/gpu/decode.cu cuda/gpu/prefill.cu)
  list(REMOVE_ITEM kernels ${tiled})
  add_library(pagedcore_gpu OBJECT ${tiled} ${kernels})
  target_include_directories(pagedcore_gpu PRIVATE cuda/include cuda/gpu)
  # No contraction of products and sums but where it is written (fmaf): else what a row's result is would depend on which
  # kernel of several computes it, and its bits on the sequences beside it.
  target_compile_options(pagedcore_gpu PRIVATE --ptxas-options=-v --threads=2 --fmad=false)
  set_target_properties(pagedcore_gpu PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    CUDA_VISIBILITY_PRESET hidden
    CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/python/_build/ptxas_report.py")
  string(REPLACE ";" " " images "${CMAKE_CUDA_ARCHITECTURES}")
  set_property(SOURCE cuda/gpu/runtime.cu APPEND PROPERTY COMPILE_DEFINITIONS "PAGEDCORE_IMAGES=\"${images}\"")
endif()
