// How attention is cut into tiles of scores, and how its operands come into the cache.
//
//           queries of a block
//            q q q q q q q q
//     keys k s s s s s s s s
//     of a k s s s s s s s s
//    block k s s s s s s s s
//
// A tile of scores is stored as (keys, queries): a vector holds scores of several queries and one
// key. So sums over keys, over rows and over columns of the grid add whole vectors, whatever the
// grid's width.
//
// A tile and the keys, values and gradients that belong to it fit the L2 cache. 16-bit numbers are
// widened when they are copied there.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "products.h"

namespace naslora {
namespace {

constexpr int64_t kQueryBlock = 128, kKeyBlock = 256;  // of a tile, at most
// A head is cut into parts of at least kPartTokens queries, until there are kWantedTasks tasks.
// These are few, as every part sums gradients of keys and values in memory of its own.
constexpr int64_t kWantedTasks = 24, kPartTokens = 1024;

struct QueryBlock {
  int64_t index, first, count;
};

// Keys (row + i) * W + column + j for i < rows and j < columns. There are several rows only if
// columns = W, so the keys are consecutive.
struct KeyBlock {
  int64_t row, rows, column, columns;
  int64_t first, count;
};

struct AttentionPlan {
  const Attention& a;
  int64_t tokens = 0;                         // H W, the keys
  int64_t query_block = 0, query_blocks = 0;  // queries of a block, whole vectors
  int64_t block_rows = 0, down = 0;           // rows of the grid in a block of keys; blocks of rows
  int64_t block_columns = 0, across = 0;      // columns of the grid; blocks of columns
  int64_t keys = 0;                           // of a block, at most
  int64_t width = 0;                          // of rows of q, k and v: d in whole vectors
  int64_t stride = 0;        // of rows that have a number for each query of a block
  int64_t images_heads = 0;  // batch * heads
  int64_t parts = 0, tasks = 0;

  template <typename A>
  static AttentionPlan of(const Attention& a) {
    AttentionPlan p = {a};
    p.tokens = a.height * a.width;
    p.query_block = round_up(ceil_div(a.queries, ceil_div(a.queries, kQueryBlock)), kLanes<A>);
    p.query_blocks = ceil_div(a.queries, p.query_block);
    p.across = ceil_div(a.width, kKeyBlock);
    p.block_columns = ceil_div(a.width, p.across);
    const int64_t most_rows = p.across > 1 ? 1 : larger(1, kKeyBlock / a.width);
    p.block_rows = ceil_div(a.height, ceil_div(a.height, most_rows));
    p.down = ceil_div(a.height, p.block_rows);
    p.keys = p.block_rows * p.block_columns;
    p.width = round_up(a.dim, kLanes<A>);
    // An odd number of vectors: rows at a power of two would share few sets of the L1 cache.
    p.stride = ceil_div(round_up(p.query_block, kBlockRows), kLanes<A>) / 2 * 2 + 1;
    p.stride *= kLanes<A>;
    p.images_heads = a.batch * a.heads;
    const int64_t wanted = ceil_div(kWantedTasks, larger(1, p.images_heads));
    p.parts = larger(1, smaller(wanted, a.queries / kPartTokens));
    p.tasks = p.images_heads * p.parts;
    return p;
  }

  int64_t key_blocks() const { return down * across; }
  KeyBlock keys_of(int64_t index) const {
    KeyBlock b;
    b.row = index / across * block_rows;
    b.rows = smaller(block_rows, a.height - b.row);
    b.column = index % across * block_columns;
    b.columns = smaller(block_columns, a.width - b.column);
    b.first = b.row * a.width + b.column;
    b.count = b.rows * b.columns;
    return b;
  }
  QueryBlock queries_of(int64_t index) const {
    const int64_t first = index * query_block;
    return {index, first, smaller(query_block, a.queries - first)};
  }
  // The first block of queries of a part; for part `parts`, the end.
  int64_t first_of_part(int64_t part) const { return part * query_blocks / parts; }
  int64_t most_of_part() const { return ceil_div(query_blocks, parts); }
};

// The rows of one head of a tensor (B, heads, tokens, features).
template <typename S>
struct HeadRows {
  const S* data;
  int64_t stride;

  HeadRows(const Tokens& t, const Attention& a, int64_t head)
      : data(static_cast<const S*>(t.data) + head / a.heads * t.stride[0] +
             head % a.heads * t.stride[1]),
        stride(t.stride[2]) {}
  const S* operator[](int64_t token) const { return data + token * stride; }
};

// out (count, width) = scale * rows, with zeros behind their features. The rows may be far apart,
// as those of a joint projection are, so the hardware does not prefetch them.
template <typename S, typename A>
void load_rows(const HeadRows<S>& rows, int64_t first, int64_t count, int64_t features, A scale,
               A* out, int64_t width) {
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; ++i) {
    const S* from = rows[first + i];
    if (i + kAhead < count)
      for (int64_t c = 0; c < features; c += kLine)
        __builtin_prefetch(rows[first + i + kAhead] + c);
    A* to = out + i * width;
    for (int64_t c = 0; c < features; ++c) to[c] = scale * widen(from[c]);
    for (int64_t c = features; c < width; ++c) to[c] = 0;
  }
}

// out (features, stride) = the rows transposed. Up to whole vectors it ends with zeros.
template <typename S, typename A>
void load_transposed(const HeadRows<S>& rows, int64_t first, int64_t count, int64_t features,
                     A scale, A* out, int64_t stride) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const S* from = rows[first + i];
    const int64_t own = smaller(kLanes<A>, count - i);
    for (int64_t c = 0; c < features; ++c) {
      A* to = out + c * stride + i;
      if (own == kLanes<A>) {
        for (int j = 0; j < kLanes<A>; ++j) to[j] = scale * widen(from[j * rows.stride + c]);
      } else {
        for (int64_t j = 0; j < own; ++j) to[j] = scale * widen(from[j * rows.stride + c]);
        for (int64_t j = own; j < kLanes<A>; ++j) to[j] = 0;
      }
    }
  }
}

// The row of a token in an output (B, tokens, heads, d), of queries or of keys.
template <typename S>
S* row_of(void* out, const Attention& a, int64_t head, int64_t tokens, int64_t token) {
  token += head / a.heads * tokens;
  return static_cast<S*>(out) + (token * a.heads + head % a.heads) * a.dim;
}

// Writes rows of d numbers to an output (B, tokens, heads, d).
template <typename S, typename A>
void store_rows(const A* from, int64_t width, int64_t count, A scale, const Attention& a,
                int64_t head, int64_t tokens, int64_t first, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    S* to = row_of<S>(out, a, head, tokens, first + i);
    for (int64_t c = 0; c < a.dim; ++c) to[c] = Narrow<S>::from(scale * from[i * width + c]);
  }
}

}  // namespace
}  // namespace naslora
