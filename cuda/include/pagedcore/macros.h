// Function qualifiers shared by every framework-free header.
#pragma once

// Internal linkage and always inlined. The CPU backend compiles these headers once per instruction set; an ordinary
// inline function would be emitted once per translation unit and merged by the linker, which could then run AVX-512
// code on a machine without it.
#define PAGEDCORE_FN static inline __attribute__((always_inline))

// The same for a lambda, after its parameters.
#define PAGEDCORE_INLINE __attribute__((always_inline))
