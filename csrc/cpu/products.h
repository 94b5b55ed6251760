// Products of matrices that are in the cache, by blocks that stay in registers.
//
// c (rows, columns) = a (rows, depth) b (depth, columns). A block is kBlockRows rows of c times
// some vectors. For every k it multiplies each of its numbers a(i, k) with vectors of row k of b.
// So a may have any strides, and its transpose costs nothing. The rows of b are contiguous.
#pragma once

#include "vector.h"

namespace naslora {
namespace {

// The sums of a block, a row of b and one number of a fit the 16 or 32 vector registers.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
// So many rows of the vectors of b that a block reads stay in the L1 cache while all rows of a
// pass.
constexpr int64_t kPanelDepth = 128;

// a(i, k) is data[i * row + k * step].
template <typename A>
struct LeftMatrix {
  const A* data;
  int64_t row, step;
};

template <typename A, int V>
inline void block_product(const LeftMatrix<A>& a, const A* b, int64_t b_row, int64_t depth,
                          bool accumulate, A* c, int64_t c_row) {
  Vec<A> sum[kBlockRows][V] = {};
  const A* left = a.data;
  const int64_t row = a.row, step = a.step;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 6
    for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += left[i * row] * right[v];
    left += step;
    b += b_row;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kBlockRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = c + i * c_row + v * kLanes<A>;
      store<A>(to, accumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
}

// c = a b, or c += a b. Whole blocks of rows and whole vectors of columns are computed. So a and c
// have `rows` rounded up to kBlockRows, and b and c have `columns` rounded up to whole vectors.
template <typename A>
void product(int64_t rows, int64_t columns, int64_t depth, LeftMatrix<A> a, const A* b,
             int64_t b_row, bool accumulate, A* c, int64_t c_row) {
  const int64_t vectors = ceil_div(columns, kLanes<A>);
  for (int64_t k = 0; k < depth; k += kPanelDepth) {
    const int64_t steps = smaller(kPanelDepth, depth - k);
    for (int64_t v = 0; v < vectors; v += kBlockVectors) {
      const A* panel = b + k * b_row + v * kLanes<A>;
      with_constant(smaller(kBlockVectors, vectors - v), [&](auto size) {
        for (int64_t i = 0; i < rows; i += kBlockRows)
          block_product<A, decltype(size)::value>({a.data + i * a.row + k * a.step, a.row, a.step},
                                                  panel, b_row, steps, accumulate || k > 0,
                                                  c + i * c_row + v * kLanes<A>, c_row);
      });
    }
  }
}

}  // namespace
}  // namespace naslora
