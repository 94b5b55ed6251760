// o = softmax(scale q k^T + rel_h + rel_w) v, one tile of scores at a time.
#pragma once

#include <cmath>
#include <limits>

#include "attention_plan.h"
#include "exponential.h"

namespace naslora {
namespace {

template <typename A>
constexpr A kLowest = -std::numeric_limits<A>::infinity();

template <typename A>
struct ForwardScratch {
  A *keys, *values;            // of the head: a block's panels; (tokens, width)
  A *queries, *rel_h, *rel_w;  // of a block of queries
  A *scores, *out;             // of a tile; (queries, width)
  A *maximum, *sum;            // of each row of scores so far

  template <typename Arena>
  ForwardScratch(Arena& arena, const AttentionPlan& p)
      : keys(arena.template take<A>(p.key_blocks() * p.panels)),
        values(arena.template take<A>(p.tokens * p.width)),
        queries(arena.template take<A>(p.query_block * p.width)),
        rel_h(arena.template take<A>(p.query_block * p.block_rows)),
        rel_w(arena.template take<A>(p.query_block * p.column_stride)),
        scores(arena.template take<A>(p.query_block * p.score_stride)),
        out(arena.template take<A>(p.query_block * p.width)),
        maximum(arena.template take<A>(p.query_block)),
        sum(arena.template take<A>(p.query_block)) {}
};

template <typename A>
inline A horizontal_max(Vec<A> v) {
  A lanes[kLanes<A>];
  store<A>(lanes, v);
  A highest = lanes[0];
  for (int i = 1; i < kLanes<A>; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
  return highest;
}

// Goes on with the softmax of a row. Its scores become exp(score - maximum), and what was summed
// with a smaller maximum is scaled. A row of -inf keeps the maximum -inf and the sum 0, until the
// division by the sum makes it NaN. The maximum ignores NaN, but the sum does not.
template <typename A>
inline void softmax_step(A* scores, int64_t count, A& maximum, A& sum, A* out, int64_t width) {
  const int64_t padded = round_up(count, kLanes<A>);
  for (int64_t j = count; j < padded; ++j) scores[j] = kLowest<A>;
  Vec<A> highest = broadcast(maximum);
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    const Vec<A> s = load(scores + j);
    highest = s > highest ? s : highest;
  }
  const A top = horizontal_max<A>(highest);
  const A shift = top == kLowest<A> ? A{0} : top;
  if (top != maximum) {
    const A keep = exponential<A>(broadcast(maximum - shift))[0];
    sum *= keep;
    for (int64_t c = 0; c < width; c += kLanes<A>) store<A>(out + c, load(out + c) * keep);
    maximum = top;
  }
  Vec<A> total = {};
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    const Vec<A> e = exponential<A>(load(scores + j) - shift);
    store<A>(scores + j, e);
    total += e;
  }
  sum += horizontal_sum<A>(total);
}

template <typename S>
void forward_tile(const Attention& a, const AttentionPlan& plan, int64_t head, int64_t block,
                  const QueryBlock& queries, const ForwardScratch<AccumulatorOf<S>>& scratch) {
  using A = AccumulatorOf<S>;
  const KeyBlock keys = plan.key_block(a, block);
  const int64_t width = plan.width;
  load_rows<S, A>({a.rel_h, a, head}, queries.first, queries.count, keys.row, keys.rows, 1,
                  scratch.rel_h, plan.block_rows);
  load_rows<S, A>({a.rel_w, a, head}, queries.first, queries.count, keys.column, keys.columns, 1,
                  scratch.rel_w, plan.column_stride);
  fill_bias<A>(plan, keys, queries.count, scratch.rel_h, scratch.rel_w, scratch.scores);
  product<A>(queries.count, keys.count, a.dim, {scratch.queries, width, 1},
             {scratch.keys + block * plan.panels, kPanel<A>, kPanel<A> * a.dim}, true,
             scratch.scores, plan.score_stride);
  for (int64_t i = 0; i < queries.count; ++i)
    softmax_step<A>(scratch.scores + i * plan.score_stride, keys.count, scratch.maximum[i],
                    scratch.sum[i], scratch.out + i * width, width);
  product<A>(queries.count, width, keys.count, {scratch.scores, plan.score_stride, 1},
             {scratch.values + keys.first * width, width, kPanel<A>}, true, scratch.out, width);
}

template <typename S>
void attention_forward(const Attention& a, void* o, void* lse) {
  using A = AccumulatorOf<S>;
  const auto plan = AttentionPlan::of<A>(a);
  parallel_tasks(plan.tasks, [&](int64_t first, int64_t last) {
    const auto scratch = place_in_scratch<ForwardScratch<A>>(plan);
    int64_t loaded = -1;  // the head whose keys and values are in the scratch memory
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / plan.parts, part = task % plan.parts;
      if (head != loaded) {
        for (int64_t b = 0; b < plan.key_blocks(); ++b) {
          const KeyBlock keys = plan.key_block(a, b);
          load_panels<S, A>({a.k, a, head}, keys.first, keys.count, a.dim,
                            scratch.keys + b * plan.panels);
        }
        load_rows<S, A>({a.v, a, head}, 0, plan.tokens, 0, a.dim, 1, scratch.values, plan.width);
        loaded = head;
      }
      for (int64_t q = plan.first_query_block(part); q < plan.first_query_block(part + 1); ++q) {
        const QueryBlock queries = plan.query(q);
        load_rows<S, A>({a.q, a, head}, queries.first, queries.count, 0, a.dim,
                        static_cast<A>(a.scale), scratch.queries, plan.width);
        fill<A>(scratch.out, queries.count * plan.width, 0);
        fill<A>(scratch.maximum, queries.count, kLowest<A>);
        fill<A>(scratch.sum, queries.count, 0);
        for (int64_t b = 0; b < plan.key_blocks(); ++b)
          forward_tile<S>(a, plan, head, b, queries, scratch);
        for (int64_t i = 0; i < queries.count; ++i) {
          const int64_t token = queries.first + i;
          store_rows<S, A>(scratch.out + i * plan.width, plan.width, 1, 1 / scratch.sum[i], a, head,
                           token, o);
          static_cast<A*>(lse)[head * plan.tokens + token] =
              scratch.maximum[i] + static_cast<A>(log(static_cast<double>(scratch.sum[i])));
        }
      }
    }
  });
}

}  // namespace
}  // namespace naslora
