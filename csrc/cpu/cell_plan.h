// What one call of the cell computes before it visits tiles: the mixture, the offsets of taps, and
// the weights in the order in which the loops take them.
//
// A cell with few channels uses the folded kernel (41 taps, c x c). The gradient of the folded
// kernel alone gives those of alpha and of all weights. A cell with more channels applies the
// depthwise and the pointwise convolutions one after another, which costs less arithmetic from four
// channels on.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace naslora {
namespace {

constexpr int64_t kMostFoldedChannels = 3;

// What is constant over the tiles of a call.
template <typename S>
struct Plan : Tiles<S> {
  using typename Tiles<S>::A;
  using Tiles<S>::tiling;

  const Cell& cell;
  const CellWeights<A> weights;
  const bool folded;
  double mixture[kOperations];  // float64, so that a product with a weight is rounded once
  int64_t tap[kFoldedTaps], transposed_tap[kFoldedTaps];  // offsets in a plane
  int64_t weight_tap[kAllWeightTaps], transposed_weight_tap[kAllWeightTaps];

  explicit Plan(const Cell& cell)
      : Tiles<S>(cell),
        cell(cell),
        weights{cell.c,
                {static_cast<const A*>(cell.dw[0]), static_cast<const A*>(cell.dw[1]),
                 static_cast<const A*>(cell.dw[2]), static_cast<const A*>(cell.dw[3])},
                static_cast<const A*>(cell.pw)},
        folded(cell.c <= kMostFoldedChannels) {
    for (int i = 0; i < kOperations; ++i) mixture[i] = static_cast<const A*>(cell.alpha)[i];
    softmax(mixture, mixture, [](double x) { return ::exp(x); });
    for (int t = 0; t < kFoldedTaps; ++t) {
      tap[t] = kTaps.dy[t] * tiling.row_stride + kTaps.dx[t];
      transposed_tap[t] = -tap[t];
    }
    for (int i = 0; i < kConvolutions; ++i) {
      for (int t = 0; t < kWeightTaps[i]; ++t) {
        weight_tap[kWeightStart[i] + t] = tap[kTaps.of_weight[i][t]];
        transposed_weight_tap[kWeightStart[i] + t] = -tap[kTaps.of_weight[i][t]];
      }
    }
  }
};

// The weights of the loops, forward or transposed.
//
// Folded: one loop, with terms (source, tap). Forward it reads z, transposed it reads grad_y.
//
// Separable, forward: a depthwise loop for each (op, in), then a pointwise loop with terms (op,
// in), whose weights include the mixture. Transposed, the pointwise loop of each op comes first,
// and the depthwise weights include the mixture.
template <typename S>
struct LoopWeights {
  using A = typename Plan<S>::A;

  Buffer<A> convolution, pointwise;
  Buffer<int64_t> offset;

  LoopWeights(const Plan<S>& plan, bool transposed)
      : convolution(plan.folded ? plan.c * plan.c * kFoldedTaps : plan.c * kAllWeightTaps),
        pointwise(plan.folded ? 0 : kConvolutions * plan.c * plan.c),
        offset(plan.folded ? plan.c * kFoldedTaps : kConvolutions * plan.c) {
    if (plan.folded)
      fold(plan, transposed);
    else
      separate(plan, transposed);
  }

 private:
  void fold(const Plan<S>& plan, bool transposed) {
    const int64_t c = plan.c, terms = c * kFoldedTaps;
    for (int64_t in = 0; in < c; ++in) {
      for (int64_t out = 0; out < c; ++out) {
        const int64_t source = transposed ? out : in, target = transposed ? in : out;
        for (int t = 0; t < kFoldedTaps; ++t)
          convolution[blocked_index(source * kFoldedTaps + t, terms, target, c)] =
              folded_weight(plan.weights, plan.mixture, out, in, t, kTaps);
      }
    }
    const int64_t* tap = transposed ? plan.transposed_tap : plan.tap;
    for (int64_t source = 0; source < c; ++source)
      for (int t = 0; t < kFoldedTaps; ++t)
        offset[source * kFoldedTaps + t] = source * plan.tiling.plane_size + tap[t];
  }

  void separate(const Plan<S>& plan, bool transposed) {
    const int64_t c = plan.c;
    for (int i = 0; i < kConvolutions; ++i) {
      for (int64_t in = 0; in < c; ++in) {
        offset[i * c + in] = (i * c + in) * plan.tiling.plane_size;
        for (int t = 0; t < kWeightTaps[i]; ++t) {
          convolution[in * kAllWeightTaps + kWeightStart[i] + t] =
              plan.weights.depthwise(i, in, t) * (transposed ? plan.mixture[i] : 1);
        }
        for (int64_t out = 0; out < c; ++out) {
          const A weight = plan.weights.pointwise(i, out, in);
          if (transposed)
            pointwise[i * c * c + blocked_index(out, c, in, c)] = weight;
          else
            pointwise[blocked_index(i * c + in, kConvolutions * c, out, c)] =
                plan.mixture[i] * weight;
        }
      }
    }
  }
};

// The four depthwise convolutions of the planes z, into 4 c planes [op, channel].
template <typename S, typename A>
void depthwise(const Plan<S>& plan, const A* weights, const A* z, A* planes, const Tile& tile) {
  for (int i = 0; i < kConvolutions; ++i)
    for (int64_t in = 0; in < plan.c; ++in)
      plan.stencil(z + in * plan.tiling.plane_size, plan.weight_tap + kWeightStart[i],
                   weights + in * kAllWeightTaps + kWeightStart[i], kWeightTaps[i],
                   planes + (i * plan.c + in) * plan.tiling.plane_size, 1, plan.begin(0),
                   plan.count(tile, 0), false);
}

}  // namespace
}  // namespace naslora
