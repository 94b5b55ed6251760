// The backward of the cell, in one pass over z and grad_y.
#pragma once

#include "pools_backward.h"

namespace naslora {
namespace {

// What a task sums over its tiles. The gradients of all parameters follow from these sums, and from
// either
//   folded:    grad_K[out, in, tap] = sum_p g_out[p] z_in[p + tap], or
//   separable: P[i, out, in] = sum_p g_out[p] (dw_i * z_in)[p] and
//              D[i, in, tap] = sum_p (pw_i^T g)_in[p] z_in[p + tap].
struct PartialLayout {
  int64_t pools;      // grad_a of avg_pool, max_pool and skip_connect
  int64_t folded;     // grad_K as [in, tap, out]
  int64_t pointwise;  // P as [op, in, out]
  int64_t depthwise;  // D as [in, weight tap]
  int64_t size;

  PartialLayout(bool is_folded, int64_t c) {
    pools = 0;
    folded = 3;
    pointwise = folded + (is_folded ? c * c * kFoldedTaps : 0);
    depthwise = pointwise + (is_folded ? 0 : kConvolutions * c * c);
    size = depthwise + (is_folded ? 0 : kAllWeightTaps * c);
  }
};

template <typename S>
struct BackwardScratch {
  using A = typename Plan<S>::A;

  A *z, *g, *grad_z;  // c planes each
  A* depthwise;       // planes [op, channel]: dw_i * z, then the gradients with respect to them
  PoolScratch<S> pool;
  bool finite = true;  // z

  BackwardScratch(ScratchArena& arena, const Plan<S>& plan)
      : z(arena.template take<A>(plan.c * plan.tiling.plane_size)),
        g(arena.template take<A>(plan.c * plan.tiling.plane_size)),
        grad_z(arena.template take<A>(plan.c * plan.tiling.plane_size)),
        depthwise(arena.template take<A>(
            plan.folded ? 0 : kConvolutions * plan.c * plan.tiling.plane_size)),
        pool(arena, plan) {}
};

template <typename S>
class Backward {
 public:
  using A = typename Plan<S>::A;

  Backward(const Cell& cell, const Map& grad_y, const CellGradients& gradients)
      : plan(cell),
        grad_y(grad_y),
        gradients(gradients),
        forward(plan, false),
        transposed(plan, true),
        partial(plan.folded, plan.c),
        need_parameters(gradients.alpha || gradients.pw),
        partials(need_parameters ? plan.tiling.tasks * partial.size : 0) {}

  void run() {
    parallel_tasks(plan.tiling.tasks, [&](int64_t first, int64_t last) {
      auto scratch = place_in_scratch<BackwardScratch<S>>(plan);
      for (int64_t task = first; task < last; ++task) run_task(task, scratch);
    });
    if (need_parameters) finish();
  }

 private:
  void run_task(int64_t task, BackwardScratch<S>& s) {
    double* sums = partials.data() + task * partial.size;
    if (need_parameters) fill<double>(sums, partial.size, 0);
    double unused[3], *pools = need_parameters ? sums + partial.pools : unused;
    const int64_t size = plan.tiling.plane_size;
    plan.for_tiles(task, task + 1, [&](const Tile& tile, bool new_geometry) {
      plan.load_tile(plan.cell.z, tile, s.z);
      plan.load_tile(grad_y, tile, s.g);
      if (new_geometry) plan.load_geometry(tile, s.pool.inverse_size);
      s.finite = all_finite<A>(s.z, plan.c * size);
      if (plan.folded)
        run_folded(tile, s, sums);
      else
        run_separable(tile, s, sums);
      if (gradients.z || gradients.alpha)
        for (int64_t i = 0; i < plan.c; ++i)
          PoolBackward<S>(plan, tile, s.pool)
              .run(s.z + i * size, s.g + i * size, gradients.z ? s.grad_z + i * size : nullptr,
                   pools);
      if (gradients.z) plan.store_tile(s.grad_z, grad_y, tile, gradients.z);
    });
  }

  void run_folded(const Tile& tile, const BackwardScratch<S>& s, double* sums) {
    const int64_t c = plan.c;
    if (gradients.z)
      plan.stencil(s.g, transposed.offset.data(), transposed.convolution.data(), c * kFoldedTaps,
                   s.grad_z, c, plan.begin(0), plan.count(tile, 0), false);
    if (need_parameters)
      for (int64_t in = 0; in < c; ++in)
        correlate(tile, s, s.g, c, s.z + in * plan.tiling.plane_size, plan.tap, kFoldedTaps,
                  sums + partial.folded + in * kFoldedTaps * c, c);
  }

  void run_separable(const Tile& tile, const BackwardScratch<S>& s, double* sums) {
    const int64_t c = plan.c, size = plan.tiling.plane_size;
    const A skip = static_cast<A>(plan.mixture[kSkip]);
    if (need_parameters) {
      depthwise(plan, forward.convolution.data(), s.z, s.depthwise, tile);
      correlate(tile, s, s.g, c, s.depthwise, forward.offset.data(), kConvolutions * c,
                sums + partial.pointwise, c);
    }
    if (!gradients.z && !gradients.pw) return;
    pointwise_transposed(tile, s);
    for (int64_t in = 0; in < c; ++in) {
      for (int i = 0; i < kConvolutions; ++i) {
        const A* grad_depthwise = s.depthwise + (i * c + in) * size;
        const int64_t weight = in * kAllWeightTaps + kWeightStart[i];
        if (gradients.z)
          plan.stencil(grad_depthwise, plan.transposed_weight_tap + kWeightStart[i],
                       transposed.convolution.data() + weight, kWeightTaps[i], s.grad_z + in * size,
                       1, plan.begin(0), plan.count(tile, 0), i > 0);
        if (gradients.pw)
          correlate(tile, s, grad_depthwise, 1, s.z + in * size, plan.weight_tap + kWeightStart[i],
                    kWeightTaps[i], sums + partial.depthwise + weight, 1);
      }
    }
    if (gradients.z)
      for (int64_t i = 0; i < c * size; ++i) s.grad_z[i] += skip * s.g[i];
  }

  // The gradients with respect to the depthwise planes: pw_i^T g. Those of the tile's pixels depend
  // on kReach rows more on each side, and are zero outside the image.
  void pointwise_transposed(const Tile& tile, const BackwardScratch<S>& s) {
    const int64_t c = plan.c, size = plan.tiling.plane_size;
    const int64_t above = smaller(kReach, tile.y);
    const int64_t below = smaller(kReach, plan.cell.height - tile.y - tile.rows);
    const int64_t begin = plan.begin(above);
    const int64_t count = (above + tile.rows + below) * plan.tiling.row_stride;
    for (int i = 0; i < kConvolutions; ++i) {
      for (int64_t in = 0; in < c; ++in) {
        A* plane = s.depthwise + (i * c + in) * size;
        fill<A>(plane, begin, 0);
        fill<A>(plane + begin + count, size - begin - count, 0);
      }
      plan.stencil(s.g, forward.offset.data(), transposed.pointwise.data() + i * c * c, c,
                   s.depthwise + i * c * size, c, begin, count, false);
    }
  }

  // result[s, o] += sum over the tile's pixels of left_o[p] * source[offset[s] + p].
  //
  // The fast loop also multiplies the zeros of `left` between rows, which adds nothing as long as z
  // is finite. Infinity or NaN would spread to taps that no pixel reaches, so such tiles are summed
  // pixel by pixel.
  void correlate(const Tile& tile, const BackwardScratch<S>& s, const A* left, int64_t targets,
                 const A* source, const int64_t* offset, int64_t terms, double* result,
                 int64_t result_stride) {
    const int64_t begin = plan.begin(0), count = plan.count(tile, 0);
    const int64_t size = plan.tiling.plane_size;
    if (!s.finite) {
      for (int64_t o = 0; o < targets; ++o)
        for (int64_t n = 0; n < terms; ++n)
          result[n * result_stride + o] += pixel_sum(tile, left + o * size, source + offset[n]);
      return;
    }
    for_target_blocks(targets, [&](int64_t o, auto block) {
      constexpr int O = decltype(block)::value;
      correlate_terms<A, O>(left + o * size + begin, size, source + begin, offset, terms,
                            result + o, result_stride, count);
    });
  }

  A pixel_sum(const Tile& tile, const A* left, const A* source) const {
    A sum = 0;
    for (int64_t y = 0; y < tile.rows; ++y) {
      const int64_t row = plan.tiling.origin + y * plan.tiling.row_stride;
      for (int64_t p = row; p < row + plan.cell.width; ++p) sum += left[p] * source[p];
    }
    return sum;
  }

  // The second stage: adds the sums of all tasks in order, then applies the chain rule.
  void finish() {
    double* total = partials.data();
    for (int64_t task = 1; task < plan.tiling.tasks; ++task)
      for (int64_t i = 0; i < partial.size; ++i) total[i] += total[task * partial.size + i];

    double grad_a[kOperations] = {};
    grad_a[kAvgPool] = total[partial.pools];
    grad_a[kMaxPool] = total[partial.pools + 1];
    grad_a[kSkip] = total[partial.pools + 2];
    for (int i = 0; i < kConvolutions; ++i) {
      for (int64_t in = 0; in < plan.c; ++in) {
        for (int64_t out = 0; out < plan.c; ++out) {
          const double product = pointwise_gradient(total, i, out, in);
          grad_a[i] += plan.weights.pointwise(i, out, in) * product;
          if (gradients.pw)
            static_cast<A*>(gradients.pw)[(i * plan.c + out) * plan.c + in] =
                static_cast<A>(plan.mixture[i] * product);
        }
        if (!gradients.pw) continue;
        for (int t = 0; t < kWeightTaps[i]; ++t)
          static_cast<A*>(gradients.dw[i])[in * kWeightTaps[i] + t] =
              static_cast<A>(plan.mixture[i] * depthwise_gradient(total, i, in, t));
      }
    }
    if (!gradients.alpha) return;
    double grad_alpha[kOperations];
    softmax_backward(plan.mixture, grad_a, grad_alpha);
    for (int k = 0; k < kOperations; ++k)
      static_cast<A*>(gradients.alpha)[k] = static_cast<A>(grad_alpha[k]);
  }

  // grad_pw_i[out, in] / a_i: P of PartialLayout, or the chain rule from grad_K.
  double pointwise_gradient(const double* total, int i, int64_t out, int64_t in) const {
    if (!plan.folded) return total[partial.pointwise + (i * plan.c + in) * plan.c + out];
    return sum_over_taps<double>(
        i, kTaps, [&](int t) { return plan.weights.depthwise(i, in, t); },
        [&](int tap) { return grad_K(total, out, in, tap); });
  }

  // grad_dw_i[in, t] / a_i: D of PartialLayout, or the chain rule from grad_K.
  double depthwise_gradient(const double* total, int i, int64_t in, int t) const {
    if (!plan.folded) return total[partial.depthwise + in * kAllWeightTaps + kWeightStart[i] + t];
    double sum = 0;
    add_over_outputs(
        plan.c, [&](int64_t out) { return plan.weights.pointwise(i, out, in); },
        [&](int64_t out) { return grad_K(total, out, in, kTaps.of_weight[i][t]); }, sum);
    return sum;
  }

  double grad_K(const double* total, int64_t out, int64_t in, int tap) const {
    return total[partial.folded + (in * kFoldedTaps + tap) * plan.c + out];
  }

  const Plan<S> plan;
  const Map& grad_y;
  const CellGradients& gradients;
  const LoopWeights<S> forward, transposed;
  const PartialLayout partial;
  const bool need_parameters;
  const Buffer<double> partials;
};

template <typename S>
void cell_backward(const Cell& cell, const Map& grad_y, const CellGradients& gradients) {
  Backward<S>(cell, grad_y, gradients).run();
}

}  // namespace
}  // namespace naslora
