# For CMakeLists.txt: the ops of pagedcore._kernels over the shim's device, as its submodule `kernels`. The same checks,
# dispatch and kernels as on a GPU then run in the test suite. CPU kernels without instruction sets: they are not at test,
# and nothing here is worth optimising. In few translation units, for what pybind11 costs each.
get_filename_component(cuda "${CMAKE_CURRENT_SOURCE_DIR}/.." ABSOLUTE)
file(GLOB binding CONFIGURE_DEPENDS ${cuda}/src/*.cpp)
set(cpu attention_scalar cache_ops isa merge_states paged_attention plan probe threads)
list(TRANSFORM cpu PREPEND ${cuda}/cpu/)
list(TRANSFORM cpu APPEND .cpp)
add_library(shim_cpu OBJECT ${cpu})
add_library(shim_binding OBJECT ${binding} device_tensor.cpp)
set_target_properties(shim_binding PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 7)
target_link_libraries(shim_binding PRIVATE pybind11::module)
target_compile_definitions(shim_binding PRIVATE PAGEDCORE_GPU PAGEDCORE_WITHOUT_MODULE)
foreach(target shim_cpu shim_binding)
  target_include_directories(${target} PRIVATE ${cuda} ../include ${cuda}/cpu ${cuda}/src .)
  target_compile_options(${target} PRIVATE -O0 -Wall -Wextra -ffp-contract=off)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
endforeach()

target_sources(${module} PRIVATE runtime.cpp)
target_include_directories(${module} PRIVATE ${cuda})
set_property(SOURCE module.cpp APPEND PROPERTY COMPILE_DEFINITIONS PAGEDCORE_SHIM_BINDING)
target_link_libraries(${module} PRIVATE shim_cpu shim_binding ${CMAKE_DL_LIBS})
