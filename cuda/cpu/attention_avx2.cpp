// clang-format off: the wrapper defines what the template is made of
#include "simd_avx2.h"
#include "attention.h"
