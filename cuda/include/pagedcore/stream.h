// The stream that a GPU op is put on, for whoever calls the ops and compiles no kernel. It is cudaStream_t by its own
// name, so that CUDA's headers are not needed here; the host shim has none and ignores it.
#pragma once

struct CUstream_st;

namespace pagedcore::device {

using Stream = ::CUstream_st*;

}  // namespace pagedcore::device
