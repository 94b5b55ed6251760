// exp of vectors, for arguments that are at most about 0, as those of a softmax are.
#pragma once

#include "vector.h"

namespace naslora {
namespace {

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2. `round` is 1.5 times the
// number whose unit in the last place is 1: adding it leaves n in the low bits. ln 2 is split in
// two, so that n * ln2_high is exact.
template <typename A>
struct Exponential;

template <>
struct Exponential<float> {
  typedef NASLORA_VECTOR(uint32_t) Bits;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23
  static constexpr float per_ln2 = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.33654f;  // below it, exp is no normal number
  static constexpr int mantissa = 23;
  static constexpr uint32_t bias = 127;
  static constexpr uint32_t round_bits = 0x4b400000u;
  // (exp(r) - 1 - r) / r^2, highest power first: Cephes' minimax polynomial.
  static constexpr float series[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct Exponential<double> {
  typedef NASLORA_VECTOR(uint64_t) Bits;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double per_ln2 = 1.4426950408889634074;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -708.3;
  static constexpr int mantissa = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr uint64_t round_bits = 0x4338000000000000u;
  // 1 / 13! down to 1 / 2!: the next term is below 2^-57.
  static constexpr double series[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
      1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
};

// Within two units in the last place. 0 where the result is no normal number. NaN stays NaN.
template <typename A>
inline Vec<A> exponential(Vec<A> x) {
  using E = Exponential<A>;
  using Bits = typename E::Bits;
  const auto tiny = x < broadcast(E::lowest);
  x = tiny ? broadcast(E::lowest) : x;
  const Vec<A> rounded = x * E::per_ln2 + E::round;
  const Vec<A> n = rounded - E::round;
  const Vec<A> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Vec<A> sum = broadcast(E::series[0]);
#pragma GCC unroll 16
  for (int i = 1; i < static_cast<int>(sizeof(E::series) / sizeof(A)); ++i)
    sum = sum * r + E::series[i];
  const Vec<A> fraction = (sum * r * r + r) + A{1};
  const Bits power = ((Bits)rounded - E::round_bits + E::bias) << E::mantissa;  // 2^n
  const Vec<A> result = fraction * (Vec<A>)power;
  return tiny ? Vec<A>{} : result;
}

}  // namespace
}  // namespace naslora
