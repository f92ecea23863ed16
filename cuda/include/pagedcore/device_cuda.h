// device.h for nvcc: one instruction each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#define PAGEDCORE_LINE
#define PAGEDCORE_PASS_LINE
#define PAGEDCORE_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define PAGEDCORE_DEVICE static __device__ __forceinline__
#define PAGEDCORE_MEMBER __device__ __forceinline__

namespace pagedcore::device {

constexpr uint32_t kFullMask = 0xffffffffu;  // of warp collectives: all lanes take part

using Vec16 = uint4;

PAGEDCORE_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
PAGEDCORE_DEVICE int fresh_thread_id() {
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
PAGEDCORE_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
PAGEDCORE_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

PAGEDCORE_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char pagedcore_shared[];
  return pagedcore_shared;
}

PAGEDCORE_DEVICE void sync_threads() { __syncthreads(); }
PAGEDCORE_DEVICE void sync_warp() { __syncwarp(); }
PAGEDCORE_DEVICE float shuffle_xor(float x, int lane_mask) { return __shfl_xor_sync(kFullMask, x, lane_mask); }
PAGEDCORE_DEVICE int shuffle(int x, int lane) { return __shfl_sync(kFullMask, x, lane); }
PAGEDCORE_DEVICE float shuffle(float x, int lane) { return __shfl_sync(kFullMask, x, lane); }
PAGEDCORE_DEVICE uint32_t ballot(bool x) { return __ballot_sync(kFullMask, x); }

using SharedAddress = uint32_t;
PAGEDCORE_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
PAGEDCORE_DEVICE SharedAddress flip_bits(SharedAddress p, int bits) { return p ^ static_cast<uint32_t>(bits); }

PAGEDCORE_DEVICE void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
PAGEDCORE_DEVICE void cp_async_4(SharedAddress shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
PAGEDCORE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
PAGEDCORE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

PAGEDCORE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
PAGEDCORE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

template <class T>
PAGEDCORE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
PAGEDCORE_DEVICE uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

struct Floats2 {
  float low, high;
};
template <class T>
PAGEDCORE_DEVICE Floats2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ Floats2 unpack2<f16>(uint32_t pair) {
  Floats2 r;
  asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
      : "=f"(r.low), "=f"(r.high)
      : "r"(pair));
  return r;
}
template <>
__device__ __forceinline__ Floats2 unpack2<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
PAGEDCORE_DEVICE constexpr bool converts_codes() { return true; }
PAGEDCORE_DEVICE void convert_codes(uint32_t codes, uint32_t& even, uint32_t& odd) {
  asm("{.reg .b16 low, high;\n .reg .b32 sorted;\n prmt.b32 sorted, %2, 0, 0x3120;\n mov.b32 {low, high}, sorted;\n"
      " cvt.rn.f16x2.e4m3x2 %0, low;\n cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(even), "=r"(odd)
      : "r"(codes));
}
#else
PAGEDCORE_DEVICE constexpr bool converts_codes() { return false; }
PAGEDCORE_DEVICE void convert_codes(uint32_t, uint32_t&, uint32_t&) {}
#endif
PAGEDCORE_DEVICE uint32_t times_256(uint32_t pair) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0x5c005c00u));
  return r;
}

PAGEDCORE_DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
PAGEDCORE_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }
PAGEDCORE_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
// By exp2 and a division, and near 0 by a polynomial: within 1 ulp, where tanh.approx errs by 2^-11.
PAGEDCORE_DEVICE float tanh_of(float x) { return tanhf(x); }

PAGEDCORE_DEVICE uint32_t load_4(const void* p) { return *static_cast<const uint32_t*>(p); }
PAGEDCORE_DEVICE Vec16 load_16(const void* p) { return *static_cast<const uint4*>(p); }
PAGEDCORE_DEVICE void store_16(void* p, const Vec16& value) { *static_cast<uint4*>(p) = value; }
PAGEDCORE_DEVICE float load_coherent(const float* p) { return __ldcg(p); }
PAGEDCORE_DEVICE int atomic_add(int* p, int value) { return atomicAdd(p, value); }
PAGEDCORE_DEVICE void fence() { __threadfence(); }
PAGEDCORE_DEVICE void raise_flag(uint32_t* word) { *static_cast<volatile uint32_t*>(word) = 1; }

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here, and not again to whoever asks next
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class Params>
class Residency {
 public:
  constexpr Residency(void (*kernel)(Params), int threads, int shared_bytes)
      : kernel_(kernel), threads_(threads), shared_bytes_(shared_bytes) {}

  int blocks() const {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    std::atomic<int>& known = known_[device % kDevices];
    if (int blocks = known.load(std::memory_order_acquire); blocks > 0 && device < kDevices) return blocks;
    check(cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_),
          "cudaFuncSetAttribute");
    int processors = 0, of_one = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, kernel_, threads_, static_cast<size_t>(shared_bytes_)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const int blocks = processors * (of_one > 0 ? of_one : 1);
    if (device < kDevices) known.store(blocks, std::memory_order_release);
    return blocks;
  }

 private:
  static constexpr int kDevices = 64;  // whose answers are kept; later ones are asked each time
  void (*kernel_)(Params);
  int threads_, shared_bytes_;
  mutable std::atomic<int> known_[kDevices] = {};
};

// Loads a kernel's code onto the current device: at its first launch that would be in the way of a capture.
template <class Params>
void load(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
}

template <class Params>
void launch(void (*kernel)(Params), int grid_x, int grid_y, int grid_z, int threads, size_t shared_bytes, Stream stream,
            const Params& params) {
  // What <<<>>> says is to be read from cudaGetLastError, which has the errors of others too.
  Params copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchKernel(kernel, dim3(grid_x, grid_y, grid_z), dim3(threads), arguments, shared_bytes, stream),
        "kernel launch");
}

}  // namespace pagedcore::device
