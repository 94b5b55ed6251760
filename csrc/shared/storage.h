// The types that maps are stored in, and the type that each is computed in.
#pragma once

#include <cstring>

#include "vocabulary.h"

namespace naslora {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

NASLORA_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
NASLORA_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The conversions have no branches, so that compilers vectorise loops over them. On a GPU each is
// one instruction.
NASLORA_HOST_DEVICE inline float widen(float value) { return value; }
NASLORA_HOST_DEVICE inline double widen(double value) { return value; }
NASLORA_HOST_DEVICE inline float widen(bfloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
NASLORA_HOST_DEVICE inline float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t rebias = 112u << 23;  // 127 - 15
  const uint32_t normal = magnitude + rebias;
  const uint32_t infinite = normal + rebias;  // all-ones exponent stays all ones
  // A subnormal has no implied leading one: read as a normal number it has one, so subtract it.
  const uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_of(sign | (exponent == 0x0f800000u ? infinite : finite));
#endif
}

template <typename S>
struct Narrow {  // float32 and float64 need no rounding
  template <typename A>
  NASLORA_HOST_DEVICE static S from(A value) {
    return value;
  }
};
template <>
struct Narrow<bfloat16> {
  NASLORA_HOST_DEVICE static bfloat16 from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    bfloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
    return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
#endif
  }
};
template <>
struct Narrow<float16> {
  NASLORA_HOST_DEVICE static float16 from(float value) {
#if defined(__CUDA_ARCH__)
    float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 aligns a value below 2^-14 to units of 2^-24, and rounds it to nearest even.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // 65520 is the smallest float that rounds to infinity.
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? overflow : finite))};
#endif
  }
};

// The type that maps of storage type S are computed in: float64 for float64, else float32.
template <typename S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename S>
using AccumulatorOf = typename Accumulator<S>::type;

// Calls body(S{}) with the storage type of `dtype`.
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
