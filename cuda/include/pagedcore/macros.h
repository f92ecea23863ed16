// Function qualifiers shared by every framework-free header.
#pragma once

// Internal linkage and always inlined. The CPU backend compiles these headers once per instruction set; an ordinary
// inline function would be emitted once per translation unit and merged by the linker, which could then run AVX-512
// code on a machine without it.
#if defined(__CUDACC__)
#define PAGEDCORE_FN static __host__ __device__ __forceinline__
#else
#define PAGEDCORE_FN static inline __attribute__((always_inline))
#endif

// The same for a lambda of the CPU backend, after its parameters.
#define PAGEDCORE_INLINE __attribute__((always_inline))
