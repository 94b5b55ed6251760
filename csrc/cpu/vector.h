// Vectors of float and double, as wide as those of the instruction set that this file is compiled
// for. They are the vector types of GCC and Clang, so one source serves SSE2, AVX2, AVX-512 and
// NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../shared/storage.h"

// Every instruction set compiles the same sources. If a function had external linkage, the linker
// would keep one copy, perhaps with instructions that this machine lacks. So the headers of
// csrc/cpu define everything in an anonymous namespace, and the kernels call no inline function of
// the standard library. Inline functions of csrc/shared are safe: if a compiler does not inline
// one, the linker keeps the copy of the first object file, and setup.py links the baseline first.
namespace naslora {
namespace {

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
// v with zeros in the lanes from `count` on.
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
inline A horizontal_sum(Vec<A> v) {  // adds halves to halves: few steps, in a fixed order
  A lanes[kLanes<A>];
  store<A>(lanes, v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Calls body(std::integral_constant<int, N>) with N = n, for n in 1..4: sizes of register blocks.
template <typename Body>
inline void with_constant(int64_t n, const Body& body) {
  switch (n) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 4>{});
  }
}

}  // namespace
}  // namespace naslora
