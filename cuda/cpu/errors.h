// Faults that are found below the Python boundary and become exceptions of pagedcore.errors there.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace pagedcore {

enum class Fault { invalid_argument, unsupported, type, block };

// `argument`, `expected` and `got` become attributes of the exception; the message is "argument: expected ..., got
// ...", and a hint says what to do about it.
struct ArgumentError : std::runtime_error {
  ArgumentError(Fault fault, std::string argument, std::string expected, std::string got)
      : std::runtime_error(argument + ": expected " + expected + ", got " + got),
        fault(fault),
        argument(std::move(argument)),
        expected(std::move(expected)),
        got(std::move(got)) {}

  Fault fault;
  std::string argument, expected, got, hint;
  int64_t block = 0, num_blocks = 0;  // Fault::block only
};

}  // namespace pagedcore
