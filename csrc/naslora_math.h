// The arithmetic of the mixed cell that every compiled backend shares: the table of operations,
// their taps, the folding of the convolutions into one, the pooling rules, 16-bit floats.
// Plain C++17 without the standard library's containers, so that CUDA code can include it too.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NASLORA_HOST_DEVICE __host__ __device__
#else
#define NASLORA_HOST_DEVICE
#endif

namespace naslora {

// ---- The operations, in the order of alpha -------------------------------------------------

constexpr int kConvolutions = 4;  // sep_conv_3x3, sep_conv_5x5, dil_conv_3x3, dil_conv_5x5
constexpr int kAvgPool = 4, kMaxPool = 5, kSkip = 6, kNone = 7;
constexpr int kOperations = 8;
constexpr int kKernelSize[kConvolutions] = {3, 5, 3, 5};
constexpr int kDilation[kConvolutions] = {1, 1, 2, 2};
constexpr int kReach = 4;  // the furthest tap of any operation: dil_conv_5x5
NASLORA_HOST_DEVICE constexpr int weight_taps(int op) { return op % 2 ? 25 : 9; }
constexpr int kWeightTaps[kConvolutions] = {weight_taps(0), weight_taps(1), weight_taps(2),
                                            weight_taps(3)};
constexpr int kAllWeightTaps = 68;  // 9 + 25 + 9 + 25
// Where each begins among the 68.
NASLORA_HOST_DEVICE constexpr int weight_start(int op) { return op / 2 * 34 + op % 2 * 9; }
constexpr int kWeightStart[kConvolutions] = {weight_start(0), weight_start(1), weight_start(2),
                                             weight_start(3)};

// The four convolutions together touch 41 of the 9x9 window's pixels.
constexpr int kFoldedTaps = 41;

struct alignas(4) TapTable {
  int8_t dy[kFoldedTaps] = {};
  int8_t dx[kFoldedTaps] = {};
  int8_t weight[kFoldedTaps][kConvolutions] = {};  // which tap of each convolution; -1: none
  int8_t of_weight[kConvolutions][25] = {};        // [convolution][its tap] -> one of the 41
};

// Row-major over the 9x9 window, so that neighbouring taps read neighbouring memory.
constexpr TapTable make_tap_table() {
  TapTable table;
  int count = 0;
  for (int dy = -kReach; dy <= kReach; ++dy) {
    for (int dx = -kReach; dx <= kReach; ++dx) {
      bool used = false;
      for (int i = 0; i < kConvolutions; ++i) {
        const int half = kKernelSize[i] / 2, dilation = kDilation[i];
        table.weight[count][i] = -1;
        if (dy % dilation != 0 || dx % dilation != 0) continue;
        const int ky = dy / dilation + half, kx = dx / dilation + half;
        if (ky < 0 || ky >= kKernelSize[i] || kx < 0 || kx >= kKernelSize[i]) continue;
        table.weight[count][i] = ky * kKernelSize[i] + kx;
        table.of_weight[i][ky * kKernelSize[i] + kx] = count;
        used = true;
      }
      if (used) {
        table.dy[count] = dy;
        table.dx[count] = dx;
        ++count;
      }
    }
  }
  return table;
}

constexpr TapTable kTaps = make_tap_table();
constexpr int kCentreTap = kTaps.of_weight[0][4];
static_assert(kTaps.dy[kFoldedTaps - 1] == kReach && kTaps.dx[kFoldedTaps - 1] == kReach,
              "the union of the four kernels has 41 taps");

// ---- The mixture ---------------------------------------------------------------------------

// a = softmax(alpha); `exponential` is the platform's exp for T.
template <typename T, typename Exp>
NASLORA_HOST_DEVICE inline void softmax(const T* alpha, T* a, Exp exponential) {
  T largest = alpha[0];
  for (int i = 1; i < kOperations; ++i) largest = alpha[i] > largest ? alpha[i] : largest;
  T sum = 0;
  for (int i = 0; i < kOperations; ++i) sum += a[i] = exponential(alpha[i] - largest);
  const T scale = 1 / sum;
  for (int i = 0; i < kOperations; ++i) a[i] *= scale;
}

// d alpha_k = a_k (d a_k - sum_j a_j d a_j)
template <typename T>
NASLORA_HOST_DEVICE inline void softmax_backward(const T* a, const T* grad_a, T* grad_alpha) {
  T mean = 0;
  for (int i = 0; i < kOperations; ++i) mean += a[i] * grad_a[i];
  for (int i = 0; i < kOperations; ++i) grad_alpha[i] = a[i] * (grad_a[i] - mean);
}

// A cell's parameters: dw[i] is (c, k, k), pw is (4, c, c) as [operation, output, input].
template <typename T>
struct CellParameters {
  int64_t c;
  const T* dw[kConvolutions];
  const T* pw;

  NASLORA_HOST_DEVICE T depthwise(int op, int64_t in, int tap) const {
    return dw[op][in * weight_taps(op) + tap];
  }
  NASLORA_HOST_DEVICE T pointwise(int op, int64_t out, int64_t in) const {
    return pw[(op * c + out) * c + in];
  }
};

// K[out, in, tap] = sum_i a_i pw_i[out, in] dw_i[in, tap] + a_skip [out = in, tap = centre],
// the one convolution that all but the poolings amount to. `U` may be wider than the parameters.
template <typename P, typename U>
NASLORA_HOST_DEVICE inline U folded_weight(const P& parameters, const U* a, int64_t out, int64_t in,
                                           int tap, const TapTable& taps) {
  U sum = 0;
  for (int i = 0; i < kConvolutions; ++i) {
    const int t = taps.weight[tap][i];
    if (t >= 0) sum += a[i] * parameters.pointwise(i, out, in) * parameters.depthwise(i, in, t);
  }
  return out == in && tap == kCentreTap ? sum + a[kSkip] : sum;
}

// ---- Poolings ------------------------------------------------------------------------------

// 1 / (valid pixels of the 3x3 window around (y, x)): what avg_pool multiplies by. Without a
// division, which is a function call on a GPU.
template <typename A>
NASLORA_HOST_DEVICE inline A pool_share(int64_t y, int64_t x, int64_t height, int64_t width) {
  const int rows = 1 + (y > 0) + (y + 1 < height);
  const int columns = 1 + (x > 0) + (x + 1 < width);
  switch (rows * columns) {
    case 1: return A(1);
    case 2: return A(1) / 2;
    case 3: return A(1) / 3;
    case 4: return A(1) / 4;
    case 6: return A(1) / 6;
    default: return A(1) / 9;
  }
}

// Walking the taps row by row, a later value replaces the maximum only if it is larger, so that
// the first of equals wins, or NaN, so that NaN propagates. (On vectors, lane by lane.)
template <typename V>
NASLORA_HOST_DEVICE inline auto max_pool_takes(V value, V maximum) {
  return (value > maximum) | (value != value);
}

// ---- 16-bit floats -------------------------------------------------------------------------

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

// The conversions have no branches, so that compilers vectorise loops over them. On a GPU they are
// the one instruction it has for each.
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
  // A subnormal is its digits as a normal number with an implied one, less that one.
  const uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_of(sign | (exponent == 0x0f800000u ? infinite : finite));
#endif
}

template <typename S>
struct Narrow {  // float32 and float64 are stored as they are
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

// The type that a storage type is computed in.
template <typename S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace naslora
