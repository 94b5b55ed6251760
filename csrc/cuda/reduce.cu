// The second stage of every reduction, in one launch: adds the partial sums of all groups in order,
// and writes the parameters' gradients.
//
// Each block does one of three things: the gradient of alpha; the gradients of dw and pw for one
// input channel; or 32 features of grad_A or grad_B for one rank.
#include "cell_weights.cuh"

namespace naslora {
namespace {

constexpr int kReduceThreads = 256;
constexpr int kFeaturesPerBlock = 32;
constexpr int kOutputsAtOnce = 16;
constexpr int kMostSums = kOutputsAtOnce * kFoldedTaps;

struct ReduceArguments : Reduction {
  int alpha_blocks, weight_blocks, A_blocks;  // in this order; grad_B has the blocks after them
};

template <typename A>
struct ReduceShared {
  A* sums;    // [kMostSums]
  A* slices;  // [kReduceThreads]
  SharedTables<A> tables;
  A* dw;  // [weight tap]
  A* pw;  // [op][output]

  NASLORA_HOST_DEVICE explicit ReduceShared(SharedArena& arena)
      : sums(arena.take<A>(kMostSums)),
        slices(arena.take<A>(kReduceThreads)),
        tables(arena),
        dw(arena.take<A>(kAllWeightTaps)),
        pw(arena.take<A>(kConvolutions * kOutputsAtOnce)) {}

  // sums[i] = sum over groups of partials[group, i], for `count` neighbouring numbers. If these are
  // few, threads divide the groups into slices, which are then added in order.
  __device__ void add_groups(const A* partials, int64_t groups, int64_t stride, int count) const {
    int width = kReduceThreads;
    while (width / 2 >= count && width > kWarp) width /= 2;
    const int count_of_slices = kReduceThreads / width, slice = threadIdx.x / width;
    __syncthreads();  // other threads may still read the previous sums
    for (int i = threadIdx.x % width; i < count; i += width) {
      A sum = 0;
#pragma unroll 8
      for (int64_t g = slice; g < groups; g += count_of_slices) sum += partials[g * stride + i];
      (count_of_slices > 1 ? slices[threadIdx.x] : sums[i]) = sum;
    }
    __syncthreads();
    if (count_of_slices == 1) return;
    for_block(count, [&](int i) {
      A sum = slices[i];
      for (int s = 1; s < count_of_slices; ++s) sum += slices[s * width + i];
      sums[i] = sum;
    });
    __syncthreads();
  }
};

template <typename A>
__device__ void alpha_gradient(const ReduceArguments& p, const ReduceShared<A>& shared) {
  const int64_t pairs = channel_pairs(p.c, sizeof(A) == 8);
  const int64_t stride = partial_size(p.c);
  const A* partials = static_cast<const A*>(p.cell_partials) + kernel_sums(p.c);
  constexpr int kPairsAtOnce = kMostSums / kMixtureSums;
  shared.tables.load(p.alpha);
  A sum = 0;
  for (int64_t first = 0; first < pairs; first += kPairsAtOnce) {
    const int count = static_cast<int>(smaller(kPairsAtOnce, pairs - first));
    shared.add_groups(partials + first * kMixtureSums, p.cell_groups, stride, count * kMixtureSums);
    if (threadIdx.x < kMixtureSums)
      for (int i = 0; i < count; ++i) sum += shared.sums[i * kMixtureSums + threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x < kOperations) shared.sums[threadIdx.x] = threadIdx.x < kMixtureSums ? sum : 0;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A gradient[kOperations];
  softmax_backward(shared.tables.mixture, shared.sums, gradient);
#pragma unroll
  for (int i = 0; i < kOperations; ++i) write(p.grad_alpha, i, gradient[i]);
}

// grad_dw and grad_pw of one input channel: the chain rule of cell_math.h.
template <typename A>
__device__ void weight_gradients(const ReduceArguments& p, const ReduceShared<A>& shared,
                                 int64_t in) {
  const int64_t stride = partial_size(p.c);
  const A* partials = static_cast<const A*>(p.cell_partials) + in * p.c * kFoldedTaps;
  const TapTable& taps = *shared.tables.taps;
  shared.tables.load(p.alpha);
  for_block(kAllWeightTaps, [&](int t) {
    const int op = op_of(t);
    shared.dw[t] = read<A>(of_op(p.dw, op), in * weight_taps(op) + t - weight_start(op));
  });
  A depthwise = 0;
  for (int64_t first = 0; first < p.c; first += kOutputsAtOnce) {
    const int count = static_cast<int>(smaller(kOutputsAtOnce, p.c - first));
    shared.add_groups(partials + first * kFoldedTaps, p.cell_groups, stride, count * kFoldedTaps);
    for_block(kConvolutions * count, [&](int i) {
      const int op = i / count, out = i % count;
      const int64_t index = (op * p.c + first + out) * p.c + in;
      shared.pw[op * kOutputsAtOnce + out] = read<A>(p.pw, index);
      const A sum = sum_over_taps<A>(
          op, taps, [&](int t) { return shared.dw[weight_start(op) + t]; },
          [&](int tap) { return shared.sums[out * kFoldedTaps + tap]; });
      write(p.grad_pw, index, shared.tables.mixture[op] * sum);
    });
    __syncthreads();
    if (threadIdx.x < kAllWeightTaps) {
      const int t = threadIdx.x, op = op_of(t);
      const int tap = taps.of_weight[op][t - weight_start(op)];
      add_over_outputs(
          count, [&](int out) { return shared.pw[op * kOutputsAtOnce + out]; },
          [&](int out) { return shared.sums[out * kFoldedTaps + tap]; }, depthwise);
    }
  }
  if (threadIdx.x < kAllWeightTaps) {
    const int t = threadIdx.x, op = op_of(t);
    write(of_op(p.grad_dw, op), in * weight_taps(op) + t - weight_start(op),
          shared.tables.mixture[op] * depthwise);
  }
}

template <typename A>
__device__ void low_rank_gradient(const Reduction::LowRank& low_rank, int block, bool transposed,
                                  const ReduceShared<A>& shared) {
  const int tiles = static_cast<int>(ceil_div(low_rank.features, kFeaturesPerBlock));
  const int64_t k = block / tiles, first = block % tiles * kFeaturesPerBlock;
  const int count = static_cast<int>(smaller(kFeaturesPerBlock, low_rank.features - first));
  shared.add_groups(static_cast<const A*>(low_rank.partials) + k * low_rank.features + first,
                    low_rank.groups, low_rank.rank * low_rank.features, count);
  if (static_cast<int>(threadIdx.x) < count)
    write(low_rank.gradient,
          transposed ? (first + threadIdx.x) * low_rank.rank + k
                     : k * low_rank.features + first + threadIdx.x,
          shared.sums[threadIdx.x]);
}

template <typename A>
__global__ void __launch_bounds__(kReduceThreads, 4)
    reduce_gradients_kernel(const ReduceArguments p) {
  const auto shared = place_in_shared<ReduceShared<A>>();
  int block = blockIdx.x;
  if (block < p.alpha_blocks) return alpha_gradient(p, shared);
  block -= p.alpha_blocks;
  if (block < p.weight_blocks) return weight_gradients(p, shared, block);
  block -= p.weight_blocks;
  if (block < p.A_blocks) return low_rank_gradient(p.A, block, false, shared);
  low_rank_gradient(p.B, block - p.A_blocks, true, shared);
}

}  // namespace

void reduce_gradients(const Stream& stream, const Reduction& reduction) {
  const auto low_rank_blocks = [](const Reduction::LowRank& p) {
    return p.gradient.data ? p.rank * ceil_div(p.features, kFeaturesPerBlock) : 0;
  };
  ReduceArguments p{reduction, 0, 0, 0};
  p.alpha_blocks = p.grad_alpha.data ? 1 : 0;
  p.weight_blocks = static_cast<int>(p.grad_pw.data ? p.c : 0);
  p.A_blocks = static_cast<int>(low_rank_blocks(p.A));
  const int64_t blocks = p.alpha_blocks + p.weight_blocks + p.A_blocks + low_rank_blocks(p.B);
  const auto run = [&](auto accumulator) {
    using A = decltype(accumulator);
    launch("reduce_gradients", reduce_gradients_kernel<A>, blocks, 1, kReduceThreads,
           measure<ReduceShared<A>, SharedArena>(), stream, p);
  };
  p.float64 ? run(double()) : run(float());
}

}  // namespace naslora
