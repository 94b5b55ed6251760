// Maps cut into tiles, tiles in shared memory, and what is done with them.
//
// A tile has at most 16x16 pixels, so one of SAM's windows of 14x14 is one tile. With a halo of
// four pixels a channel of a tile is a plane of 24x24 numbers, zero outside the image, and a tap is
// a constant offset. Kernels work on N channels at a time, so that any number of channels fits. N
// is 2 for cells with at most 2 channels and in float64, else 4.
#pragma once

#include "common.cuh"

namespace naslora {

constexpr int kFewChannels = 2, kMostChannels = 4;  // values of N

constexpr int kTile = 16;
constexpr int kSide = kTile + 2 * kReach;
constexpr int kThreads = kTile * kTile / 2;  // each has two pixels, one below the other

// All tiles of an image have the same size, except the last ones down and across, which may be
// smaller.
struct Tiling {
  int height, width;  // of an image
  int rows, columns;  // of a tile
  int down, across;   // tiles of an image

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

  // Small tiles need only half of the threads.
  int threads() const { return rows * 2 <= kTile ? kThreads / 2 : kThreads; }
};

struct Tile {
  int64_t image;
  int y, x;           // its first pixel
  int rows, columns;  // of pixels

  __device__ Tile(const Tiling& tiling, int index) {
    const int row = index / tiling.across;
    image = row / tiling.down;
    y = row % tiling.down * tiling.rows;
    x = index % tiling.across * tiling.columns;
    rows = tiling.rows < tiling.height - y ? tiling.rows : tiling.height - y;
    columns = tiling.columns < tiling.width - x ? tiling.columns : tiling.width - x;
  }
};

// The two layouts of a tile in shared memory: planes, or the N channels of a pixel side by side.
struct Planar {
  static constexpr int kHalo = kReach;
  static constexpr int kRowStride = kSide, kPixelStride = 1, kChannelStride = kSide * kSide;
  static constexpr int kOrigin = kReach * kRowStride + kReach;  // of the tile's first pixel
};
template <int N, int Halo, int Row>
struct Interleaved {
  static constexpr int kHalo = Halo;
  static constexpr int kRowStride = Row * N, kPixelStride = N, kChannelStride = 1;
  static constexpr int kOrigin = Halo * (kRowStride + kPixelStride);
  static constexpr int kSize = (kTile + 2 * Halo) * kRowStride;
};

// The i-th selected channel, within the map whatever `channels` holds: the host checks its values
// once, and they may change later without its notice.
__device__ inline int64_t selected_channel(const CellShape& shape, int64_t i) {
  return shape.channels ? larger(0, smaller(load_element(shape.channels + i), shape.rank - 1)) : i;
}

// Brings the selected channels first, ..., first + N - 1 of a tile and its halo to shared memory.
// Pixels outside the image and channels beyond c are zero. A thread goes down one column of one
// channel, so that it computes for each number hardly more than whether the row is in the image.
template <typename S, int N, typename Layout>
__device__ void load_tile(const Map& map, const CellShape& shape, int64_t first,
                          const Tiling& tiling, const Tile& tile, AccumulatorOf<S>* to) {
  constexpr int kHalo = Layout::kHalo;
  const int height = tile.rows + 2 * kHalo, lanes = (tile.columns + 2 * kHalo) * N;
  const int threads = static_cast<int>(blockDim.x), rows = threads < lanes ? 1 : threads / lanes;
  const int first_row = threadIdx.x / lanes;
  if (first_row >= rows) return;
  const int64_t step = rows * map.stride[1];
  for (int lane = threadIdx.x % lanes; lane < lanes; lane += threads) {
    const int n = lane % N, column = lane / N, x = tile.x + column - kHalo, y = tile.y - kHalo;
    const bool exists = first + n < shape.c && x >= 0 && x < tiling.width;
    const S* from = static_cast<const S*>(map.data) + tile.image * map.stride[0];
    if (exists)
      from += selected_channel(shape, first + n) * map.stride[3] + x * map.stride[2] +
              (y + first_row) * map.stride[1];
    AccumulatorOf<S>* into = to + first_row * Layout::kRowStride + column * Layout::kPixelStride +
                             n * Layout::kChannelStride;
#pragma unroll 4
    for (int row = first_row; row < height; row += rows) {
      S value{};
      if (exists && static_cast<unsigned>(y + row) < static_cast<unsigned>(tiling.height))
        value = load_element(from);
      *into = widen(value);
      from += step, into += rows * Layout::kRowStride;
    }
  }
}

// The thread's two pixels of a tile, one below the other. Neighbouring lanes have neighbouring
// columns, so that no two lanes of a warp read the same bank of shared memory.
struct Pixels {
  int row, column;

  __device__ Pixels() : row(threadIdx.x / kTile * 2), column(threadIdx.x % kTile) {}
  __device__ int offset() const { return Planar::kOrigin + row * Planar::kRowStride + column; }
  __device__ bool inside(const Tile& tile, int i) const {
    return row + i < tile.rows && column < tile.columns;
  }
};

// ---- Writing maps --------------------------------------------------------------------------

// Writes the thread's pixels of the selected channels first, ..., first + N - 1 of a contiguous
// (B, H, W, r) map.
template <typename S, int N>
__device__ void store_pixels(const AccumulatorOf<S> (&sum)[2][N], const CellShape& shape,
                             int64_t first, const Tiling& tiling, const Tile& tile,
                             const Pixels& pixels, S* out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!pixels.inside(tile, i)) continue;
    const int64_t row = tile.image * tiling.height + tile.y + pixels.row + i;
    S* to = out + (row * tiling.width + tile.x + pixels.column) * shape.rank;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (first + n < shape.c) to[selected_channel(shape, first + n)] = Narrow<S>::from(sum[i][n]);
  }
}

// Copies a tile of the rest of the channels. `selected` is shared memory for kChannelsAtOnce flags.
constexpr int kChannelsAtOnce = 512;
template <typename S>
__device__ void copy_rest(const Map& map, const CellShape& shape, const Tiling& tiling,
                          const Tile& tile, char* selected, S* out) {
  const S* from = static_cast<const S*>(map.data) + tile.image * map.stride[0];
  for (int64_t first = 0; first < shape.rank; first += kChannelsAtOnce) {
    const int count = static_cast<int>(smaller(kChannelsAtOnce, shape.rank - first));
    __syncthreads();
    for_block(count, [&](int i) { selected[i] = false; });
    __syncthreads();
    for_block(shape.c, [&](int i) {
      const int64_t k = shape.channels[i] - first;
      if (k >= 0 && k < count) selected[k] = true;
    });
    __syncthreads();
    for_block(tile.rows * tile.columns * count, [&](int i) {
      const int k = i % count, column = i / count % tile.columns, row = i / count / tile.columns;
      if (selected[k]) return;
      const int64_t y = tile.y + row, x = tile.x + column;
      out[((tile.image * tiling.height + y) * tiling.width + x) * shape.rank + first + k] =
          load_element(from + y * map.stride[1] + x * map.stride[2] + (first + k) * map.stride[3]);
    });
  }
}

// ---- The 3x3 window of the poolings --------------------------------------------------------

template <typename A>
struct Window {
  A average, maximum;
  int argmax;  // drawing in cell_math.h

  // The window of pixel (y, x) of the image, which is at `at` in shared memory. Pixels outside the
  // image do not count. If no value is larger than -inf, the first pixel in the image is the
  // argmax.
  __device__ Window(const A* at, int row_stride, int pixel_stride, int y, int x,
                    const Tiling& tiling) {
    A sum = 0;
    maximum = -static_cast<A>(HUGE_VAL);
    argmax = (y == 0) * 3 + (x == 0);
#pragma unroll 1
    for (int dy = -1; dy <= 1; ++dy) {
#pragma unroll
      for (int dx = -1; dx <= 1; ++dx) {
        const A value = at[dy * row_stride + dx * pixel_stride];
        if (y + dy < 0 || y + dy >= tiling.height || x + dx < 0 || x + dx >= tiling.width) continue;
        sum += value;
        if (max_pool_takes(value, maximum)) maximum = value, argmax = window_index(dy, dx);
      }
    }
    average = sum * inverse_window_size<A>(y, x, tiling.height, tiling.width);
  }
};

}  // namespace naslora
