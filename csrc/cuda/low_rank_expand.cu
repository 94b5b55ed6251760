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
  __device__ static int position(int feature) {
    constexpr int kStored = Vector<S>::kSize, kRead = Vector<A>::kSize;
    const int lane = feature / kStored % kWarp;
    const int i = feature / (kStored * kWarp) * kStored + feature % kStored;
    return (i / kRead * kWarp + lane) * kRead + i % kRead;
  }

  // Brings `rank_tile` ranks to shared memory; 0 beyond the last rank, feature and token.
  __device__ void load(const ExpandArguments& p, int64_t first_rank, int64_t first_feature,
                       int64_t first_token) const {
    constexpr int kWarpFeatures = WarpShape<S>::kWarpFeatures;
    const int features = p.warps.features * kWarpFeatures;
#pragma unroll 4
    for (int i = threadIdx.x; i < p.rank_tile * features; i += blockDim.x) {
      const int64_t rank = first_rank + i / features, feature = first_feature + i % features;
      A element = 0;
      if (rank < p.rank && feature < p.features)
        element = read<A>(p.factor, rank * p.factor_stride[0] + feature * p.factor_stride[1]);
      const int in_warp = i % kWarpFeatures;
      factor[i - in_warp + position(in_warp)] = element;
    }
    const int tokens = static_cast<int>(p.block_tokens);
    for_block(p.rank_tile * tokens, [&](int i) {
      const int64_t rank = first_rank + i % p.rank_tile, token = first_token + i / p.rank_tile;
      A weight = 0;
      if (rank < p.rank && token < p.tokens)
        weight = static_cast<A>(p.scale) * widen(static_cast<const S*>(p.u)[token * p.rank + rank]);
      u[i % p.rank_tile * tokens + i / p.rank_tile] = weight;
    });
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
      if (t == 0 || p.rank > p.rank_tile) {
        __syncthreads();
        shared.load(p, first_rank, first_feature, first_token);
        __syncthreads();
      }
      add_ranks(shared.factor + place.feature * kWarpFeatures, block_features, shared.u + token,
                p.block_tokens, static_cast<int>(smaller(p.rank_tile, p.rank - first_rank)),
                place.lane, sum);
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
    // With more ranks a block reads more of the factor, so more tokens share it.
    const int64_t step = p.warps.slices * kTokens;
    const int64_t tokens = smaller(kMostTokens, kFewestTokens * ceil_div(p.rank, 2 * kRanks));
    p.block_tokens = round_up(tokens, step);
    const bool whole = aligned<S>(p.out, p.features, p.features);
    launch("low_rank_expand",
           whole ? low_rank_expand_kernel<S, true> : low_rank_expand_kernel<S, false>,
           ceil_div(p.tokens, p.block_tokens), ceil_div(tiles, p.warps.features),
           p.warps.count() * kWarp, measure<ExpandShared<S>, SharedArena>(p), stream, p);
  });
}

}  // namespace naslora
