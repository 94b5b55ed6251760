// A cell after the search: one convolution with a kernel given by the caller, and the poolings that
// kept a weight.
#pragma once

#include "cell_forward.h"
#include "low_rank.h"

namespace naslora {
namespace {

// The taps of a (c, c, k, k) kernel that are not zero for every pair of channels, as weights and
// offsets of `stencil`. A kernel folded from the four convolutions has 41 such taps of 81.
template <typename S>
struct NonzeroTaps {
  using A = typename Tiles<S>::A;

  int64_t terms = 0;  // (in, tap)
  Buffer<A> weight;
  Buffer<int64_t> offset;

  NonzeroTaps(const Tiles<S>& tiles, const A* kernel, int64_t kernel_size)
      : weight(tiles.c * tiles.c * kernel_size * kernel_size),
        offset(tiles.c * kernel_size * kernel_size) {
    const int64_t c = tiles.c, taps = kernel_size * kernel_size, half = kernel_size / 2;
    Buffer<int64_t> used(taps);
    int64_t count = 0;
    for (int64_t t = 0; t < taps; ++t) {
      bool any = false;
      for (int64_t pair = 0; pair < c * c; ++pair) any |= kernel[pair * taps + t] != 0;
      if (any) used[count++] = t;
    }
    terms = c * count;
    for (int64_t in = 0; in < c; ++in) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t dy = used[n] / kernel_size - half, dx = used[n] % kernel_size - half;
        offset[in * count + n] = in * tiles.tiling.plane_size + dy * tiles.tiling.row_stride + dx;
        for (int64_t out = 0; out < c; ++out)
          weight[blocked_index(in * count + n, terms, out, c)] =
              kernel[(out * c + in) * taps + used[n]];
      }
    }
  }
};

template <typename S>
void folded_cell(const FoldedCell& cell, void* out) {
  using A = typename Tiles<S>::A;
  const Tiles<S> tiles(cell);
  const NonzeroTaps<S> taps(tiles, static_cast<const A*>(cell.kernel), cell.kernel_size);
  const auto convolve = [&](const Tile& tile, const ForwardScratch<S>& s) {
    tiles.stencil(s.z, taps.offset.data(), taps.weight.data(), taps.terms, s.y, tiles.c,
                  tiles.begin(0), tiles.count(tile, 0), false);
  };
  forward_tiles<true, S, A>(tiles, cell.z, static_cast<A>(cell.avg_weight),
                            static_cast<A>(cell.max_weight), 0, out, convolve);
}

// The adapter's part of a folded layer. It is one function because a call from Python costs more
// time than the cell of a small map.
template <typename S>
void folded_update(const FoldedUpdate& p) {
  FoldedCell cell = p.cell;
  const int64_t c = cell.c, tokens = cell.batch * cell.height * cell.width;
  const Buffer<S> z(tokens * c), y(tokens * c);

  LowRankPass encode = {};
  encode.dtype = cell.dtype;
  encode.x = p.x, encode.x_stride = p.x_stride;
  encode.tokens = tokens, encode.features = p.in_features, encode.rank = c;
  encode.scale = 1;
  encode.factor = p.encoder, encode.product = z.data();
  low_rank_pass<S>(encode);

  cell.z = {z.data(), {cell.height * cell.width * c, cell.width * c, c, 1}};
  folded_cell<S>(cell, y.data());

  low_rank_expand<S>(
      {cell.dtype, y.data(), p.decoder, p.bias, tokens, p.out_features, c, 1.0, p.h});
}

}  // namespace
}  // namespace naslora
