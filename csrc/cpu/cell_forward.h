// The forward of the cell: y = the mixture of the eight operations of z, tile by tile.
#pragma once

#include "cell_plan.h"

namespace naslora {
namespace {

template <typename S>
struct ForwardScratch {
  using A = typename Tiles<S>::A;

  A *z, *y;                                          // c planes each
  A* depthwise;                                      // planes [op, channel], or none
  A *inverse_size, *padded, *row_sum, *row_maximum;  // one plane each

  ForwardScratch(ScratchArena& arena, const Tiles<S>& tiles, int64_t depthwise_planes) {
    const int64_t size = tiles.tiling.plane_size;
    z = arena.template take<A>(tiles.c * size);
    y = arena.template take<A>(tiles.c * size);
    depthwise = arena.template take<A>(depthwise_planes * size);
    inverse_size = arena.template take<A>(size);
    padded = arena.template take<A>(size);
    row_sum = arena.template take<A>(size);
    row_maximum = arena.template take<A>(size);
  }
};

// A plane with -inf outside the image: the padding of max_pool.
template <typename S, typename A>
void pad_with_lowest(const Tiles<S>& tiles, const A* plane, const A* inverse_size, A* padded) {
  const Vec<A> lowest = broadcast<A>(-static_cast<A>(HUGE_VAL));
  for (int64_t p = 0; p < tiles.tiling.plane_size; p += kLanes<A>)
    store<A>(padded + p, load<A>(inverse_size + p) > 0 ? load<A>(plane + p) : lowest);
}

// y += avg_weight avg_pool(z) + max_weight max_pool(z) for one channel, or one of the two terms.
// The sum and the maximum of a window are those of the sums and maxima of its rows.
template <bool kAverage, bool kMaximum, typename S, typename A>
void add_pools(const Tiles<S>& tiles, const Tile& tile, A avg_weight, A max_weight,
               const ForwardScratch<S>& scratch, int64_t channel) {
  const auto larger_of = [](Vec<A> maximum, Vec<A> value) {
    return max_pool_takes(value, maximum) ? value : maximum;
  };
  const int64_t row_stride = tiles.tiling.row_stride, lanes = kLanes<A>;
  const A* z = scratch.z + channel * tiles.tiling.plane_size;
  A* y = scratch.y + channel * tiles.tiling.plane_size;
  const A *inverse_size = scratch.inverse_size, *padded = scratch.padded;
  A *row_sum = scratch.row_sum, *row_maximum = scratch.row_maximum;

  if constexpr (kMaximum) pad_with_lowest(tiles, z, inverse_size, scratch.padded);
  int64_t begin = tiles.begin(1), end = begin + tiles.count(tile, 1);
  for (int64_t p = begin; p < end; p += lanes) {
    if constexpr (kAverage)
      store<A>(row_sum + p, load<A>(z + p - 1) + load<A>(z + p) + load<A>(z + p + 1));
    if constexpr (kMaximum) {
      const Vec<A> maximum = larger_of(load<A>(padded + p - 1), load<A>(padded + p));
      store<A>(row_maximum + p, larger_of(maximum, load<A>(padded + p + 1)));
    }
  }
  begin = tiles.begin(0), end = begin + tiles.count(tile, 0);
  for (int64_t p = begin; p < end; p += lanes) {
    Vec<A> sum = load<A>(y + p);
    if constexpr (kAverage) {
      const Vec<A> nine = load<A>(row_sum + p - row_stride) + load<A>(row_sum + p) +
                          load<A>(row_sum + p + row_stride);
      sum += avg_weight * (nine * load<A>(inverse_size + p));
    }
    if constexpr (kMaximum) {
      const Vec<A> maximum =
          larger_of(load<A>(row_maximum + p - row_stride), load<A>(row_maximum + p));
      sum += max_weight * larger_of(maximum, load<A>(row_maximum + p + row_stride));
    }
    store<A>(y + p, sum);
  }
}

// The forward of a cell of any kind: convolve(tile, scratch) computes scratch.y from scratch.z,
// then the poolings are added. With kSkipsZeros a pooling of weight zero is not computed; without,
// it is, and brings the NaN of 0 * inf to y, as in PyTorch.
template <bool kSkipsZeros, typename S, typename A, typename Convolve>
void forward_tiles(const Tiles<S>& tiles, const Map& z, A avg_weight, A max_weight,
                   int64_t depthwise_planes, void* out, const Convolve& convolve) {
  parallel_tasks(tiles.tiling.tasks, [&](int64_t first_task, int64_t last_task) {
    const auto scratch = place_in_scratch<ForwardScratch<S>>(tiles, depthwise_planes);
    tiles.for_tiles(first_task, last_task, [&](const Tile& tile, bool new_geometry) {
      tiles.load_tile(z, tile, scratch.z);
      if (new_geometry) tiles.load_geometry(tile, scratch.inverse_size);
      convolve(tile, scratch);
      const auto pool = [&](auto average, auto maximum) {
        for (int64_t i = 0; i < tiles.c; ++i)
          add_pools<decltype(average)::value, decltype(maximum)::value>(tiles, tile, avg_weight,
                                                                        max_weight, scratch, i);
      };
      if constexpr (kSkipsZeros) {
        if (avg_weight != 0 && max_weight != 0) pool(std::true_type{}, std::true_type{});
        if (avg_weight != 0 && max_weight == 0) pool(std::true_type{}, std::false_type{});
        if (avg_weight == 0 && max_weight != 0) pool(std::false_type{}, std::true_type{});
      } else {
        pool(std::true_type{}, std::true_type{});
      }
      tiles.store_tile(scratch.y, z, tile, out);
    });
  });
}

template <typename S>
void cell_forward(const Cell& cell, void* out) {
  using A = typename Plan<S>::A;
  const Plan<S> plan(cell);
  const LoopWeights<S> weights(plan, false);
  const int64_t c = plan.c, size = plan.tiling.plane_size;
  const A skip = static_cast<A>(plan.mixture[kSkip]);

  const auto convolve = [&](const Tile& tile, const ForwardScratch<S>& s) {
    const int64_t begin = plan.begin(0), count = plan.count(tile, 0);
    if (plan.folded) {
      plan.stencil(s.z, weights.offset.data(), weights.convolution.data(), c * kFoldedTaps, s.y, c,
                   begin, count, false);
    } else {
      depthwise(plan, weights.convolution.data(), s.z, s.depthwise, tile);
      plan.stencil(s.depthwise, weights.offset.data(), weights.pointwise.data(), kConvolutions * c,
                   s.y, c, begin, count, false);
      for (int64_t i = 0; i < c * size; ++i) s.y[i] += skip * s.z[i];
    }
  };
  forward_tiles<false, S, A>(plan, cell.z, static_cast<A>(plan.mixture[kAvgPool]),
                             static_cast<A>(plan.mixture[kMaxPool]),
                             plan.folded ? 0 : kConvolutions * c, out, convolve);
}

}  // namespace
}  // namespace naslora
