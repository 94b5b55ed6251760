// What all kernels use: launching, shared memory, parameters, vectors of 16 bytes.
//
// The kernels are CUDA C++17 over addresses. With `emulation.h` a plain C++ compiler builds them
// for the CPU instead, so that tests can run them without a GPU.
#pragma once

#if defined(NASLORA_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <stdexcept>
#include <string>

#include "../shared/arena.h"
#include "../shared/cell_math.h"
#include "kernels.h"

namespace naslora {

constexpr int kWarp = 32;

// ---- Launching -----------------------------------------------------------------------------

inline void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next call does not report it again
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and restores the previous one at the end of the scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* kernel, int device) {
    check(kernel, cudaGetDevice(&previous_));
    changed_ = previous_ != device;
    if (changed_) check(kernel, cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// The dynamic shared memory of the block.
__device__ inline char* shared_memory() {
#if defined(NASLORA_EMULATION)
  return emulation::shared_memory();
#else
  extern __shared__ uint4 naslora_shared_memory[];
  return reinterpret_cast<char*>(naslora_shared_memory);
#endif
}

using SharedArena = Arena<16>;  // bytes of the widest load

// Places a layout in the shared memory of the block. The launch asks for as many bytes as `measure`
// returns for the same arguments (arena.h).
template <typename Layout, typename... Arguments>
__device__ inline Layout place_in_shared(const Arguments&... arguments) {
  SharedArena arena(shared_memory());
  return Layout(arena, arguments...);
}

// Calls body(i) for i in [0, count), divided among the threads of the block. The loop is not
// unrolled: that would take registers and time to compile, and would not make the few rounds
// faster.
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

// ---- Parameters ----------------------------------------------------------------------------

// An element of a parameter of any dtype. The loads are conditional, but no conversion waits for
// one inside a branch. So the loads of several rounds of a loop are in flight together. __ldg says
// that the address is global and that the kernel does not write there.
template <typename A>
__device__ inline A read(const Parameter& p, int64_t i) {
  const bool is_float32 = p.dtype == Dtype::float32;
  float value = 0;
  if (is_float32) value = __ldg(static_cast<const float*>(p.data) + i);
  if constexpr (sizeof(A) == 8) {
    double wide = 0;
    if (!is_float32) wide = __ldg(static_cast<const double*>(p.data) + i);
    return is_float32 ? value : wide;
  } else {
    uint16_t bits = 0;
    if (!is_float32) bits = __ldg(static_cast<const uint16_t*>(p.data) + i);
    const float narrow = p.dtype == Dtype::bfloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
    return is_float32 ? value : narrow;
  }
}

// Calls body(elements) with the address of a parameter's elements as their own type: what a loop
// does for each element then does not depend on the dtype.
template <typename A, typename Body>
__device__ inline void with_elements(const Parameter& p, const Body& body) {
  if (p.dtype == Dtype::float32)
    body(static_cast<const float*>(p.data));
  else if constexpr (sizeof(A) == 8)
    body(static_cast<const double*>(p.data));
  else if (p.dtype == Dtype::bfloat16)
    body(static_cast<const bfloat16*>(p.data));
  else
    body(static_cast<const float16*>(p.data));
}

// __stwb says that the address is global.
template <typename A>
__device__ inline void write(const Parameter& p, int64_t i, A value) {
  if (p.dtype == Dtype::float32)
    __stwb(static_cast<float*>(p.data) + i, static_cast<float>(value));
  else if constexpr (sizeof(A) == 8)
    __stwb(static_cast<double*>(p.data) + i, value);
  else
    __stwb(static_cast<uint16_t*>(p.data) + i, p.dtype == Dtype::bfloat16
                                                   ? Narrow<bfloat16>::from(value).bits
                                                   : Narrow<float16>::from(value).bits);
}

// An element of a map that the kernel does not write to. The compiler otherwise loses sight of the
// memory that a moving pointer is in.
template <typename S>
__device__ inline S load_element(const S* from) {
  if constexpr (sizeof(S) == 2)
    return S{__ldg(reinterpret_cast<const uint16_t*>(from))};
  else
    return __ldg(from);
}

// ---- Vectors -------------------------------------------------------------------------------

// Sixteen bytes, which one instruction loads or stores if they are aligned.
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

}  // namespace naslora
