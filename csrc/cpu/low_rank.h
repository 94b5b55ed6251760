// The low-rank products of an adapter. They are bound by the memory traffic of the wide matrix, so
// each reads or writes it once, in blocks of tokens that stay in the cache.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "vector.h"

namespace naslora {
namespace {

constexpr int kTokenBlock = 4;          // tokens that share the loads of the factor
constexpr int kRankBlock = 3;           // 4 x 3 sums leave 4 of the 16 registers of AVX2 free
constexpr int64_t kCachedTokens = 16;   // tokens that are worked on while they are in the cache
constexpr int64_t kMostPartials = 32;   // bounds the memory of partial gradients, and the threads
constexpr int64_t kFewestTokens = 32;   // of a partial gradient
constexpr int64_t kFeatureSlice = 256;  // features that a task of the second stage adds up

// ---- Blocks of R tokens and K ranks, in registers ------------------------------------------

template <typename A, int K>
inline void load_factor(const A* factor, int64_t features, int64_t j, Vec<A> (&row)[K]) {
  for (int k = 0; k < K; ++k) row[k] = load<A>(factor + k * features + j);
}

template <typename A, int R, int K>
inline void broadcast_block(const A* u, int64_t rank, Vec<A> (&block)[R][K]) {
  for (int t = 0; t < R; ++t)
    for (int k = 0; k < K; ++k) block[t][k] = broadcast<A>(u[t * rank + k]);
}

// product[t, k] = scale * sum_j x[t, j] factor[k, j]
//
// The hardware prefetcher does not see that the next tokens follow, as rows are too short. So the
// loop prefetches them: they are `ahead` elements further.
template <typename A, int R, int K>
void product_block(const A* const* x, const A* factor, int64_t features, A scale, A* product,
                   int64_t rank, int64_t ahead) {
  Vec<A> sum[R][K] = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= features; j += kLanes<A>) {
    Vec<A> row[K];
    load_factor<A, K>(factor, features, j, row);
    for (int t = 0; t < R; ++t) {
      const Vec<A> xv = load<A>(x[t] + j);
      __builtin_prefetch(x[t] + j + ahead);
      for (int k = 0; k < K; ++k) sum[t][k] += xv * row[k];
    }
  }
  for (int t = 0; t < R; ++t) {
    for (int k = 0; k < K; ++k) {
      A total = horizontal_sum<A>(sum[t][k]);
      for (int64_t i = j; i < features; ++i) total += x[t][i] * factor[k * features + i];
      product[t * rank + k] = scale * total;
    }
  }
}

// gradient[k, j] += sum_t u[t, k] x[t, j]
template <typename A, int R, int K>
void gradient_block(const A* const* x, const A* u, int64_t rank, int64_t features, A* gradient) {
  Vec<A> weight[R][K];
  broadcast_block<A, R, K>(u, rank, weight);
  int64_t j = 0;
  for (; j + kLanes<A> <= features; j += kLanes<A>) {
    Vec<A> xv[R];
    for (int t = 0; t < R; ++t) xv[t] = load<A>(x[t] + j);
    for (int k = 0; k < K; ++k) {
      Vec<A> sum = load<A>(gradient + k * features + j);
      for (int t = 0; t < R; ++t) sum += weight[t][k] * xv[t];
      store<A>(gradient + k * features + j, sum);
    }
  }
  for (; j < features; ++j)
    for (int k = 0; k < K; ++k)
      for (int t = 0; t < R; ++t) gradient[k * features + j] += u[t * rank + k] * x[t][j];
}

// out[t, j] = bias[j] + sum_k u[t, k] factor[k, j]; or, with `add`, the sum is added to out.
template <typename A, int R, int K>
void expand_block(const A* u, const A* factor, const A* bias, int64_t rank, int64_t features,
                  bool add, A* const* out) {
  Vec<A> weight[R][K];
  broadcast_block<A, R, K>(u, rank, weight);
  int64_t j = 0;
  for (; j + kLanes<A> <= features; j += kLanes<A>) {
    Vec<A> row[K];
    load_factor<A, K>(factor, features, j, row);
    const Vec<A> start = bias ? load<A>(bias + j) : Vec<A>{};
    for (int t = 0; t < R; ++t) {
      Vec<A> sum = add ? load<A>(out[t] + j) : start;
      for (int k = 0; k < K; ++k) sum += weight[t][k] * row[k];
      store<A>(out[t] + j, sum);
    }
  }
  for (; j < features; ++j) {
    for (int t = 0; t < R; ++t) {
      A sum = add ? out[t][j] : bias ? bias[j] : 0;
      for (int k = 0; k < K; ++k) sum += u[t * rank + k] * factor[k * features + j];
      out[t][j] = sum;
    }
  }
}

// Calls body(k, K) for blocks of ranks of nearly equal size: 4 is 2 + 2, not 3 + 1.
template <typename Body>
void for_rank_blocks(int64_t rank, const Body& body) {
  const int64_t blocks = ceil_div(rank, kRankBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * rank / blocks, end = (b + 1) * rank / blocks;
    with_constant(end - begin, [&](auto size) {
      if constexpr (decltype(size)::value <= kRankBlock) body(begin, size);
    });
  }
}

// Calls body(t, R, k, K) for blocks of tokens and ranks.
template <typename Body>
void for_blocks(int64_t tokens, int64_t rank, const Body& body) {
  for (int64_t t = 0; t < tokens; t += kTokenBlock)
    with_constant(smaller(kTokenBlock, tokens - t), [&](auto size) {
      for_rank_blocks(rank, [&](int64_t k, auto ranks) { body(t, size, k, ranks); });
    });
}

template <typename A>
void product_rows(const A* const* x, int64_t tokens, const A* factor, int64_t features,
                  int64_t rank, A scale, A* product, int64_t ahead) {
  for_blocks(tokens, rank, [&](int64_t t, auto size, int64_t k, auto ranks) {
    product_block<A, decltype(size)::value, decltype(ranks)::value>(
        x + t, factor + k * features, features, scale, product + t * rank + k, rank, ahead);
  });
}

template <typename A>
void gradient_rows(const A* const* x, int64_t tokens, const A* u, int64_t features, int64_t rank,
                   A* gradient) {
  for_blocks(tokens, rank, [&](int64_t t, auto size, int64_t k, auto ranks) {
    gradient_block<A, decltype(size)::value, decltype(ranks)::value>(
        x + t, u + t * rank + k, rank, features, gradient + k * features);
  });
}

// ---- product = scale x factor^T and gradient = scale u^T x ---------------------------------

// Scratch memory for rows of x and of u in the type that is computed in.
template <typename S, typename A>
struct TokenScratch {
  A* buffer;  // (tokens, J) for 16-bit rows, else none
  A* u;       // (tokens, r)

  TokenScratch(ScratchArena& arena, int64_t tokens, int64_t features, int64_t rank) {
    buffer = arena.template take<A>(std::is_same_v<S, A> ? 0 : tokens * features);
    u = arena.template take<A>(tokens * rank);
  }
};

// Points at rows of x as A: in place, or, if they are 16-bit, at a widened copy in `buffer`.
template <typename S, typename A>
void point_at_tokens(const S* x, int64_t stride, int64_t tokens, int64_t features, A* buffer,
                     const A** rows) {
  for (int64_t t = 0; t < tokens; ++t) {
    if constexpr (std::is_same_v<S, A>) {
      rows[t] = x + t * stride;
    } else {
      A* copy = buffer + t * features;
      for (int64_t j = 0; j < features; ++j) copy[j] = widen(x[t * stride + j]);
      rows[t] = copy;
    }
  }
}

// The tokens from `begin` to `end`: writes their rows of the product, and adds to the partial
// gradient.
template <typename S, typename A>
void pass_tokens(const LowRankPass& p, int64_t begin, int64_t end,
                 const TokenScratch<S, A>& scratch, A* partial) {
  const int64_t r = p.rank, features = p.features;
  const A* x[kCachedTokens];
  for (int64_t t = begin; t < end; t += kCachedTokens) {
    const int64_t count = smaller(kCachedTokens, end - t);
    point_at_tokens(static_cast<const S*>(p.x) + t * p.x_stride, p.x_stride, count, features,
                    scratch.buffer, x);
    if (p.product) {
      product_rows(x, count, static_cast<const A*>(p.factor), features, r, static_cast<A>(p.scale),
                   scratch.u, kTokenBlock * p.x_stride);
      S* product = static_cast<S*>(p.product) + t * r;
      for (int64_t i = 0; i < count * r; ++i) product[i] = Narrow<S>::from(scratch.u[i]);
    }
    if (p.gradient) {
      const S* u = static_cast<const S*>(p.u) + t * r;
      for (int64_t i = 0; i < count * r; ++i) scratch.u[i] = widen(u[i]);
      gradient_rows(x, count, scratch.u, features, r, partial);
    }
  }
}

// The second stage: every element of the gradient adds its partials in task order.
template <typename A>
void add_partials(const LowRankPass& p, const A* partials, int64_t tasks, int64_t partial_size) {
  const int64_t slices = ceil_div(p.features, kFeatureSlice);
  parallel_tasks(p.rank * slices, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t k = slice / slices, begin = slice % slices * kFeatureSlice;
      const int64_t count = smaller(kFeatureSlice, p.features - begin);
      A sum[kFeatureSlice] = {};
      for (int64_t task = 0; task < tasks; ++task) {
        const A* partial = partials + task * partial_size + k * p.features + begin;
        for (int64_t j = 0; j < count; ++j) sum[j] += partial[j];
      }
      A* out = static_cast<A*>(p.gradient) + k * p.gradient_stride[0];
      for (int64_t j = 0; j < count; ++j)
        out[(begin + j) * p.gradient_stride[1]] = static_cast<A>(p.scale) * sum[j];
    }
  });
}

template <typename S>
void low_rank_pass(const LowRankPass& p) {
  using A = AccumulatorOf<S>;
  // Tasks have whole blocks of tokens, so that only the very last block is incomplete.
  const int64_t tasks = larger(1, smaller(kMostPartials, p.tokens / kFewestTokens));
  const int64_t task_tokens = round_up(ceil_div(p.tokens, tasks), kTokenBlock);
  const int64_t partial_size = p.gradient ? round_up(p.rank * p.features, 16) : 0;
  const Buffer<A> partials(tasks * partial_size);

  parallel_tasks(tasks, [&](int64_t first, int64_t last) {
    const auto scratch = place_in_scratch<TokenScratch<S, A>>(kCachedTokens, p.features, p.rank);
    for (int64_t task = first; task < last; ++task) {
      A* partial = partials.data() + task * partial_size;
      fill<A>(partial, partial_size, 0);
      pass_tokens<S, A>(p, task * task_tokens, smaller(p.tokens, (task + 1) * task_tokens), scratch,
                        partial);
    }
  });
  if (p.gradient) add_partials<A>(p, partials.data(), tasks, partial_size);
}

// ---- out = bias + scale u factor -----------------------------------------------------------

template <typename S>
void low_rank_expand(const LowRankExpand& p) {
  using A = AccumulatorOf<S>;
  const int64_t r = p.rank, features = p.features;
  parallel_tasks(ceil_div(p.tokens, kCachedTokens), [&](int64_t first, int64_t last) {
    const auto scratch = place_in_scratch<TokenScratch<S, A>>(int64_t{kTokenBlock}, features, r);
    const int64_t end = smaller(p.tokens, last * kCachedTokens);
    for (int64_t t = first * kCachedTokens; t < end; t += kTokenBlock) {
      const int64_t count = smaller(kTokenBlock, end - t);
      const S* u = static_cast<const S*>(p.u) + t * r;
      for (int64_t i = 0; i < count * r; ++i) scratch.u[i] = static_cast<A>(p.scale) * widen(u[i]);
      S* out = static_cast<S*>(p.out) + t * features;
      A* target[kTokenBlock];
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (std::is_same_v<S, A>)
          target[i] = out + i * features;
        else
          target[i] = scratch.buffer + i * features;
      }
      for_rank_blocks(r, [&](int64_t k, auto ranks) {
        constexpr int K = decltype(ranks)::value;
        const A* factor = static_cast<const A*>(p.factor) + k * features;
        const A* bias = static_cast<const A*>(p.bias);
        if (k == 0) {  // rows that are not in the cache yet are written fastest one by one
          for (int64_t i = 0; i < count; ++i)
            expand_block<A, 1, K>(scratch.u + i * r, factor, bias, r, features, false, target + i);
        } else {
          with_constant(count, [&](auto size) {
            expand_block<A, decltype(size)::value, K>(scratch.u + k, factor, bias, r, features,
                                                      true, target);
          });
        }
      });
      if constexpr (!std::is_same_v<S, A>)
        for (int64_t i = 0; i < count * features; ++i) out[i] = Narrow<S>::from(scratch.buffer[i]);
    }
  });
}

}  // namespace
}  // namespace naslora
