// The instances of mixed.h for e4m3 codes.
#include "mixed.h"

namespace pagedcore::gpu {

template TiledKernel mixed_kernel_of<Codes>(const AttentionParams&);

}  // namespace pagedcore::gpu
