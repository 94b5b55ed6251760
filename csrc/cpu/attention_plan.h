// How attention is cut into tiles of scores, and how its operands come into the cache.
//
//                 keys of a block: whole rows of the grid, or a part of one row
//                 k k k k k k k k |
//     queries   q s s s s s s s s |  <- a tile of scores
//     of a      q s s s s s s s s |
//     block     q s s s s s s s s |
//
// A tile and the keys, values and gradients that belong to it fit the L2 cache. 16-bit numbers are
// widened when they are copied there.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "products.h"

namespace naslora {
namespace {

constexpr int64_t kQueryBlock = 96;  // queries of a tile at most, a multiple of kBlockRows
constexpr int64_t kKeyBlock = 256;   // keys of a tile at most
// A head is cut into parts of at least kPartTokens queries, until there are kWantedTasks tasks.
// These are few, as every part sums gradients of keys and values in memory of its own.
constexpr int64_t kWantedTasks = 24, kPartTokens = 1024;
static_assert(kQueryBlock % kBlockRows == 0);

struct QueryBlock {
  int64_t first, count;
};

// Keys (row + i) * W + column + j for i < rows and j < columns. More than one row only if
// columns = W, so the keys are consecutive.
struct KeyBlock {
  int64_t row, rows, column, columns;
  int64_t first, count;
};

struct AttentionPlan {
  int64_t tokens;                     // N = H W
  int64_t query_block, query_blocks;  // queries of a block, a multiple of kBlockRows
  int64_t block_rows, down;           // rows of the grid in a block of keys; blocks of rows
  int64_t block_columns, across;      // columns of the grid; blocks of columns
  int64_t keys;                       // of a block, at most
  int64_t width;                      // of rows of q, k and v: d in whole vectors
  int64_t score_stride;               // from one row of scores to the next
  int64_t column_stride;              // of rows of rel_w
  int64_t panels;                     // numbers in the panels of a block of keys
  int64_t heads;                      // of all images
  int64_t parts, tasks;

  template <typename A>
  static AttentionPlan of(const Attention& a) {
    AttentionPlan p;
    p.tokens = a.height * a.width;
    p.query_block = round_up(ceil_div(p.tokens, ceil_div(p.tokens, kQueryBlock)), kBlockRows);
    p.query_blocks = ceil_div(p.tokens, p.query_block);
    p.across = ceil_div(a.width, kKeyBlock);
    p.block_columns = ceil_div(a.width, p.across);
    const int64_t most_rows = p.across > 1 ? 1 : larger(1, kKeyBlock / a.width);
    p.block_rows = ceil_div(a.height, ceil_div(a.height, most_rows));
    p.down = ceil_div(a.height, p.block_rows);
    p.keys = p.block_rows * p.block_columns;
    p.width = round_up(a.dim, kLanes<A>);
    // The last vector of a row of the grid, or of a block of rows of a product, may lie beyond.
    p.score_stride = round_up(p.keys, kLanes<A>) + round_up(kBlockRows, kLanes<A>);
    p.column_stride = round_up(p.block_columns, kLanes<A>);
    p.panels = round_up(p.keys, kPanel<A>) * a.dim;
    p.heads = a.batch * a.heads;
    const int64_t wanted = ceil_div(kWantedTasks, larger(1, p.heads));
    p.parts = larger(1, smaller(wanted, p.tokens / kPartTokens));
    p.tasks = p.heads * p.parts;
    return p;
  }

  int64_t key_blocks() const { return down * across; }

  KeyBlock key_block(const Attention& a, int64_t index) const {
    KeyBlock b;
    b.row = index / across * block_rows;
    b.rows = smaller(block_rows, a.height - b.row);
    b.column = index % across * block_columns;
    b.columns = smaller(block_columns, a.width - b.column);
    b.first = b.row * a.width + b.column;
    b.count = b.rows * b.columns;
    return b;
  }
  QueryBlock query(int64_t index) const {
    const int64_t first = index * query_block;
    return {first, smaller(query_block, tokens - first)};
  }
  // The first block of queries of a part; that of part `parts` is the end.
  int64_t first_query_block(int64_t part) const { return part * query_blocks / parts; }
  int64_t part_tokens() const { return ceil_div(query_blocks, parts) * query_block; }
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
  const S* row(int64_t token) const { return data + token * stride; }
};

// out (count, stride) = scale * columns first_column.. of rows first..; zeros behind the columns.
template <typename S, typename A>
void load_rows(const HeadRows<S>& rows, int64_t first, int64_t count, int64_t first_column,
               int64_t columns, A scale, A* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const S* from = rows.row(first + i) + first_column;
    A* to = out + i * stride;
    for (int64_t c = 0; c < columns; ++c) to[c] = scale * widen(from[c]);
    for (int64_t c = columns; c < stride; ++c) to[c] = 0;
  }
}

// Transposes rows into panels of (features, kPanel): the right matrix of a product with them. The
// last panel ends with zeros.
template <typename S, typename A>
void load_panels(const HeadRows<S>& rows, int64_t first, int64_t count, int64_t features, A* out) {
  for (int64_t j = 0; j < round_up(count, kPanel<A>); ++j) {
    A* to = out + j / kPanel<A> * kPanel<A> * features + j % kPanel<A>;
    const S* from = rows.row(first + j);
    for (int64_t c = 0; c < features; ++c) to[c * kPanel<A>] = j < count ? widen(from[c]) : A{0};
  }
}

// out_row[token] = a row of `features` numbers of an output (B, tokens, heads, features).
template <typename S, typename A>
void store_rows(const A* from, int64_t stride, int64_t count, A scale, const Attention& a,
                int64_t head, int64_t first, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = head / a.heads * a.height * a.width + first + i;
    S* to = static_cast<S*>(out) + (token * a.heads + head % a.heads) * a.dim;
    for (int64_t c = 0; c < a.dim; ++c) to[c] = Narrow<S>::from(scale * from[i * stride + c]);
  }
}

// scores = rel_h + rel_w, for the queries of a block and the keys of a block. A row of the grid is
// written in whole vectors. What lies beyond its end is overwritten by the next row.
template <typename A>
void fill_bias(const AttentionPlan& plan, const KeyBlock& keys, int64_t queries, const A* rel_h,
               const A* rel_w, A* scores) {
  for (int64_t i = 0; i < queries; ++i) {
    A* to = scores + i * plan.score_stride;
    const A* row_bias = rel_h + i * plan.block_rows;
    const A* column_bias = rel_w + i * plan.column_stride;
    for (int64_t k = 0; k < keys.rows; ++k)
      for (int64_t l = 0; l < keys.columns; l += kLanes<A>)
        store<A>(to + k * keys.columns + l, load(column_bias + l) + row_bias[k]);
  }
}

}  // namespace
}  // namespace naslora
