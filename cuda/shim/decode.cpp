#include "decode.h"

#include "codes.h"

namespace pagedcore::shim {

std::pair<uint32_t, uint32_t> decode_codes(uint32_t codes) {
  uint32_t even, odd;
  gpu::decode(codes, even, odd);
  return {even, odd};
}

}  // namespace pagedcore::shim
