// The forward of the mixed cell and of the folded cell.
//
// Everything but the poolings is one convolution. Every block folds the kernel K for itself, from
// weights in shared memory, which takes less time than a launch. A block computes N targets of a
// tile, two pixels a thread, from all sources, N at a time.
#include "cell_weights.cuh"

namespace naslora {
namespace {

// ---- The two kinds of convolution ----------------------------------------------------------

// The folded kernel K of a mixed cell.
template <typename S, int N>
struct MixedConvolution {
  using A = AccumulatorOf<S>;
  using Arguments = Cell;
  static constexpr bool kSkipsZeros = false;
  SharedTables<A> tables;
  SharedWeights<A, N> weights;
  A* folded;  // [source][tap][target]

  NASLORA_HOST_DEVICE MixedConvolution(SharedArena& arena, const Arguments&)
      : tables(arena), weights(arena) {
    folded = arena.take<A>(N * kFoldedTaps * N);
  }
  __device__ void begin(const Arguments& cell) { tables.load(cell.alpha); }
  // `load` runs before and `finish` after the barrier that makes N sources visible.
  __device__ void load(const Arguments& cell, int64_t out, int64_t in) {
    weights.load(cell, out, in);
  }
  __device__ void finish() { fold(weights, tables.mixture, *tables.taps, false, folded); }
  __device__ void add(const A* plane, int source, A (&sum)[2][N]) const {
    convolve(plane, folded + source * kFoldedTaps * N, sum);
  }
  __device__ A avg_weight(const Arguments&) const { return tables.mixture[kAvgPool]; }
  __device__ A max_weight(const Arguments&) const { return tables.mixture[kMaxPool]; }
};

// The kernel of a folded cell, of any size up to 9x9.
template <typename S, int N>
struct FoldedConvolution {
  using A = AccumulatorOf<S>;
  using Arguments = FoldedCell;
  static constexpr bool kSkipsZeros = true;  // a pooling of weight zero is not added, not even NaN
  A* weights;                                // [source][row][column][target]
  int size;

  NASLORA_HOST_DEVICE FoldedConvolution(SharedArena& arena, const Arguments& cell) {
    size = static_cast<int>(cell.kernel_size);
    weights = arena.take<A>(N * size * size * N);
  }
  __device__ void begin(const Arguments&) {}
  __device__ void load(const Arguments& cell, int64_t out, int64_t in) {
    const int taps = size * size;
    for_block(taps, [&](int tap) {
#pragma unroll
      for (int i = 0; i < N * N; ++i) {
        const int source = i / N, target = i % N;
        A value = 0;
        if (out + target < cell.c && in + source < cell.c)
          value = read<A>(cell.kernel, ((out + target) * cell.c + in + source) * taps + tap);
        weights[(source * taps + tap) * N + target] = value;
      }
    });
  }
  __device__ void finish() {}
  __device__ void add(const A* plane, int source, A (&sum)[2][N]) const {
    const A* weight = weights + source * size * size * N;
    for (int dy = -(size / 2); dy <= size / 2; ++dy) {
      A part[2][N] = {};
      for (int dx = -(size / 2); dx <= size / 2; ++dx, weight += N)
        add_tap<N>(plane, dy * Planar::kRowStride + dx, weight, part);
      naslora::add(part, sum);
    }
  }
  __device__ A avg_weight(const Arguments& cell) const { return static_cast<A>(cell.avg_weight); }
  __device__ A max_weight(const Arguments& cell) const { return static_cast<A>(cell.max_weight); }
};

// ---- The kernel ----------------------------------------------------------------------------

template <typename Convolution>
struct ForwardArguments {
  typename Convolution::Arguments cell;
  Tiling tiling;
  void* y;
};

template <typename S, int N, typename Convolution>
struct ForwardShared {
  Convolution convolution;
  AccumulatorOf<S>* z;  // planes
  char* selected;       // flags of copy_rest

  NASLORA_HOST_DEVICE
  ForwardShared(SharedArena& arena, const typename Convolution::Arguments& cell)
      : convolution(arena, cell) {
    z = arena.take<AccumulatorOf<S>>(N * Planar::kChannelStride);
    selected = arena.take<char>(kChannelsAtOnce);
  }
};

// sum += avg_weight avg_pool(plane) + max_weight max_pool(plane) on the thread's pixels
template <bool kSkipsZeros, typename A>
__device__ inline void add_pools(const A* plane, const Tiling& tiling, const Tile& tile,
                                 const Pixels& pixels, A avg_weight, A max_weight, A& above,
                                 A& below) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Window<A> window(plane + pixels.offset() + i * Planar::kRowStride, Planar::kRowStride, 1,
                           tile.y + pixels.row + i, tile.x + pixels.column, tiling);
    A& sum = i ? below : above;
    if (!kSkipsZeros || avg_weight != 0) sum += avg_weight * window.average;
    if (!kSkipsZeros || max_weight != 0) sum += max_weight * window.maximum;
  }
}

template <typename S, int N, typename Convolution>
__global__ void __launch_bounds__(kThreads, 4)
    cell_forward_kernel(const ForwardArguments<Convolution> p) {
  using A = AccumulatorOf<S>;
  auto shared = place_in_shared<ForwardShared<S, N, Convolution>>(p.cell);
  Convolution& convolution = shared.convolution;
  const int64_t c = p.cell.c, first = blockIdx.y * N;
  const Tile tile(p.tiling, blockIdx.x);
  const Pixels pixels;

  A sum[2][N] = {};
  convolution.begin(p.cell);
  for (int64_t source = 0; source < c; source += N) {
    convolution.load(p.cell, first, source);
    load_tile<S, N, Planar>(p.cell.z, p.cell, source, p.tiling, tile, shared.z);
    __syncthreads();
    convolution.finish();
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < N && source + n < c; ++n)
      convolution.add(shared.z + n * Planar::kChannelStride + pixels.offset(), n, sum);
    if (source == first) {
      const A avg_weight = convolution.avg_weight(p.cell);
      const A max_weight = convolution.max_weight(p.cell);
#pragma unroll
      for (int n = 0; n < N; ++n)
        add_pools<Convolution::kSkipsZeros>(shared.z + n * Planar::kChannelStride, p.tiling, tile,
                                            pixels, avg_weight, max_weight, sum[0][n], sum[1][n]);
    }
    __syncthreads();
  }
  S* y = static_cast<S*>(p.y);
  store_pixels<S>(sum, p.cell, first, p.tiling, tile, pixels, y);
  if (first == 0 && c < p.cell.rank)
    copy_rest(p.cell.z, p.cell, p.tiling, tile, shared.selected, y);
}

template <template <typename, int> class Convolution, typename Arguments>
void launch_forward(const char* name, const Stream& stream, const Arguments& cell, void* y) {
  with_channels(cell, [&](auto storage, auto channels) {
    using S = decltype(storage);
    constexpr int N = decltype(channels)::value;
    const ForwardArguments<Convolution<S, N>> p{cell, Tiling::of(cell.height, cell.width), y};
    const size_t bytes = measure<ForwardShared<S, N, Convolution<S, N>>, SharedArena>(cell);
    launch(name, cell_forward_kernel<S, N, Convolution<S, N>>, p.tiling.count(cell.batch),
           ceil_div(cell.c, N), p.tiling.threads(), bytes, stream, p);
  });
}

}  // namespace

void cell_forward(const Stream& stream, const Cell& cell, void* y) {
  launch_forward<MixedConvolution>("cell_forward", stream, cell, y);
}

void folded_cell_forward(const Stream& stream, const FoldedCell& cell, void* y) {
  launch_forward<FoldedConvolution>("folded_cell_forward", stream, cell, y);
}

}  // namespace naslora
