// Data races, found by happens-before: two accesses of different threads to one byte, one of them a write, with no
// barrier between them.
//
// The kernel's translation unit is compiled with -fsanitize=thread and not linked with its library; the calls that the
// compiler puts before each load and store end here. Within a block, order comes from __syncthreads and, between lanes
// of a warp, from __syncwarp. Blocks run one after another, so between blocks order must be proved and not seen: what
// block A wrote may be read by block B if A's writer published it (the write; a barrier unless the same thread goes on;
// a fence; an atomic access) and B's reader acquired it (an atomic access to the same word; a fence; a barrier unless
// the same thread goes on).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pagedcore::shim::races {

// In a build without the check all of these return at once.
void begin_launch();
void begin_block(int64_t block, const void* shared, size_t shared_bytes, int threads);
void block_barrier();
void warp_barrier(int warp);
void fence(int thread);
void atomic(int thread, const void* address);

// Explicit accesses, for what the shim does in a kernel's name: copies, ldmatrix, vector loads and stores.
void read(int thread, const void* address, size_t bytes);
void write(int thread, const void* address, size_t bytes);

}  // namespace pagedcore::shim::races
