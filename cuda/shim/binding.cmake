# For CMakeLists.txt: the ops of pagedcore._kernels over the shim's device, as its submodule `kernels`. The same checks,
# dispatch and kernels as on a GPU then run in the test suite. CPU kernels without instruction sets: they are not at test.
get_filename_component(cuda "${CMAKE_CURRENT_SOURCE_DIR}/.." ABSOLUTE)
file(GLOB binding CONFIGURE_DEPENDS ${cuda}/src/*.cpp)
set(cpu attention_scalar cache_ops isa merge_states paged_attention plan probe threads)
list(TRANSFORM cpu PREPEND ${cuda}/cpu/)
list(TRANSFORM cpu APPEND .cpp)
target_sources(${module} PRIVATE ${binding} ${cpu} device_tensor.cpp runtime.cpp)
target_include_directories(${module} PRIVATE ${cuda})
set_property(SOURCE ${binding} ${cpu} APPEND PROPERTY INCLUDE_DIRECTORIES ${cuda}/cpu ${cuda}/src)
set_property(SOURCE ${binding} APPEND PROPERTY COMPILE_DEFINITIONS PAGEDCORE_GPU PAGEDCORE_WITHOUT_MODULE)
set_property(SOURCE module.cpp APPEND PROPERTY COMPILE_DEFINITIONS PAGEDCORE_SHIM_BINDING)
target_link_libraries(${module} PRIVATE ${CMAKE_DL_LIBS})
