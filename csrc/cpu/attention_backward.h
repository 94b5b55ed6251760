// The gradients of attention. A tile of scores is computed again from the saved log-sum-exp:
//
//     p = exp(scores - lse)       dv = p^T grad_o
//     dp = grad_o v^T             ds = p (dp - delta),  delta = the row sums of grad_o * o
//     dq = scale ds k             dk = scale ds^T q
//     drel_h, drel_w = ds summed over the columns and over the rows of the grid
//
// A task is a part of the queries of one head. It goes through the blocks of keys, and for each one
// through its queries. So a block's gradients of keys and values stay in the cache; those of the
// queries are summed in memory of the thread.
#pragma once

#include "attention_plan.h"
#include "exponential.h"

namespace naslora {
namespace {

template <typename A>
struct BackwardScratch {
  // Of a block of keys.
  A *key_panels, *value_panels, *keys;
  A *grad_keys, *grad_values;
  // Of a block of queries.
  A *queries, *grad_out, *rel_h, *rel_w;
  A *scores, *grad_scores;
  // Of a part.
  A *delta, *grad_queries, *grad_rel_h, *grad_rel_w;
  int64_t grad_column_stride;

  template <typename Arena>
  BackwardScratch(Arena& arena, const Attention& a, const AttentionPlan& p)
      : key_panels(arena.template take<A>(p.panels)),
        value_panels(arena.template take<A>(p.panels)),
        keys(arena.template take<A>(p.keys * p.width)),
        grad_keys(arena.template take<A>(round_up(p.keys, kBlockRows) * p.width)),
        grad_values(arena.template take<A>(round_up(p.keys, kBlockRows) * p.width)),
        queries(arena.template take<A>(p.query_block * p.width)),
        grad_out(arena.template take<A>(p.query_block * p.width)),
        rel_h(arena.template take<A>(p.query_block * p.block_rows)),
        rel_w(arena.template take<A>(p.query_block * p.column_stride)),
        scores(arena.template take<A>(p.query_block * p.score_stride)),
        grad_scores(arena.template take<A>(p.query_block * p.score_stride)),
        delta(arena.template take<A>(p.part_tokens())),
        grad_queries(arena.template take<A>(p.part_tokens() * p.width)),
        grad_rel_h(arena.template take<A>(p.part_tokens() * a.height)),
        grad_rel_w(arena.template take<A>(p.part_tokens() * wide(a))),
        grad_column_stride(wide(a)) {}

  // The last vector of a block of columns may lie beyond the row.
  static int64_t wide(const Attention& a) { return round_up(a.width, kLanes<A>) + kLanes<A>; }
};

// delta = the row sums of grad_o * o.
template <typename S, typename A>
void row_products(const HeadRows<S>& grad_o, const HeadRows<S>& o, int64_t first, int64_t count,
                  int64_t dim, A* delta) {
  for (int64_t i = 0; i < count; ++i) {
    const S *g = grad_o.row(first + i), *out = o.row(first + i);
    A sum = 0;
    for (int64_t c = 0; c < dim; ++c) sum += widen(g[c]) * widen(out[c]);
    delta[i] = sum;
  }
}

// Scores become p, and grad_scores, which hold dp, become ds.
template <typename A>
inline void softmax_gradient(A* scores, A* grad_scores, int64_t count, A lse, A delta) {
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    const Vec<A> p = exponential<A>(load(scores + j) - lse);
    store<A>(scores + j, p);
    store<A>(grad_scores + j, p * (load(grad_scores + j) - delta));
  }
}

// Adds ds of a query to its gradients of rel_h and rel_w.
template <typename A>
inline void add_bias_gradients(const A* grad_scores, const KeyBlock& keys, A* rel_h, A* rel_w) {
  for (int64_t k = 0; k < keys.rows; ++k) {
    const A* from = grad_scores + k * keys.columns;
    Vec<A> total = {};
    for (int64_t l = 0; l < keys.columns; l += kLanes<A>) {
      const Vec<A> g = first_lanes<A>(load(from + l), keys.columns - l);
      store<A>(rel_w + l, load(rel_w + l) + g);
      total += g;
    }
    rel_h[k] += horizontal_sum<A>(total);
  }
}

// The gradients of one call: what is needed, and where the parts' sums go.
template <typename S>
struct AttentionBackward {
  using A = AccumulatorOf<S>;

  const Attention& a;
  const AttentionGradients& g;
  const AttentionPlan plan;
  const bool need_scores;  // ds
  const int64_t head_size;
  // (heads, parts, tokens, dim) each, if there are several parts
  Buffer<A> key_partials, value_partials;

  AttentionBackward(const Attention& a, const AttentionGradients& g)
      : a(a),
        g(g),
        plan(AttentionPlan::of<A>(a)),
        need_scores(g.q || g.k || g.rel_h || g.rel_w),
        head_size(plan.tokens * a.dim),
        key_partials(plan.parts > 1 && g.k ? plan.tasks * head_size : 0),
        value_partials(plan.parts > 1 && g.v ? plan.tasks * head_size : 0) {}

  void run() const {
    parallel_tasks(plan.tasks, [&](int64_t first, int64_t last) {
      const auto scratch = place_in_scratch<BackwardScratch<A>>(a, plan);
      for (int64_t task = first; task < last; ++task) part(task, scratch);
    });
    if (plan.parts > 1)
      parallel_tasks(plan.heads, [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) {
          if (g.k) add_parts(key_partials, head, g.k);
          if (g.v) add_parts(value_partials, head, g.v);
        }
      });
  }

  void part(int64_t task, const BackwardScratch<A>& scratch) const {
    const int64_t head = task / plan.parts, part = task % plan.parts;
    const int64_t begin = plan.first_query_block(part), end = plan.first_query_block(part + 1);
    const int64_t first = plan.query(begin).first;
    const int64_t count = plan.query(end - 1).first + plan.query(end - 1).count - first;
    row_products<S, A>({g.grad_o, a, head}, {g.o, a, head}, first, count, a.dim, scratch.delta);
    fill<A>(scratch.grad_queries, count * plan.width, 0);
    fill<A>(scratch.grad_rel_h, count * a.height, 0);
    fill<A>(scratch.grad_rel_w, count * scratch.grad_column_stride, 0);
    for (int64_t b = 0; b < plan.key_blocks(); ++b) {
      const KeyBlock keys = plan.key_block(a, b);
      load_keys(head, keys, scratch);
      for (int64_t q = begin; q < end; ++q) tile(head, keys, plan.query(q), first, scratch);
      if (g.k) store_keys(scratch.grad_keys, keys, task, key_partials, g.k);
      if (g.v) store_keys(scratch.grad_values, keys, task, value_partials, g.v);
    }
    if (g.q)
      store_rows<S, A>(scratch.grad_queries, plan.width, count, static_cast<A>(a.scale), a, head,
                       first, g.q);
    const int64_t row = head * plan.tokens + first;
    if (g.rel_h) store_bias(scratch.grad_rel_h, a.height, count, a.height, row, g.rel_h);
    if (g.rel_w)
      store_bias(scratch.grad_rel_w, scratch.grad_column_stride, count, a.width, row, g.rel_w);
  }

  void load_keys(int64_t head, const KeyBlock& keys, const BackwardScratch<A>& scratch) const {
    load_panels<S, A>({a.k, a, head}, keys.first, keys.count, a.dim, scratch.key_panels);
    if (need_scores)
      load_panels<S, A>({a.v, a, head}, keys.first, keys.count, a.dim, scratch.value_panels);
    if (g.q)
      load_rows<S, A>({a.k, a, head}, keys.first, keys.count, 0, a.dim, 1, scratch.keys,
                      plan.width);
    const int64_t rows = round_up(keys.count, kBlockRows);
    fill<A>(scratch.grad_keys, rows * plan.width, 0);
    fill<A>(scratch.grad_values, rows * plan.width, 0);
  }

  // `first` is the first query of the part.
  void tile(int64_t head, const KeyBlock& keys, const QueryBlock& queries, int64_t first,
            const BackwardScratch<A>& scratch) const {
    const int64_t width = plan.width, stride = plan.score_stride;
    load_rows<S, A>({a.q, a, head}, queries.first, queries.count, 0, a.dim, static_cast<A>(a.scale),
                    scratch.queries, width);
    load_rows<S, A>({g.grad_o, a, head}, queries.first, queries.count, 0, a.dim, 1,
                    scratch.grad_out, width);
    load_rows<S, A>({a.rel_h, a, head}, queries.first, queries.count, keys.row, keys.rows, 1,
                    scratch.rel_h, plan.block_rows);
    load_rows<S, A>({a.rel_w, a, head}, queries.first, queries.count, keys.column, keys.columns, 1,
                    scratch.rel_w, plan.column_stride);
    fill_bias<A>(plan, keys, queries.count, scratch.rel_h, scratch.rel_w, scratch.scores);
    const int64_t panel = kPanel<A> * a.dim;
    product<A>(queries.count, keys.count, a.dim, {scratch.queries, width, 1},
               {scratch.key_panels, kPanel<A>, panel}, true, scratch.scores, stride);
    if (need_scores)
      product<A>(queries.count, keys.count, a.dim, {scratch.grad_out, width, 1},
                 {scratch.value_panels, kPanel<A>, panel}, false, scratch.grad_scores, stride);
    const A* lse = static_cast<const A*>(g.lse) + head * plan.tokens;
    for (int64_t i = 0; i < queries.count; ++i) {
      const int64_t token = queries.first + i, own = token - first;
      A* grad_scores = scratch.grad_scores + i * stride;
      softmax_gradient<A>(scratch.scores + i * stride, grad_scores, keys.count, lse[token],
                          scratch.delta[own]);
      if (g.rel_h || g.rel_w)
        add_bias_gradients<A>(grad_scores, keys, scratch.grad_rel_h + own * a.height + keys.row,
                              scratch.grad_rel_w + own * scratch.grad_column_stride + keys.column);
    }
    if (g.v)
      product<A>(keys.count, width, queries.count, {scratch.scores, 1, stride},
                 {scratch.grad_out, width, kPanel<A>}, true, scratch.grad_values, width);
    if (g.k)
      product<A>(keys.count, width, queries.count, {scratch.grad_scores, 1, stride},
                 {scratch.queries, width, kPanel<A>}, true, scratch.grad_keys, width);
    if (g.q)
      product<A>(queries.count, width, keys.count, {scratch.grad_scores, stride, 1},
                 {scratch.keys, width, kPanel<A>}, true,
                 scratch.grad_queries + (queries.first - first) * width, width);
  }

  // Writes a block's gradients of keys or values: to the output, or to the sums of the part.
  void store_keys(const A* from, const KeyBlock& keys, int64_t task, const Buffer<A>& partials,
                  void* out) const {
    if (plan.parts == 1)
      return store_rows<S, A>(from, plan.width, keys.count, 1, a, task, keys.first, out);
    A* to = partials.data() + task * head_size + keys.first * a.dim;
    for (int64_t j = 0; j < keys.count; ++j)
      for (int64_t c = 0; c < a.dim; ++c) to[j * a.dim + c] = from[j * plan.width + c];
  }

  void add_parts(const Buffer<A>& partials, int64_t head, void* out) const {
    A* sum = partials.data() + head * plan.parts * head_size;
    for (int64_t part = 1; part < plan.parts; ++part)
      for (int64_t i = 0; i < head_size; ++i) sum[i] += sum[part * head_size + i];
    store_rows<S, A>(sum, a.dim, plan.tokens, 1, a, head, 0, out);
  }

  static void store_bias(const A* from, int64_t stride, int64_t count, int64_t columns, int64_t row,
                         void* out) {
    S* to = static_cast<S*>(out) + row * columns;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns; ++c)
        to[i * columns + c] = Narrow<S>::from(from[i * stride + c]);
  }
};

template <typename S>
void attention_backward(const Attention& a, const AttentionGradients& gradients) {
  AttentionBackward<S>(a, gradients).run();
}

}  // namespace
}  // namespace naslora
