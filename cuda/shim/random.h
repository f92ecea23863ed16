// The shim's source of randomness: splitmix64, seeded by set_seed.
#pragma once

#include <cstdint>

namespace pagedcore::shim {

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // Uniform in [0, n); the bias of the product is below n / 2^64.
  uint64_t below(uint64_t n) { return static_cast<uint64_t>(static_cast<unsigned __int128>(next()) * n >> 64); }

 private:
  uint64_t state_ = 0;
};

}  // namespace pagedcore::shim
