// The skinny products of a low-rank adapter. They are bound by the memory of their large operand,
// so each reads or writes it once, in blocks of rows that stay in the cache.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vector.h"

namespace {

constexpr int kRowBlock = 4;         // rows that share the loads of the small matrix
constexpr int kRankBlock = 3;        // 4 x 3 sums fit the 16 registers of AVX2 with 4 to spare
constexpr int64_t kBlockRows = 16;   // rows worked on while they are in the cache
constexpr int64_t kPartials = 32;    // partial gradients; bounds both their memory and the threads
constexpr int64_t kFewestRows = 32;  // per partial gradient

// out[t, k] = scale * sum_j x[t, j] m[k, j] for R rows and K ranks. Rows are too short for the
// processor to guess that the next ones follow, so it is told: they are `ahead` elements further.
template <typename A, int R, int K>
void dot_block(const A* const* x, const A* m, int64_t columns, A scale, A* out, int64_t rank,
               int64_t ahead) {
  Vec<A> sum[R][K] = {};
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) {
    Vec<A> mv[K];
    for (int k = 0; k < K; ++k) mv[k] = load<A>(m + k * columns + j);
    for (int t = 0; t < R; ++t) {
      const Vec<A> xv = load<A>(x[t] + j);
      __builtin_prefetch(x[t] + j + ahead);
      for (int k = 0; k < K; ++k) sum[t][k] += xv * mv[k];
    }
  }
  for (int t = 0; t < R; ++t) {
    for (int k = 0; k < K; ++k) {
      A total = horizontal_sum<A>(sum[t][k]);
      for (int64_t i = j; i < columns; ++i) total += x[t][i] * m[k * columns + i];
      out[t * rank + k] = scale * total;
    }
  }
}

// gradient[k, j] += sum_t rows[t, k] x[t, j] for R rows and K ranks
template <typename A, int R, int K>
void outer_block(const A* const* x, const A* rows, int64_t rank, int64_t columns, A* gradient) {
  Vec<A> u[R][K];
  for (int t = 0; t < R; ++t)
    for (int k = 0; k < K; ++k) u[t][k] = broadcast<A>(rows[t * rank + k]);
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) {
    Vec<A> xv[R];
    for (int t = 0; t < R; ++t) xv[t] = load<A>(x[t] + j);
    for (int k = 0; k < K; ++k) {
      Vec<A> sum = load<A>(gradient + k * columns + j);
      for (int t = 0; t < R; ++t) sum += u[t][k] * xv[t];
      store<A>(gradient + k * columns + j, sum);
    }
  }
  for (; j < columns; ++j)
    for (int k = 0; k < K; ++k)
      for (int t = 0; t < R; ++t) gradient[k * columns + j] += rows[t * rank + k] * x[t][j];
}

// Calls body(std::integral_constant<int, N>) with N = n, for n in 1..kRowBlock.
template <typename Body>
void with_constant(int64_t n, const Body& body) {
  static_assert(kRowBlock == 4 && kRankBlock <= kRowBlock, "one case per size below");
  switch (n) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 4>{});
  }
}

// Calls body(k, K) over the ranks in blocks as equal as they come (4 is 2 + 2, not 3 + 1).
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

template <typename A>
void dot_rows(const A* const* x, int64_t count, const A* matrix, int64_t columns, int64_t rank,
              A scale, A* out, int64_t ahead) {
  for (int64_t t = 0; t < count; t += kRowBlock) {
    with_constant(smaller(kRowBlock, count - t), [&](auto rows) {
      for_rank_blocks(rank, [&](int64_t k, auto ranks) {
        dot_block<A, decltype(rows)::value, decltype(ranks)::value>(
            x + t, matrix + k * columns, columns, scale, out + t * rank + k, rank, ahead);
      });
    });
  }
}

template <typename A>
void outer_rows(const A* const* x, int64_t count, const A* u, int64_t columns, int64_t rank,
                A* gradient) {
  for (int64_t t = 0; t < count; t += kRowBlock) {
    with_constant(smaller(kRowBlock, count - t), [&](auto rows) {
      for_rank_blocks(rank, [&](int64_t k, auto ranks) {
        outer_block<A, decltype(rows)::value, decltype(ranks)::value>(
            x + t, u + t * rank + k, rank, columns, gradient + k * columns);
      });
    });
  }
}

// Points at rows of x as A: where they are, or, for 16-bit x, at a widened copy in `buffer`.
template <typename S, typename A>
void point_at_rows(const S* x, int64_t stride, int64_t count, int64_t columns, A* buffer,
                   const A** rows) {
  for (int64_t t = 0; t < count; ++t) {
    if constexpr (std::is_same_v<S, A>) {
      rows[t] = x + t * stride;
    } else {
      A* copy = buffer + t * columns;
      for (int64_t j = 0; j < columns; ++j) copy[j] = widen(x[t * stride + j]);
      rows[t] = copy;
    }
  }
}

template <typename S>
void low_rank_pass(const naslora::LowRankPass& p) {
  using A = typename naslora::Accumulator<S>::type;
  const int64_t r = p.rank, columns = p.columns;
  const int64_t widened = std::is_same_v<S, A> ? 0 : kBlockRows * columns;
  // Whole blocks of rows per task, so that only the last block of all is ragged.
  const int64_t tasks = larger(1, smaller(kPartials, p.tokens / kFewestRows));
  const int64_t task_rows = round_up(ceil_div(p.tokens, tasks), kRowBlock);
  const int64_t partial_size = p.gradient ? round_up(r * columns, 16) : 0;
  const Buffer<A> partials(tasks * partial_size);

  parallel_tasks(tasks, [&](int64_t first, int64_t last) {
    Arena sizes(nullptr);
    sizes.take<A>(widened), sizes.take<A>(kBlockRows * r);
    Arena arena(naslora::thread_scratch(sizes.size()));
    A* buffer = arena.template take<A>(widened);
    A* small = arena.template take<A>(kBlockRows * r);
    const A* x[kBlockRows];
    for (int64_t task = first; task < last; ++task) {
      A* partial = partials.data() + task * partial_size;
      for (int64_t i = 0; i < partial_size; ++i) partial[i] = 0;
      const int64_t end = smaller(p.tokens, (task + 1) * task_rows);
      for (int64_t t = task * task_rows; t < end; t += kBlockRows) {
        const int64_t count = smaller(kBlockRows, end - t);
        point_at_rows(static_cast<const S*>(p.x) + t * p.x_stride, p.x_stride, count, columns,
                      buffer, x);
        if (p.product) {
          dot_rows<A>(x, count, static_cast<const A*>(p.matrix), columns, r,
                      static_cast<A>(p.scale), small, kRowBlock * p.x_stride);
          S* out = static_cast<S*>(p.product) + t * r;
          for (int64_t i = 0; i < count * r; ++i) out[i] = naslora::Narrow<S>::from(small[i]);
        }
        if (p.gradient) {
          const S* rows = static_cast<const S*>(p.rows) + t * r;
          for (int64_t i = 0; i < count * r; ++i) small[i] = widen(rows[i]);
          outer_rows<A>(x, count, small, columns, r, partial);
        }
      }
    }
  });
  if (!p.gradient) return;

  // Second stage: every element adds its partials in task order.
  constexpr int64_t kSlice = 256;
  const int64_t slices = ceil_div(columns, kSlice);
  parallel_tasks(r * slices, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t k = slice / slices, begin = slice % slices * kSlice;
      const int64_t count = smaller(kSlice, columns - begin);
      A sum[kSlice] = {};
      for (int64_t task = 0; task < tasks; ++task) {
        const A* partial = partials.data() + task * partial_size + k * columns + begin;
        for (int64_t j = 0; j < count; ++j) sum[j] += partial[j];
      }
      A* out = static_cast<A*>(p.gradient) + k * p.gradient_stride_k;
      for (int64_t j = 0; j < count; ++j)
        out[(begin + j) * p.gradient_stride_j] = static_cast<A>(p.scale) * sum[j];
    }
  });
}

// out[t, j] = bias[j] + sum_k u[t, k] m[k, j] for R rows and K ranks; or, for further ranks, added
// to what is there.
template <typename A, int R, int K>
void expand_block(const A* u, const A* m, const A* bias, int64_t rank, int64_t columns, bool add,
                  A* const* out) {
  Vec<A> scale[R][K];
  for (int t = 0; t < R; ++t)
    for (int k = 0; k < K; ++k) scale[t][k] = broadcast<A>(u[t * rank + k]);
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) {
    Vec<A> mv[K];
    for (int k = 0; k < K; ++k) mv[k] = load<A>(m + k * columns + j);
    const Vec<A> start = bias ? load<A>(bias + j) : Vec<A>{};
    for (int t = 0; t < R; ++t) {
      Vec<A> sum = add ? load<A>(out[t] + j) : start;
      for (int k = 0; k < K; ++k) sum += scale[t][k] * mv[k];
      store<A>(out[t] + j, sum);
    }
  }
  for (; j < columns; ++j) {
    for (int t = 0; t < R; ++t) {
      A sum = add ? out[t][j] : bias ? bias[j] : 0;
      for (int k = 0; k < K; ++k) sum += u[t * rank + k] * m[k * columns + j];
      out[t][j] = sum;
    }
  }
}

template <typename S>
void low_rank_expand(const naslora::LowRankExpand& p) {
  using A = typename naslora::Accumulator<S>::type;
  const int64_t r = p.rank, columns = p.columns;
  const int64_t narrowed = std::is_same_v<S, A> ? 0 : kRowBlock * columns;
  const int64_t tasks = ceil_div(p.tokens, kBlockRows);
  parallel_tasks(tasks, [&](int64_t first, int64_t last) {
    Arena sizes(nullptr);
    sizes.take<A>(narrowed), sizes.take<A>(kRowBlock * r);
    Arena arena(naslora::thread_scratch(sizes.size()));
    A* buffer = arena.template take<A>(narrowed);
    A* u = arena.template take<A>(kRowBlock * r);
    const int64_t end = smaller(p.tokens, last * kBlockRows);
    for (int64_t t = first * kBlockRows; t < end; t += kRowBlock) {
      const int64_t count = smaller(kRowBlock, end - t);
      const S* rows = static_cast<const S*>(p.rows) + t * r;
      for (int64_t i = 0; i < count * r; ++i) u[i] = static_cast<A>(p.scale) * widen(rows[i]);
      S* out = static_cast<S*>(p.out) + t * columns;
      A* target[kRowBlock];
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (std::is_same_v<S, A>)
          target[i] = out + i * columns;
        else
          target[i] = buffer + i * columns;
      }
      for_rank_blocks(r, [&](int64_t k, auto ranks) {
        constexpr int K = decltype(ranks)::value;
        const A* m = static_cast<const A*>(p.matrix) + k * columns;
        const A* bias = static_cast<const A*>(p.bias);
        if (k == 0) {  // a row that is not in the cache yet is written fastest on its own
          for (int64_t i = 0; i < count; ++i)
            expand_block<A, 1, K>(u + i * r, m, bias, r, columns, false, target + i);
        } else {
          with_constant(count, [&](auto size) {
            expand_block<A, decltype(size)::value, K>(u + k, m, bias, r, columns, true, target);
          });
        }
      });
      if constexpr (!std::is_same_v<S, A>)
        for (int64_t i = 0; i < count * columns; ++i) out[i] = naslora::Narrow<S>::from(buffer[i]);
    }
  });
}

}  // namespace
