// The two loops that do the arithmetic of the cell, over a flat range of positions of planes:
// `stencil_block`, a weighted sum of shifted planes, and `correlate_block`, dot products of planes
// with shifted planes.
#pragma once

#include "vector.h"

namespace naslora {
namespace {

constexpr int kMostTargets = 4;    // planes that one step of a loop writes
constexpr int kMostVectors = 8;    // vectors that one step of a loop takes
constexpr int64_t kShortSum = 12;  // terms
constexpr int64_t kLongSum = 64;   // vectors

// Calls body(o, O) for targets o, o + 1, ..., o + O - 1, in blocks of at most kMostTargets.
template <typename Body>
void for_target_blocks(int64_t targets, const Body& body) {
  for (int64_t o = 0; o < targets; o += kMostTargets)
    with_constant(smaller(kMostTargets, targets - o), [&](auto size) { body(o, size); });
}

// Where the loops take the weight of a term for a target: [block of targets][term][target of
// block].
inline int64_t blocked_index(int64_t term, int64_t terms, int64_t target, int64_t targets) {
  const int64_t first = target / kMostTargets * kMostTargets;
  const int64_t size = smaller(kMostTargets, targets - first);
  return first * terms + term * size + target - first;
}

// out_o[p] (+)= sum_s weight[s, o] * source[offset[s] + p]   for p in [0, count) and terms s.
//
// `count` is rounded up to whole blocks of vectors: planes end with that much slack. A long sum is
// a sum of short sums, whose rounding errors stay as small as those of one convolution after
// another.
template <typename A, int O>
void stencil_block(const A* source, const int64_t* offset, const A* weight, int64_t terms, A* out,
                   int64_t out_stride, int64_t count, bool accumulate) {
  // Vectors of a target that share the load of a weight.
  constexpr int U = O == 1 ? kMostVectors : O == 2 ? 4 : O == 3 ? 3 : 2;
  for (int64_t p = 0; p < count; p += U * kLanes<A>) {
    Vec<A> sum[O][U] = {};
    if (accumulate)
      for (int o = 0; o < O; ++o)
        for (int u = 0; u < U; ++u) sum[o][u] = load<A>(out + o * out_stride + p + u * kLanes<A>);
    for (int64_t first = 0; first < terms; first += kShortSum) {
      const int64_t last = smaller(terms, first + kShortSum);
      Vec<A> part[O][U] = {};
      for (int64_t s = first; s < last; ++s) {
        const A* at = source + offset[s] + p;
        Vec<A> v[U];
        for (int u = 0; u < U; ++u) v[u] = load<A>(at + u * kLanes<A>);
        for (int o = 0; o < O; ++o)
          for (int u = 0; u < U; ++u) part[o][u] += weight[s * O + o] * v[u];
      }
      for (int o = 0; o < O; ++o)
        for (int u = 0; u < U; ++u) sum[o][u] += part[o][u];
    }
    for (int o = 0; o < O; ++o)
      for (int u = 0; u < U; ++u) store<A>(out + o * out_stride + p + u * kLanes<A>, sum[o][u]);
  }
}

// result[s, o] += sum_p left_o[p] * source[offset[s] + p]   for p in [0, count) and N terms s.
//
// A long sum is a sum of shorter sums, as above.
template <typename A, int O, int N>
void correlate_block(const A* left, int64_t left_stride, const A* source, const int64_t* offset,
                     double* result, int64_t result_stride, int64_t count) {
  for (int64_t first = 0; first < count; first += kLongSum * kLanes<A>) {
    const int64_t last = smaller(count, first + kLongSum * kLanes<A>);
    Vec<A> sum[N][O] = {};
    for (int64_t p = first; p < last; p += kLanes<A>) {
      Vec<A> l[O];
      for (int o = 0; o < O; ++o)
        l[o] = first_lanes<A>(load<A>(left + o * left_stride + p), count - p);
      for (int s = 0; s < N; ++s) {
        const Vec<A> v = load<A>(source + offset[s] + p);
        for (int o = 0; o < O; ++o) sum[s][o] += l[o] * v;
      }
    }
    for (int s = 0; s < N; ++s)
      for (int o = 0; o < O; ++o) result[s * result_stride + o] += horizontal_sum<A>(sum[s][o]);
  }
}

// The same for any number of terms, in blocks of nearly equal size, at most N.
template <typename A, int O, int N = 12 / O>  // 12 sums fit the 16 registers of AVX2
void correlate_terms(const A* left, int64_t left_stride, const A* source, const int64_t* offset,
                     int64_t terms, double* result, int64_t result_stride, int64_t count) {
  const int64_t blocks = ceil_div(terms, N);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * terms / blocks, size = (b + 1) * terms / blocks - begin;
    if (size == N) {
      correlate_block<A, O, N>(left, left_stride, source, offset + begin,
                               result + begin * result_stride, result_stride, count);
    } else if constexpr (N > 1) {
      correlate_terms<A, O, N - 1>(left, left_stride, source, offset + begin, size,
                                   result + begin * result_stride, result_stride, count);
    }
  }
}

// Whether a plane has no infinity and no NaN.
template <typename A>
bool all_finite(const A* plane, int64_t count) {
  Vec<A> sum = {};
  for (int64_t p = 0; p < count; p += kLanes<A>) sum += load<A>(plane + p) - load<A>(plane + p);
  return horizontal_sum<A>(sum) == 0;
}

}  // namespace
}  // namespace naslora
