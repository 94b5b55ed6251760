// What the CPU kernels offer, once per instruction set, and what they need from their host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace naslora {

enum class Dtype : int64_t { float32, float64, bfloat16, float16 };

// Pointers to maps are to elements of `dtype`; parameters and their gradients are float32, or
// float64 where dtype is float64. Offsets are in elements and 64 bits wide.
struct Map {  // (B, H, W, r) with any strides
  const void* data;
  int64_t stride[4];
};

struct Grid {  // B maps of H x W pixels with r channels, c of which are convolved
  Dtype dtype;
  int64_t batch, height, width, rank, c;
  const int64_t* channels;  // (c,), or null for all
};

struct Cell : Grid {
  const void* alpha;  // (8,)
  const void* dw[4];  // (c, k, k)
  const void* pw;     // (4, c, c)
  Map z;
};

struct FoldedCell : Grid {  // c = r
  const void* kernel;       // (c, c, k, k), k = 1, 3, ..., 9
  int64_t kernel_size;
  double average, maximum;  // weights of the poolings; what is zero is not computed
  Map z;
};

struct CellGradients {  // a null pointer is a gradient that nobody asked for
  void* z;              // (B, H, W, r), contiguous
  void* alpha;          // (8,)
  void* dw[4];          // all four and pw, or none
  void* pw;
};

// The skinny products of a low-rank adapter, over the rows of x (T, J).
struct LowRankPass {
  Dtype dtype;
  const void* x;
  int64_t x_stride, tokens, columns, rank;
  double scale;
  const void* matrix;  // (r, J)
  void* product;       // (T, r) = scale * x matrix^T, or null: none
  const void* rows;    // (T, r)
  void* gradient;      // [k, j] = scale * sum_t rows[t, k] x[t, j], or null: none
  int64_t gradient_stride_k, gradient_stride_j;
};

struct LowRankExpand {  // out (T, J) = bias + scale * rows matrix
  Dtype dtype;
  const void* rows;    // (T, r)
  const void* matrix;  // (r, J)
  const void* bias;    // (J,) or null
  int64_t tokens, columns, rank;
  double scale;
  void* out;
};

// h = bias + rows of (folded cell of x encoder^T) decoder: what the frozen product is added to.
struct FoldedUpdate {
  FoldedCell cell;  // z is not set: it lives during the call
  const void* x;    // (T, J), T = B H W
  int64_t x_stride, columns;
  const void* encoder;  // (c, J)
  const void* decoder;  // (c, C_out)
  const void* bias;     // (C_out,) or null
  int64_t out_columns;
  void* h;  // (T, C_out)
};

struct Kernels {
  const char* name;
  void (*cell_forward)(const Cell&, void* y);  // y (B, H, W, r), contiguous
  void (*cell_backward)(const Cell&, const Map& grad_y, const CellGradients&);
  void (*folded_cell)(const FoldedCell&, void* y);
  void (*low_rank_pass)(const LowRankPass&);
  void (*low_rank_expand)(const LowRankExpand&);
  void (*folded_update)(const FoldedUpdate&);
};

// Work is cut into tasks by its shape alone, never by the number of threads, and partial sums
// are added in task order: results are the same bits whoever runs the tasks.
using TaskRange = void (*)(int64_t begin, int64_t end, void* context);
void run_tasks(int64_t count, TaskRange body, void* context);

// Memory of the calling thread, aligned to a cache line, kept between calls; valid until the
// thread asks again.
void* thread_scratch(size_t bytes);

// Memory for one call, aligned likewise.
void* host_allocate(size_t bytes);
void host_free(void* memory);

}  // namespace naslora
