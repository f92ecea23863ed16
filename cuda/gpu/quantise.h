// Writing to a quantised cache (quantise.cu), as reshape_and_cache does where there are tokens.
#pragma once

#include <cstdint>

#include "pagedcore/params.h"
#include "pagedcore/stream.h"

namespace pagedcore::gpu {

void quantise_and_cache(const CacheWriteParams& params, int64_t num_blocks, device::Stream stream);

}  // namespace pagedcore::gpu
