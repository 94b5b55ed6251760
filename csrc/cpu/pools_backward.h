// The backward of the poolings for one channel of a tile.
//
// The maximum of a window is the maximum of its rows' maxima, and its gradient goes back the same
// two steps. So the argmax of a window (drawing in cell_math.h) is kept in two parts, each -1, 0 or
// 1: `row_argmax` is the column of a row's maximum, relative to the position; `column_argmax` is
// the row whose maximum is the largest.
#pragma once

#include "cell_forward.h"

namespace naslora {
namespace {

template <typename S>
struct PoolScratch {
  using A = typename Tiles<S>::A;

  A *inverse_size, *padded;  // as in the forward
  A* averaged_g;             // g / (size of the window)
  A* row_g;                  // sums of three neighbours in a row of averaged_g
  A* row_maximum;
  A* routed_g;  // sum of g over the windows whose maximum is in this row
  Integer<A>*row_argmax, *column_argmax;

  PoolScratch(ScratchArena& arena, const Tiles<S>& tiles) {
    const int64_t size = tiles.tiling.plane_size;
    inverse_size = arena.template take<A>(size);
    padded = arena.template take<A>(size);
    averaged_g = arena.template take<A>(size);
    row_g = arena.template take<A>(size);
    row_maximum = arena.template take<A>(size);
    routed_g = arena.template take<A>(size);
    row_argmax = arena.template take<Integer<A>>(size);
    column_argmax = arena.template take<Integer<A>>(size);
  }
};

template <typename S>
class PoolBackward {
 public:
  using A = typename Plan<S>::A;

  PoolBackward(const Plan<S>& plan, const Tile& tile, const PoolScratch<S>& scratch)
      : plan(plan), tile(tile), s(scratch), row_stride(plan.tiling.row_stride) {}

  // grad_z += what the poolings send back, unless grad_z is null. sums += grad_a of avg_pool,
  // max_pool and skip_connect: as the poolings are linear in z for a fixed argmax, each is
  // <z, what the operation sends back for g>.
  void run(const A* z, const A* g, A* grad_z, double* sums) const {
    pad(z, g);
    pool_rows();
    pool_columns(g);
    send_back(z, g, grad_z, sums);
  }

 private:
  void pad(const A* z, const A* g) const {
    pad_with_lowest(plan, z, s.inverse_size, s.padded);
    for (int64_t p = 0; p < plan.tiling.plane_size; p += kLanes<A>)
      store<A>(s.averaged_g + p, load<A>(g + p) * load<A>(s.inverse_size + p));
  }

  // The maximum of values[p - step], values[p], values[p + step], and which of them it is. If none
  // is larger than -inf, the first that is in the image.
  IndexVec<A> argmax_of_three(const A* values, int64_t p, int64_t step, Vec<A>& maximum) const {
    maximum = load<A>(values + p - step);
    IndexVec<A> argmax = load<A>(s.inverse_size + p - step) > 0 ? IndexVec<A>{} - 1 : IndexVec<A>{};
    for (int i = 0; i <= 1; ++i) {
      const Vec<A> value = load<A>(values + p + i * step);
      const auto takes = max_pool_takes(value, maximum);
      maximum = takes ? value : maximum;
      argmax = takes ? IndexVec<A>{} + i : argmax;
    }
    return argmax;
  }

  void pool_rows() const {
    const int64_t begin = plan.begin(2), end = begin + plan.count(tile, 2);
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      const A* g = s.averaged_g + p;
      store<A>(s.row_g + p, load<A>(g - 1) + load<A>(g) + load<A>(g + 1));
      Vec<A> maximum;
      const IndexVec<A> argmax = argmax_of_three(s.padded, p, 1, maximum);
      store<A>(s.row_maximum + p, maximum);
      store_index<A>(s.row_argmax + p, argmax);
    }
  }

  void pool_columns(const A* g) const {
    int64_t begin = plan.begin(1) - 1, end = begin + plan.count(tile, 1) + 2;
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      Vec<A> maximum;
      store_index<A>(s.column_argmax + p, argmax_of_three(s.row_maximum, p, row_stride, maximum));
    }
    begin = plan.begin(0) - 1, end = begin + plan.count(tile, 0) + 2;
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      Vec<A> sum = {};
      for (int dy = -1; dy <= 1; ++dy) {
        const int64_t at = p - dy * row_stride;
        sum += load_index<A>(s.column_argmax + at) == dy ? load<A>(g + at) : Vec<A>{};
      }
      store<A>(s.routed_g + p, sum);
    }
  }

  void send_back(const A* z, const A* g, A* grad_z, double* sums) const {
    const int64_t begin = plan.begin(0), count = plan.count(tile, 0);
    const A avg_weight = static_cast<A>(plan.mixture[kAvgPool]);
    const A max_weight = static_cast<A>(plan.mixture[kMaxPool]);
    Vec<A> sum[3] = {};
    for (int64_t p = begin, vectors = 1; p < begin + count; p += kLanes<A>, ++vectors) {
      const Vec<A> average = load<A>(s.row_g + p - row_stride) + load<A>(s.row_g + p) +
                             load<A>(s.row_g + p + row_stride);
      Vec<A> maximum = {};
      for (int dx = -1; dx <= 1; ++dx) {
        const int64_t at = p - dx;
        maximum += load_index<A>(s.row_argmax + at) == dx ? load<A>(s.routed_g + at) : Vec<A>{};
      }
      if (grad_z)
        store<A>(grad_z + p, load<A>(grad_z + p) + avg_weight * average + max_weight * maximum);
      const int64_t left = begin + count - p;
      const Vec<A> pixels = load<A>(z + p);
      sum[0] += first_lanes<A>(pixels * average, left);
      sum[1] += first_lanes<A>(pixels * maximum, left);
      sum[2] += first_lanes<A>(pixels * load<A>(g + p), left);
      if (vectors % kLongSum != 0 && left > kLanes<A>) continue;
      for (int i = 0; i < 3; ++i) {
        sums[i] += horizontal_sum<A>(sum[i]);
        sum[i] = Vec<A>{};
      }
    }
  }

  const Plan<S>& plan;
  const Tile& tile;
  const PoolScratch<S>& s;
  const int64_t row_stride;
};

}  // namespace
}  // namespace naslora
