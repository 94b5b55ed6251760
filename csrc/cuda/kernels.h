// What the CUDA kernels offer to the Python module. Each function is one kernel launch on the given
// device and stream; it throws std::runtime_error with the kernel's name if the launch fails.
//
// Addresses are the device's. Maps are (B, H, W, r) with strides in elements; everything else is
// contiguous unless it has strides. Parameters are of the maps' dtype or float32, each for itself;
// partial sums are float32, or float64 where the maps are.
#pragma once

#include <cstdint>

namespace naslora {

enum class Dtype : int64_t { float32, float64, bfloat16, float16 };

struct Map {
  const void* data;
  int64_t stride[4];
};

struct Parameter {  // null: none
  void* data;
  Dtype dtype;
};

struct Stream {
  int device;
  void* handle;
};

struct Maps {
  Dtype dtype;
  int64_t batch, height, width, rank, c;
  const int64_t* channels;  // (c,), those of the maps that take part, or null for all
  Map z;
};

struct Cell : Maps {
  Parameter alpha;  // (8,)
  Parameter dw[4];  // (c, k, k)
  Parameter pw;     // (4, c, c)
};

// y (B, H, W, r) = the mixed cell of z
void cell_forward(const Stream&, const Cell&, void* y);

// grad_z (B, H, W, r) and partials (cell_groups, cell_partial_size); null is not due
void cell_backward(const Stream&, const Cell&, const Map& grad_y, void* grad_z, void* partials);
int64_t cell_groups(int64_t batch, int64_t height, int64_t width, int64_t c);
int64_t cell_partial_size(int64_t c);

// y (B, H, W, r) = kernel * z + average avg_pool(z) + maximum max_pool(z)
struct FoldedCell : Maps {
  Parameter kernel;  // (c, c, size, size) as [out, in, row, column]
  int64_t size;      // odd, at most 9
  double average, maximum;
};
void folded_cell_forward(const Stream&, const FoldedCell&, void* y);

// The skinny products of a low-rank adapter: of rows (T, J), each row contiguous, read once
struct LowRankPass {
  Dtype dtype;
  const void* rows;
  int64_t row_stride, tokens, columns, rank;
  Parameter matrix;  // (r, J)
  int64_t matrix_stride[2];
  const void* u;  // (T, r)
  double scale;
  void* product;   // (T, r) = scale rows matrix^T, or null
  void* partials;  // (row_groups, r, J), whose sum is scale u^T rows, or null
};
void low_rank_pass(const Stream&, const LowRankPass&);
int64_t row_groups(int64_t tokens);

struct LowRankExpand {  // out (T, J) = bias + scale u matrix
  Dtype dtype;
  const void* u;  // (T, r)
  int64_t tokens, columns, rank;
  Parameter matrix;  // (r, J)
  int64_t matrix_stride[2];
  Parameter bias;  // (J,), or none
  double scale;
  void* out;
};
void low_rank_expand(const Stream&, const LowRankExpand&);

// The second stage: adds up partial sums over their groups and writes gradients. Null is not due;
// grad_dw and grad_pw are due together.
struct Reduction {
  bool float64;  // the partials
  int64_t cell_groups, c;
  const void* cell_partials;
  Parameter alpha, dw[4], pw;
  Parameter grad_alpha, grad_dw[4], grad_pw;
  struct LowRank {
    int64_t groups, rank, columns;
    const void* partials;  // (groups, r, J)
    Parameter gradient;
  } A, B;  // gradients (r, J) and, transposed, (J, r)
};
void reduce_gradients(const Stream&, const Reduction&);

}  // namespace naslora
