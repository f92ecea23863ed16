// clang-format off: the wrapper defines what the template is made of
#include "simd_scalar.h"
#include "attention.h"
