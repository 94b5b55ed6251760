// The arithmetic of the cell that the CPU and the CUDA kernels share: the table of operations and
// their taps, the folded kernel and its chain rule, the rules of the poolings.
//
// It is plain C++17 and uses no container of the standard library, so that CUDA can include it.
#pragma once

#include "storage.h"
#include "vocabulary.h"

namespace naslora {

// ---- The operations ------------------------------------------------------------------------

constexpr int kConvolutions = 4;  // sep_conv_3x3, sep_conv_5x5, dil_conv_3x3, dil_conv_5x5
constexpr int kAvgPool = 4, kMaxPool = 5, kSkip = 6, kNone = 7;
constexpr int kOperations = 8;
constexpr int kKernelSize[kConvolutions] = {3, 5, 3, 5};
constexpr int kDilation[kConvolutions] = {1, 1, 2, 2};
constexpr int kReach = 4;  // distance of the furthest tap from the centre: dil_conv_5x5

// The weight taps of the four depthwise kernels lie one after another.
NASLORA_HOST_DEVICE constexpr int weight_taps(int op) { return op % 2 ? 25 : 9; }
NASLORA_HOST_DEVICE constexpr int weight_start(int op) { return op / 2 * 34 + op % 2 * 9; }
constexpr int kAllWeightTaps = 68;  // 9 + 25 + 9 + 25
constexpr int kWeightTaps[kConvolutions] = {weight_taps(0), weight_taps(1), weight_taps(2),
                                            weight_taps(3)};
constexpr int kWeightStart[kConvolutions] = {weight_start(0), weight_start(1), weight_start(2),
                                             weight_start(3)};

// ---- The taps of the folded kernel ---------------------------------------------------------
//
// The four convolutions together use 41 pixels of the 9x9 window. Each is marked with the
// convolutions that use it: s for sep_conv_5x5, whose inner nine are also sep_conv_3x3's; d for
// dil_conv_5x5, whose inner nine are also dil_conv_3x3's; * for both.
//
//         -4 -3 -2 -1  0  1  2  3  4
//     -4   d     d     d     d     d
//     -3
//     -2   d     *  s  *  s  *     d
//     -1         s  s  s  s  s
//      0   d     *  s  *  s  *     d
//      1         s  s  s  s  s
//      2   d     *  s  *  s  *     d
//      3
//      4   d     d     d     d     d

constexpr int kFoldedTaps = 41;

struct alignas(4) TapTable {
  int8_t dy[kFoldedTaps] = {};
  int8_t dx[kFoldedTaps] = {};
  int8_t weight[kFoldedTaps][kConvolutions] = {};  // weight tap of each convolution, -1 for none
  int8_t of_weight[kConvolutions][25] = {};        // [convolution][weight tap] -> folded tap
};

// In row-major order, so that neighbouring taps read neighbouring memory.
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

// a = softmax(alpha). `exponential` is the platform's exp for T.
template <typename T, typename Exp>
NASLORA_HOST_DEVICE inline void softmax(const T* alpha, T* a, Exp exponential) {
  T largest = alpha[0];
  for (int i = 1; i < kOperations; ++i) largest = alpha[i] > largest ? alpha[i] : largest;
  T sum = 0;
  for (int i = 0; i < kOperations; ++i) sum += a[i] = exponential(alpha[i] - largest);
  const T scale = 1 / sum;
  for (int i = 0; i < kOperations; ++i) a[i] *= scale;
}

// grad_alpha_k = a_k (grad_a_k - sum_j a_j grad_a_j)
template <typename T>
NASLORA_HOST_DEVICE inline void softmax_backward(const T* a, const T* grad_a, T* grad_alpha) {
  T mean = 0;
  for (int i = 0; i < kOperations; ++i) mean += a[i] * grad_a[i];
  for (int i = 0; i < kOperations; ++i) grad_alpha[i] = a[i] * (grad_a[i] - mean);
}

// ---- The folded kernel and its chain rule --------------------------------------------------

// The weights of a cell's convolutions: dw[i] is (c, k, k), pw is (4, c, c) as [op, out, in].
template <typename T>
struct CellWeights {
  int64_t c;
  const T* dw[kConvolutions];
  const T* pw;

  NASLORA_HOST_DEVICE T depthwise(int op, int64_t in, int weight_tap) const {
    return dw[op][in * weight_taps(op) + weight_tap];
  }
  NASLORA_HOST_DEVICE T pointwise(int op, int64_t out, int64_t in) const {
    return pw[(op * c + out) * c + in];
  }
};

// K[out, in, tap] = sum_i a_i pw_i[out, in] dw_i[in, tap] + a_skip [out = in, tap = centre]
//
// `Weights` has the functions of CellWeights. U may be wider than the weights.
template <typename Weights, typename U>
NASLORA_HOST_DEVICE inline U folded_weight(const Weights& weights, const U* a, int64_t out,
                                           int64_t in, int tap, const TapTable& taps) {
  U sum = 0;
  for (int i = 0; i < kConvolutions; ++i) {
    const int t = taps.weight[tap][i];
    if (t >= 0) sum += a[i] * weights.pointwise(i, out, in) * weights.depthwise(i, in, t);
  }
  return out == in && tap == kCentreTap ? sum + a[kSkip] : sum;
}

// With grad_K = dL/dK the chain rule is, for each convolution i,
//
//   grad_a_i           = sum_{out, in, tap} pw_i[out, in] dw_i[in, tap] grad_K[out, in, tap]
//   grad_pw_i[out, in] = a_i sum_tap dw_i[in, tap] grad_K[out, in, tap]
//   grad_dw_i[in, tap] = a_i sum_out pw_i[out, in] grad_K[out, in, tap]
//
// and grad_a_skip sums grad_K at the centre tap where out = in. The next three functions are these
// sums without the factor a_i.

// Adds to grad_a what one element of grad_K contributes.
template <typename Weights, typename U>
NASLORA_HOST_DEVICE inline void add_mixture_gradient(const Weights& weights, U grad_K, int64_t out,
                                                     int64_t in, int tap, const TapTable& taps,
                                                     U* grad_a) {
  for (int i = 0; i < kConvolutions; ++i) {
    const int t = taps.weight[tap][i];
    if (t >= 0) grad_a[i] += grad_K * weights.pointwise(i, out, in) * weights.depthwise(i, in, t);
  }
  if (out == in && tap == kCentreTap) grad_a[kSkip] += grad_K;
}

// sum_t depthwise(t) grad_K(tap of t) over the weight taps t of one convolution. Times a_i it is
// grad_pw_i[out, in]; times pw_i[out, in], and summed over out and in, it is grad_a_i.
template <typename U, typename Depthwise, typename GradK>
NASLORA_HOST_DEVICE inline U sum_over_taps(int op, const TapTable& taps, const Depthwise& depthwise,
                                           const GradK& grad_K) {
  U sum = 0;
  for (int t = 0; t < weight_taps(op); ++t) sum += depthwise(t) * grad_K(taps.of_weight[op][t]);
  return sum;
}

// sum += sum_out pointwise(out) grad_K(out). Times a_i the sum is grad_dw_i[in, tap].
template <typename U, typename Index, typename Pointwise, typename GradK>
NASLORA_HOST_DEVICE inline void add_over_outputs(Index outputs, const Pointwise& pointwise,
                                                 const GradK& grad_K, U& sum) {
  for (Index out = 0; out < outputs; ++out) sum += pointwise(out) * grad_K(out);
}

// ---- The poolings --------------------------------------------------------------------------

// 1 / (pixels of the 3x3 window around (y, x) that are in the image): the factor of avg_pool. A
// division would be a function call on a GPU.
template <typename A>
NASLORA_HOST_DEVICE inline A inverse_window_size(int64_t y, int64_t x, int64_t height,
                                                 int64_t width) {
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

// Whether a later value of a window replaces the maximum so far. Values come in row-major order.
// Only a larger one does, so that the first of equal values wins, and NaN, so that NaN propagates.
// On vectors the answer is a mask with a lane for each value.
template <typename V>
NASLORA_HOST_DEVICE inline auto max_pool_takes(V value, V maximum) {
  return (value > maximum) | (value != value);
}

// The pixels of a 3x3 window are numbered in row-major order. The argmax of a window is the number
// of its largest pixel:
//
//              dx = -1   0   1
//     dy = -1        0   1   2
//     dy =  0        3   4   5       4 is the pixel that the window belongs to
//     dy =  1        6   7   8
//
// Pixel p lies in the windows of its nine neighbours. In the window of the neighbour with number q
// it has the opposite number, 8 - q. So max_pool sends grad_y of that neighbour back to p if and
// only if the argmax of its window is 8 - q.
NASLORA_HOST_DEVICE constexpr int window_index(int dy, int dx) { return (dy + 1) * 3 + dx + 1; }
NASLORA_HOST_DEVICE constexpr int opposite_index(int index) { return 8 - index; }

}  // namespace naslora
