// The mixed cell, forward and backward, and the convolution that a merged cell leaves.
//
// All but the poolings is one convolution K on 41 taps, which every block folds for itself, from
// parameters in shared memory: that takes less time than a launch. A block computes N channels of
// a tile, two pixels a thread, from all channels of the tile, N after N.
//
// The backward has blocks of two kinds in one launch, which fill the card together. Some compute
// grad_z like the forward, with K transposed. The others take a pair of channel groups and correlate
// grad_y with z over some tiles, a thread a tap; from the sums dL/dK follow all parameters' gradients.
#include "cell.cuh"

namespace naslora {
namespace {

// ---- What differs between a searched and a merged cell ---------------------------------------

template <typename S, int N>
struct MixedConvolution {
  using A = AccumulatorOf<S>;
  using Arguments = Cell;
  static constexpr bool kSkipsZeros = false;
  SharedMixture<A> mixture;
  SharedParameters<A, N> parameters;
  A* weights;  // [source][tap][target]

  NASLORA_HOST_DEVICE void take(Carver& carver, const Arguments&) {
    mixture.take(carver);
    parameters.take(carver);
    weights = carver.take<A>(N * kFoldedTaps * N);
  }
  __device__ void begin(const Arguments& cell) { mixture.stage(cell.alpha); }
  // Before and after the barrier behind which a group of sources is there.
  __device__ void stage(const Arguments& cell, int64_t out, int64_t in) {
    parameters.stage(cell, out, in);
  }
  __device__ void finish() { fold(parameters, mixture.a, *mixture.taps, false, weights); }
  __device__ void add(const A* plane, int source, A (&sum)[2][N]) const {
    convolve(plane, weights + source * kFoldedTaps * N, sum);
  }
  __device__ A average(const Arguments&) const { return mixture.a[kAvgPool]; }
  __device__ A maximum(const Arguments&) const { return mixture.a[kMaxPool]; }
};

// A dense kernel of odd size up to 9 x 9.
template <typename S, int N>
struct DenseConvolution {
  using A = AccumulatorOf<S>;
  using Arguments = FoldedCell;
  static constexpr bool kSkipsZeros = true;  // a weight of zero costs nothing, not even a NaN
  A* weights;  // [source][row][column][target]
  int size;

  NASLORA_HOST_DEVICE void take(Carver& carver, const Arguments& cell) {
    size = static_cast<int>(cell.size);
    weights = carver.take<A>(N * size * size * N);
  }
  __device__ void begin(const Arguments&) {}
  __device__ void stage(const Arguments& cell, int64_t out, int64_t in) {
    const int taps = size * size;
    for_block(N * taps * N, [&](int i) {
      const int target = i % N, tap = i / N % taps, source = i / (N * taps);
      A value = 0;
      if (out + target < cell.c && in + source < cell.c)
        value = read<A>(cell.kernel, ((out + target) * cell.c + in + source) * taps + tap);
      weights[i] = value;
    });
  }
  __device__ void finish() {}
  __device__ void add(const A* plane, int source, A (&sum)[2][N]) const {
    const A* weight = weights + source * size * size * N;
    for (int dy = -(size / 2); dy <= size / 2; ++dy) {
      A part[2][N] = {};
      for (int dx = -(size / 2); dx <= size / 2; ++dx, weight += N)
        add_tap<N>(plane, dy * Planes::kRow + dx, weight, part);
      naslora::add(part, sum);
    }
  }
  __device__ A average(const Arguments& cell) const { return static_cast<A>(cell.average); }
  __device__ A maximum(const Arguments& cell) const { return static_cast<A>(cell.maximum); }
};

// ---- Writing maps --------------------------------------------------------------------------

// Writes the thread's pixels of channels `first` .. `first` + N of a contiguous (B, H, W, r) map.
template <typename S, int N>
__device__ void write_pixels(const AccumulatorOf<S> (&sum)[2][N], const Maps& maps, int64_t first,
                             const Tiling& tiling, const Tile& tile, const Pixels& pixels, S* out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!pixels.inside(tile, i)) continue;
    const int64_t row = tile.image * tiling.height + tile.y + pixels.row + i;
    S* to = out + (row * tiling.width + tile.x + pixels.column) * maps.rank;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (first + n < maps.c) to[channel_at(maps.channels, first + n)] = Narrow<S>::from(sum[i][n]);
  }
}

// Copies a tile of the channels outside S; `mixed` is shared memory.
constexpr int kChannelsAtOnce = 512;
template <typename S>
__device__ void copy_other_channels(const Map& map, const Maps& maps, const Tiling& tiling,
                                    const Tile& tile, char* mixed, S* out) {
  const S* from = static_cast<const S*>(map.data) + tile.image * map.stride[0];
  for (int64_t first = 0; first < maps.rank; first += kChannelsAtOnce) {
    const int count = static_cast<int>(smaller(kChannelsAtOnce, maps.rank - first));
    __syncthreads();
    for_block(count, [&](int i) { mixed[i] = false; });
    __syncthreads();
    for_block(maps.c, [&](int i) {
      const int64_t k = maps.channels[i] - first;
      if (k >= 0 && k < count) mixed[k] = true;
    });
    __syncthreads();
    for_block(tile.rows * tile.columns * count, [&](int i) {
      const int k = i % count, column = i / count % tile.columns, row = i / count / tile.columns;
      if (mixed[k]) return;
      const int64_t y = tile.y + row, x = tile.x + column;
      out[((tile.image * tiling.height + y) * tiling.width + x) * maps.rank + first + k] =
          from[y * map.stride[1] + x * map.stride[2] + (first + k) * map.stride[3]];
    });
  }
}

// ---- Forward -------------------------------------------------------------------------------

template <typename Convolution>
struct ForwardArguments {
  typename Convolution::Arguments cell;
  Tiling tiling;
  void* y;
};

template <typename S, int N, typename Convolution>
struct ForwardShared {
  Convolution convolution;
  AccumulatorOf<S>* planes;
  char* mixed;

  NASLORA_HOST_DEVICE
  ForwardShared(Carver& carver, const typename Convolution::Arguments& cell) {
    convolution.take(carver, cell);
    planes = carver.take<AccumulatorOf<S>>(N * Planes::kChannel);
    mixed = carver.take<char>(kChannelsAtOnce);
  }
};

// sum += average * avg_pool(plane) + maximum * max_pool(plane) on the thread's pixels
template <bool kSkipsZeros, typename A>
__device__ inline void add_pools(const A* plane, const Tiling& tiling, const Tile& tile,
                                 const Pixels& pixels, A average, A maximum, A& above, A& below) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Window<A> window(plane + pixels.offset() + i * Planes::kRow, Planes::kRow, 1,
                           tile.y + pixels.row + i, tile.x + pixels.column, tiling);
    A& sum = i ? below : above;
    if (!kSkipsZeros || average != 0) sum += average * window.average;
    if (!kSkipsZeros || maximum != 0) sum += maximum * window.maximum;
  }
}

template <typename S, int N, typename Convolution>
__global__ void __launch_bounds__(kThreads, 4)
    cell_forward_kernel(const ForwardArguments<Convolution> p) {
  using A = AccumulatorOf<S>;
  Carver carver(shared_memory());
  ForwardShared<S, N, Convolution> shared(carver, p.cell);
  Convolution& convolution = shared.convolution;
  const int64_t c = p.cell.c, first = blockIdx.y * N;
  const Tile tile(p.tiling, blockIdx.x);
  const Pixels pixels;

  A sum[2][N] = {};
  convolution.begin(p.cell);
  for (int64_t source = 0; source < c; source += N) {
    convolution.stage(p.cell, first, source);
    stage<S, N, Planes>(p.cell.z, p.cell, source, p.tiling, tile, shared.planes);
    __syncthreads();
    convolution.finish();
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < N && source + n < c; ++n)
      convolution.add(shared.planes + n * Planes::kChannel + pixels.offset(), n, sum);
    if (source == first) {
      const A average = convolution.average(p.cell), maximum = convolution.maximum(p.cell);
#pragma unroll
      for (int n = 0; n < N; ++n)
        add_pools<Convolution::kSkipsZeros>(shared.planes + n * Planes::kChannel, p.tiling, tile,
                                            pixels, average, maximum, sum[0][n], sum[1][n]);
    }
    __syncthreads();
  }
  S* y = static_cast<S*>(p.y);
  write_pixels<S>(sum, p.cell, first, p.tiling, tile, pixels, y);
  if (first == 0 && c < p.cell.rank)
    copy_other_channels(p.cell.z, p.cell, p.tiling, tile, shared.mixed, y);
}

// ---- Backward ------------------------------------------------------------------------------

struct BackwardArguments {
  Cell cell;
  Map grad_y;
  Tiling tiling;
  void* grad_z;
  void* partials;
  int64_t partial_size;
  int tiles, groups, group_tiles;
  int channel_groups;
  int kernel_blocks;  // groups times pairs of channel groups; the blocks after them are grad_z's
};

// grad_z: K transposed over grad_y, the adjoint of the averaging, and the maxima's gradients.

template <typename S, int N>
struct InputShared {
  using A = AccumulatorOf<S>;
  SharedMixture<A> mixture;
  SharedParameters<A, N> parameters;
  A* weights;   // [out][tap][in]
  A* g;         // planes
  A* z;         // planes
  char* winner;  // [channel][pixel of the tile and one around]: which of its window is the maximum
  char* mixed;

  static constexpr int kWinnerRow = kTile + 2;

  NASLORA_HOST_DEVICE explicit InputShared(Carver& carver) {
    mixture.take(carver);
    parameters.take(carver);
    weights = carver.take<A>(N * kFoldedTaps * N);
    g = carver.take<A>(N * Planes::kChannel);
    z = carver.take<A>(N * Planes::kChannel);
    winner = carver.take<char>(N * kWinnerRow * kWinnerRow);
    mixed = carver.take<char>(kChannelsAtOnce);
  }

  __device__ void find_winners(const Tiling& tiling, const Tile& tile) const {
    const int width = tile.columns + 2, pixels = (tile.rows + 2) * width;
    for_block(N * pixels, [&](int i) {
      const int n = i / pixels, row = i % pixels / width - 1, column = i % width - 1;
      const A* at = z + n * Planes::kChannel + Planes::kOrigin + row * Planes::kRow + column;
      const Window<A> window(at, Planes::kRow, 1, tile.y + row, tile.x + column, tiling);
      winner[(n * kWinnerRow + row + 1) * kWinnerRow + column + 1] =
          static_cast<char>(window.winner);
    });
  }

  // Adds what the two poolings send to pixel (row, column) of the tile.
  __device__ void add_pool_adjoints(const Tiling& tiling, const Tile& tile, int row, int column,
                                    A (&sum)[N]) const {
    A average[N] = {}, maximum[N] = {};
#pragma unroll 1
    for (int q = 0; q < 9; ++q) {  // the pixels whose windows hold this one
      const int dy = q / 3 - 1, dx = q % 3 - 1, y = tile.y + row + dy, x = tile.x + column + dx;
      if (y < 0 || y >= tiling.height || x < 0 || x >= tiling.width) continue;
      const A share = pool_share<A>(y, x, tiling.height, tiling.width);
      const A* gradient = g + Planes::kOrigin + (row + dy) * Planes::kRow + column + dx;
      const char* won = winner + (row + dy + 1) * kWinnerRow + column + dx + 1;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        average[n] += share * gradient[n * Planes::kChannel];
        if (won[n * kWinnerRow * kWinnerRow] == 8 - q) maximum[n] += gradient[n * Planes::kChannel];
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
      sum[n] += mixture.a[kAvgPool] * average[n] + mixture.a[kMaxPool] * maximum[n];
  }
};

template <typename S, int N>
__device__ void input_gradient(const BackwardArguments& p, int tile_index, int64_t first) {
  using A = AccumulatorOf<S>;
  Carver carver(shared_memory());
  InputShared<S, N> shared(carver);
  const int64_t c = p.cell.c;
  const Tile tile(p.tiling, tile_index);
  const Pixels pixels;

  A sum[2][N] = {};
  for (int64_t source = 0; source < c; source += N) {
    shared.parameters.stage(p.cell, source, first);
    stage<S, N, Planes>(p.grad_y, p.cell, source, p.tiling, tile, shared.g);
    if (source == first) stage<S, N, Planes>(p.cell.z, p.cell, first, p.tiling, tile, shared.z);
    __syncthreads();
    fold(shared.parameters, shared.mixture.a, *shared.mixture.taps, true, shared.weights);
    if (source == first) shared.find_winners(p.tiling, tile);
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < N && source + n < c; ++n)
      convolve(shared.g + n * Planes::kChannel + pixels.offset(),
                   shared.weights + n * kFoldedTaps * N, sum);
    if (source == first) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (pixels.inside(tile, i))
          shared.add_pool_adjoints(p.tiling, tile, pixels.row + i, pixels.column, sum[i]);
    }
    __syncthreads();
  }
  S* grad_z = static_cast<S*>(p.grad_z);
  write_pixels<S>(sum, p.cell, first, p.tiling, tile, pixels, grad_z);
  if (first == 0 && c < p.cell.rank)
    copy_other_channels(p.grad_y, p.cell, p.tiling, tile, shared.mixed, grad_z);
}

// dL/dK[out, in, tap] = sum_p g_out[p] z_in[p + tap], of N outputs and N inputs. A thread sums for
// one tap, over every `slices`-th row of pixels; one pixel's channels lie side by side.

template <typename S, int N>
struct KernelShared {
  using A = AccumulatorOf<S>;
  using Z = Interleaved<N, kReach, kSide + 1>;  // odd, so that rows begin in other banks
  using G = Interleaved<N, 0, kTile>;
  static constexpr int kSlices = kThreads / kFoldedTaps;
  SharedMixture<A> mixture;
  SharedParameters<A, N> parameters;
  A* z;
  A* g;
  A* sums;     // [slice][tap][out][in]
  A* mixed_sums;  // [warp][operation]

  NASLORA_HOST_DEVICE explicit KernelShared(Carver& carver) {
    mixture.take(carver);
    parameters.take(carver);
    z = carver.take<A>(Z::kSize);
    g = carver.take<A>(G::kSize);
    sums = carver.take<A>(kSlices * kFoldedTaps * N * N);
    mixed_sums = carver.take<A>(kThreads / kWarp * kMixtureSums);
  }
};

template <typename S, int N>
__device__ void kernel_gradient(const BackwardArguments& p, int group, int pair) {
  using A = AccumulatorOf<S>;
  using Shared = KernelShared<S, N>;
  using Z = typename Shared::Z;
  using G = typename Shared::G;
  Carver carver(shared_memory());
  Shared shared(carver);
  const int64_t c = p.cell.c;
  const int64_t out = pair / p.channel_groups * N, in = pair % p.channel_groups * N;
  const int slices = blockDim.x / kFoldedTaps;
  const int tap = threadIdx.x % kFoldedTaps, slice = threadIdx.x / kFoldedTaps;
  shared.parameters.stage(p.cell, out, in);
  __syncthreads();
  const int offset = shared.mixture.taps->dy[tap] * Z::kRow + shared.mixture.taps->dx[tap] * Z::kPixel;

  A sum[N][N] = {}, average = 0, maximum = 0;
  const int begin = group * p.group_tiles;
  for (int t = begin; t < begin + p.group_tiles && t < p.tiles; ++t) {
    const Tile tile(p.tiling, t);
    __syncthreads();
    stage<S, N, Z>(p.cell.z, p.cell, in, p.tiling, tile, shared.z);
    stage<S, N, G>(p.grad_y, p.cell, out, p.tiling, tile, shared.g);
    __syncthreads();
    if (slice < slices) {
      for (int row = slice; row < tile.rows; row += slices) {
        const A* z = shared.z + Z::kOrigin + offset + row * Z::kRow;
        const A* g = shared.g + row * G::kRow;
        A part[N][N] = {};  // a short sum, whose rounding errors stay small
        for (int column = 0; column < tile.columns; ++column) {
          const Pack<A, N> right = load_pack<N>(z + column * Z::kPixel);
          const Pack<A, N> left = load_pack<N>(g + column * G::kPixel);
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
    if (out != in) continue;
    for_block(tile.rows * tile.columns * N, [&](int i) {
      const int n = i % N, row = i / N / tile.columns, column = i / N % tile.columns;
      const Window<A> window(shared.z + Z::kOrigin + row * Z::kRow + column * Z::kPixel + n,
                             Z::kRow, Z::kPixel, tile.y + row, tile.x + column, p.tiling);
      const A g = shared.g[row * G::kRow + column * G::kPixel + n];
      if (in + n >= c) return;
      average += g * window.average;
      maximum += g * window.maximum;
    });
  }

  // The slices' sums together are dL/dK of these tiles; dL/da_i is its product with pw_i dw_i.
  if (slice < slices) {
#pragma unroll
    for (int o = 0; o < N; ++o)
#pragma unroll
      for (int i = 0; i < N; ++i)
        shared.sums[((slice * kFoldedTaps + tap) * N + o) * N + i] = sum[o][i];
  }
  __syncthreads();
  A mixture[kMixtureSums] = {};
  mixture[kAvgPool] = average, mixture[kMaxPool] = maximum;
  A* partials = static_cast<A*>(p.partials) + group * p.partial_size;
  for_block(kFoldedTaps * N * N, [&](int e) {
    const int t = e % kFoldedTaps, o = e / kFoldedTaps % N, i = e / kFoldedTaps / N;
    if (out + o >= c || in + i >= c) return;
    A total = 0;
    for (int s = 0; s < slices; ++s) total += shared.sums[((s * kFoldedTaps + t) * N + o) * N + i];
    partials[((in + i) * c + out + o) * kFoldedTaps + t] = total;
#pragma unroll
    for (int op = 0; op < kConvolutions; ++op) {
      const int w = shared.mixture.taps->weight[t][op];
      if (w >= 0)
        mixture[op] += total * shared.parameters.pointwise(op, out + o, in + i) *
                       shared.parameters.depthwise(op, in + i, w);
    }
    if (t == kCentreTap && out + o == in + i) mixture[kSkip] += total;
  });

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kMixtureSums; ++k) {
#pragma unroll
    for (int offset = kWarp / 2; offset >= 1; offset /= 2)
      mixture[k] += __shfl_xor_sync(0xffffffffu, mixture[k], offset);
    if (lane == 0) shared.mixed_sums[warp * kMixtureSums + k] = mixture[k];
  }
  __syncthreads();
  if (threadIdx.x < kMixtureSums) {
    A total = 0;
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w)
      total += shared.mixed_sums[w * kMixtureSums + threadIdx.x];
    partials[kernel_sums(c) + pair * kMixtureSums + threadIdx.x] = total;
  }
}

template <typename S, int N>
__global__ void __launch_bounds__(kThreads, 4) cell_backward_kernel(const BackwardArguments p) {
  // Both kinds of blocks lay it out first; and it is best computed while registers are free.
  Carver carver(shared_memory());
  SharedMixture<AccumulatorOf<S>> mixture;
  mixture.take(carver);
  mixture.stage(p.cell.alpha);
  const int block = blockIdx.x;
  if (block < p.kernel_blocks) {
    kernel_gradient<S, N>(p, block % p.groups, block / p.groups);
  } else {
    const int i = block - p.kernel_blocks;
    input_gradient<S, N>(p, i / p.channel_groups, i % p.channel_groups * N);
  }
}

// ---- Launching -----------------------------------------------------------------------------

// body(S{}, std::integral_constant<int, N>{})
template <typename Body>
void with_channels(const Maps& maps, const Body& body) {
  with_storage(maps.dtype, [&](auto storage) {
    if constexpr (std::is_same_v<decltype(storage), double>) {
      body(storage, std::integral_constant<int, kFewChannels>());
    } else {
      if (maps.c <= kFewChannels) return body(storage, std::integral_constant<int, kFewChannels>());
      return body(storage, std::integral_constant<int, kMostChannels>());
    }
  });
}

template <template <typename, int> class Convolution, typename Arguments>
void launch_forward(const char* name, const Stream& stream, const Arguments& cell, void* y) {
  with_channels(cell, [&](auto storage, auto channels) {
    using S = decltype(storage);
    constexpr int N = decltype(channels)::value;
    const ForwardArguments<Convolution<S, N>> p{cell, Tiling::of(cell.height, cell.width), y};
    Carver carver(nullptr);
    ForwardShared<S, N, Convolution<S, N>>(carver, cell);
    launch(name, cell_forward_kernel<S, N, Convolution<S, N>>, p.tiling.count(cell.batch),
           ceil_div(cell.c, N), p.tiling.threads(), carver.size(), stream, p);
  });
}

}  // namespace

void cell_forward(const Stream& stream, const Cell& cell, void* y) {
  launch_forward<MixedConvolution>("cell_forward", stream, cell, y);
}

void folded_cell_forward(const Stream& stream, const FoldedCell& cell, void* y) {
  launch_forward<DenseConvolution>("folded_cell_forward", stream, cell, y);
}

namespace {

// As many groups as fill a large card with one block each, where there are so many tiles; no more,
// as each leaves c x c x 41 sums.
int64_t tiles_per_group(int64_t tiles, int64_t c) {
  return ceil_div(tiles, smaller(64, larger(8, 256 / channel_pairs(c, false))));
}

}  // namespace

int64_t cell_groups(int64_t batch, int64_t height, int64_t width, int64_t c) {
  const int64_t tiles = Tiling::of(height, width).count(batch);
  return ceil_div(tiles, tiles_per_group(tiles, c));
}

int64_t cell_partial_size(int64_t c) {
  return kernel_sums(c) + channel_pairs(c, true) * kMixtureSums;
}

void cell_backward(const Stream& stream, const Cell& cell, const Map& grad_y, void* grad_z,
                   void* partials) {
  with_channels(cell, [&](auto storage, auto channels) {
    using S = decltype(storage);
    constexpr int N = decltype(channels)::value;
    BackwardArguments p{cell, grad_y, Tiling::of(cell.height, cell.width), grad_z, partials,
                        0,    0,      0, 0, 0, 0};
    const int64_t tiles = p.tiling.count(cell.batch), channel_groups = ceil_div(cell.c, N);
    const int64_t groups = cell_groups(cell.batch, cell.height, cell.width, cell.c);
    const int64_t kernel_blocks = partials ? groups * channel_groups * channel_groups : 0;
    p.partial_size = cell_partial_size(cell.c);
    p.tiles = static_cast<int>(tiles);
    p.groups = static_cast<int>(groups);
    p.group_tiles = static_cast<int>(tiles_per_group(tiles, cell.c));
    p.channel_groups = static_cast<int>(channel_groups);
    p.kernel_blocks = static_cast<int>(kernel_blocks);
    Carver input(nullptr), kernel(nullptr);
    InputShared<S, N>{input};
    KernelShared<S, N>{kernel};
    launch("cell_backward", cell_backward_kernel<S, N>,
           kernel_blocks + (grad_z ? tiles * channel_groups : 0), 1, p.tiling.threads(),
           larger(input.size(), kernel.size()), stream, p);
  });
}

}  // namespace naslora
