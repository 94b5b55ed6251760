// Vectors of float and double as wide as the instruction set this file is compiled for. They are
// the compilers' own vector types, so one source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu_kernels.h"
#include "naslora_math.h"

// Every instruction set compiles the same sources, so nothing here may have external linkage: the
// linker would keep one copy, perhaps of instructions that this machine lacks. For the same reason
// the kernels use no inline functions of the standard library.
namespace {

using naslora::widen;

#define NASLORA_VECTOR(T) T __attribute__((vector_size(NASLORA_VECTOR_BYTES)))
#define NASLORA_UNALIGNED(T) \
  T __attribute__((vector_size(NASLORA_VECTOR_BYTES), aligned(sizeof(T)), may_alias))

template <typename A>
struct Simd;
template <>
struct Simd<float> {
  typedef NASLORA_VECTOR(float) Vector;
  typedef NASLORA_UNALIGNED(float) Unaligned;
  typedef NASLORA_VECTOR(int32_t) Index;
  typedef NASLORA_UNALIGNED(int32_t) UnalignedIndex;
  using Integer = int32_t;
};
template <>
struct Simd<double> {
  typedef NASLORA_VECTOR(double) Vector;
  typedef NASLORA_UNALIGNED(double) Unaligned;
  typedef NASLORA_VECTOR(int64_t) Index;
  typedef NASLORA_UNALIGNED(int64_t) UnalignedIndex;
  using Integer = int64_t;
};

template <typename A>
using Vec = typename Simd<A>::Vector;
template <typename A>
using IndexVec = typename Simd<A>::Index;
template <typename A>
using Integer = typename Simd<A>::Integer;
template <typename A>
constexpr int kLanes = NASLORA_VECTOR_BYTES / sizeof(A);

template <typename A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename Simd<A>::Unaligned*>(p);
}
template <typename A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename Simd<A>::Unaligned*>(p) = v;
}
// v with zeros from lane `count` on.
template <typename A>
inline Vec<A> first_lanes(Vec<A> v, int64_t count) {
  if (count >= kLanes<A>) return v;
  A lanes[kLanes<A>];
  store<A>(lanes, v);
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i < count ? lanes[i] : 0;
  return load<A>(lanes);
}
template <typename A>
inline IndexVec<A> load_index(const Integer<A>* p) {
  return *reinterpret_cast<const typename Simd<A>::UnalignedIndex*>(p);
}
template <typename A>
inline void store_index(Integer<A>* p, IndexVec<A> v) {
  *reinterpret_cast<typename Simd<A>::UnalignedIndex*>(p) = v;
}
template <typename A>
inline Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}
template <typename A>
inline A horizontal_sum(Vec<A> v) {  // halves onto halves: a short chain, in a fixed order
  A lanes[kLanes<A>];
  store<A>(lanes, v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Calls body(begin, end) for ranges that together are [0, count), on the host's threads.
template <typename Body>
void parallel_tasks(int64_t count, const Body& body) {
  naslora::run_tasks(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// Memory of one call.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count ? static_cast<T*>(naslora::host_allocate(count * sizeof(T))) : nullptr) {}
  ~Buffer() { naslora::host_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Cuts consecutive pieces off one allocation; with a null base it only adds up the sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + size_ : nullptr;
    size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  size_t size() const { return static_cast<size_t>(size_); }

 private:
  char* base_;
  int64_t size_ = 0;
};

}  // namespace
