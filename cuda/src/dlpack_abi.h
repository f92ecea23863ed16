// The parts of the DLPack 1.x C ABI that are used here, declared from its specification
// (https://dmlc.github.io/dlpack/latest/).
#pragma once

#include <cstdint>

namespace pagedcore::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6, kFloat8E4m3fn = 10 };

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// What `type(tensor).__dlpack_c_exchange_api__` points to. Only the borrowed view is used; it costs no reference and no
// allocation.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, Tensor* out);  // may be null; borrowed for as long as the object lives
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace pagedcore::dlpack
