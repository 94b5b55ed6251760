// The skinny products of a low-rank adapter. They are bound by the memory of their large operand,
// rows (T, J), so each reads or writes it once, sixteen bytes a thread and instruction.
//
// Both kernels share one geometry. A warp works on 256 columns, eight a thread (128 and four in
// float64), so that what belongs to a column stays in a thread's registers while rows pass by. A
// block takes some consecutive rows; its warps divide the columns among them and, where these are
// few, also the rows, in slices. Sizes follow from shapes alone, never from the device, so that
// every card adds in the same order.
#include "common.cuh"

namespace naslora {
namespace {

constexpr int kMostWarps = 8;  // of a block
constexpr int kRanks = 3;  // a thread works on at once; the usual ranks 3, 6, 12 and 24 divide
constexpr int64_t kFewestRows = 8, kMostRows = 96;  // of a group
constexpr int64_t kGroups = 160;  // wanted: more than any card has multiprocessors

template <typename S>
struct Shape {
  using A = AccumulatorOf<S>;
  static constexpr int kColumns = sizeof(A) == 8 ? 4 : 8;           // of a thread
  static constexpr int kWarpColumns = kColumns * kWarp;             // of a warp
  static constexpr int kRows = 64 / (kColumns * sizeof(S));         // 64 bytes a thread in flight
};

// A thread's columns of one row as they are stored; 0 beyond the last column. `kAligned` rows begin
// and end at multiples of sixteen bytes.
template <typename S, bool kAligned>
struct Piece {
  static constexpr int kSize = Vector<S>::kSize, kVectors = Shape<S>::kColumns / kSize;
  Vector<S> vector[kVectors];

  // Which of the warp's columns a lane's i-th is: vectors of neighbouring lanes are neighbours.
  __device__ static int column(int i, int lane) {
    return (i / kSize * kWarp + lane) * kSize + i % kSize;
  }

  __device__ void load(const S* row, int first, int columns, int lane) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + column(v * kSize, lane);
      if constexpr (kAligned) {
        vector[v] = at < columns ? load_vector(row + at) : Vector<S>{};
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e) vector[v].lane[e] = at + e < columns ? row[at + e] : S{};
      }
    }
  }
  __device__ void store(S* row, int first, int columns, int lane) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + column(v * kSize, lane);
      if constexpr (kAligned) {
        if (at < columns) store_vector(row + at, vector[v]);
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (at + e < columns) row[at + e] = vector[v].lane[e];
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
bool aligned(const void* data, int64_t stride, int64_t columns) {
  return (reinterpret_cast<uintptr_t>(data) | stride * sizeof(S) | columns * sizeof(S)) % 16 == 0;
}

// How the warps of a block share its columns, ranks and rows.
struct Warps {
  int columns, ranks, slices;
  NASLORA_HOST_DEVICE int count() const { return columns * ranks * slices; }

  static Warps share(int64_t column_tiles, int64_t rank_groups, int64_t most) {
    Warps w;
    w.ranks = static_cast<int>(smaller(rank_groups, most));
    const int64_t rounds = ceil_div(column_tiles, most / w.ranks);
    w.columns = static_cast<int>(ceil_div(column_tiles, rounds));
    w.slices = static_cast<int>(most / (w.columns * w.ranks));
    return w;
  }
};

// ---- product = scale rows matrix^T and partials, whose sum is scale u^T rows -----------------
//
// Each warp keeps its columns of three rows of the matrix and of three rows of partial sums in
// registers. For every row it multiplies its part of the product, which is then summed over lanes
// by exchanging halves, and over warps in shared memory. Warps of other ranks read the same rows
// at about the same time: one of them from memory, the others from the L1 cache.

struct PassArguments : LowRankPass {
  int64_t group_rows;
  Warps warps;
};

template <typename S>
struct PassShared {
  using A = AccumulatorOf<S>;
  A* products;  // [column warp][row of the group][rank of the block]
  A* partials;  // [column warp][rank of the block][column of the warp]

  NASLORA_HOST_DEVICE PassShared(Carver& carver, const PassArguments& p) {
    const int64_t ranks = p.warps.columns * p.warps.ranks * kRanks;
    products = carver.take<A>(p.product ? ranks * p.group_rows : 0);
    partials = carver.take<A>(p.partials ? ranks * Shape<S>::kWarpColumns : 0);
  }
};

// Sums the values of two rows over the warp. Afterwards the lower half of the lanes holds the first
// row's sums in values[0], the upper half the second's: lanes first exchange the rows they give up.
template <typename A>
__device__ void sum_over_lanes(A (&values)[2][kRanks], int lane) {
  constexpr int kHalf = kWarp / 2;
  const bool upper = lane >= kHalf;
#pragma unroll
  for (int k = 0; k < kRanks; ++k) {
    const A kept = upper ? values[1][k] : values[0][k];
    const A given = upper ? values[0][k] : values[1][k];
    values[0][k] = kept + __shfl_xor_sync(0xffffffffu, given, kHalf);
  }
#pragma unroll
  for (int offset = kHalf / 2; offset >= 1; offset /= 2)
#pragma unroll
    for (int k = 0; k < kRanks; ++k)
      values[0][k] += __shfl_xor_sync(0xffffffffu, values[0][k], offset);
}

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    low_rank_pass_kernel(const PassArguments p) {
  using A = AccumulatorOf<S>;
  using Piece = Piece<S, kAligned>;
  constexpr int kColumns = Shape<S>::kColumns, kWarpColumns = Shape<S>::kWarpColumns;
  constexpr int kRows = Shape<S>::kRows;
  Carver carver(shared_memory());
  const PassShared<S> shared(carver, p);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column_warp = warp % p.warps.columns;
  const int rank_warp = warp / p.warps.columns % p.warps.ranks;
  const int slice = warp / (p.warps.columns * p.warps.ranks);
  const int block_ranks = p.warps.ranks * kRanks;
  const int block_rank = blockIdx.y * block_ranks;
  const int first_rank = block_rank + rank_warp * kRanks;

  const int rank = static_cast<int>(p.rank), columns = static_cast<int>(p.columns);
  const int64_t first_row = blockIdx.x * p.group_rows;
  const int group_rows = static_cast<int>(smaller(p.group_rows, p.tokens - first_row));
  const int begin = slice * group_rows / p.warps.slices;
  const int end = (slice + 1) * group_rows / p.warps.slices;
  const S* rows = static_cast<const S*>(p.rows) + first_row * p.row_stride;
  A* products_of_warp = shared.products + column_warp * static_cast<int>(p.group_rows) * block_ranks +
                        rank_warp * kRanks;
  // A warp without ranks reads another's: its sums are not written.
  const S* u = static_cast<const S*>(p.u) + first_row * rank + (first_rank < rank ? first_rank : 0);

  for (int tile = 0; tile < columns; tile += p.warps.columns * kWarpColumns) {
    const int first = tile + column_warp * kWarpColumns;
    A matrix[kRanks][kColumns], partial[kRanks][kColumns];
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = first + Piece::column(i, lane);
        matrix[k][i] = 0;
        if (p.product && first_rank + k < rank && column < columns)
          matrix[k][i] = read<A>(p.matrix, (first_rank + k) * p.matrix_stride[0] +
                                               column * p.matrix_stride[1]);
        partial[k][i] = 0;
      }
    }

    for (int t = begin; t < end; t += kRows) {
      Piece piece[kRows];
      A products[2][kRanks];
#pragma unroll
      for (int i = 0; i < kRows; ++i)  // beyond the last row once more the last
        piece[i].load(rows + (t + i < end ? t + i : end - 1) * p.row_stride, first, columns, lane);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A row[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) row[j] = piece[i].get(j);
        if (p.partials && t + i < end) {
#pragma unroll
          for (int k = 0; k < kRanks; ++k) {
            const int at = first_rank + k < rank ? k : 0;  // sums of no rank are not written
            const A weight = widen(u[(t + i) * rank + at]);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) partial[k][j] += weight * row[j];
          }
        }
        if (!p.product) continue;
#pragma unroll
        for (int k = 0; k < kRanks; ++k) {
          products[i % 2][k] = 0;
#pragma unroll
          for (int j = 0; j < kColumns; ++j) products[i % 2][k] += row[j] * matrix[k][j];
        }
        if (i % 2 == 0) continue;
        sum_over_lanes(products, lane);
        const int summed = t + i - 1 + lane / (kWarp / 2);
        if (lane % (kWarp / 2) == 0 && summed < end) {
          A* sums = products_of_warp + summed * block_ranks;
#pragma unroll
          for (int k = 0; k < kRanks; ++k) sums[k] = (tile ? sums[k] : 0) + products[0][k];
        }
      }
    }

    // The slices add up their partial sums in order; then neighbouring threads write neighbours.
    if (p.partials) {
      const int own = (column_warp * p.warps.ranks + rank_warp) * kRanks;
      for (int s = 0; s < p.warps.slices; ++s) {
        if (s == slice) {
#pragma unroll
          for (int k = 0; k < kRanks; ++k) {
            A* sums = shared.partials + (own + k) * kWarpColumns;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
              A& sum = sums[Piece::column(i, lane)];
              sum = (s ? sum : 0) + partial[k][i];
            }
          }
        }
        __syncthreads();
      }
      A* out = static_cast<A*>(p.partials) + blockIdx.x * p.rank * p.columns;
      for (int k = slice; k < kRanks && first_rank + k < rank; k += p.warps.slices)
        for (int i = lane; i < kWarpColumns && first + i < columns; i += kWarp)
          out[(first_rank + k) * p.columns + first + i] =
              static_cast<A>(p.scale) * shared.partials[(own + k) * kWarpColumns + i];
      __syncthreads();
    }
  }

  if (!p.product) return;
  __syncthreads();
  S* product = static_cast<S*>(p.product) + first_row * p.rank;
  for_block(group_rows * block_ranks, [&](int i) {
    const int k = block_rank + i % block_ranks;
    A sum = 0;
    for (int w = 0; w < p.warps.columns; ++w)
      sum += shared.products[w * p.group_rows * block_ranks + i];
    if (k < rank)
      product[i / block_ranks * rank + k] = Narrow<S>::from(static_cast<A>(p.scale) * sum);
  });
}

// ---- out = bias + scale u matrix -------------------------------------------------------------
//
// The block's columns of the matrix lie in shared memory, as does u for its rows, times the scale.
// Each thread sums eight columns of four rows at a time, so that an element of the matrix, once
// read, serves four rows, and one of u eight columns.

constexpr int kExpandRows = 4;
constexpr int64_t kFewestExpandRows = 16, kMostExpandRows = 64;  // of a block
constexpr int64_t kRankTile = 32;  // of 256 columns, or fewer ranks of more: 32 KiB

struct ExpandArguments : LowRankExpand {
  int64_t block_rows;
  Warps warps;
  int rank_tile;
};

template <typename S>
struct ExpandShared {
  using A = AccumulatorOf<S>;
  A* matrix;  // [rank][column of the block, as `position` orders a warp's]
  A* u;       // [rank][row of the block]

  NASLORA_HOST_DEVICE ExpandShared(Carver& carver, const ExpandArguments& p) {
    matrix = carver.take<A>(p.rank_tile * p.warps.columns * Shape<S>::kWarpColumns);
    u = carver.take<A>(p.rank_tile * p.block_rows);
  }

  // A thread reads its columns as vectors of A, and neighbouring lanes neighbouring vectors: of
  // 16-bit columns, which lie eight to a lane, the first four of all lanes come before the others.
  __device__ static int position(int column) {
    constexpr int kStored = Vector<S>::kSize, kRead = Vector<A>::kSize;
    const int lane = column / kStored % kWarp;
    const int i = column / (kStored * kWarp) * kStored + column % kStored;
    return (i / kRead * kWarp + lane) * kRead + i % kRead;
  }
};

template <typename S>
__device__ void stage_expand(const ExpandArguments& p, const ExpandShared<S>& shared,
                             int64_t first_rank, int64_t first_column, int64_t first_row) {
  using A = AccumulatorOf<S>;
  constexpr int kWarpColumns = Shape<S>::kWarpColumns;
  const int columns = p.warps.columns * kWarpColumns;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.rank_tile * columns; i += blockDim.x) {
    const int64_t rank = first_rank + i / columns, column = first_column + i % columns;
    A element = 0;
    if (rank < p.rank && column < p.columns)
      element = read<A>(p.matrix, rank * p.matrix_stride[0] + column * p.matrix_stride[1]);
    const int in_warp = i % kWarpColumns;
    shared.matrix[i - in_warp + shared.position(in_warp)] = element;
  }
  const int rows = static_cast<int>(p.block_rows);
  for_block(p.rank_tile * rows, [&](int i) {
    const int64_t rank = first_rank + i % p.rank_tile, row = first_row + i / p.rank_tile;
    A weight = 0;
    if (rank < p.rank && row < p.tokens)
      weight = static_cast<A>(p.scale) * widen(static_cast<const S*>(p.u)[row * p.rank + rank]);
    shared.u[i % p.rank_tile * rows + i / p.rank_tile] = weight;
  });
}

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    low_rank_expand_kernel(const ExpandArguments p) {
  using A = AccumulatorOf<S>;
  using Piece = Piece<S, kAligned>;
  constexpr int kColumns = Shape<S>::kColumns, kWarpColumns = Shape<S>::kWarpColumns;
  Carver carver(shared_memory());
  const ExpandShared<S> shared(carver, p);

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column_warp = warp % p.warps.columns, slice = warp / p.warps.columns;
  const int block_columns = p.warps.columns * kWarpColumns;
  const int columns = static_cast<int>(p.columns), first_column = blockIdx.y * block_columns;
  const int first = first_column + column_warp * kWarpColumns;
  const int64_t first_row = blockIdx.x * p.block_rows;
  A bias[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = first + Piece::column(i, lane);
    bias[i] = 0;
    if (p.bias.data && column < columns) bias[i] = read<A>(p.bias, column);
  }

  const int step = p.warps.slices * kExpandRows;
  for (int t = 0; t < p.block_rows; t += step) {  // every warp as often: there are barriers inside
    const int row = t + slice * kExpandRows;
    A sum[kExpandRows][kColumns] = {};
    for (int64_t first_rank = 0; first_rank < p.rank; first_rank += p.rank_tile) {
      if (t == 0 || p.rank > p.rank_tile) {
        __syncthreads();
        stage_expand(p, shared, first_rank, first_column, first_row);
        __syncthreads();
      }
      const int ranks = static_cast<int>(smaller(p.rank_tile, p.rank - first_rank));
      for (int k = 0; k < ranks; ++k) {
        constexpr int kSize = Vector<A>::kSize;
        const A* matrix = shared.matrix + k * block_columns + column_warp * kWarpColumns;
        const A* weight = shared.u + k * p.block_rows + row;
#pragma unroll
        for (int v = 0; v < kColumns / kSize; ++v) {
          const Vector<A> element = load_vector(matrix + (v * kWarp + lane) * kSize);
#pragma unroll
          for (int i = 0; i < kExpandRows; ++i)
#pragma unroll
            for (int e = 0; e < kSize; ++e) sum[i][v * kSize + e] += weight[i] * element.lane[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kExpandRows; ++i) {
      if (first_row + row + i >= p.tokens) break;
      Piece piece;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) piece.set(j, bias[j] + sum[i][j]);
      piece.store(static_cast<S*>(p.out) + (first_row + row + i) * p.columns, first, columns, lane);
    }
  }
}

int64_t rows_per_group(int64_t tokens) {
  return larger(kFewestRows, smaller(kMostRows, ceil_div(tokens, kGroups)));
}

}  // namespace

int64_t row_groups(int64_t tokens) { return ceil_div(tokens, rows_per_group(tokens)); }

void low_rank_pass(const Stream& stream, const LowRankPass& pass) {
  with_storage(pass.dtype, [&](auto storage) {
    using S = decltype(storage);
    PassArguments p{pass, rows_per_group(pass.tokens), {}};
    const int64_t rank_groups = ceil_div(p.rank, kRanks);
    p.warps = Warps::share(ceil_div(p.columns, Shape<S>::kWarpColumns), rank_groups, kMostWarps);
    Carver carver(nullptr);
    PassShared<S>(carver, p);
    const bool whole = aligned<S>(p.rows, p.row_stride, p.columns);
    launch("low_rank_pass", whole ? low_rank_pass_kernel<S, true> : low_rank_pass_kernel<S, false>,
           row_groups(p.tokens), ceil_div(rank_groups, p.warps.ranks), p.warps.count() * kWarp,
           carver.size(), stream, p);
  });
}

void low_rank_expand(const Stream& stream, const LowRankExpand& expand) {
  with_storage(expand.dtype, [&](auto storage) {
    using S = decltype(storage);
    ExpandArguments p{expand, 0, {}, static_cast<int>(smaller(expand.rank, kRankTile))};
    const int64_t tiles = ceil_div(p.columns, Shape<S>::kWarpColumns);
    p.warps = Warps::share(tiles, 1, smaller(kMostWarps, kRankTile / p.rank_tile));
    p.warps.slices = kMostWarps / p.warps.columns;
    // The more ranks, the more of the matrix a block reads: more rows share it.
    const int64_t step = p.warps.slices * kExpandRows;
    const int64_t rows = smaller(kMostExpandRows, kFewestExpandRows * ceil_div(p.rank, 2 * kRanks));
    p.block_rows = ceil_div(rows, step) * step;
    Carver carver(nullptr);
    ExpandShared<S>(carver, p);
    const bool whole = aligned<S>(p.out, p.columns, p.columns);
    launch("low_rank_expand",
           whole ? low_rank_expand_kernel<S, true> : low_rank_expand_kernel<S, false>,
           ceil_div(p.tokens, p.block_rows), ceil_div(tiles, p.warps.columns),
           p.warps.count() * kWarp, carver.size(), stream, p);
  });
}

}  // namespace naslora
