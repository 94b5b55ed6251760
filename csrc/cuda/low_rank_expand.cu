// out = bias + scale u factor
//
// Shared memory holds the block's features of the factor, and u for its tokens, times the scale. A
// thread sums eight features of four tokens at a time. So each element of the factor, once read,
// serves four tokens, and each of u eight features.
#include "low_rank.cuh"

namespace naslora {
namespace {

constexpr int kTokens = 4;                               // that a thread works on at once
constexpr int64_t kFewestTokens = 16, kMostTokens = 64;  // of a block
constexpr int64_t kBlocks = 1024;  // wanted: several for each multiprocessor of a large card
constexpr int64_t kRankTile = 32;  // of 256 features, or fewer ranks of more: 32 KiB

struct ExpandArguments : LowRankExpand {
  int64_t block_tokens;
  Warps warps;
  int rank_tile;
};

template <typename S>
struct ExpandShared {
  using A = AccumulatorOf<S>;
  A* factor;  // [rank][feature of the block, in the order of `position` within a warp]
  A* u;       // [rank][token of the block]

  NASLORA_HOST_DEVICE ExpandShared(SharedArena& arena, const ExpandArguments& p) {
    factor = arena.take<A>(p.rank_tile * p.warps.features * WarpShape<S>::kWarpFeatures);
    u = arena.take<A>(p.rank_tile * p.block_tokens);
  }

  // A thread reads its features as vectors of A, and neighbouring lanes read neighbouring vectors.
  // So of 16-bit features, eight a lane, the first four of all lanes come before the other four.
  // A step of 32 features is a constant step of positions.
  __device__ static constexpr int position(int feature) {
    constexpr int kStored = Vector<S>::kSize, kRead = Vector<A>::kSize;
    const int lane = feature / kStored % kWarp;
    const int i = feature / (kStored * kWarp) * kStored + feature % kStored;
    return (i / kRead * kWarp + lane) * kRead + i % kRead;
  }

  // Brings some ranks to shared memory. A warp brings 256 features of a rank, or all tokens of a
  // rank, at a time: all its loads come before its stores. Beyond the last feature or token it
  // brings the last one again, of which nothing is written.
  __device__ void load(const ExpandArguments& p, int64_t first_rank, int ranks, int first_feature,
                       int64_t first_token) const {
    constexpr int kFeatures = WarpShape<S>::kFeatures;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int last_feature = static_cast<int>(p.features) - 1;
    with_elements<A>(p.factor, [&](const auto* element) {
      for (int row = warp; row < ranks * p.warps.features; row += warps) {
        const int first = first_feature + row % p.warps.features * (kFeatures * kWarp) + lane;
        const auto* from = element + (first_rank + row / p.warps.features) * p.factor_stride[0];
        A* to = factor + row * (kFeatures * kWarp) + position(lane);
        A elements[kFeatures];
#pragma unroll
        for (int i = 0; i < kFeatures; ++i) {
          const int feature = first + i * kWarp < last_feature ? first + i * kWarp : last_feature;
          elements[i] = widen(from[feature * p.factor_stride[1]]);
        }
#pragma unroll
        for (int i = 0; i < kFeatures; ++i) to[i * position(kWarp)] = elements[i];
      }
    });
    const S* from = static_cast<const S*>(p.u) + first_token * p.rank + first_rank;
    const int tokens = static_cast<int>(p.block_tokens), rank = static_cast<int>(p.rank);
    const int last_token = static_cast<int>(smaller(tokens, p.tokens - first_token)) - 1;
    for (int k = warp; k < ranks; k += warps)
      for (int t = lane; t < tokens; t += kWarp)
        u[k * tokens + t] =
            static_cast<A>(p.scale) * widen(from[(t < last_token ? t : last_token) * rank + k]);
  }
};

// sum[token][feature] += u factor over the ranks in shared memory. `weights` points at the thread's
// tokens of u, `factor` at the warp's features.
template <typename A, int kFeatures>
__device__ inline void add_ranks(const A* factor, int factor_stride, const A* weights,
                                 int64_t weight_stride, int ranks, int lane,
                                 A (&sum)[kTokens][kFeatures]) {
  constexpr int kSize = Vector<A>::kSize;
  for (int k = 0; k < ranks; ++k) {
    const A* row = factor + k * factor_stride;
    const A* weight = weights + k * weight_stride;
#pragma unroll
    for (int v = 0; v < kFeatures / kSize; ++v) {
      const Vector<A> element = load_vector(row + (v * kWarp + lane) * kSize);
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[i][v * kSize + e] += weight[i] * element.lane[e];
    }
  }
}

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    low_rank_expand_kernel(const ExpandArguments p) {
  using A = AccumulatorOf<S>;
  using Piece = Piece<S, kAligned>;
  constexpr int kFeatures = WarpShape<S>::kFeatures;
  constexpr int kWarpFeatures = WarpShape<S>::kWarpFeatures;
  const auto shared = place_in_shared<ExpandShared<S>>(p);
  const WarpPlace place(p.warps);
  const int block_features = p.warps.features * kWarpFeatures;
  const int features = static_cast<int>(p.features), first_feature = blockIdx.y * block_features;
  const int first = first_feature + place.feature * kWarpFeatures;
  const int64_t first_token = blockIdx.x * p.block_tokens;
  A bias[kFeatures];
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    const int feature = first + Piece::feature(i, place.lane);
    bias[i] = 0;
    if (p.bias.data && feature < features) bias[i] = read<A>(p.bias, feature);
  }

  const int step = p.warps.slices * kTokens;
  for (int t = 0; t < p.block_tokens; t += step) {  // as often in every warp: there are barriers
    const int token = t + place.slice * kTokens;
    A sum[kTokens][kFeatures] = {};
    for (int64_t first_rank = 0; first_rank < p.rank; first_rank += p.rank_tile) {
      const int ranks = static_cast<int>(smaller(p.rank_tile, p.rank - first_rank));
      if (t == 0 || p.rank > p.rank_tile) {
        __syncthreads();
        shared.load(p, first_rank, ranks, first_feature, first_token);
        __syncthreads();
      }
      add_ranks(shared.factor + place.feature * kWarpFeatures, block_features, shared.u + token,
                p.block_tokens, ranks, place.lane, sum);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (first_token + token + i >= p.tokens) break;
      Piece piece;
#pragma unroll
      for (int j = 0; j < kFeatures; ++j) piece.set(j, bias[j] + sum[i][j]);
      piece.store(static_cast<S*>(p.out) + (first_token + token + i) * p.features, first, features,
                  place.lane);
    }
  }
}

}  // namespace

void low_rank_expand(const Stream& stream, const LowRankExpand& expand) {
  with_storage(expand.dtype, [&](auto storage) {
    using S = decltype(storage);
    ExpandArguments p{expand, 0, {}, static_cast<int>(smaller(expand.rank, kRankTile))};
    const int64_t tiles = ceil_div(p.features, WarpShape<S>::kWarpFeatures);
    p.warps = Warps::divide(tiles, 1, smaller(kMostWarps, kRankTile / p.rank_tile));
    p.warps.slices = kMostWarps / p.warps.features;
    // More tokens share a block's part of the factor if it has many ranks, and if there are blocks
    // enough.
    const int64_t step = p.warps.slices * kTokens, across = ceil_div(tiles, p.warps.features);
    const int64_t wanted =
        larger(kFewestTokens * ceil_div(p.rank, 2 * kRanks), ceil_div(p.tokens * across, kBlocks));
    p.block_tokens = round_up(smaller(kMostTokens, wanted), step);
    const bool whole = aligned<S>(p.out, p.features, p.features);
    launch("low_rank_expand",
           whole ? low_rank_expand_kernel<S, true> : low_rank_expand_kernel<S, false>,
           ceil_div(p.tokens, p.block_tokens), across, p.warps.count() * kWarp,
           measure<ExpandShared<S>, SharedArena>(p), stream, p);
  });
}

}  // namespace naslora
