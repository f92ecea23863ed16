// clang-format off: the wrapper defines what the template is made of
#include "simd_avx512_bf16.h"
#include "attention.h"
