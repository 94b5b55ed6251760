// The interface of the CPU kernels, which are compiled once per instruction set, and the services
// that they need from the Python module.
//
// `dtype` is that of maps, tokens and products. Weights, factors and their gradients are float32,
// or float64 where dtype is float64. They are contiguous unless they have strides. Strides are in
// elements. A null pointer to an output means that it is not needed.
#pragma once

#include "../shared/vocabulary.h"

namespace naslora {

struct Cell : CellShape {
  const void* alpha;  // (8,)
  const void* dw[4];  // (c, k, k)
  const void* pw;     // (4, c, c)
  Map z;
};

struct CellGradients {
  void* z;      // (B, H, W, r), contiguous
  void* alpha;  // (8,)
  void* dw[4];  // the four and pw are needed together
  void* pw;
};

// y = kernel * z + avg_weight avg_pool(z) + max_weight max_pool(z), with all channels selected. A
// pooling of weight zero is not computed.
struct FoldedCell : CellShape {
  const void* kernel;   // (c, c, k, k)
  int64_t kernel_size;  // k = 1, 3, 5, 7 or 9
  double avg_weight, max_weight;
  Map z;
};

// product = scale x factor^T and gradient = scale u^T x, in one pass over x.
struct LowRankPass {
  Dtype dtype;
  const void* x;  // (T, J)
  int64_t x_stride, tokens, features, rank;
  double scale;
  const void* factor;  // (r, J)
  void* product;       // (T, r), or null
  const void* u;       // (T, r)
  void* gradient;      // (r, J), or null
  int64_t gradient_stride[2];
};

// out = bias + scale u factor
struct LowRankExpand {
  Dtype dtype;
  const void* u;       // (T, r)
  const void* factor;  // (r, J)
  const void* bias;    // (J,), or null
  int64_t tokens, features, rank;
  double scale;
  void* out;  // (T, J)
};

// h = bias + (folded cell of x lora_A^T) decoder: the adapter's part of a folded layer.
struct FoldedUpdate {
  FoldedCell cell;  // z is not set: it lives only during the call
  const void* x;    // (T, C_in), T = B H W
  int64_t x_stride, in_features;
  const void* encoder;  // (c, C_in), lora_A
  const void* decoder;  // (c, C_out), lora_B transposed
  const void* bias;     // (C_out,), or null
  int64_t out_features;
  void* h;  // (T, C_out)
};

// A tensor (B, heads, N, features) of which the features are contiguous.
struct Tokens {
  const void* data;
  int64_t stride[3];
};

// Attention with decomposed relative positions: N = queries, and a grid of height * width keys.
struct Attention {
  Dtype dtype;
  int64_t batch, heads, queries, height, width, dim;
  double scale;
  Tokens q, k, v, rel_h, rel_w;
};

// What the backward of attention gets besides the operands, and what it writes.
struct AttentionGradients {
  Tokens grad_o, o;
  const void* softmax;  // what the forward wrote
  void *q, *k, *v;      // (B, N, heads, dim), of the keys (B, height * width, heads, dim)
  void *rel_h, *rel_w;  // (B, heads, N, height) and (B, heads, N, width)
};

// The kernels of attention. They use wider vectors than the others, or further instructions.
struct AttentionKernels {
  // o (B, N, heads, dim). softmax (2, B, heads, N), in the dtype of sums: the largest score of each
  // query, and the sum of exp(score - largest).
  void (*forward)(const Attention&, void* o, void* softmax);
  void (*backward)(const Attention&, const AttentionGradients&);
};

struct Kernels {
  void (*cell_forward)(const Cell&, void* y);  // y (B, H, W, r), contiguous
  void (*cell_backward)(const Cell&, const Map& grad_y, const CellGradients&);
  void (*folded_cell)(const FoldedCell&, void* y);
  void (*low_rank_pass)(const LowRankPass&);
  void (*low_rank_expand)(const LowRankExpand&);
  void (*folded_update)(const FoldedUpdate&);
};

// Of the instruction set in use.
extern const Kernels* kernels;
extern const AttentionKernels* attention_kernels;

// Runs body on ranges that together are [0, count), on the threads of torch.
//
// The cut into tasks depends on shapes alone, never on the number of threads, and partial sums are
// added in task order. So results have the same bits for any number of threads.
using TaskRange = void (*)(int64_t begin, int64_t end, void* context);
void run_tasks(int64_t count, TaskRange body, void* context);

// Memory of the calling thread, aligned to a cache line. It is kept between calls and valid until
// the thread's next request.
void* thread_scratch(size_t bytes);

// Memory for one call, aligned to a cache line.
void* host_allocate(size_t bytes);
void host_free(void* memory);

}  // namespace naslora
