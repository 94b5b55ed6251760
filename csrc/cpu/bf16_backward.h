// The backward of attention_backward.h on bfloat16: products of 16 bits, softmax in float32. p and
// ds are rounded for the products. The gradients of rel_h and rel_w are sums of ds in float32.
#pragma once

#include "attention_backward.h"
#include "bf16_forward.h"

namespace naslora {
namespace {

struct Bf16Queries {
  Panels queries, grad_out;                        // a column for each query
  Panels queries_t, grad_out_t;                    // a column for each feature
  float *rel_h, *rel_w, *grad_rel_h, *grad_rel_w;  // (H, stride) or (W, stride)
  float *maximum, *inverse_sum, *delta;            // (stride,)
  float* grad_queries;                             // (width, stride)

  template <typename Arena>
  Bf16Queries(Arena& arena, const AttentionPlan& p) {
    const int64_t depth = round_up(p.query_block, kPack);
    const auto panels = [&](int64_t rows) {
      return Panels{arena.template take<bfloat16>(depth * p.width), rows * kPanel};
    };
    const auto wide = [&](int64_t rows) { return arena.template take<float>(rows * p.stride); };
    queries = panels(p.width), grad_out = panels(p.width);
    queries_t = panels(depth), grad_out_t = panels(depth);
    rel_h = wide(p.a.height), grad_rel_h = wide(p.a.height);
    rel_w = wide(p.a.width), grad_rel_w = wide(p.a.width);
    maximum = wide(1), inverse_sum = wide(1), delta = wide(1);
    grad_queries = wide(p.width);
  }
};

struct Bf16Keys {
  int64_t depth, p_row;              // the keys and the queries of a block, in whole packs
  bfloat16 *keys, *values, *keys_t;  // (keys, width) twice, (width, depth)
  float *grad_keys, *grad_values;    // (keys, width)
  float *scores, *grad_scores;       // of a panel: (keys, kScores)
  bfloat16 *p, *ds;                  // of a tile: (keys, p_row)
  Panels ds_columns;                 // ds again, a column for each query

  template <typename Arena>
  Bf16Keys(Arena& arena, const AttentionPlan& plan)
      : depth(round_up(plan.keys, kPack)), p_row(round_up(plan.query_block, kPack)) {
    const auto narrow = [&](int64_t row) { return arena.template take<bfloat16>(depth * row); };
    const auto wide = [&](int64_t row) { return arena.template take<float>(depth * row); };
    keys = narrow(plan.width), values = narrow(plan.width), keys_t = narrow(plan.width);
    grad_keys = wide(plan.width), grad_values = wide(plan.width);
    scores = wide(kScores), grad_scores = wide(kScores);
    p = narrow(p_row), ds = narrow(p_row), ds_columns = {narrow(p_row), depth * kPanel};
  }
};

struct Bf16Backward : BackwardParts<bfloat16, Bf16Backward, Bf16Queries, Bf16Keys> {
  using S = bfloat16;
  using Setup = Tiles;

  Bf16Backward(const Attention& a, const AttentionGradients& g)
      : BackwardParts(bf16_plan(a), g, static_cast<float>(a.scale)) {}

  void load_queries(int64_t head, const QueryBlock& block, const Bf16Queries& q) const {
    const int64_t first = block.first, count = block.count, stride = plan.stride;
    const Rows queries = {{a.q, a, head}, first, count, a.dim};
    const Rows grad_o = {{g.grad_o, a, head}, first, count, a.dim};
    const Rows o = {{g.o, a, head}, first, count, a.dim};
    queries.pack_columns(q.queries);
    queries.pack_depth(q.queries_t);
    grad_o.pack_columns(q.grad_out);
    grad_o.pack_depth(q.grad_out_t);
    Rows{{a.rel_h, a, head}, first, count, a.height}.widen_transposed(kLog2e, q.rel_h, stride);
    Rows{{a.rel_w, a, head}, first, count, a.width}.widen_transposed(kLog2e, q.rel_w, stride);
    fill<A>(q.grad_rel_h, a.height * stride, 0);
    fill<A>(q.grad_rel_w, a.width * stride, 0);
    const A* maximum = static_cast<const A*>(g.softmax) + head * a.queries + first;
    const A* sum = maximum + plan.images_heads * a.queries;
    for (int64_t i = 0; i < count; ++i) {
      q.maximum[i] = maximum[i] * kLog2e;
      q.inverse_sum[i] = 1 / sum[i];
      __m512 delta = {};
      for (int64_t c = 0; c < a.dim; c += 32)
        delta = _mm512_dpbf16_ps(delta, (__m512bh)grad_o.load(i, c), (__m512bh)o.load(i, c));
      q.delta[i] = horizontal_sum<A>(delta);
    }
  }

  void load_keys(int64_t head, const KeyBlock& block, const Bf16Keys& k) const {
    const Rows keys = {{a.k, a, head}, block.first, block.count, a.dim};
    keys.pack(k.keys, plan.width);
    keys.pack_transposed(k.keys_t, k.depth);
    Rows{{a.v, a, head}, block.first, block.count, a.dim}.pack(k.values, plan.width);
  }

  void tile(const KeyBlock& block, bool first, int64_t queries, const Bf16Keys& k,
            const Bf16Queries& q) const {
    const int64_t width = plan.width, keys = block.count;
    // The products with p and ds go on with zeros behind the last query.
    const int64_t columns = round_up(queries, larger(kPanel, kBlockDepth));
    for (int64_t i = 0; i < columns; i += kScores) {
      const int64_t own = smaller(kScores, columns - i);
      product(keys, own, a.dim, k.keys, width, q.queries.from(i), false, k.scores, kScores);
      product(keys, own, a.dim, k.values, width, q.grad_out.from(i), false, k.grad_scores, kScores);
      for (int64_t lanes = 0; lanes < own; lanes += kPanel)
        softmax_gradient(block, i + lanes, lanes_below(smaller(16, queries - i - lanes)),
                         k.scores + lanes, k.grad_scores + lanes, q, k);
    }
    if (g.v)
      product(keys, a.dim, queries, k.p, k.p_row, q.grad_out_t, !first, k.grad_values, width);
    if (g.k) product(keys, a.dim, queries, k.ds, k.p_row, q.queries_t, !first, k.grad_keys, width);
    if (g.q)
      product(a.dim, queries, keys, k.keys_t, k.depth, k.ds_columns, block.first > 0,
              q.grad_queries, plan.stride);
  }

  // As the function of attention_backward.h, for the queries from `i` on. p and ds are rounded in
  // pairs of keys, in the orders of the products. They are zero where the mask has none.
  void softmax_gradient(const KeyBlock& keys, int64_t i, __mmask16 queries, const float* scores,
                        const float* grad_scores, const Bf16Queries& q, const Bf16Keys& k) const {
    const int64_t stride = plan.stride;
    const float scale = static_cast<float>(a.scale * kLog2e);
    const __m512 maximum = load(q.maximum + i), inverse_sum = load(q.inverse_sum + i);
    const __m512 delta = load(q.delta + i);
    __m512 row_bias = {}, row_sum = {};
    int64_t row = keys.row, column = 0;
    for (int64_t j = 0; j < round_up(keys.count, kBlockDepth); j += 2) {
      __m512i rounded[2] = {};
#pragma GCC unroll 2
      for (int64_t n = j; n < j + 2; ++n) {
        if (n >= keys.count) break;
        if (column == 0) {
          row_bias = load(q.rel_h + row * stride + i) - maximum;
          row_sum = load(q.grad_rel_h + row * stride + i);
        }
        A* column_sum = q.grad_rel_w + (keys.column + column) * stride + i;
        const __m512 bias = row_bias + load(q.rel_w + (keys.column + column) * stride + i);
        const __m512 p = power_of_two(load(scores + n * kScores) * scale + bias) * inverse_sum;
        const __m512 ds = p * (load(grad_scores + n * kScores) - delta);
        store<A>(column_sum, load(column_sum) + ds);
        row_sum += ds;
        if (++column == keys.columns) {
          store<A>(q.grad_rel_h + row++ * stride + i, row_sum);
          column = 0;
        }
        rounded[n - j] = narrow(ds, queries);
        store_half(k.p + n * k.p_row + i, narrow(p, queries));
        store_half(k.ds + n * k.p_row + i, rounded[n - j]);
      }
      _mm512_storeu_si512(k.ds_columns.from(i).data + j * kPanel, pairs(rounded[0], rounded[1]));
    }
  }

  void store_queries(int64_t head, const QueryBlock& block, const Bf16Queries& q) const {
    const auto store = [&](const A* from, int64_t features, A scale, S* to, int64_t row) {
      fill<A>(q.delta, plan.stride, scale);
      store_columns(from, plan.stride, block.count, features, q.delta, to, row);
    };
    const int64_t first = head * a.queries + block.first;
    if (g.q)
      store(q.grad_queries, a.dim, key_scale, row_of<S>(g.q, a, head, a.queries, block.first),
            a.heads * a.dim);
    if (g.rel_h)
      store(q.grad_rel_h, a.height, 1, static_cast<S*>(g.rel_h) + first * a.height, a.height);
    if (g.rel_w)
      store(q.grad_rel_w, a.width, 1, static_cast<S*>(g.rel_w) + first * a.width, a.width);
  }
};

}  // namespace
}  // namespace naslora
