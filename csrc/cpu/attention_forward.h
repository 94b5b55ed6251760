// o = softmax(scale q k^T + rel_h + rel_w) v, one tile of scores at a time.
#pragma once

#include <limits>

#include "attention_plan.h"
#include "exponential.h"

namespace naslora {
namespace {

template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

template <typename A>
struct ForwardScratch {
  struct Setup {};
  A *keys, *values;            // of the head, (tokens, width) each
  A *queries, *rel_h, *rel_w;  // of a block of queries: (d, stride), (H, stride), (W, stride)
  A* scores;                   // of a tile, (keys, stride)
  A *maximum, *sum, *keep;     // of each query, so far
  A* out;                      // (queries, width)

  template <typename Arena>
  ForwardScratch(Arena& arena, const AttentionPlan& p)
      : keys(arena.template take<A>((p.tokens + kBlockRows) * p.width)),
        values(arena.template take<A>(p.tokens * p.width)),
        queries(arena.template take<A>(p.a.dim * p.stride)),
        rel_h(arena.template take<A>(p.a.height * p.stride)),
        rel_w(arena.template take<A>(p.a.width * p.stride)),
        scores(arena.template take<A>(round_up(p.keys, kBlockRows) * p.stride)),
        maximum(arena.template take<A>(p.stride)),
        sum(arena.template take<A>(p.stride)),
        keep(arena.template take<A>(p.stride)),
        out(arena.template take<A>(round_up(p.query_block, kBlockRows) * p.width)) {}
};

// Goes on with the softmax of some queries, one a lane. Their scores q k become exp(score -
// maximum) with the biases in the score. What was summed with a smaller maximum is due to be
// multiplied by `keep`. A query whose scores are all -inf keeps the maximum -inf and the sum 0,
// until the division by the sum makes NaN of them. The maximum ignores NaN, but the sum does not.
template <typename A>
inline void softmax_step(const KeyBlock& keys, int64_t stride, const A* rel_h, const A* rel_w,
                         A* scores, A* maximum, A* sum, A* keep) {
  const Vec<A> before = load(maximum);
  Vec<A> top = before;
  for (int64_t k = 0; k < keys.rows; ++k) {
    const Vec<A> row_bias = load(rel_h + (keys.row + k) * stride);
    for (int64_t l = 0; l < keys.columns; ++l) {
      A* at = scores + (k * keys.columns + l) * stride;
      const Vec<A> s = load(at) + (row_bias + load(rel_w + (keys.column + l) * stride));
      top = s > top ? s : top;
      store<A>(at, s);
    }
  }
  const Vec<A> shift = top == broadcast(kLowest<A>) ? Vec<A>{} : top;
  Vec<A> total = {};
  for (int64_t k = 0; k < keys.rows; ++k) {
    Vec<A> row_total = {};  // short sums of short sums are more accurate
    for (int64_t l = 0; l < keys.columns; ++l) {
      A* at = scores + (k * keys.columns + l) * stride;
      const Vec<A> e = exponential<A>(load(at) - shift);
      store<A>(at, e);
      row_total += e;
    }
    total += row_total;
  }
  const Vec<A> kept = exponential<A>(before - shift);
  store<A>(keep, kept);
  store<A>(sum, load(sum) * kept + total);
  store<A>(maximum, top);
}

template <typename A>
void forward_tile(const AttentionPlan& plan, const KeyBlock& keys, int64_t queries, bool first,
                  const ForwardScratch<A>& scratch) {
  const int64_t width = plan.width, stride = plan.stride;
  product<A>(keys.count, queries, plan.a.dim, {scratch.keys + keys.first * width, width, 1},
             scratch.queries, stride, false, scratch.scores, stride);
  for (int64_t i = 0; i < queries; i += kLanes<A>)
    softmax_step<A>(keys, stride, scratch.rel_h + i, scratch.rel_w + i, scratch.scores + i,
                    scratch.maximum + i, scratch.sum + i, scratch.keep + i);
  if (!first)
    for (int64_t i = 0; i < queries; ++i) {
      A* out = scratch.out + i * width;
      if (scratch.keep[i] != A{1})
        for (int64_t c = 0; c < width; ++c) out[c] *= scratch.keep[i];
    }
  product<A>(queries, width, keys.count, {scratch.scores, 1, stride},
             scratch.values + keys.first * width, width, !first, scratch.out, width);
}

template <typename S>
void forward_block(const AttentionPlan& plan, int64_t head, const QueryBlock& queries,
                   const ForwardScratch<AccumulatorOf<S>>& scratch, void* o, void* softmax) {
  using A = AccumulatorOf<S>;
  const Attention& a = plan.a;
  load_transposed<S, A>({a.q, a, head}, queries.first, queries.count, a.dim,
                        static_cast<A>(a.scale), scratch.queries, plan.stride);
  load_transposed<S, A>({a.rel_h, a, head}, queries.first, queries.count, a.height, 1,
                        scratch.rel_h, plan.stride);
  load_transposed<S, A>({a.rel_w, a, head}, queries.first, queries.count, a.width, 1, scratch.rel_w,
                        plan.stride);
  fill<A>(scratch.maximum, plan.stride, kLowest<A>);
  fill<A>(scratch.sum, plan.stride, 0);
  for (int64_t b = 0; b < plan.key_blocks(); ++b)
    forward_tile<A>(plan, plan.keys_of(b), queries.count, b == 0, scratch);
  A* maximum = static_cast<A*>(softmax) + head * a.queries + queries.first;
  A* sum = maximum + plan.images_heads * a.queries;
  for (int64_t i = 0; i < queries.count; ++i) {
    maximum[i] = scratch.maximum[i];
    sum[i] = scratch.sum[i];
    store_rows<S, A>(scratch.out + i * plan.width, plan.width, 1, 1 / sum[i], a, head, a.queries,
                     queries.first + i, o);
  }
}

// Calls load(scratch, head) for each head of a thread, and compute(scratch, head, queries) for the
// blocks of its queries.
template <typename Scratch, typename Load, typename Compute>
void for_each_block(const AttentionPlan& plan, const Load& load, const Compute& compute) {
  parallel_tasks(plan.tasks, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename Scratch::Setup setup;
    const auto scratch = place_in_scratch<Scratch>(plan);
    int64_t loaded = -1;  // the head whose keys and values are in the scratch memory
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / plan.parts, part = task % plan.parts;
      if (head != loaded) load(scratch, head);
      loaded = head;
      for (int64_t q = plan.first_of_part(part); q < plan.first_of_part(part + 1); ++q)
        compute(scratch, head, plan.queries_of(q));
    }
  });
}

template <typename S>
void attention_forward(const Attention& a, void* o, void* softmax) {
  using A = AccumulatorOf<S>;
  using Scratch = ForwardScratch<A>;
  const auto plan = AttentionPlan::of<A>(a);
  for_each_block<Scratch>(
      plan,
      [&](const Scratch& s, int64_t head) {
        load_rows<S, A>({a.k, a, head}, 0, plan.tokens, a.dim, 1, s.keys, plan.width);
        load_rows<S, A>({a.v, a, head}, 0, plan.tokens, a.dim, 1, s.values, plan.width);
      },
      [&](const Scratch& s, int64_t head, const QueryBlock& queries) {
        forward_block<S>(plan, head, queries, s, o, softmax);
      });
}

}  // namespace
}  // namespace naslora
