// Maps cut into tiles, and the planes of a tile.
//
// A tile is a band of whole rows of one image. Its selected channels are copied to planes, which
// stay in the cache:
//
//     position 0 ->  h h h h h 0 0 0 0    the halo: kReach rows above the tile, or zeros
//                    h h h h h 0 0 0 0
//     origin ----->  p p p p p 0 0 0 0    the tile: `width` pixels, then kReach zeros
//                    p p p p p 0 0 0 0    each row is `row_stride` positions after the last one
//                    h h h h h 0 0 0 0    the halo below
//                    h h h h h 0 0 0 0
//     plane_size ->  after some slack, as loops round up to whole vectors
//
// The zeros on the right of a row are also the halo on the left of the next row. So every tap is
// one constant offset, and a loop over a tile is a loop over a flat range of positions. The zeros
// cost a few wasted lanes, but vectors are full even on maps as small as 14x14.
#pragma once

#include <stdexcept>
#include <string>

#include "../shared/cell_math.h"
#include "memory.h"
#include "plane_loops.h"

namespace naslora {
namespace {

constexpr int64_t kTilePositions = 1024;  // planes of about 4 KiB: a few dozen fit the L2 cache
constexpr int64_t kMostTasks = 64;        // bounds the memory of partial sums

struct Tile {
  int64_t image, y, rows;  // y is the tile's first row
};

struct Tiling {
  int64_t rows;        // of a tile; the last tile of an image may have fewer
  int64_t down;        // tiles of an image
  int64_t tiles;       // of all images
  int64_t tasks;       // ranges of tiles
  int64_t row_stride;  // positions from one row to the next
  int64_t origin;      // position of the tile's first pixel
  int64_t plane_size;  // positions of a plane, slack included

  template <typename A>
  static Tiling of(const CellShape& shape) {
    Tiling t;
    t.row_stride = shape.width + kReach;
    const int64_t most_rows = smaller(shape.height, larger(8, kTilePositions / t.row_stride));
    t.rows = ceil_div(shape.height, ceil_div(shape.height, most_rows));
    t.down = ceil_div(shape.height, t.rows);
    t.tiles = shape.batch * t.down;
    t.tasks = larger(1, smaller(t.tiles, kMostTasks));        // sums of an empty batch are zero
    t.origin = round_up(kReach * t.row_stride + kReach, 16);  // most loads are then aligned
    const int64_t read_by_taps = t.origin + (t.rows + kReach) * t.row_stride;
    t.plane_size = round_up(read_by_taps + kMostVectors * kLanes<A>, 16);
    return t;
  }

  Tile tile(const CellShape& shape, int64_t index) const {
    const int64_t y = index % down * rows;
    return {index / down, y, smaller(rows, shape.height - y)};
  }
};

// The tiles of one call, and what is done with the planes of a tile.
template <typename S>
struct Tiles {
  using A = AccumulatorOf<S>;

  const CellShape& shape;
  const Tiling tiling;
  const int64_t c;
  Buffer<int64_t> selected, rest;  // channels

  explicit Tiles(const CellShape& shape)
      : shape(shape),
        tiling(Tiling::of<A>(shape)),
        c(shape.c),
        selected(shape.c),
        rest(shape.rank - shape.c) {
    // The channels are copied first: the caller's may change while the kernel runs.
    for (int64_t i = 0; i < c; ++i) selected[i] = shape.channels ? shape.channels[i] : i;
    int64_t others = 0, found = 0;
    for (int64_t k = 0; k < shape.rank; ++k) {
      bool is_selected = false;
      for (int64_t i = 0; i < c; ++i) is_selected |= selected[i] == k;
      if (is_selected)
        ++found;
      else if (others < shape.rank - c)
        rest[others++] = k;
    }
    if (found != c)
      throw std::invalid_argument("channels: expected distinct values in 0.." +
                                  std::to_string(shape.rank - 1));
  }

  // Calls body(tile, new_geometry) for the tiles of some tasks. `new_geometry` says whether the
  // tile lies elsewhere in its image than the tile before.
  template <typename Body>
  void for_tiles(int64_t first_task, int64_t last_task, const Body& body) const {
    const int64_t first = first_task * tiling.tiles / tiling.tasks;
    const int64_t last = last_task * tiling.tiles / tiling.tasks;
    for (int64_t index = first; index < last; ++index)
      body(tiling.tile(shape, index), index == first || tiling.down > 1);
  }

  // The positions from the first to the last pixel of a tile with `halo` more rows above and below.
  int64_t begin(int64_t halo) const { return tiling.origin - halo * tiling.row_stride; }
  int64_t count(const Tile& tile, int64_t halo) const {
    return (tile.rows + 2 * halo - 1) * tiling.row_stride + shape.width;
  }

  // Fills the planes of the selected channels with a tile and its halo.
  void load_tile(const Map& map, const Tile& tile, A* planes) const {
    fill<A>(planes, c * tiling.plane_size, 0);
    const int64_t first = larger(0, tile.y - kReach);
    const int64_t last = smaller(shape.height, tile.y + tile.rows + kReach);
    const S* image = static_cast<const S*>(map.data) + tile.image * map.stride[0];
    const int64_t width = shape.width, x_stride = map.stride[2];
    for (int64_t y = first; y < last; ++y) {
      A* to = planes + tiling.origin + (y - tile.y) * tiling.row_stride;
      for (int64_t i = 0; i < c; ++i) {
        const S* from = image + y * map.stride[1] + selected[i] * map.stride[3];
        for (int64_t x = 0; x < width; ++x)
          to[i * tiling.plane_size + x] = widen(from[x * x_stride]);
      }
    }
  }

  // Writes a tile of a contiguous (B, H, W, r) map: the selected channels from planes, the rest
  // from `map`.
  void store_tile(const A* planes, const Map& map, const Tile& tile, void* out) const {
    const int64_t r = shape.rank;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t y = tile.y + row;
      S* to = static_cast<S*>(out) + (tile.image * shape.height + y) * shape.width * r;
      const A* from = planes + tiling.origin + row * tiling.row_stride;
      for (int64_t i = 0; i < c; ++i)
        for (int64_t x = 0; x < shape.width; ++x)
          to[x * r + selected[i]] = Narrow<S>::from(from[i * tiling.plane_size + x]);
      const S* same =
          static_cast<const S*>(map.data) + tile.image * map.stride[0] + y * map.stride[1];
      for (int64_t i = 0; i < r - c; ++i) {
        const int64_t k = rest[i];
        for (int64_t x = 0; x < shape.width; ++x)
          to[x * r + k] = same[x * map.stride[2] + k * map.stride[3]];
      }
    }
  }

  // Fills a plane with 1 / (size of the 3x3 window) at pixels of the image and 0 outside. It also
  // tells where a plane has pixels of the image.
  void load_geometry(const Tile& tile, A* inverse_size) const {
    fill<A>(inverse_size, tiling.plane_size, 0);
    const int64_t first = larger(0, tile.y - kReach);
    const int64_t last = smaller(shape.height, tile.y + tile.rows + kReach);
    for (int64_t y = first; y < last; ++y) {
      A* row = inverse_size + tiling.origin + (y - tile.y) * tiling.row_stride;
      for (int64_t x = 0; x < shape.width; ++x)
        row[x] = inverse_window_size<A>(y, x, shape.height, shape.width);
    }
  }

  // out_o (+)= sum_s weight[s, o] * (source shifted by offset[s]) for any number of targets o. The
  // weights are in the order of blocked_index.
  void stencil(const A* source, const int64_t* offset, const A* weight, int64_t terms, A* out,
               int64_t targets, int64_t begin, int64_t count, bool accumulate) const {
    for_target_blocks(targets, [&](int64_t o, auto size) {
      stencil_block<A, decltype(size)::value>(source + begin, offset, weight + o * terms, terms,
                                              out + o * tiling.plane_size + begin,
                                              tiling.plane_size, count, accumulate);
    });
  }
};

}  // namespace
}  // namespace naslora
