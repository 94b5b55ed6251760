// product = scale x factor^T, and partials whose sum is scale u^T x, in one pass over x.
//
// Each warp keeps its features of three rows of the factor and of three rows of partial sums in
// registers. For every token it computes its part of the product, which is then summed over lanes
// by exchanging halves, and over warps in shared memory. Warps of other ranks read the same tokens
// at about the same time: one of them from memory, the others from the L1 cache.
#include "low_rank.cuh"

namespace naslora {
namespace {

constexpr int64_t kFewestTokens = 8, kMostTokens = 96;  // of a group
constexpr int64_t kGroups = 160;  // wanted: more than any card has multiprocessors
// Without partial sums a group costs nothing, and small ones keep all multiprocessors busy longer.
constexpr int64_t kMostTokensOfProducts = 32;

struct PassArguments : LowRankPass {
  int64_t group_tokens;
  Warps warps;
};

template <typename S>
struct PassShared {
  using A = AccumulatorOf<S>;
  A* products;  // [feature warp][token of the group][rank of the block]
  A* partials;  // [feature warp][rank of the block][feature of the warp]

  NASLORA_HOST_DEVICE PassShared(SharedArena& arena, const PassArguments& p) {
    const int64_t ranks = p.warps.features * p.warps.ranks * kRanks;
    products = arena.take<A>(p.product ? ranks * p.group_tokens : 0);
    partials = arena.take<A>(p.partials ? ranks * WarpShape<S>::kWarpFeatures : 0);
  }
};

// Sums the values of kTokens tokens over the warp. Afterwards values[0] holds the sums of token
// lane / (kWarp / kTokens). While a lane has several tokens, it gives half of them to another lane
// and adds what that lane gives of the other half.
template <typename A, int kTokens>
__device__ void sum_over_lanes(A (&values)[kTokens][kRanks], int lane) {
  int offset = kWarp / 2;
#pragma unroll
  for (int half = kTokens / 2; half >= 1; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i)
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
        const A kept = upper ? values[i + half][k] : values[i][k];
        const A given = upper ? values[i][k] : values[i + half][k];
        values[i][k] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
      }
  }
#pragma unroll
  for (; offset >= 1; offset /= 2)
#pragma unroll
    for (int k = 0; k < kRanks; ++k)
      values[0][k] += __shfl_xor_sync(0xffffffffu, values[0][k], offset);
}

// One thread of the kernel: its place, and the work on one tile of features.
template <typename S, bool kAligned>
struct PassThread {
  using A = AccumulatorOf<S>;
  using Piece = naslora::Piece<S, kAligned>;
  static constexpr int kFeatures = WarpShape<S>::kFeatures;
  static constexpr int kWarpFeatures = WarpShape<S>::kWarpFeatures;
  // Rows that are loaded number by number take more registers.
  static constexpr int kTokens = kAligned ? WarpShape<S>::kTokens : 2;

  const PassArguments& p;
  const PassShared<S>& shared;
  const WarpPlace place;
  const int block_ranks, block_rank, first_rank;
  const int rank, features;
  const int64_t first_token;
  const int group_tokens, begin, end;  // the warp's tokens of the group
  const S* const x;
  const S* const u;
  A* const products;  // [token][rank of the block], of this warp

  __device__ PassThread(const PassArguments& p, const PassShared<S>& shared)
      : p(p),
        shared(shared),
        place(p.warps),
        block_ranks(p.warps.ranks * kRanks),
        block_rank(blockIdx.y * block_ranks),
        first_rank(block_rank + place.rank * kRanks),
        rank(static_cast<int>(p.rank)),
        features(static_cast<int>(p.features)),
        first_token(blockIdx.x * p.group_tokens),
        group_tokens(static_cast<int>(smaller(p.group_tokens, p.tokens - first_token))),
        begin(place.slice * group_tokens / p.warps.slices),
        end((place.slice + 1) * group_tokens / p.warps.slices),
        x(static_cast<const S*>(p.x) + first_token * p.x_stride),
        // A warp without ranks reads another's. Its sums are not written.
        u(static_cast<const S*>(p.u) + first_token * rank + (first_rank < rank ? first_rank : 0)),
        products(shared.products + place.feature * static_cast<int>(p.group_tokens) * block_ranks +
                 place.rank * kRanks) {}

  __device__ void load_factor(int first, A (&factor)[kRanks][kFeatures]) const {
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) {
        const int feature = first + Piece::feature(i, place.lane);
        factor[k][i] = 0;
        if (p.product && first_rank + k < rank && feature < features)
          factor[k][i] = read<A>(
              p.factor, (first_rank + k) * p.factor_stride[0] + feature * p.factor_stride[1]);
      }
    }
  }

  // Adds the warp's tokens to `partial` and to the products. `first` is the warp's first feature;
  // `again` says whether the products of earlier tiles are to be added to.
  __device__ void pass_tokens(int first, bool again, const A (&factor)[kRanks][kFeatures],
                              A (&partial)[kRanks][kFeatures]) const {
    for (int t = begin; t < end; t += kTokens) {
      Piece piece[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)  // beyond the last token, the last one again
        piece[i].load(x + (t + i < end ? t + i : end - 1) * p.x_stride, first, features,
                      place.lane);
      if (p.partials) add_to_partial(piece, t, partial);
      if (p.product) add_to_products(piece, t, again, factor);
    }
  }

  __device__ void add_to_partial(const Piece (&piece)[kTokens], int t,
                                 A (&partial)[kRanks][kFeatures]) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
        const int at = first_rank + k < rank ? k : 0;  // no sum beyond the last rank is written
        const A weight = t + i < end ? widen(u[(t + i) * rank + at]) : 0;
#pragma unroll
        for (int j = 0; j < kFeatures; ++j) partial[k][j] += weight * piece[i].get(j);
      }
    }
  }

  __device__ void add_to_products(const Piece (&piece)[kTokens], int t, bool again,
                                  const A (&factor)[kRanks][kFeatures]) const {
    A sums[kTokens][kRanks] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
      for (int k = 0; k < kRanks; ++k)
#pragma unroll
        for (int j = 0; j < kFeatures; ++j) sums[i][k] += piece[i].get(j) * factor[k][j];
    sum_over_lanes(sums, place.lane);
    constexpr int kLanes = kWarp / kTokens;  // of a token
    const int token = t + place.lane / kLanes;
    if (place.lane % kLanes == 0 && token < end) {
      A* to = products + token * block_ranks;
#pragma unroll
      for (int k = 0; k < kRanks; ++k) to[k] = (again ? to[k] : 0) + sums[0][k];
    }
  }

  // Adds the partial sums of the slices in order, and writes them: neighbouring threads write
  // neighbouring features.
  __device__ void store_partials(int first, const A (&partial)[kRanks][kFeatures]) const {
    const int own = (place.feature * p.warps.ranks + place.rank) * kRanks;
    for (int s = 0; s < p.warps.slices; ++s) {
      if (s == place.slice) {
#pragma unroll
        for (int k = 0; k < kRanks; ++k) {
          A* sums = shared.partials + (own + k) * kWarpFeatures;
#pragma unroll
          for (int i = 0; i < kFeatures; ++i) {
            A& sum = sums[Piece::feature(i, place.lane)];
            sum = (s ? sum : 0) + partial[k][i];
          }
        }
      }
      __syncthreads();
    }
    A* out = static_cast<A*>(p.partials) + blockIdx.x * p.rank * p.features;
    for (int k = place.slice; k < kRanks && first_rank + k < rank; k += p.warps.slices)
      for (int i = place.lane; i < kWarpFeatures && first + i < features; i += kWarp)
        out[(first_rank + k) * p.features + first + i] =
            static_cast<A>(p.scale) * shared.partials[(own + k) * kWarpFeatures + i];
    __syncthreads();
  }

  // Adds the products of the feature warps, and writes them.
  __device__ void store_products() const {
    S* product = static_cast<S*>(p.product) + first_token * p.rank;
    for_block(group_tokens * block_ranks, [&](int i) {
      const int k = block_rank + i % block_ranks;
      A sum = 0;
      for (int w = 0; w < p.warps.features; ++w)
        sum += shared.products[w * p.group_tokens * block_ranks + i];
      if (k < rank)
        product[i / block_ranks * rank + k] = Narrow<S>::from(static_cast<A>(p.scale) * sum);
    });
  }
};

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    low_rank_pass_kernel(const PassArguments p) {
  using A = AccumulatorOf<S>;
  using Thread = PassThread<S, kAligned>;
  const auto shared = place_in_shared<PassShared<S>>(p);
  const Thread thread(p, shared);
  const int tile_features = p.warps.features * Thread::kWarpFeatures;
  for (int tile = 0; tile < thread.features; tile += tile_features) {
    const int first = tile + thread.place.feature * Thread::kWarpFeatures;
    A factor[kRanks][Thread::kFeatures], partial[kRanks][Thread::kFeatures] = {};
    thread.load_factor(first, factor);
    thread.pass_tokens(first, tile > 0, factor, partial);
    if (p.partials) thread.store_partials(first, partial);
  }
  if (!p.product) return;
  __syncthreads();
  thread.store_products();
}

int64_t tokens_per_group(int64_t tokens) {
  return larger(kFewestTokens, smaller(kMostTokens, ceil_div(tokens, kGroups)));
}

}  // namespace

int64_t token_groups(int64_t tokens) { return ceil_div(tokens, tokens_per_group(tokens)); }

void low_rank_pass(const Stream& stream, const LowRankPass& pass) {
  with_storage(pass.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t most = pass.partials ? kMostTokens : kMostTokensOfProducts;
    PassArguments p{pass, smaller(most, tokens_per_group(pass.tokens)), {}};
    const int64_t rank_groups = ceil_div(p.rank, kRanks);
    const int64_t tiles = ceil_div(p.features, WarpShape<S>::kWarpFeatures);
    p.warps = Warps::divide(tiles, rank_groups, kMostWarps);
    const bool whole = aligned<S>(p.x, p.x_stride, p.features);
    launch("low_rank_pass", whole ? low_rank_pass_kernel<S, true> : low_rank_pass_kernel<S, false>,
           ceil_div(p.tokens, p.group_tokens), ceil_div(rank_groups, p.warps.ranks),
           p.warps.count() * kWarp, measure<PassShared<S>, SharedArena>(p), stream, p);
  });
}

}  // namespace naslora
