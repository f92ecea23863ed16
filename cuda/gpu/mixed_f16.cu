// The instances of mixed.h for float16.
#include "mixed.h"

namespace pagedcore::gpu {

template TiledKernel mixed_kernel_of<f16>(const AttentionParams&);

}  // namespace pagedcore::gpu
