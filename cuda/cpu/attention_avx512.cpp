// clang-format off: the wrapper defines what the template is made of
#include "simd_avx512.h"
#include "attention.h"
