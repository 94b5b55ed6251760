// The backward of the mixed cell: grad_z and the partial sums of the parameters' gradients.
//
// One launch has blocks of two kinds, which fill the card together. Input blocks compute grad_z, as
// the forward computes y, with the transposed K. Kernel blocks compute grad_K: each takes a group
// of tiles and a pair of channel groups and correlates grad_y with z, one tap a thread. All
// parameters' gradients follow from grad_K in the second stage (reduce.cu).
#include "cell_weights.cuh"

namespace naslora {
namespace {

struct BackwardArguments {
  Cell cell;
  Map grad_y;
  Tiling tiling;
  void* grad_z;
  void* partials;
  int64_t partial_size;
  int tiles, groups, group_tiles;  // group_tiles is the number of tiles of a group
  int channel_groups;              // of N channels each
  int kernel_blocks;               // groups times pairs; the blocks after them are input blocks
};

// ---- Input blocks --------------------------------------------------------------------------
//
// grad_z = the transposed K over grad_y + the adjoint of avg_pool + the gradients that max_pool
// routes to the argmax of each window.

template <typename S, int N>
struct InputGradientShared {
  using A = AccumulatorOf<S>;
  SharedTables<A> tables;
  SharedWeights<A, N> weights;
  A* folded;       // [source][tap][target]
  A* g;            // planes
  A* z;            // planes
  char* argmax;    // [channel][pixel of the tile with a halo of 1]
  char* selected;  // flags of copy_rest

  static constexpr int kArgmaxRow = kTile + 2, kArgmaxChannel = kArgmaxRow * kArgmaxRow;

  NASLORA_HOST_DEVICE explicit InputGradientShared(SharedArena& arena)
      : tables(arena), weights(arena) {
    folded = arena.take<A>(N * kFoldedTaps * N);
    g = arena.take<A>(N * Planar::kChannelStride);
    z = arena.take<A>(N * Planar::kChannelStride);
    argmax = arena.take<char>(N * kArgmaxChannel);
    selected = arena.take<char>(kChannelsAtOnce);
  }

  __device__ void find_argmax(const Tiling& tiling, const Tile& tile) const {
    const int width = tile.columns + 2, pixels = (tile.rows + 2) * width;
    for_block(N * pixels, [&](int i) {
      const int n = i / pixels, row = i % pixels / width - 1, column = i % width - 1;
      const A* at =
          z + n * Planar::kChannelStride + Planar::kOrigin + row * Planar::kRowStride + column;
      const Window<A> window(at, Planar::kRowStride, 1, tile.y + row, tile.x + column, tiling);
      argmax[(n * kArgmaxRow + row + 1) * kArgmaxRow + column + 1] =
          static_cast<char>(window.argmax);
    });
  }

  // Adds what the two poolings send back to pixel (row, column) of the tile.
  __device__ void add_pool_gradients(const Tiling& tiling, const Tile& tile, int row, int column,
                                     A (&sum)[N]) const {
    A average[N] = {}, maximum[N] = {};
#pragma unroll 1
    for (int q = 0; q < 9; ++q) {  // the neighbours whose windows hold this pixel
      const int dy = q / 3 - 1, dx = q % 3 - 1, y = tile.y + row + dy, x = tile.x + column + dx;
      if (y < 0 || y >= tiling.height || x < 0 || x >= tiling.width) continue;
      const A share = inverse_window_size<A>(y, x, tiling.height, tiling.width);
      const A* gradient = g + Planar::kOrigin + (row + dy) * Planar::kRowStride + column + dx;
      const char* index = argmax + (row + dy + 1) * kArgmaxRow + column + dx + 1;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        average[n] += share * gradient[n * Planar::kChannelStride];
        if (index[n * kArgmaxChannel] == opposite_index(q))
          maximum[n] += gradient[n * Planar::kChannelStride];
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
      sum[n] += tables.mixture[kAvgPool] * average[n] + tables.mixture[kMaxPool] * maximum[n];
  }
};

template <typename S, int N>
__device__ void input_gradient(const BackwardArguments& p, int tile_index, int64_t first) {
  using A = AccumulatorOf<S>;
  auto shared = place_in_shared<InputGradientShared<S, N>>();
  const int64_t c = p.cell.c;
  const Tile tile(p.tiling, tile_index);
  const Pixels pixels;

  A sum[2][N] = {};
  for (int64_t source = 0; source < c; source += N) {
    shared.weights.load(p.cell, source, first);
    load_tile<S, N, Planar>(p.grad_y, p.cell, source, p.tiling, tile, shared.g);
    if (source == first) load_tile<S, N, Planar>(p.cell.z, p.cell, first, p.tiling, tile, shared.z);
    __syncthreads();
    fold(shared.weights, shared.tables.mixture, *shared.tables.taps, true, shared.folded);
    if (source == first) shared.find_argmax(p.tiling, tile);
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < N && source + n < c; ++n)
      convolve(shared.g + n * Planar::kChannelStride + pixels.offset(),
               shared.folded + n * kFoldedTaps * N, sum);
    if (source == first) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (pixels.inside(tile, i))
          shared.add_pool_gradients(p.tiling, tile, pixels.row + i, pixels.column, sum[i]);
    }
    __syncthreads();
  }
  S* grad_z = static_cast<S*>(p.grad_z);
  store_pixels<S>(sum, p.cell, first, p.tiling, tile, pixels, grad_z);
  if (first == 0 && c < p.cell.rank)
    copy_rest(p.grad_y, p.cell, p.tiling, tile, shared.selected, grad_z);
}

// ---- Kernel blocks -------------------------------------------------------------------------
//
// grad_K[out, in, tap] = sum_p g_out[p] z_in[p + tap] for N outputs and N inputs. A thread sums for
// one tap, over every `slices`-th row of pixels. The channels of a pixel lie side by side.

template <typename S, int N>
struct KernelGradientShared {
  using A = AccumulatorOf<S>;
  using Z = Interleaved<N, kReach, kSide + 1>;  // odd, so that rows begin in different banks
  using G = Interleaved<N, 0, kTile>;
  static constexpr int kSlices = kThreads / kFoldedTaps;
  SharedTables<A> tables;
  SharedWeights<A, N> weights;
  A* z;
  A* g;
  A* kernel_sums;   // [slice][tap][out][in]
  A* mixture_sums;  // [warp][operation]

  NASLORA_HOST_DEVICE explicit KernelGradientShared(SharedArena& arena)
      : tables(arena), weights(arena) {
    z = arena.take<A>(Z::kSize);
    g = arena.take<A>(G::kSize);
    kernel_sums = arena.take<A>(kSlices * kFoldedTaps * N * N);
    mixture_sums = arena.take<A>(kThreads / kWarp * kMixtureSums);
  }
  __device__ A& kernel_sum(int slice, int tap, int out, int in) const {
    return kernel_sums[((slice * kFoldedTaps + tap) * N + out) * N + in];
  }
};

// sum[out][in] += the thread's rows of a tile, for its tap: `z` and `g` are its first pixels.
template <typename S, int N>
__device__ inline void correlate(const AccumulatorOf<S>* z_tile, const AccumulatorOf<S>* g_tile,
                                 const Tile& tile, int slice, int slices,
                                 AccumulatorOf<S> (&sum)[N][N]) {
  using A = AccumulatorOf<S>;
  using Z = typename KernelGradientShared<S, N>::Z;
  using G = typename KernelGradientShared<S, N>::G;
  for (int row = slice; row < tile.rows; row += slices) {
    const A* z = z_tile + row * Z::kRowStride;
    const A* g = g_tile + row * G::kRowStride;
    A part[N][N] = {};  // a short sum has small rounding errors
    for (int column = 0; column < tile.columns; ++column) {
      const Pack<A, N> right = load_pack<N>(z + column * Z::kPixelStride);
      const Pack<A, N> left = load_pack<N>(g + column * G::kPixelStride);
#pragma unroll
      for (int o = 0; o < N; ++o)
#pragma unroll
        for (int i = 0; i < N; ++i) part[o][i] += left.lane[o] * right.lane[i];
    }
#pragma unroll
    for (int o = 0; o < N; ++o)
#pragma unroll
      for (int i = 0; i < N; ++i) sum[o][i] += part[o][i];
  }
}

// average += <g, avg_pool(z)> and maximum += <g, max_pool(z)> over the thread's share of a tile.
template <typename S, int N>
__device__ inline void add_pool_products(const KernelGradientShared<S, N>& shared,
                                         const Tiling& tiling, const Tile& tile, int64_t in,
                                         int64_t c, AccumulatorOf<S>& average,
                                         AccumulatorOf<S>& maximum) {
  using A = AccumulatorOf<S>;
  using Z = typename KernelGradientShared<S, N>::Z;
  using G = typename KernelGradientShared<S, N>::G;
  for_block(tile.rows * tile.columns * N, [&](int i) {
    const int n = i % N, row = i / N / tile.columns, column = i / N % tile.columns;
    const Window<A> window(
        shared.z + Z::kOrigin + row * Z::kRowStride + column * Z::kPixelStride + n, Z::kRowStride,
        Z::kPixelStride, tile.y + row, tile.x + column, tiling);
    const A g = shared.g[row * G::kRowStride + column * G::kPixelStride + n];
    if (in + n >= c) return;
    average += g * window.average;
    maximum += g * window.maximum;
  });
}

// Adds the slices' sums, writes them as grad_K of this group, and adds their part of grad_a.
template <typename S, int N>
__device__ inline void store_kernel_gradient(const KernelGradientShared<S, N>& shared, int64_t c,
                                             int64_t out, int64_t in, int slices,
                                             AccumulatorOf<S>* partials,
                                             AccumulatorOf<S> (&grad_a)[kMixtureSums]) {
  using A = AccumulatorOf<S>;
  for_block(kFoldedTaps * N * N, [&](int e) {
    const int tap = e % kFoldedTaps, o = e / kFoldedTaps % N, i = e / kFoldedTaps / N;
    if (out + o >= c || in + i >= c) return;
    A total = 0;
    for (int s = 0; s < slices; ++s) total += shared.kernel_sum(s, tap, o, i);
    partials[((in + i) * c + out + o) * kFoldedTaps + tap] = total;
    add_mixture_gradient(shared.weights, total, out + o, in + i, tap, *shared.tables.taps, grad_a);
  });
}

// Sums grad_a over the block and writes it.
template <typename S, int N>
__device__ inline void store_mixture_gradient(const KernelGradientShared<S, N>& shared,
                                              AccumulatorOf<S> (&grad_a)[kMixtureSums],
                                              AccumulatorOf<S>* partials) {
  using A = AccumulatorOf<S>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kMixtureSums; ++k) {
#pragma unroll
    for (int offset = kWarp / 2; offset >= 1; offset /= 2)
      grad_a[k] += __shfl_xor_sync(0xffffffffu, grad_a[k], offset);
    if (lane == 0) shared.mixture_sums[warp * kMixtureSums + k] = grad_a[k];
  }
  __syncthreads();
  if (threadIdx.x < kMixtureSums) {
    A total = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w)
      total += shared.mixture_sums[w * kMixtureSums + threadIdx.x];
    partials[threadIdx.x] = total;
  }
}

template <typename S, int N>
__device__ void kernel_gradient(const BackwardArguments& p, int group, int pair) {
  using A = AccumulatorOf<S>;
  using Shared = KernelGradientShared<S, N>;
  using Z = typename Shared::Z;
  using G = typename Shared::G;
  auto shared = place_in_shared<Shared>();
  const int64_t c = p.cell.c;
  const int64_t out = pair / p.channel_groups * N, in = pair % p.channel_groups * N;
  const int slices = blockDim.x / kFoldedTaps;
  const int tap = threadIdx.x % kFoldedTaps, slice = threadIdx.x / kFoldedTaps;
  shared.weights.load(p.cell, out, in);
  __syncthreads();
  const TapTable& taps = *shared.tables.taps;
  const int offset = taps.dy[tap] * Z::kRowStride + taps.dx[tap] * Z::kPixelStride;

  A sum[N][N] = {}, average = 0, maximum = 0;
  const int begin = group * p.group_tiles;
  for (int t = begin; t < begin + p.group_tiles && t < p.tiles; ++t) {
    const Tile tile(p.tiling, t);
    __syncthreads();
    load_tile<S, N, Z>(p.cell.z, p.cell, in, p.tiling, tile, shared.z);
    load_tile<S, N, G>(p.grad_y, p.cell, out, p.tiling, tile, shared.g);
    __syncthreads();
    if (slice < slices)
      correlate<S, N>(shared.z + Z::kOrigin + offset, shared.g, tile, slice, slices, sum);
    if (out == in) add_pool_products(shared, p.tiling, tile, in, c, average, maximum);
  }

  if (slice < slices) {
#pragma unroll
    for (int o = 0; o < N; ++o)
#pragma unroll
      for (int i = 0; i < N; ++i) shared.kernel_sum(slice, tap, o, i) = sum[o][i];
  }
  __syncthreads();
  A grad_a[kMixtureSums] = {};
  grad_a[kAvgPool] = average, grad_a[kMaxPool] = maximum;
  A* partials = static_cast<A*>(p.partials) + group * p.partial_size;
  store_kernel_gradient(shared, c, out, in, slices, partials, grad_a);
  store_mixture_gradient(shared, grad_a, partials + kernel_sums(c) + pair * kMixtureSums);
}

// ---- The kernel ----------------------------------------------------------------------------

template <typename S, int N>
__global__ void __launch_bounds__(kThreads, 4) cell_backward_kernel(const BackwardArguments p) {
  // Both layouts begin with the tables. They are loaded here, while most registers are free.
  place_in_shared<SharedTables<AccumulatorOf<S>>>().load(p.cell.alpha);
  const int block = blockIdx.x;
  if (block < p.kernel_blocks) {
    kernel_gradient<S, N>(p, block % p.groups, block / p.groups);
  } else {
    const int i = block - p.kernel_blocks;
    input_gradient<S, N>(p, i / p.channel_groups, i % p.channel_groups * N);
  }
}

// As many groups as one block each needs to fill a large card, if there are so many tiles. Not
// more, as each group leaves c x c x 41 sums.
int64_t tiles_per_group(int64_t tiles, int64_t c) {
  return ceil_div(tiles, smaller(64, larger(8, 256 / channel_pairs(c, false))));
}

}  // namespace

int64_t cell_groups(int64_t batch, int64_t height, int64_t width, int64_t c) {
  const int64_t tiles = Tiling::of(height, width).count(batch);
  return ceil_div(tiles, tiles_per_group(tiles, c));
}

int64_t cell_partial_size(int64_t c) { return partial_size(c); }

void cell_backward(const Stream& stream, const Cell& cell, const Map& grad_y, void* grad_z,
                   void* partials) {
  with_channels(cell, [&](auto storage, auto channels) {
    using S = decltype(storage);
    constexpr int N = decltype(channels)::value;
    BackwardArguments p{
        cell, grad_y, Tiling::of(cell.height, cell.width), grad_z, partials, 0, 0, 0, 0, 0, 0};
    const int64_t tiles = p.tiling.count(cell.batch), channel_groups = ceil_div(cell.c, N);
    const int64_t groups = cell_groups(cell.batch, cell.height, cell.width, cell.c);
    const int64_t kernel_blocks = partials ? groups * channel_groups * channel_groups : 0;
    p.partial_size = partial_size(cell.c);
    p.tiles = static_cast<int>(tiles);
    p.groups = static_cast<int>(groups);
    p.group_tiles = static_cast<int>(tiles_per_group(tiles, cell.c));
    p.channel_groups = static_cast<int>(channel_groups);
    p.kernel_blocks = static_cast<int>(kernel_blocks);
    const size_t bytes = larger(measure<InputGradientShared<S, N>, SharedArena>(),
                                measure<KernelGradientShared<S, N>, SharedArena>());
    launch("cell_backward", cell_backward_kernel<S, N>,
           kernel_blocks + (grad_z ? tiles * channel_groups : 0), 1, p.tiling.threads(), bytes,
           stream, p);
  });
}

}  // namespace naslora
