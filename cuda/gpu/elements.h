// The elements of a tiled kernel: of query and output, of the cache, and of what tensor cores multiply.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pagedcore/device.h"
#include "pagedcore/params.h"

namespace pagedcore::gpu {

// In place of a dtype: a cache of e4m3 codes. Codes become f16, which is exact, and so do queries of either dtype,
// which is known when the kernel runs: one instance serves both.
struct Codes {};

template <class T>
constexpr bool kOfCodes = std::is_same_v<T, Codes>;

template <class T>
struct Elements {
  using Cache = T;
};
template <>
struct Elements<Codes> {
  using Cache = e4m3;
};

// Two elements of an output, the first in the low half.
template <class T>
PAGEDCORE_DEVICE uint32_t pack_output(const AttentionParams& p, float low, float high) {
  if constexpr (kOfCodes<T>) {
    return p.dtype == DType::f16 ? device::pack2<f16>(low, high) : device::pack2<bf16>(low, high);
  } else {
    return device::pack2<T>(low, high);
  }
}

}  // namespace pagedcore::gpu
