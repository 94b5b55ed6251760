// The mixed cell, forward and backward, in one pass each over channels-last maps.
//
// A task takes one tile, a band of rows of one image, and gathers the cell's channels into planes
// that stay in the cache: rows of `width` pixels, four zeros between them (the reach of the
// furthest tap) and four rows above and below. On such a plane a tap is a constant offset, so all
// of the cell's arithmetic is two loops over a flat range of positions: `stencil`, a weighted sum
// of shifted planes, and `correlate`, dot products of planes with shifted planes. The padding
// between rows costs a few wasted lanes and buys full vectors on maps as small as 14x14.
//
// Few channels use the folded convolution K (41 taps, c x c); its gradient alone gives those of
// alpha, the depthwise and the pointwise kernels. Many use the separable form, which costs less
// arithmetic from four channels on.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vector.h"

namespace {

using naslora::Cell;
using naslora::CellGradients;
using naslora::CellParameters;
using naslora::Grid;
using naslora::kAllWeightTaps;
using naslora::kAvgPool;
using naslora::kCentreTap;
using naslora::kConvolutions;
using naslora::kFoldedTaps;
using naslora::kMaxPool;
using naslora::kOperations;
using naslora::kReach;
using naslora::kSkip;
using naslora::kTaps;
using naslora::kWeightStart;
using naslora::kWeightTaps;
using naslora::Map;

constexpr int64_t kMostFoldedChannels = 3;
constexpr int64_t kTilePositions = 1024;  // planes of about 4 KiB, a few dozen of which fit L2
constexpr int64_t kMostTasks = 64;        // bounds the memory of partial gradients
constexpr int kMostOutputs = 4;
constexpr int64_t kShortSum = 12;  // terms
constexpr int64_t kLongSum = 64;   // vectors
constexpr int kMostVectors = 8;    // that one step of a loop takes

// ---- The two loops -------------------------------------------------------------------------

// out_o[p] (+)= sum_s weight[s, o] * source[offset[s] + p]   for p in [0, count)
// count is rounded up to whole blocks of vectors: planes end in that much slack. The sum is one of
// short sums, whose rounding errors stay as small as those of one convolution after another.
template <typename A, int O>
void stencil_block(const A* source, const int64_t* offset, const A* weight, int64_t sources, A* out,
                   int64_t out_stride, int64_t count, bool accumulate) {
  constexpr int U = O == 1 ? kMostVectors : O == 2 ? 4 : O == 3 ? 3 : 2;  // share a weight
  for (int64_t p = 0; p < count; p += U * kLanes<A>) {
    Vec<A> sum[O][U] = {};
    if (accumulate)
      for (int o = 0; o < O; ++o)
        for (int u = 0; u < U; ++u) sum[o][u] = load<A>(out + o * out_stride + p + u * kLanes<A>);
    for (int64_t first = 0; first < sources; first += kShortSum) {
      const int64_t last = smaller(sources, first + kShortSum);
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

// result[s, o] += sum_p left_o[p] * source[offset[s] + p]   for p in [0, count), N sources s.
// Long sums, too, are ones of shorter sums.
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

// The same for any number of sources, in blocks as equal as they come of at most N.
template <typename A, int O, int N = 12 / O>  // 12 sums: as many as 16 registers have room for
void correlate_sources(const A* left, int64_t left_stride, const A* source, const int64_t* offset,
                       int64_t sources, double* result, int64_t result_stride, int64_t count) {
  const int64_t blocks = ceil_div(sources, N);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * sources / blocks, size = (b + 1) * sources / blocks - begin;
    if (size == N) {
      correlate_block<A, O, N>(left, left_stride, source, offset + begin,
                               result + begin * result_stride, result_stride, count);
    } else if constexpr (N > 1) {
      correlate_sources<A, O, N - 1>(left, left_stride, source, offset + begin, size,
                                     result + begin * result_stride, result_stride, count);
    }
  }
}

// Whether a plane holds no infinity and no NaN.
template <typename A>
bool all_finite(const A* plane, int64_t count) {
  Vec<A> sum = {};
  for (int64_t p = 0; p < count; p += kLanes<A>) sum += load<A>(plane + p) - load<A>(plane + p);
  return horizontal_sum<A>(sum) == 0;
}

// Calls body(o, O) for output channels in blocks of at most kMostOutputs.
template <typename Body>
void for_output_blocks(int64_t outputs, const Body& body) {
  for (int64_t o = 0; o < outputs; o += kMostOutputs) {
    switch (smaller(kMostOutputs, outputs - o)) {
      case 1: body(o, std::integral_constant<int, 1>{}); break;
      case 2: body(o, std::integral_constant<int, 2>{}); break;
      case 3: body(o, std::integral_constant<int, 3>{}); break;
      default: body(o, std::integral_constant<int, 4>{}); break;
    }
  }
}

// ---- Tiles ---------------------------------------------------------------------------------

// How a map is cut into tiles and how a tile's planes are laid out.
struct Layout {
  int64_t band_rows, bands, tiles, tasks;
  int64_t pitch;   // positions from one row to the next
  int64_t origin;  // position of the band's first pixel
  int64_t used;    // positions up to the last that any tap of the band's pixels reads
  int64_t plane;   // positions of a plane

  template <typename A>
  static Layout of(const Grid& grid) {
    Layout t;
    t.pitch = grid.width + kReach;
    t.bands = ceil_div(grid.height, smaller(grid.height, larger(8, kTilePositions / t.pitch)));
    t.band_rows = ceil_div(grid.height, t.bands);
    t.bands = ceil_div(grid.height, t.band_rows);
    t.tiles = grid.batch * t.bands;
    t.tasks = larger(1, smaller(t.tiles, kMostTasks));   // an empty batch still sums to zero
    t.origin = round_up(kReach * t.pitch + kReach, 16);  // so that most loads are aligned
    t.used = t.origin + (t.band_rows + kReach) * t.pitch;
    t.plane = round_up(t.used + kMostVectors * kLanes<A>, 16);  // loops round up to blocks
    return t;
  }
};

struct Tile {
  int64_t image, first_row, rows;
};

Tile tile_at(const Layout& layout, const Grid& grid, int64_t index) {
  const int64_t first = index % layout.bands * layout.band_rows;
  return {index / layout.bands, first, smaller(layout.band_rows, grid.height - first)};
}

template <typename T>
void fill(T* data, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

// Maps cut into tiles, and what is done with a tile's planes.
template <typename S>
struct Tiles {
  using A = typename naslora::Accumulator<S>::type;

  const Grid& grid;
  const Layout layout;
  const int64_t c;
  Buffer<int64_t> channel, unmixed;  // S, and the other channels

  explicit Tiles(const Grid& grid)
      : grid(grid),
        layout(Layout::of<A>(grid)),
        c(grid.c),
        channel(grid.c),
        unmixed(grid.rank - grid.c) {
    int64_t others = 0;
    for (int64_t i = 0; i < c; ++i) channel[i] = grid.channels ? grid.channels[i] : i;
    for (int64_t k = 0; k < grid.rank; ++k) {
      bool mixed = false;
      for (int64_t i = 0; i < c; ++i) mixed |= channel[i] == k;
      if (!mixed) unmixed[others++] = k;
    }
  }

  // Positions of `halo` rows more than the tile on either side, from the first to the last pixel.
  int64_t start(int64_t halo) const { return layout.origin - halo * layout.pitch; }
  int64_t count(const Tile& tile, int64_t halo) const {
    return (tile.rows + 2 * halo - 1) * layout.pitch + grid.width;
  }

  // Brings S of a map into zero-padded planes, with the four rows above and below the tile.
  void gather(const Map& map, const Tile& tile, A* planes) const {
    fill<A>(planes, c * layout.plane, 0);
    const int64_t begin = larger(0, tile.first_row - kReach);
    const int64_t end = smaller(grid.height, tile.first_row + tile.rows + kReach);
    const S* image = static_cast<const S*>(map.data) + tile.image * map.stride[0];
    for (int64_t y = begin; y < end; ++y) {
      A* to = planes + layout.origin + (y - tile.first_row) * layout.pitch;
      for (int64_t i = 0; i < c; ++i) {
        const S* from = image + y * map.stride[1] + channel[i] * map.stride[3];
        for (int64_t x = 0; x < grid.width; ++x)
          to[i * layout.plane + x] = widen(from[x * map.stride[2]]);
      }
    }
  }

  // Writes a contiguous (B, H, W, r) map: planes into S, and `map` into the other channels.
  void scatter(const A* planes, const Map& map, const Tile& tile, void* out) const {
    const int64_t r = grid.rank;
    for (int64_t y = 0; y < tile.rows; ++y) {
      const int64_t row = tile.first_row + y;
      S* to = static_cast<S*>(out) + (tile.image * grid.height + row) * grid.width * r;
      const A* from = planes + layout.origin + y * layout.pitch;
      for (int64_t i = 0; i < c; ++i)
        for (int64_t x = 0; x < grid.width; ++x)
          to[x * r + channel[i]] = naslora::Narrow<S>::from(from[i * layout.plane + x]);
      const S* same =
          static_cast<const S*>(map.data) + tile.image * map.stride[0] + row * map.stride[1];
      for (int64_t i = 0; i < r - c; ++i) {
        const int64_t k = unmixed[i];
        for (int64_t x = 0; x < grid.width; ++x)
          to[x * r + k] = same[x * map.stride[2] + k * map.stride[3]];
      }
    }
  }

  // 1 / (valid pixels of the 3x3 window) on the map's pixels around the tile, 0 beside the map.
  void pool_geometry(const Tile& tile, A* reciprocal) const {
    fill<A>(reciprocal, layout.plane, 0);
    const int64_t begin = larger(0, tile.first_row - kReach);
    const int64_t end = smaller(grid.height, tile.first_row + tile.rows + kReach);
    for (int64_t y = begin; y < end; ++y) {
      A* row = reciprocal + layout.origin + (y - tile.first_row) * layout.pitch;
      for (int64_t x = 0; x < grid.width; ++x)
        row[x] = naslora::pool_share<A>(y, x, grid.height, grid.width);
    }
  }

  // A plane with -inf beside the map, as max_pool pads it. `reciprocal` knows where the map is.
  void pad_with_lowest(const A* plane, const A* reciprocal, A* padded) const {
    const Vec<A> lowest = broadcast<A>(-static_cast<A>(HUGE_VAL));
    for (int64_t p = 0; p < layout.plane; p += kLanes<A>)
      store<A>(padded + p, load<A>(reciprocal + p) > 0 ? load<A>(plane + p) : lowest);
  }

  void stencil(const A* source, const int64_t* offset, const A* weight, int64_t sources, A* out,
               int64_t outputs, int64_t begin, int64_t count, bool accumulate) const {
    for_output_blocks(outputs, [&](int64_t o, auto size) {
      stencil_block<A, decltype(size)::value>(source + begin, offset, weight + o * sources, sources,
                                              out + o * layout.plane + begin, layout.plane, count,
                                              accumulate);
    });
  }
};

// The cell as one call uses it: what is constant over its tiles.
template <typename S>
struct Plan : Tiles<S> {
  using typename Tiles<S>::A;
  using Tiles<S>::layout;

  const Cell& cell;
  const CellParameters<A> parameters;
  const bool folded;
  double mixture[kOperations];  // a; products with it are rounded once
  int64_t tap[kFoldedTaps], transposed_tap[kFoldedTaps];
  int64_t weight_tap[kAllWeightTaps], transposed_weight_tap[kAllWeightTaps];

  explicit Plan(const Cell& cell)
      : Tiles<S>(cell),
        cell(cell),
        parameters{cell.c,
                   {static_cast<const A*>(cell.dw[0]), static_cast<const A*>(cell.dw[1]),
                    static_cast<const A*>(cell.dw[2]), static_cast<const A*>(cell.dw[3])},
                   static_cast<const A*>(cell.pw)},
        folded(cell.c <= kMostFoldedChannels) {
    for (int i = 0; i < kOperations; ++i) mixture[i] = static_cast<const A*>(cell.alpha)[i];
    naslora::softmax(mixture, mixture, [](double x) { return ::exp(x); });
    for (int t = 0; t < kFoldedTaps; ++t) {
      tap[t] = kTaps.dy[t] * layout.pitch + kTaps.dx[t];
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

// ---- Weights as the loops take them --------------------------------------------------------

// `stencil` takes its weights in blocks of outputs, [block][source][output of the block].
inline int64_t blocked(int64_t source, int64_t sources, int64_t output, int64_t outputs) {
  const int64_t first = output / kMostOutputs * kMostOutputs;
  const int64_t size = smaller(kMostOutputs, outputs - first);
  return first * sources + source * size + output - first;
}

template <typename S>
struct Weights {
  using A = typename Plan<S>::A;
  // Folded: sources are (channel, tap). Separable: one depthwise pass per operation and channel,
  // then a pointwise pass whose sources are (operation, channel).
  Buffer<A> convolution, pointwise;
  Buffer<int64_t> offset;

  // Forward: weights of z. Transposed: weights of grad_y (folded), or of the pointwise pass that
  // comes first in the backward (separable; alpha then multiplies the depthwise weights).
  Weights(const Plan<S>& plan, bool transposed)
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
    const int64_t c = plan.c, sources = c * kFoldedTaps;
    for (int64_t in = 0; in < c; ++in) {
      for (int64_t out = 0; out < c; ++out) {
        const int64_t from = transposed ? out : in, to = transposed ? in : out;
        for (int t = 0; t < kFoldedTaps; ++t)
          convolution[blocked(from * kFoldedTaps + t, sources, to, c)] =
              naslora::folded_weight(plan.parameters, plan.mixture, out, in, t, kTaps);
      }
      const int64_t* tap = transposed ? plan.transposed_tap : plan.tap;
      for (int t = 0; t < kFoldedTaps; ++t)
        offset[in * kFoldedTaps + t] = in * plan.layout.plane + tap[t];
    }
  }

  void separate(const Plan<S>& plan, bool transposed) {
    const int64_t c = plan.c;
    for (int i = 0; i < kConvolutions; ++i) {
      for (int64_t in = 0; in < c; ++in) {
        offset[i * c + in] = (i * c + in) * plan.layout.plane;
        for (int t = 0; t < kWeightTaps[i]; ++t) {
          convolution[in * kAllWeightTaps + kWeightStart[i] + t] =
              plan.parameters.depthwise(i, in, t) * (transposed ? plan.mixture[i] : 1);
        }
        for (int64_t out = 0; out < c; ++out) {
          const A weight = plan.parameters.pointwise(i, out, in);
          if (transposed)
            pointwise[i * c * c + blocked(out, c, in, c)] = weight;
          else
            pointwise[blocked(i * c + in, kConvolutions * c, out, c)] = plan.mixture[i] * weight;
        }
      }
    }
  }
};

// The four depthwise convolutions of the planes z into 4 c planes, [operation, channel].
template <typename S, typename A>
void depthwise(const Plan<S>& plan, const A* weights, const A* z, A* maps, const Tile& tile) {
  for (int i = 0; i < kConvolutions; ++i)
    for (int64_t in = 0; in < plan.c; ++in)
      plan.stencil(z + in * plan.layout.plane, plan.weight_tap + kWeightStart[i],
                   weights + in * kAllWeightTaps + kWeightStart[i], kWeightTaps[i],
                   maps + (i * plan.c + in) * plan.layout.plane, 1, plan.start(0),
                   plan.count(tile, 0), false);
}

// ---- Forward -------------------------------------------------------------------------------

// y += average * avg_pool(z) + largest * max_pool(z) for one channel's planes, or one of the two. A
// window's sum and maximum are those of its rows' sums and maxima.
template <bool Average, bool Maximum, typename S, typename A>
void add_pools(const Tiles<S>& tiles, const Tile& tile, A average, A largest, const A* z,
               const A* reciprocal, A* padded, A* row_sum, A* row_maximum, A* y) {
  const auto larger_of = [](Vec<A> maximum, Vec<A> value) {
    return naslora::max_pool_takes(value, maximum) ? value : maximum;
  };
  const int64_t pitch = tiles.layout.pitch, lanes = kLanes<A>;

  if constexpr (Maximum) tiles.pad_with_lowest(z, reciprocal, padded);
  int64_t begin = tiles.start(1), end = begin + tiles.count(tile, 1);
  for (int64_t p = begin; p < end; p += lanes) {
    if constexpr (Average)
      store<A>(row_sum + p, load<A>(z + p - 1) + load<A>(z + p) + load<A>(z + p + 1));
    if constexpr (Maximum) {
      const Vec<A> maximum = larger_of(load<A>(padded + p - 1), load<A>(padded + p));
      store<A>(row_maximum + p, larger_of(maximum, load<A>(padded + p + 1)));
    }
  }
  begin = tiles.start(0), end = begin + tiles.count(tile, 0);
  for (int64_t p = begin; p < end; p += lanes) {
    Vec<A> sum = load<A>(y + p);
    if constexpr (Average) {
      const Vec<A> nine =
          load<A>(row_sum + p - pitch) + load<A>(row_sum + p) + load<A>(row_sum + p + pitch);
      sum += average * (nine * load<A>(reciprocal + p));
    }
    if constexpr (Maximum) {
      const Vec<A> maximum = larger_of(load<A>(row_maximum + p - pitch), load<A>(row_maximum + p));
      sum += largest * larger_of(maximum, load<A>(row_maximum + p + pitch));
    }
    store<A>(y + p, sum);
  }
}

template <typename S>
void cell_forward(const Cell& cell, void* out) {
  const Plan<S> plan(cell);
  using A = typename Plan<S>::A;
  const Weights<S> weights(plan, false);
  const Layout& layout = plan.layout;
  const int64_t c = plan.c;
  const A skip = static_cast<A>(plan.mixture[kSkip]);
  const A average = static_cast<A>(plan.mixture[kAvgPool]);
  const A largest = static_cast<A>(plan.mixture[kMaxPool]);

  parallel_tasks(layout.tasks, [&](int64_t first_task, int64_t last_task) {
    const int64_t convolved = plan.folded ? 0 : kConvolutions * c;
    A *z, *y, *maps, *reciprocal, *padded, *row_sum, *row_maximum;
    const auto carve = [&](Arena arena) {
      z = arena.template take<A>(c * layout.plane);
      y = arena.template take<A>(c * layout.plane);
      maps = arena.template take<A>(convolved * layout.plane);
      reciprocal = arena.template take<A>(layout.plane);
      padded = arena.template take<A>(layout.plane);
      row_sum = arena.template take<A>(layout.plane);
      row_maximum = arena.template take<A>(layout.plane);
      return arena.size();
    };
    carve(Arena(naslora::thread_scratch(carve(Arena(nullptr)))));

    const int64_t first = first_task * layout.tiles / layout.tasks;
    const int64_t last = last_task * layout.tiles / layout.tasks;
    for (int64_t index = first; index < last; ++index) {
      const Tile tile = tile_at(layout, cell, index);
      const int64_t begin = plan.start(0), count = plan.count(tile, 0);
      plan.gather(cell.z, tile, z);
      if (index == first || layout.bands > 1) plan.pool_geometry(tile, reciprocal);
      if (plan.folded) {
        plan.stencil(z, weights.offset.data(), weights.convolution.data(), c * kFoldedTaps, y, c,
                     begin, count, false);
      } else {
        depthwise(plan, weights.convolution.data(), z, maps, tile);
        plan.stencil(maps, weights.offset.data(), weights.pointwise.data(), kConvolutions * c, y, c,
                     begin, count, false);
        for (int64_t i = 0; i < c * layout.plane; ++i) y[i] += skip * z[i];
      }
      for (int64_t i = 0; i < c; ++i)
        add_pools<true, true>(plan, tile, average, largest, z + i * layout.plane, reciprocal, padded,
                              row_sum, row_maximum, y + i * layout.plane);
      plan.scatter(y, cell.z, tile, out);
    }
  });
}

// ---- Backward ------------------------------------------------------------------------------

// What a task sums over its tiles. Everything but the poolings and the skip follows from either
//   folded:    dK[out, in, tap] = sum_p g_out[p] z_in[p + tap], or
//   separable: P[i, out, in] = sum_p g_out[p] (dw_i * z_in)[p] and
//              D[i, in, tap] = sum_p (pw_i^T g)_in[p] z_in[p + tap].
struct PartialLayout {
  int64_t pools;      // da_avg, da_max, da_skip
  int64_t folded;     // dK as [in, tap, out]
  int64_t pointwise;  // P as [operation, in, out]
  int64_t depthwise;  // D as [in, (operation, tap)]
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
        want_parameters(gradients.alpha || gradients.pw),
        partials(want_parameters ? plan.layout.tasks * partial.size : 0) {}

  void run() {
    parallel_tasks(layout().tasks, [&](int64_t first, int64_t last) {
      Planes planes;
      planes.carve(*this, Arena(naslora::thread_scratch(planes.carve(*this, Arena(nullptr)))));
      for (int64_t task = first; task < last; ++task) run_task(task, planes);
    });
    if (want_parameters) finish();
  }

 private:
  struct Planes {
    A *z, *g, *dz;  // c planes each
    A* maps;        // 4 c planes: the depthwise maps, then the pointwise gradients
    A *reciprocal, *padded, *shared_g, *row_g, *row_maximum, *routed_g;
    Integer<A>*row_winner, *column_winner;  // -1, 0 or 1: before, at or after the pixel
    bool finite;                            // z

    size_t carve(const Backward& b, Arena arena) {
      const int64_t c = b.plan.c, plane = b.layout().plane;
      z = arena.template take<A>(c * plane);
      g = arena.template take<A>(c * plane);
      dz = arena.template take<A>(c * plane);
      maps = arena.template take<A>(b.plan.folded ? 0 : kConvolutions * c * plane);
      reciprocal = arena.template take<A>(plane);
      padded = arena.template take<A>(plane);
      shared_g = arena.template take<A>(plane);
      row_g = arena.template take<A>(plane);
      row_maximum = arena.template take<A>(plane);
      routed_g = arena.template take<A>(plane);
      row_winner = arena.template take<Integer<A>>(plane);
      column_winner = arena.template take<Integer<A>>(plane);
      return arena.size();
    }
  };

  const Layout& layout() const { return plan.layout; }

  void run_task(int64_t task, Planes& s) {
    double* sums = partials.data() + task * partial.size;
    if (want_parameters) fill<double>(sums, partial.size, 0);
    double unused[3], *pools = want_parameters ? sums + partial.pools : unused;
    const int64_t first = task * layout().tiles / layout().tasks;
    const int64_t last = (task + 1) * layout().tiles / layout().tasks;
    for (int64_t index = first; index < last; ++index) {
      const Tile tile = tile_at(layout(), plan.cell, index);
      plan.gather(plan.cell.z, tile, s.z);
      plan.gather(grad_y, tile, s.g);
      if (index == first || layout().bands > 1) plan.pool_geometry(tile, s.reciprocal);
      s.finite = all_finite<A>(s.z, plan.c * layout().plane);
      if (plan.folded)
        run_folded(tile, s, sums);
      else
        run_separable(tile, s, sums);
      if (gradients.z || gradients.alpha)
        for (int64_t i = 0; i < plan.c; ++i) run_pools(tile, i, s, pools);
      if (gradients.z) plan.scatter(s.dz, grad_y, tile, gradients.z);
    }
  }

  void run_folded(const Tile& tile, const Planes& s, double* sums) {
    const int64_t c = plan.c;
    if (gradients.z)
      plan.stencil(s.g, transposed.offset.data(), transposed.convolution.data(), c * kFoldedTaps,
                   s.dz, c, plan.start(0), plan.count(tile, 0), false);
    if (want_parameters)
      for (int64_t in = 0; in < c; ++in)
        correlate(tile, s, s.g, c, s.z + in * layout().plane, plan.tap, kFoldedTaps,
                  sums + partial.folded + in * kFoldedTaps * c, c);
  }

  void run_separable(const Tile& tile, const Planes& s, double* sums) {
    const int64_t c = plan.c, plane = layout().plane;
    const A skip = static_cast<A>(plan.mixture[kSkip]);
    if (want_parameters) {
      depthwise(plan, forward.convolution.data(), s.z, s.maps, tile);
      correlate(tile, s, s.g, c, s.maps, forward.offset.data(), kConvolutions * c,
                sums + partial.pointwise, c);
    }
    if (!gradients.z && !gradients.pw) return;
    // The gradients of the depthwise maps: those of the tile's pixels reach four rows further, and
    // are zero beside the map.
    const int64_t above = smaller(kReach, tile.first_row);
    const int64_t below = smaller(kReach, plan.cell.height - tile.first_row - tile.rows);
    const int64_t begin = plan.start(above);
    const int64_t count = (above + tile.rows + below) * layout().pitch;
    for (int i = 0; i < kConvolutions; ++i) {
      for (int64_t in = 0; in < c; ++in) {
        A* map = s.maps + (i * c + in) * plane;
        fill<A>(map, begin, 0);
        fill<A>(map + begin + count, plane - begin - count, 0);
      }
      plan.stencil(s.g, forward.offset.data(), transposed.pointwise.data() + i * c * c, c,
                   s.maps + i * c * plane, c, begin, count, false);
    }
    for (int64_t in = 0; in < c; ++in) {
      for (int i = 0; i < kConvolutions; ++i) {
        const A* map = s.maps + (i * c + in) * plane;
        const int64_t weight = in * kAllWeightTaps + kWeightStart[i];
        if (gradients.z)
          plan.stencil(map, plan.transposed_weight_tap + kWeightStart[i],
                       transposed.convolution.data() + weight, kWeightTaps[i], s.dz + in * plane, 1,
                       plan.start(0), plan.count(tile, 0), i > 0);
        if (gradients.pw)
          correlate(tile, s, map, 1, s.z + in * plane, plan.weight_tap + kWeightStart[i],
                    kWeightTaps[i], sums + partial.depthwise + weight, 1);
      }
    }
    if (gradients.z)
      for (int64_t i = 0; i < c * plane; ++i) s.dz[i] += skip * s.g[i];
  }

  // The poolings of one channel: dz += their adjoints; sums += da_avg, da_max, da_skip.
  //
  // The maximum of a window is the maximum of its rows' maxima, and its gradient goes back the
  // same two steps. As the poolings pass on pixels or their means, da is <z, adjoint of g>.
  void run_pools(const Tile& tile, int64_t channel, const Planes& s, double* sums) {
    const A* z = s.z + channel * layout().plane;
    const A* g = s.g + channel * layout().plane;
    pad_planes(z, g, s);
    pool_rows(tile, s);
    pool_columns(tile, g, s);
    pool_adjoints(tile, z, g, s, s.dz + channel * layout().plane, sums);
  }

  void pad_planes(const A* z, const A* g, const Planes& s) {
    plan.pad_with_lowest(z, s.reciprocal, s.padded);
    for (int64_t p = 0; p < layout().plane; p += kLanes<A>)  // g / (pixels that were averaged)
      store<A>(s.shared_g + p, load<A>(g + p) * load<A>(s.reciprocal + p));
  }

  // Sums of three neighbours in a row of shared_g, maxima of z and which of the three they are.
  void pool_rows(const Tile& tile, const Planes& s) {
    const int64_t begin = plan.start(2), end = begin + plan.count(tile, 2);
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      const A* g = s.shared_g + p;
      store<A>(s.row_g + p, load<A>(g - 1) + load<A>(g) + load<A>(g + 1));
      Vec<A> maximum = load<A>(s.padded + p - 1);
      // If nothing is larger than -inf, the first pixel on the map wins.
      IndexVec<A> winner = load<A>(s.reciprocal + p - 1) > 0 ? IndexVec<A>{} - 1 : IndexVec<A>{};
      for (int dx = 0; dx <= 1; ++dx) {
        const Vec<A> value = load<A>(s.padded + p + dx);
        const auto takes = naslora::max_pool_takes(value, maximum);
        maximum = takes ? value : maximum;
        winner = takes ? IndexVec<A>{} + dx : winner;
      }
      store<A>(s.row_maximum + p, maximum);
      store_index<A>(s.row_winner + p, winner);
    }
  }

  // Which row of its window each pixel's maximum is in, then g brought to those rows' maxima.
  void pool_columns(const Tile& tile, const A* g, const Planes& s) {
    const int64_t pitch = layout().pitch;
    int64_t begin = plan.start(1) - 1, end = begin + plan.count(tile, 1) + 2;
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      Vec<A> maximum = load<A>(s.row_maximum + p - pitch);
      IndexVec<A> winner =
          load<A>(s.reciprocal + p - pitch) > 0 ? IndexVec<A>{} - 1 : IndexVec<A>{};
      for (int dy = 0; dy <= 1; ++dy) {
        const Vec<A> value = load<A>(s.row_maximum + p + dy * pitch);
        const auto takes = naslora::max_pool_takes(value, maximum);
        maximum = takes ? value : maximum;
        winner = takes ? IndexVec<A>{} + dy : winner;
      }
      store_index<A>(s.column_winner + p, winner);
    }
    begin = plan.start(0) - 1, end = begin + plan.count(tile, 0) + 2;
    for (int64_t p = begin; p < end; p += kLanes<A>) {
      Vec<A> sum = {};
      for (int dy = -1; dy <= 1; ++dy) {
        const int64_t at = p - dy * pitch;
        sum += load_index<A>(s.column_winner + at) == dy ? load<A>(g + at) : Vec<A>{};
      }
      store<A>(s.routed_g + p, sum);
    }
  }

  void pool_adjoints(const Tile& tile, const A* z, const A* g, const Planes& s, A* dz,
                     double* sums) {
    const int64_t pitch = layout().pitch, begin = plan.start(0), count = plan.count(tile, 0);
    const A a_average = static_cast<A>(plan.mixture[kAvgPool]);
    const A a_maximum = static_cast<A>(plan.mixture[kMaxPool]);
    Vec<A> sum[3] = {};
    for (int64_t p = begin, vectors = 1; p < begin + count; p += kLanes<A>, ++vectors) {
      const Vec<A> average =
          load<A>(s.row_g + p - pitch) + load<A>(s.row_g + p) + load<A>(s.row_g + p + pitch);
      Vec<A> maximum = {};
      for (int dx = -1; dx <= 1; ++dx) {
        const int64_t at = p - dx;
        maximum += load_index<A>(s.row_winner + at) == dx ? load<A>(s.routed_g + at) : Vec<A>{};
      }
      if (gradients.z)
        store<A>(dz + p, load<A>(dz + p) + a_average * average + a_maximum * maximum);
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

  // result[s, o] += sum over the tile's pixels of left_o[p] * source[offset[s] + p].
  //
  // The loop multiplies the padding between rows, too: zeros of left, as long as z is finite. An
  // infinity or NaN would spread to taps that no pixel reaches, so those tiles go pixel by pixel.
  void correlate(const Tile& tile, const Planes& s, const A* left, int64_t outputs, const A* source,
                 const int64_t* offset, int64_t sources, double* result, int64_t result_stride) {
    const int64_t begin = plan.start(0), count = plan.count(tile, 0);
    if (!s.finite) {
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t n = 0; n < sources; ++n)
          result[n * result_stride + o] +=
              pixel_sum(tile, left + o * layout().plane, source + offset[n]);
      return;
    }
    for_output_blocks(outputs, [&](int64_t o, auto size) {
      constexpr int O = decltype(size)::value;
      correlate_sources<A, O>(left + o * layout().plane + begin, layout().plane, source + begin,
                              offset, sources, result + o, result_stride, count);
    });
  }

  A pixel_sum(const Tile& tile, const A* left, const A* source) const {
    A sum = 0;
    for (int64_t y = 0; y < tile.rows; ++y) {
      const int64_t row = layout().origin + y * layout().pitch;
      for (int64_t p = row; p < row + plan.cell.width; ++p) sum += left[p] * source[p];
    }
    return sum;
  }

  void finish();

  double folded_at(const double* total, int64_t in, int tap, int64_t out) const {
    return total[partial.folded + (in * kFoldedTaps + tap) * plan.c + out];
  }

  const Plan<S> plan;
  const Map& grad_y;
  const CellGradients& gradients;
  const Weights<S> forward, transposed;
  const PartialLayout partial;
  const bool want_parameters;
  const Buffer<double> partials;
};

// Second stage: adds the tasks' sums in order, then applies the chain rule of
// y = sum_i a_i pw_i (dw_i * z): with the P and D of PartialLayout,
//   da_i = <pw_i, P_i>, dpw_i = a_i P_i, ddw_i = a_i D_i.
template <typename S>
void Backward<S>::finish() {
  const int64_t c = plan.c;
  double* total = partials.data();
  for (int64_t task = 1; task < layout().tasks; ++task)
    for (int64_t i = 0; i < partial.size; ++i) total[i] += total[task * partial.size + i];

  double grad_a[kOperations] = {};
  grad_a[kAvgPool] = total[partial.pools];
  grad_a[kMaxPool] = total[partial.pools + 1];
  grad_a[kSkip] = total[partial.pools + 2];
  const auto& w = plan.parameters;
  for (int i = 0; i < kConvolutions; ++i) {
    for (int64_t in = 0; in < c; ++in) {
      for (int64_t out = 0; out < c; ++out) {
        double product = 0;
        if (plan.folded) {
          for (int t = 0; t < kWeightTaps[i]; ++t)
            product += w.depthwise(i, in, t) * folded_at(total, in, kTaps.of_weight[i][t], out);
        } else {
          product = total[partial.pointwise + (i * c + in) * c + out];
        }
        grad_a[i] += w.pointwise(i, out, in) * product;
        if (gradients.pw)
          static_cast<A*>(gradients.pw)[(i * c + out) * c + in] =
              static_cast<A>(plan.mixture[i] * product);
      }
      if (!gradients.pw) continue;
      for (int t = 0; t < kWeightTaps[i]; ++t) {
        double product = 0;
        if (plan.folded) {
          for (int64_t out = 0; out < c; ++out)
            product += w.pointwise(i, out, in) * folded_at(total, in, kTaps.of_weight[i][t], out);
        } else {
          product = total[partial.depthwise + in * kAllWeightTaps + kWeightStart[i] + t];
        }
        static_cast<A*>(gradients.dw[i])[in * kWeightTaps[i] + t] =
            static_cast<A>(plan.mixture[i] * product);
      }
    }
  }
  if (gradients.alpha) {
    double grad_alpha[kOperations];
    naslora::softmax_backward(plan.mixture, grad_a, grad_alpha);
    for (int k = 0; k < kOperations; ++k)
      static_cast<A*>(gradients.alpha)[k] = static_cast<A>(grad_alpha[k]);
  }
}

template <typename S>
void cell_backward(const Cell& cell, const Map& grad_y, const CellGradients& gradients) {
  Backward<S>(cell, grad_y, gradients).run();
}

}  // namespace
