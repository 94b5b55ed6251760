// What all kernels share: launching, shared memory, storage types.
//
// The kernels are CUDA C++17 over addresses. `emulation.h` lets a plain C++ compiler build them
// for the CPU instead, block after block, so that tests run them where no GPU is.
#pragma once

#if defined(NASLORA_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <stdexcept>
#include <string>

#include "../naslora_math.h"
#include "kernels.h"

namespace naslora {

constexpr int kWarp = 32;
constexpr size_t kSharedMemory = 48 * 1024;  // what every block may use without asking

NASLORA_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NASLORA_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
NASLORA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Launching -----------------------------------------------------------------------------

inline void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the one before it afterwards.
class DeviceGuard {
 public:
  DeviceGuard(const char* kernel, int device) {
    check(kernel, cudaGetDevice(&before_));
    changed_ = before_ != device;
    if (changed_) check(kernel, cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The dynamic shared memory of the block, or a null pointer where there is none: on the host.
__device__ inline char* shared_memory() {
#if defined(NASLORA_EMULATION)
  return emulation::shared_memory();
#else
  extern __shared__ uint4 naslora_shared_memory[];
  return reinterpret_cast<char*>(naslora_shared_memory);
#endif
}

// Cuts arrays off the shared memory. A kernel's layout is a struct that takes its arrays from a
// Carver; with a null base that only adds up the sizes, for the launch.
class Carver {
 public:
  NASLORA_HOST_DEVICE explicit Carver(char* base) : base_(base) {}
  template <typename T>
  NASLORA_HOST_DEVICE T* take(int64_t count) {
    char* piece = base_ ? base_ + size_ : nullptr;
    size_ += (count * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(piece);
  }
  NASLORA_HOST_DEVICE size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

// body(i) for i in [0, count), shared out among the block's threads. Not unrolled: a copy of the body
// for each of a few rounds costs time to compile, and registers, but gains none to run.
template <typename Body>
__device__ inline void for_block(int count, const Body& body) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) body(i);
}

template <typename Arguments>
void launch(const char* name, void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y,
            int threads, size_t shared, const Stream& stream, Arguments arguments) {
  const DeviceGuard guard(name, stream.device);
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  void* pointers[] = {&arguments};
  if (blocks_x > INT32_MAX || blocks_y > 65535) check(name, cudaErrorInvalidConfiguration);
#if defined(NASLORA_EMULATION)
  check(name, emulation::launch(name, [&] { kernel(arguments); }, grid, threads, shared));
  (void)pointers;
#else
  check(name, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers,
                               shared, static_cast<cudaStream_t>(stream.handle)));
#endif
  check(name, cudaGetLastError());
}

// ---- Storage types -------------------------------------------------------------------------

template <typename S>
using AccumulatorOf = typename Accumulator<S>::type;

// An element of a parameter, whose dtype need not be the maps'. Loads under a condition, and none
// that a conversion has to wait for inside a branch, so that those of a loop are in flight together.
template <typename A>
__device__ inline A read(const Parameter& p, int64_t i) {
  const bool is_float32 = p.dtype == Dtype::float32;
  float value = 0;
  if (is_float32) value = static_cast<const float*>(p.data)[i];
  if constexpr (sizeof(A) == 8) {
    double wide = 0;
    if (!is_float32) wide = static_cast<const double*>(p.data)[i];
    return is_float32 ? value : wide;
  } else {
    uint16_t bits = 0;
    if (!is_float32) bits = static_cast<const uint16_t*>(p.data)[i];
    const float narrow = p.dtype == Dtype::bfloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
    return is_float32 ? value : narrow;
  }
}
template <typename A>
__device__ inline void write(const Parameter& p, int64_t i, A value) {
  if (p.dtype == Dtype::float32)
    static_cast<float*>(p.data)[i] = static_cast<float>(value);
  else if constexpr (sizeof(A) == 8)
    static_cast<double*>(p.data)[i] = value;
  else if (p.dtype == Dtype::bfloat16)
    static_cast<bfloat16*>(p.data)[i] = Narrow<bfloat16>::from(value);
  else
    static_cast<float16*>(p.data)[i] = Narrow<float16>::from(value);
}

// Sixteen bytes, which one instruction loads or stores where they are aligned.
template <typename S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S lane[kSize];
};
template <typename S>
__device__ inline Vector<S> load_vector(const S* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Vector<S> v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
template <typename S>
__device__ inline void store_vector(S* to, const Vector<S>& v) {
  uint4 bits;
  memcpy(&bits, &v, sizeof bits);
  *reinterpret_cast<uint4*>(to) = bits;
}

// body(S{}) for the storage type that dtype names
template <typename Body>
void with_storage(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(float{});
    case Dtype::float64: return body(double{});
    case Dtype::bfloat16: return body(bfloat16{});
    case Dtype::float16: return body(float16{});
  }
}

}  // namespace naslora
