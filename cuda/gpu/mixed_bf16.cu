// The instances of mixed.h for bfloat16.
#include "mixed.h"

namespace pagedcore::gpu {

template TiledKernel mixed_kernel_of<bf16>(const AttentionParams&);

}  // namespace pagedcore::gpu
