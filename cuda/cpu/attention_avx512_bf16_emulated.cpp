// The kernels of attention_avx512_bf16.cpp with the one instruction emulated: for tests, on any machine with AVX-512.
// clang-format off: the wrapper defines what the template is made of
#define PAGEDCORE_EMULATE_DPBF16
#include "simd_avx512_bf16.h"
#include "attention.h"
