// A cell after the search: one convolution, given ready, and the poolings that kept a weight. The
// planes and the loops are those of cpu_cell.h.
#pragma once

#include "cpu_cell.h"
#include "cpu_low_rank.h"

namespace {

using naslora::FoldedCell;

// The taps of a (c, c, k, k) kernel that any pair of channels uses: weights and offsets as
// `stencil` takes them. A kernel folded from the four convolutions has 41 of 81.
template <typename S>
struct Taps {
  using A = typename Tiles<S>::A;

  int64_t sources = 0;
  Buffer<A> weight;
  Buffer<int64_t> offset;

  Taps(const Tiles<S>& tiles, const A* kernel, int64_t size)
      : weight(tiles.c * tiles.c * size * size), offset(tiles.c * size * size) {
    const int64_t c = tiles.c, window = size * size;
    Buffer<int64_t> used(window);
    int64_t count = 0;
    for (int64_t t = 0; t < window; ++t) {
      bool any = false;
      for (int64_t pair = 0; pair < c * c; ++pair) any |= kernel[pair * window + t] != 0;
      if (any) used[count++] = t;
    }
    sources = c * count;
    for (int64_t in = 0; in < c; ++in) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t dy = used[n] / size - size / 2, dx = used[n] % size - size / 2;
        offset[in * count + n] = in * tiles.layout.plane + dy * tiles.layout.pitch + dx;
        for (int64_t out = 0; out < c; ++out)
          weight[blocked(in * count + n, sources, out, c)] =
              kernel[(out * c + in) * window + used[n]];
      }
    }
  }
};

template <typename S>
void folded_cell(const FoldedCell& cell, void* out) {
  using A = typename Tiles<S>::A;
  const Tiles<S> tiles(cell);
  const Taps<S> taps(tiles, static_cast<const A*>(cell.kernel), cell.kernel_size);
  const Layout& layout = tiles.layout;
  const int64_t c = tiles.c;
  const A average = static_cast<A>(cell.average), largest = static_cast<A>(cell.maximum);

  parallel_tasks(layout.tasks, [&](int64_t first_task, int64_t last_task) {
    A *z, *y, *reciprocal, *padded, *row_sum, *row_maximum;
    const auto carve = [&](Arena arena) {
      z = arena.template take<A>(c * layout.plane);
      y = arena.template take<A>(c * layout.plane);
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
      tiles.gather(cell.z, tile, z);
      if (index == first || layout.bands > 1) tiles.pool_geometry(tile, reciprocal);
      tiles.stencil(z, taps.offset.data(), taps.weight.data(), taps.sources, y, c, tiles.start(0),
                    tiles.count(tile, 0), false);
      const auto pool = [&](auto has_average, auto has_maximum) {
        for (int64_t i = 0; i < c; ++i)
          add_pools<decltype(has_average)::value, decltype(has_maximum)::value>(
              tiles, tile, average, largest, z + i * layout.plane, reciprocal, padded, row_sum,
              row_maximum, y + i * layout.plane);
      };
      if (average != 0 && largest != 0) pool(std::true_type{}, std::true_type{});
      if (average != 0 && largest == 0) pool(std::true_type{}, std::false_type{});
      if (average == 0 && largest != 0) pool(std::false_type{}, std::true_type{});
      tiles.scatter(y, cell.z, tile, out);
    }
  });
}

// The adapter's part of a folded layer in one call: maps this small cost less than a call does.
template <typename S>
void folded_update(const naslora::FoldedUpdate& p) {
  FoldedCell cell = p.cell;
  const int64_t c = cell.c, tokens = cell.batch * cell.height * cell.width;
  const Buffer<S> z(tokens * c), y(tokens * c);
  low_rank_pass<S>({cell.dtype, p.x, p.x_stride, tokens, p.columns, c, 1.0, p.encoder, z.data(),
                    nullptr, nullptr, 0, 0});
  cell.z = {z.data(), {cell.height * cell.width * c, cell.width * c, c, 1}};
  folded_cell<S>(cell, y.data());
  low_rank_expand<S>(
      {cell.dtype, y.data(), p.decoder, p.bias, tokens, p.out_columns, c, 1.0, p.h});
}

}  // namespace
