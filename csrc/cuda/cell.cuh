// What the cell's kernels share: tiles of maps in shared memory, and the arithmetic on them.
//
// A tile is at most 16x16 pixels, so a window of 14x14 is one. With the four pixels around it that
// the furthest tap reaches, and zeros beside the map, a channel of a tile is a plane of 24x24
// numbers in shared memory, where every tap is a constant offset. Channels go through in groups of
// N: 2 where the cell has no more, else 4, so that any number of them fits.
#pragma once

#include "common.cuh"

namespace naslora {

constexpr int kFewChannels = 2, kMostChannels = 4;  // N: float64, wider, always takes the fewer

NASLORA_HOST_DEVICE constexpr int64_t channel_pairs(int64_t c, bool float64) {
  const int64_t groups = ceil_div(c, float64 || c <= kFewChannels ? kFewChannels : kMostChannels);
  return groups * groups;
}

// What the backward leaves of a group of tiles: dL/dK as [in][out][tap], then of each pair of channel
// groups its part of dL/da, but for the last operation's, which is zero.
constexpr int kMixtureSums = kOperations - 1;
NASLORA_HOST_DEVICE constexpr int64_t kernel_sums(int64_t c) { return c * c * kFoldedTaps; }

constexpr int kTile = 16;
constexpr int kSide = kTile + 2 * kReach;
constexpr int kThreads = kTile * kTile / 2;  // each has two pixels, one below the other

// How maps are cut into tiles of equal size, but for the last ones.
struct Tiling {
  int height, width, rows, columns, down, across;

  static Tiling of(int64_t height, int64_t width) {
    Tiling t;
    t.height = static_cast<int>(height), t.width = static_cast<int>(width);
    t.rows = static_cast<int>(ceil_div(height, ceil_div(height, kTile)));
    t.columns = static_cast<int>(ceil_div(width, ceil_div(width, kTile)));
    t.down = static_cast<int>(ceil_div(height, t.rows));
    t.across = static_cast<int>(ceil_div(width, t.columns));
    return t;
  }
  int64_t count(int64_t batch) const { return batch * down * across; }

  // Small tiles do with half of the threads.
  int threads() const { return rows * 2 <= kTile ? kThreads / 2 : kThreads; }
};

struct Tile {
  int64_t image;
  int y, x, rows, columns;  // of the map's pixels

  __device__ Tile(const Tiling& tiling, int index) {
    const int row = index / tiling.across;
    image = row / tiling.down;
    y = row % tiling.down * tiling.rows;
    x = index % tiling.across * tiling.columns;
    rows = tiling.rows < tiling.height - y ? tiling.rows : tiling.height - y;
    columns = tiling.columns < tiling.width - x ? tiling.columns : tiling.width - x;
  }
};

// Where the numbers of a staged tile lie: planes, or N channels of a pixel side by side.
struct Planes {
  static constexpr int kHalo = kReach, kRow = kSide, kPixel = 1, kChannel = kSide * kSide;
  static constexpr int kOrigin = kReach * kRow + kReach;  // of the tile's first pixel
};
template <int N, int Halo, int Row>
struct Interleaved {
  static constexpr int kHalo = Halo, kRow = Row * N, kPixel = N, kChannel = 1;
  static constexpr int kOrigin = Halo * (kRow + kPixel);
  static constexpr int kSize = (kTile + 2 * Halo) * kRow;
};

__device__ inline int64_t channel_at(const int64_t* channels, int64_t i) {
  return channels ? channels[i] : i;
}

// Brings channels `first` .. `first` + N of S to shared memory; beside the
// map and beyond c lie zeros.
template <typename S, int N, typename Layout>
__device__ void stage(const Map& map, const Maps& maps, int64_t first, const Tiling& tiling,
                      const Tile& tile, AccumulatorOf<S>* to) {
  constexpr int kHalo = Layout::kHalo;
  const int n = threadIdx.x % N, width = tile.columns + 2 * kHalo;
  const int pixels = (tile.rows + 2 * kHalo) * width;
  const bool there = first + n < maps.c;
  const S* from = static_cast<const S*>(map.data) + tile.image * map.stride[0];
  if (there) from += channel_at(maps.channels, first + n) * map.stride[3];
#pragma unroll 4
  for (int i = threadIdx.x / N; i < pixels; i += blockDim.x / N) {
    const int row = i / width, column = i % width;
    const int y = tile.y + row - kHalo, x = tile.x + column - kHalo;
    S value{};
    if (there && y >= 0 && y < tiling.height && x >= 0 && x < tiling.width)
      value = from[y * map.stride[1] + x * map.stride[2]];
    to[row * Layout::kRow + column * Layout::kPixel + n * Layout::kChannel] = widen(value);
  }
}

// The thread's two pixels of a tile: in columns of lanes, so that no two lanes meet in a bank.
struct Pixels {
  int row, column;

  __device__ Pixels() : row(threadIdx.x / kTile * 2), column(threadIdx.x % kTile) {}
  __device__ int offset() const { return Planes::kOrigin + row * Planes::kRow + column; }
  __device__ bool inside(const Tile& tile, int i) const {
    return row + i < tile.rows && column < tile.columns;
  }
};

// ---- The 3x3 window of the poolings --------------------------------------------------------

template <typename A>
struct Window {
  A average, maximum;
  int winner;  // which of the nine pixels, row by row, has the maximum

  // Around pixel (y, x) of the map, at `at` in a staged tile. Pixels beside the map do not count.
  // If nothing is larger than -inf, the first pixel wins.
  __device__ Window(const A* at, int row, int pixel, int y, int x, const Tiling& tiling) {
    A sum = 0;
    maximum = -static_cast<A>(HUGE_VAL);
    winner = (y == 0) * 3 + (x == 0);
#pragma unroll 1
    for (int dy = -1; dy <= 1; ++dy) {
#pragma unroll
      for (int dx = -1; dx <= 1; ++dx) {
        const A value = at[dy * row + dx * pixel];
        if (y + dy < 0 || y + dy >= tiling.height || x + dx < 0 || x + dx >= tiling.width) continue;
        sum += value;
        if (max_pool_takes(value, maximum)) maximum = value, winner = (dy + 1) * 3 + dx + 1;
      }
    }
    average = sum * pool_share<A>(y, x, tiling.height, tiling.width);
  }
};

// ---- Convolutions --------------------------------------------------------------------------

// Numbers that one instruction brings from shared memory, or, of doubles, two.
template <typename A, int N>
struct alignas(sizeof(A) * N < 16 ? sizeof(A) * N : 16) Pack {
  A lane[N];
};
template <int N, typename A>
__device__ inline Pack<A, N> load_pack(const A* from) {
  return *reinterpret_cast<const Pack<A, N>*>(from);
}

// sum[pixel][n] += weight[n] * plane[pixel + offset]
template <int N, typename A>
__device__ inline void add_tap(const A* plane, int offset, const A* weight, A (&sum)[2][N]) {
  const Pack<A, N> w = load_pack<N>(weight);
  const A above = plane[offset], below = plane[offset + Planes::kRow];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[0][n] += w.lane[n] * above;
    sum[1][n] += w.lane[n] * below;
  }
}
template <int N, typename A>
__device__ inline void add(const A (&part)[2][N], A (&sum)[2][N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) sum[0][n] += part[0][n], sum[1][n] += part[1][n];
}

// One row of taps in columns kX.
template <int... kX>
struct TapRow {
  template <int N, typename A>
  __device__ static void add(const A* plane, const A* weights, A (&sum)[2][N]) {
    int tap = 0;
    (add_tap<N>(plane, kX, weights + N * tap++, sum), ...);
  }
  // Whether these are the taps from `first` on.
  static constexpr bool are(int first, int dy) {
    int tap = first;
    return ((kTaps.dy[tap] == dy && kTaps.dx[tap++] == kX) && ...);
  }
};
using FarRow = TapRow<-4, -2, 0, 2, 4>;           // 4 from the centre's
using WideRow = TapRow<-4, -2, -1, 0, 1, 2, 4>;   // 2 from it, and itself
using NearRow = TapRow<-2, -1, 0, 1, 2>;          // 1 from it
static_assert(FarRow::are(0, -4) && WideRow::are(5, -2) && NearRow::are(12, -1) &&
                  WideRow::are(17, 0) && NearRow::are(24, 1) && WideRow::are(29, 2) &&
                  FarRow::are(36, 4),
              "the seven rows of the 41 taps");

// sum += the convolution of a plane with the weights [tap][n] of a folded cell. The sums are of few
// terms, whose rounding errors stay small; the loop keeps ptxas from loading all taps at once.
template <int N, typename A>
__device__ inline void convolve(const A* plane, const A* weights, A (&sum)[2][N]) {
#pragma unroll 1
  for (int side = -1; side <= 1; side += 2) {
    A part[2][N] = {};
    FarRow::add<N>(plane + side * 4 * Planes::kRow, weights + (side < 0 ? 0 : 36) * N, part);
    WideRow::add<N>(plane + side * 2 * Planes::kRow, weights + (side < 0 ? 5 : 29) * N, part);
    NearRow::add<N>(plane + side * Planes::kRow, weights + (side < 0 ? 12 : 24) * N, part);
    add(part, sum);
  }
  A part[2][N] = {};
  WideRow::add<N>(plane, weights + 17 * N, part);
  add(part, sum);
}

// Which convolution one of the 68 depthwise taps belongs to, and that convolution's parameter: chosen
// without an index, which would bring the kernel's arguments to memory.
__device__ inline int operation_of(int tap) {
  return (tap >= weight_start(1)) + (tap >= weight_start(2)) + (tap >= weight_start(3));
}
__device__ inline Parameter of_operation(const Parameter (&p)[kConvolutions], int op) {
  return op < 2 ? (op == 0 ? p[0] : p[1]) : (op == 2 ? p[2] : p[3]);
}

// A cell's parameters of N input and N output channels; 0 where there are fewer.
template <typename A, int N>
struct SharedParameters {
  A* pw;  // [operation][out][in]
  A* dw;  // [in][tap of all four]
  int64_t first_out, first_in;

  NASLORA_HOST_DEVICE void take(Carver& carver) {
    pw = carver.take<A>(kConvolutions * N * N);
    dw = carver.take<A>(N * kAllWeightTaps);
  }
  __device__ A pointwise(int op, int64_t out, int64_t in) const {
    return pw[(op * N + out - first_out) * N + in - first_in];
  }
  __device__ A depthwise(int op, int64_t in, int tap) const {
    return dw[(in - first_in) * kAllWeightTaps + weight_start(op) + tap];
  }

  __device__ void stage(const Cell& cell, int64_t out, int64_t in) {
    first_out = out, first_in = in;
    for_block(kConvolutions * N * N, [&](int i) {
      const int op = i / (N * N), o = i / N % N, n = i % N;
      A value = 0;
      if (out + o < cell.c && in + n < cell.c)
        value = read<A>(cell.pw, (op * cell.c + out + o) * cell.c + in + n);
      pw[i] = value;
    });
    for_block(N * kAllWeightTaps, [&](int i) {
      const int n = i / kAllWeightTaps, t = i % kAllWeightTaps;
      const int op = operation_of(t), index = t - weight_start(op);
      A value = 0;
      if (in + n < cell.c)
        value = read<A>(of_operation(cell.dw, op), (in + n) * weight_taps(op) + index);
      dw[i] = value;
    });
  }
};

// K of N sources and N targets as `convolve` takes it: [source][tap][target]. The transposed K has
// the taps of the opposite pixels, which come in the opposite order.
template <typename A, int N>
__device__ void fold(const SharedParameters<A, N>& parameters, const A* mixture,
                     const TapTable& taps, bool transposed, A* weights) {
  for_block(N * kFoldedTaps * N, [&](int i) {
    const int target = i % N, tap = i / N % kFoldedTaps, source = i / (N * kFoldedTaps);
    const int64_t out = parameters.first_out + (transposed ? source : target);
    const int64_t in = parameters.first_in + (transposed ? target : source);
    weights[i] = folded_weight(parameters, mixture, out, in,
                               transposed ? kFoldedTaps - 1 - tap : tap, taps);
  });
}

__device__ const TapTable kDeviceTaps = make_tap_table();

struct Exponential {
  __device__ float operator()(float x) const { return expf(x); }
  __device__ double operator()(double x) const { return exp(x); }
};

// The table of taps and a = softmax(alpha), which one thread computes while others stage a tile.
template <typename A>
struct SharedMixture {
  TapTable* taps;
  A* a;

  NASLORA_HOST_DEVICE void take(Carver& carver) {
    taps = carver.take<TapTable>(1);
    a = carver.take<A>(kOperations);
  }
  __device__ void stage(const Parameter& alpha) const {
    const auto* table = reinterpret_cast<const uint32_t*>(&kDeviceTaps);
    for_block(sizeof(TapTable) / sizeof *table, [&](int i) {  reinterpret_cast<uint32_t*>(taps)[i] = table[i]; });
    if (threadIdx.x != blockDim.x - 1) return;
    A logits[kOperations];
#pragma unroll
    for (int i = 0; i < kOperations; ++i) logits[i] = read<A>(alpha, i);
    softmax(logits, a, Exponential());
  }
};

}  // namespace naslora
