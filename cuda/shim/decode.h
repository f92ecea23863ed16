// Codes as the tiled kernels decode them, for the tests to look at.
#pragma once

#include <cstdint>
#include <utility>

namespace pagedcore::shim {

// Of four e4m3 codes the first and third as a pair of f16 bits, and the second and fourth; as a device decodes them
// that has the compute capability that was set.
std::pair<uint32_t, uint32_t> decode_codes(uint32_t codes);

}  // namespace pagedcore::shim
