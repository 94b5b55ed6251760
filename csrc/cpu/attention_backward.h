// The gradients of attention. A tile of scores is computed again; the saved maximum and sum of each
// query make its softmax of it.
//
//     p = exp(scores - maximum) / sum      dv = p^T grad_o
//     dp = grad_o v^T                      dq = scale ds k
//     ds = p (dp - delta)                  dk = scale ds^T q
//     delta = the row sums of p dp         drel_h, drel_w = ds summed over columns and over rows
//
// A task is a part of the queries of one head. It goes through the blocks of keys, and for each one
// through its queries. So a block's gradients of keys and values stay in the cache; those of the
// queries are summed in memory of the thread.
#pragma once

#include "attention_plan.h"
#include "exponential.h"

namespace naslora {
namespace {

template <typename Queries, typename Keys>
struct BackwardScratch {
  const AttentionPlan& plan;
  Keys keys;
  int64_t block_bytes;
  char* blocks;

  template <typename Arena>
  BackwardScratch(Arena& arena, const AttentionPlan& p)
      : plan(p),
        keys(arena, p),
        block_bytes(measure<Queries, ScratchArena>(p)),
        blocks(arena.template take<char>(block_bytes * p.most_of_part())) {}

  // The data of a part's block of queries.
  Queries queries(int64_t index) const {
    ScratchArena arena(blocks + index * block_bytes);
    return Queries(arena, plan);
  }
};

// One call: what is needed, and where the sums of the parts go. `Self` loads, computes and stores
// blocks, whose data have the types `Queries` and `Keys`.
template <typename S, typename Self, typename Queries, typename Keys>
struct BackwardParts {
  using A = AccumulatorOf<S>;
  using Scratch = BackwardScratch<Queries, Keys>;

  const Attention& a;
  const AttentionGradients& g;
  const AttentionPlan plan;
  const bool need_scores;  // ds
  const int64_t head_size;
  const A key_scale;  // of the sums of grad_keys
  // (tasks, tokens, d) each, if a head has several parts
  Buffer<A> key_sums, value_sums;

  BackwardParts(const AttentionPlan& plan, const AttentionGradients& g, A key_scale)
      : a(plan.a),
        g(g),
        plan(plan),
        need_scores(g.q || g.k || g.rel_h || g.rel_w),
        head_size(plan.tokens * a.dim),
        key_scale(key_scale),
        key_sums(plan.parts > 1 && g.k ? plan.tasks * head_size : 0),
        value_sums(plan.parts > 1 && g.v ? plan.tasks * head_size : 0) {}

  const Self& self() const { return static_cast<const Self&>(*this); }

  void run() const {
    parallel_tasks(plan.tasks, [&](int64_t first, int64_t last) {
      [[maybe_unused]] const typename Self::Setup setup;
      const auto scratch = place_in_scratch<Scratch>(plan);
      for (int64_t task = first; task < last; ++task) part(task, scratch);
    });
    if (plan.parts == 1) return;
    parallel_tasks(plan.images_heads, [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; ++head) {
        if (g.k) add_parts(key_sums, head, g.k);
        if (g.v) add_parts(value_sums, head, g.v);
      }
    });
  }

  void part(int64_t task, const Scratch& scratch) const {
    const int64_t head = task / plan.parts, part = task % plan.parts;
    const int64_t begin = plan.first_of_part(part), count = plan.first_of_part(part + 1) - begin;
    for (int64_t q = 0; q < count; ++q)
      self().load_queries(head, plan.queries_of(begin + q), scratch.queries(q));
    for (int64_t b = 0; b < plan.key_blocks(); ++b) {
      const KeyBlock keys = plan.keys_of(b);
      self().load_keys(head, keys, scratch.keys);
      for (int64_t q = 0; q < count; ++q)
        self().tile(keys, q == 0, plan.queries_of(begin + q).count, scratch.keys,
                    scratch.queries(q));
      if (g.k) store_keys(scratch.keys.grad_keys, keys, task, key_sums, key_scale, g.k);
      if (g.v) store_keys(scratch.keys.grad_values, keys, task, value_sums, 1, g.v);
    }
    for (int64_t q = 0; q < count; ++q)
      self().store_queries(head, plan.queries_of(begin + q), scratch.queries(q));
  }

  // Writes a block's gradients of keys or values: to the output, or to the sums of the part.
  void store_keys(const A* from, const KeyBlock& keys, int64_t task, const Buffer<A>& sums, A scale,
                  void* out) const {
    if (plan.parts == 1)
      return store_rows<S, A>(from, plan.width, keys.count, scale, a, task, plan.tokens, keys.first,
                              out);
    A* to = sums.data() + task * head_size + keys.first * a.dim;
    for (int64_t j = 0; j < keys.count; ++j)
      for (int64_t c = 0; c < a.dim; ++c) to[j * a.dim + c] = scale * from[j * plan.width + c];
  }

  void add_parts(const Buffer<A>& sums, int64_t head, void* out) const {
    A* total = sums.data() + head * plan.parts * head_size;
    for (int64_t part = 1; part < plan.parts; ++part)
      for (int64_t i = 0; i < head_size; ++i) total[i] += total[part * head_size + i];
    store_rows<S, A>(total, a.dim, plan.tokens, 1, a, head, plan.tokens, 0, out);
  }
};

// What a block of queries has during its part. Rows of `stride` have a number for each query.
template <typename A>
struct QueryData {
  A *queries, *grad_out;                       // (queries, width); queries are scaled
  A *queries_t, *grad_out_t;                   // (d, stride)
  A *rel_h, *rel_w, *grad_rel_h, *grad_rel_w;  // (H, stride) or (W, stride)
  A *maximum, *inverse_sum, *delta;            // (stride,)
  A* grad_queries;                             // (queries, width)

  template <typename Arena>
  QueryData(Arena& arena, const AttentionPlan& p)
      : queries(arena.template take<A>(p.query_block * p.width)),
        grad_out(arena.template take<A>(p.query_block * p.width)),
        queries_t(arena.template take<A>(p.a.dim * p.stride)),
        grad_out_t(arena.template take<A>(p.a.dim * p.stride)),
        rel_h(arena.template take<A>(p.a.height * p.stride)),
        rel_w(arena.template take<A>(p.a.width * p.stride)),
        grad_rel_h(arena.template take<A>(p.a.height * p.stride)),
        grad_rel_w(arena.template take<A>(p.a.width * p.stride)),
        maximum(arena.template take<A>(p.stride)),
        inverse_sum(arena.template take<A>(p.stride)),
        delta(arena.template take<A>(p.stride)),
        grad_queries(arena.template take<A>(round_up(p.query_block, kBlockRows) * p.width)) {}
};

template <typename A>
struct KeyData {
  A *keys, *values, *grad_keys, *grad_values;  // of a block, (keys, width)
  A *scores, *grad_scores;                     // of a tile, (keys, stride)

  template <typename Arena>
  KeyData(Arena& arena, const AttentionPlan& p) {
    const int64_t rows = round_up(p.keys, kBlockRows);
    keys = arena.template take<A>(rows * p.width);
    values = arena.template take<A>(rows * p.width);
    grad_keys = arena.template take<A>(rows * p.width);
    grad_values = arena.template take<A>(rows * p.width);
    scores = arena.template take<A>(rows * p.stride);
    grad_scores = arena.template take<A>(rows * p.stride);
  }
};

// Of some queries, one a lane: the products of scores become p, and grad_scores, which hold dp,
// become ds. Adds ds to the gradients of rel_h and rel_w. If the block has `all` keys, delta is the
// sum of p dp. That equals the products of grad_o and o, but its rounding errors cancel in ds.
template <typename A>
inline void softmax_gradient(const KeyBlock& keys, bool all, int64_t stride, int64_t i,
                             const QueryData<A>& q, A* scores, A* grad_scores) {
  const Vec<A> maximum = load(q.maximum + i), inverse_sum = load(q.inverse_sum + i);
  Vec<A> total = {};
  for (int64_t k = 0; k < keys.rows; ++k) {
    const Vec<A> row_bias = load(q.rel_h + (keys.row + k) * stride + i);
    Vec<A> row_total = {};  // short sums of short sums are more accurate
    for (int64_t l = 0; l < keys.columns; ++l) {
      const int64_t at = (k * keys.columns + l) * stride + i;
      const Vec<A> bias = row_bias + load(q.rel_w + (keys.column + l) * stride + i);
      const Vec<A> p = exponential<A>(load(scores + at) + bias - maximum) * inverse_sum;
      store<A>(scores + at, p);
      row_total += p * load(grad_scores + at);
    }
    total += row_total;
  }
  const Vec<A> delta = all ? total : load(q.delta + i);
  for (int64_t k = 0; k < keys.rows; ++k) {
    A* row = q.grad_rel_h + (keys.row + k) * stride + i;
    Vec<A> row_sum = load(row);
    for (int64_t l = 0; l < keys.columns; ++l) {
      const int64_t at = (k * keys.columns + l) * stride + i;
      A* column = q.grad_rel_w + (keys.column + l) * stride + i;
      const Vec<A> ds = load(scores + at) * (load(grad_scores + at) - delta);
      store<A>(grad_scores + at, ds);
      store<A>(column, load(column) + ds);
      row_sum += ds;
    }
    store<A>(row, row_sum);
  }
}

template <typename S, typename A = AccumulatorOf<S>>
struct AttentionBackward : BackwardParts<S, AttentionBackward<S>, QueryData<A>, KeyData<A>> {
  using Parts = BackwardParts<S, AttentionBackward<S>, QueryData<A>, KeyData<A>>;
  using Parts::a, Parts::g, Parts::plan, Parts::need_scores;
  struct Setup {};

  AttentionBackward(const Attention& a, const AttentionGradients& g)
      : Parts(AttentionPlan::of<A>(a), g, 1) {}

  void load_queries(int64_t head, const QueryBlock& block, const QueryData<A>& q) const {
    const int64_t first = block.first, count = block.count, stride = plan.stride;
    const HeadRows<S> grad_o(g.grad_o, a, head), o(g.o, a, head);
    const A scale = static_cast<A>(a.scale);
    load_rows<S, A>({a.q, a, head}, first, count, a.dim, scale, q.queries, plan.width);
    load_rows<S, A>(grad_o, first, count, a.dim, 1, q.grad_out, plan.width);
    load_transposed<S, A>({a.q, a, head}, first, count, a.dim, scale, q.queries_t, stride);
    load_transposed<S, A>(grad_o, first, count, a.dim, 1, q.grad_out_t, stride);
    load_transposed<S, A>({a.rel_h, a, head}, first, count, a.height, 1, q.rel_h, stride);
    load_transposed<S, A>({a.rel_w, a, head}, first, count, a.width, 1, q.rel_w, stride);
    fill<A>(q.grad_rel_h, a.height * stride, 0);
    fill<A>(q.grad_rel_w, a.width * stride, 0);
    fill<A>(q.maximum, stride, 0);
    fill<A>(q.inverse_sum, stride, 1);
    fill<A>(q.delta, stride, 0);
    const A* maximum = static_cast<const A*>(g.softmax) + head * a.queries + first;
    const A* sum = maximum + plan.images_heads * a.queries;
    for (int64_t i = 0; i < count; ++i) {
      q.maximum[i] = maximum[i];
      q.inverse_sum[i] = 1 / sum[i];
      if (plan.key_blocks() == 1) continue;  // the tile has all that delta needs
      const S *gradient = grad_o[first + i], *out = o[first + i];
      double delta = 0;  // its error would be that of a whole row of ds
      for (int64_t c = 0; c < a.dim; ++c)
        delta += static_cast<double>(widen(gradient[c])) * widen(out[c]);
      q.delta[i] = static_cast<A>(delta);
    }
  }

  void load_keys(int64_t head, const KeyBlock& block, const KeyData<A>& k) const {
    load_rows<S, A>({a.k, a, head}, block.first, block.count, a.dim, 1, k.keys, plan.width);
    load_rows<S, A>({a.v, a, head}, block.first, block.count, a.dim, 1, k.values, plan.width);
  }

  void tile(const KeyBlock& block, bool first, int64_t queries, const KeyData<A>& k,
            const QueryData<A>& q) const {
    const int64_t width = plan.width, stride = plan.stride, keys = block.count;
    product<A>(keys, queries, a.dim, {k.keys, width, 1}, q.queries_t, stride, false, k.scores,
               stride);
    if (need_scores)
      product<A>(keys, queries, a.dim, {k.values, width, 1}, q.grad_out_t, stride, false,
                 k.grad_scores, stride);
    for (int64_t i = 0; i < queries; i += kLanes<A>)
      softmax_gradient<A>(block, keys == plan.tokens, stride, i, q, k.scores, k.grad_scores);
    if (g.v)
      product<A>(keys, width, queries, {k.scores, stride, 1}, q.grad_out, width, !first,
                 k.grad_values, width);
    if (g.k)
      product<A>(keys, width, queries, {k.grad_scores, stride, 1}, q.queries, width, !first,
                 k.grad_keys, width);
    if (g.q)
      product<A>(queries, width, keys, {k.grad_scores, 1, stride}, k.keys, width, block.first > 0,
                 q.grad_queries, width);
  }

  void store_queries(int64_t head, const QueryBlock& block, const QueryData<A>& q) const {
    if (g.q)
      store_rows<S, A>(q.grad_queries, plan.width, block.count, static_cast<A>(a.scale), a, head,
                       a.queries, block.first, g.q);
    if (g.rel_h) store_bias(head, block, q.grad_rel_h, a.height, g.rel_h);
    if (g.rel_w) store_bias(head, block, q.grad_rel_w, a.width, g.rel_w);
  }

  // Transposes the gradients of rel_h or rel_w back to (queries, features).
  void store_bias(int64_t head, const QueryBlock& block, const A* from, int64_t features,
                  void* out) const {
    S* to = static_cast<S*>(out) + (head * a.queries + block.first) * features;
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t c = 0; c < features; ++c)
        to[i * features + c] = Narrow<S>::from(from[c * plan.stride + i]);
  }
};

template <typename S>
void attention_backward(const Attention& a, const AttentionGradients& gradients) {
  AttentionBackward<S>(a, gradients).run();
}

}  // namespace
}  // namespace naslora
