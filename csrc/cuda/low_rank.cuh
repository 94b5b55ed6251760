// The geometry that the two low-rank kernels share. They are bound by the memory traffic of their
// wide matrix, x or out (T, J), so each reads or writes it once, sixteen bytes a thread and
// instruction.
//
// A warp works on 256 features, eight a thread (128 and four in float64), so that what belongs to a
// feature stays in a thread's registers while tokens pass by. A block takes some consecutive
// tokens. Its warps divide the features among them and, where these are few, also the tokens, in
// slices. Sizes depend on shapes alone, never on the device, so that every card adds in the same
// order.
#pragma once

#include "common.cuh"

namespace naslora {

constexpr int kMostWarps = 8;  // of a block
constexpr int kRanks = 3;  // that a thread works on at once; 3 divides the usual ranks 3, 6, 12, 24

template <typename S>
struct WarpShape {
  using A = AccumulatorOf<S>;
  static constexpr int kFeatures = sizeof(A) == 8 ? 4 : 8;  // of a thread
  static constexpr int kWarpFeatures = kFeatures * kWarp;
  static constexpr int kTokens = 64 / (kFeatures * sizeof(S));  // 64 bytes a thread in flight
};

// A thread's features of one token in the storage type. With kAligned, rows begin and end at
// multiples of sixteen bytes.
template <typename S, bool kAligned>
struct Piece {
  static constexpr int kSize = Vector<S>::kSize, kVectors = WarpShape<S>::kFeatures / kSize;
  Vector<S> vector[kVectors];

  // Which of the warp's features is the i-th of a lane. Neighbouring lanes have neighbouring
  // vectors.
  __device__ static int feature(int i, int lane) {
    return (i / kSize * kWarp + lane) * kSize + i % kSize;
  }

  // Beyond the last feature it loads the last vector again, or 0. A load without a condition has no
  // branch of its own, so that the loads of several tokens are in flight together.
  __device__ void load(const S* row, int first, int features, int lane) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + feature(v * kSize, lane);
      if constexpr (kAligned) {
        vector[v] = load_vector(row + (at < features ? at : features - kSize));
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e) vector[v].lane[e] = at + e < features ? row[at + e] : S{};
      }
    }
  }
  __device__ void store(S* row, int first, int features, int lane) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + feature(v * kSize, lane);
      if constexpr (kAligned) {
        if (at < features) store_vector(row + at, vector[v]);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (at + e < features) row[at + e] = vector[v].lane[e];
      }
    }
  }
  __device__ AccumulatorOf<S> get(int i) const { return widen(vector[i / kSize].lane[i % kSize]); }
  __device__ void set(int i, AccumulatorOf<S> value) {
    vector[i / kSize].lane[i % kSize] = Narrow<S>::from(value);
  }
};

// Whether rows begin and end at multiples of sixteen bytes.
template <typename S>
bool aligned(const void* data, int64_t stride, int64_t features) {
  return (reinterpret_cast<uintptr_t>(data) | stride * sizeof(S) | features * sizeof(S)) % 16 == 0;
}

// How the warps of a block divide its features, ranks and tokens.
struct Warps {
  int features, ranks, slices;  // slices of tokens
  NASLORA_HOST_DEVICE int count() const { return features * ranks * slices; }

  static Warps divide(int64_t feature_tiles, int64_t rank_groups, int64_t most) {
    Warps w;
    w.ranks = static_cast<int>(smaller(rank_groups, most));
    const int64_t rounds = ceil_div(feature_tiles, most / w.ranks);
    w.features = static_cast<int>(ceil_div(feature_tiles, rounds));
    w.slices = static_cast<int>(most / (w.features * w.ranks));
    return w;
  }
};

// Which part of the block's work the calling thread's warp has.
struct WarpPlace {
  int lane, feature, rank, slice;

  __device__ explicit WarpPlace(const Warps& warps) {
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    feature = warp % warps.features;
    rank = warp / warps.features % warps.ranks;
    slice = warp / (warps.features * warps.ranks);
  }
};

}  // namespace naslora
