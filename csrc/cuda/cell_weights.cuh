// The convolution of the cell in a block: weights in shared memory, the folded kernel, the loop
// over its taps. Also the sizes of the partial sums that the backward leaves for the second stage.
#pragma once

#include "tiles.cuh"

namespace naslora {

// ---- The partial sums of the backward ------------------------------------------------------
//
// A group of tiles leaves grad_K as [in][out][tap]. After it, each pair of channel groups (N
// outputs and N inputs) leaves what it adds to grad_a, without the last operation, whose grad_a is
// zero.

constexpr int kMixtureSums = kOperations - 1;

NASLORA_HOST_DEVICE constexpr int64_t kernel_sums(int64_t c) { return c * c * kFoldedTaps; }
NASLORA_HOST_DEVICE constexpr int64_t channel_pairs(int64_t c, bool float64) {
  const int64_t groups = ceil_div(c, float64 || c <= kFewChannels ? kFewChannels : kMostChannels);
  return groups * groups;
}
// Room for the pairs of either type.
NASLORA_HOST_DEVICE constexpr int64_t partial_size(int64_t c) {
  return kernel_sums(c) + channel_pairs(c, true) * kMixtureSums;
}

// ---- The loop over taps --------------------------------------------------------------------

// Numbers that one instruction loads from shared memory; two instructions for float64.
template <typename A, int N>
struct alignas(sizeof(A) * N < 16 ? sizeof(A) * N : 16) Pack {
  A lane[N];
};
template <int N, typename A>
__device__ inline Pack<A, N> load_pack(const A* from) {
  return *reinterpret_cast<const Pack<A, N>*>(from);
}

// sum[pixel][n] += weight[n] * plane[pixel + offset]
template <int N, typename A>
__device__ inline void add_tap(const A* plane, int offset, const A* weight, A (&sum)[2][N]) {
  const Pack<A, N> w = load_pack<N>(weight);
  const A above = plane[offset], below = plane[offset + Planar::kRowStride];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum[0][n] += w.lane[n] * above;
    sum[1][n] += w.lane[n] * below;
  }
}
template <int N, typename A>
__device__ inline void add(const A (&part)[2][N], A (&sum)[2][N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) sum[0][n] += part[0][n], sum[1][n] += part[1][n];
}

// A row of taps, in columns kX.
template <int... kX>
struct TapRow {
  template <int N, typename A>
  __device__ static void add(const A* plane, const A* weights, A (&sum)[2][N]) {
    int tap = 0;
    (add_tap<N>(plane, kX, weights + N * tap++, sum), ...);
  }
  // Whether these are the taps of row dy, from number `first` on.
  static constexpr bool are(int first, int dy) {
    int tap = first;
    return ((kTaps.dy[tap] == dy && kTaps.dx[tap++] == kX) && ...);
  }
};
using FarRow = TapRow<-4, -2, 0, 2, 4>;          // dy = -4, 4
using WideRow = TapRow<-4, -2, -1, 0, 1, 2, 4>;  // dy = -2, 0, 2
using NearRow = TapRow<-2, -1, 0, 1, 2>;         // dy = -1, 1
static_assert(FarRow::are(0, -4) && WideRow::are(5, -2) && NearRow::are(12, -1) &&
                  WideRow::are(17, 0) && NearRow::are(24, 1) && WideRow::are(29, 2) &&
                  FarRow::are(36, 4),
              "the seven rows of the 41 taps");

// sum += the convolution of a plane with weights [tap][n] of the folded kernel. Short sums have
// small rounding errors. The loop over the two sides prevents ptxas from loading all taps at once.
template <int N, typename A>
__device__ inline void convolve(const A* plane, const A* weights, A (&sum)[2][N]) {
#pragma unroll 1
  for (int side = -1; side <= 1; side += 2) {
    A part[2][N] = {};
    FarRow::add<N>(plane + side * 4 * Planar::kRowStride, weights + (side < 0 ? 0 : 36) * N, part);
    WideRow::add<N>(plane + side * 2 * Planar::kRowStride, weights + (side < 0 ? 5 : 29) * N, part);
    NearRow::add<N>(plane + side * Planar::kRowStride, weights + (side < 0 ? 12 : 24) * N, part);
    add(part, sum);
  }
  A part[2][N] = {};
  WideRow::add<N>(plane, weights + 17 * N, part);
  add(part, sum);
}

// ---- Weights in shared memory --------------------------------------------------------------

// The convolution that a weight tap belongs to, and that convolution's parameter. Both avoid an
// index into kernel arguments: the compiler would copy the arguments to local memory.
__device__ inline int op_of(int weight_tap) {
  return (weight_tap >= weight_start(1)) + (weight_tap >= weight_start(2)) +
         (weight_tap >= weight_start(3));
}
__device__ inline Parameter of_op(const Parameter (&p)[kConvolutions], int op) {
  return op < 2 ? (op == 0 ? p[0] : p[1]) : (op == 2 ? p[2] : p[3]);
}

// The weights of N inputs and N outputs; 0 beyond c. It has the functions of CellWeights.
template <typename A, int N>
struct SharedWeights {
  A* pw;  // [op][out][in]
  A* dw;  // [in][weight tap]
  int64_t first_out, first_in;

  NASLORA_HOST_DEVICE explicit SharedWeights(SharedArena& arena) {
    pw = arena.take<A>(kConvolutions * N * N);
    dw = arena.take<A>(N * kAllWeightTaps);
  }
  __device__ A pointwise(int op, int64_t out, int64_t in) const {
    return pw[(op * N + out - first_out) * N + in - first_in];
  }
  __device__ A depthwise(int op, int64_t in, int weight_tap) const {
    return dw[(in - first_in) * kAllWeightTaps + weight_start(op) + weight_tap];
  }

  __device__ void load(const Cell& cell, int64_t out, int64_t in) {
    first_out = out, first_in = in;
    for_block(kConvolutions * N * N, [&](int i) {
      const int op = i / (N * N), o = i / N % N, n = i % N;
      A value = 0;
      if (out + o < cell.c && in + n < cell.c)
        value = read<A>(cell.pw, (op * cell.c + out + o) * cell.c + in + n);
      pw[i] = value;
    });
    for_block(kAllWeightTaps, [&](int t) {
      const int op = op_of(t), taps = weight_taps(op);
      const Parameter weights = of_op(cell.dw, op);
      const int64_t first = in * taps + t - weight_start(op);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        A value = 0;
        if (in + n < cell.c) value = read<A>(weights, first + n * taps);
        dw[n * kAllWeightTaps + t] = value;
      }
    });
  }
};

// The part of K for N sources and N targets, as `convolve` takes it: [source][tap][target]. The
// transposed K takes each tap from the opposite pixel. Opposite taps have opposite numbers.
template <typename A, int N>
__device__ void fold(const SharedWeights<A, N>& weights, const A* mixture, const TapTable& taps,
                     bool transposed, A* folded) {
  for_block(N * kFoldedTaps * N, [&](int i) {
    const int target = i % N, tap = i / N % kFoldedTaps, source = i / (N * kFoldedTaps);
    const int64_t out = weights.first_out + (transposed ? source : target);
    const int64_t in = weights.first_in + (transposed ? target : source);
    folded[i] =
        folded_weight(weights, mixture, out, in, transposed ? kFoldedTaps - 1 - tap : tap, taps);
  });
}

// ---- Tables in shared memory ---------------------------------------------------------------

__device__ const TapTable kDeviceTaps = make_tap_table();

struct Exponential {
  __device__ float operator()(float x) const { return expf(x); }
  __device__ double operator()(double x) const { return exp(x); }
};

// The table of taps and the mixture. One thread computes the mixture while others load a tile.
template <typename A>
struct SharedTables {
  TapTable* taps;
  A* mixture;

  NASLORA_HOST_DEVICE explicit SharedTables(SharedArena& arena) {
    taps = arena.take<TapTable>(1);
    mixture = arena.take<A>(kOperations);
  }
  __device__ void load(const Parameter& alpha) const {
    const auto* table = reinterpret_cast<const uint32_t*>(&kDeviceTaps);
    for_block(sizeof(TapTable) / sizeof *table,
              [&](int i) { reinterpret_cast<uint32_t*>(taps)[i] = table[i]; });
    if (threadIdx.x != blockDim.x - 1) return;
    A logits[kOperations];
#pragma unroll
    for (int i = 0; i < kOperations; ++i) logits[i] = read<A>(alpha, i);
    softmax(logits, mixture, Exponential());
  }
};

// ---- Launching -----------------------------------------------------------------------------

// Calls body(S{}, std::integral_constant<int, N>{}) for the maps' dtype and number of channels.
template <typename Body>
void with_channels(const CellShape& shape, const Body& body) {
  with_storage(shape.dtype, [&](auto storage) {
    if constexpr (std::is_same_v<decltype(storage), double>) {
      body(storage, std::integral_constant<int, kFewChannels>());
    } else {
      if (shape.c <= kFewChannels)
        return body(storage, std::integral_constant<int, kFewChannels>());
      return body(storage, std::integral_constant<int, kMostChannels>());
    }
  });
}

}  // namespace naslora
