// The interface of the CUDA kernels. Each function is one launch on the given device and stream. If
// the launch fails it throws std::runtime_error with the kernel's name and CUDA's message.
//
// Addresses are device addresses. Strides are in elements; what has no strides is contiguous. Every
// parameter has the dtype of the maps or float32. Partial sums are float32, or float64 where the
// maps are. A null output is not needed.
#pragma once

#include "../shared/vocabulary.h"

namespace naslora {

// A weight, a factor, a bias or a gradient of one, with its own dtype. Null data: there is none.
struct Parameter {
  void* data;
  Dtype dtype;
};

struct Stream {
  int device;
  void* handle;
};

struct Cell : CellShape {
  Map z;
  Parameter alpha;  // (8,)
  Parameter dw[4];  // (c, k, k)
  Parameter pw;     // (4, c, c)
};

// y (B, H, W, r) of the mixed cell.
void cell_forward(const Stream&, const Cell&, void* y);

// grad_z (B, H, W, r) and partials (cell_groups, cell_partial_size).
void cell_backward(const Stream&, const Cell&, const Map& grad_y, void* grad_z, void* partials);
int64_t cell_groups(int64_t batch, int64_t height, int64_t width, int64_t c);
int64_t cell_partial_size(int64_t c);

// y = kernel * z + avg_weight avg_pool(z) + max_weight max_pool(z). A pooling of weight zero is not
// added.
struct FoldedCell : CellShape {
  Map z;
  Parameter kernel;     // (c, c, k, k) as [out, in, row, column]
  int64_t kernel_size;  // k = 1, 3, 5, 7 or 9
  double avg_weight, max_weight;
};
void folded_cell_forward(const Stream&, const FoldedCell&, void* y);

// product = scale x factor^T and partials whose sum is scale u^T x, in one pass over x.
struct LowRankPass {
  Dtype dtype;
  const void* x;  // (T, J), each row contiguous
  int64_t x_stride, tokens, features, rank;
  Parameter factor;  // (r, J)
  int64_t factor_stride[2];
  const void* u;  // (T, r)
  double scale;
  void* product;   // (T, r), or null
  void* partials;  // (token_groups, r, J), or null
};
void low_rank_pass(const Stream&, const LowRankPass&);
int64_t token_groups(int64_t tokens);

// out = bias + scale u factor
struct LowRankExpand {
  Dtype dtype;
  const void* u;  // (T, r)
  int64_t tokens, features, rank;
  Parameter factor;  // (r, J)
  int64_t factor_stride[2];
  Parameter bias;  // (J,), or none
  double scale;
  void* out;  // (T, J)
};
void low_rank_expand(const Stream&, const LowRankExpand&);

// The second stage: adds the partial sums of all groups in order and writes gradients. grad_dw and
// grad_pw are needed together.
struct Reduction {
  bool float64;  // the partials
  int64_t cell_groups, c;
  const void* cell_partials;
  Parameter alpha, dw[4], pw;
  Parameter grad_alpha, grad_dw[4], grad_pw;
  struct LowRank {
    int64_t groups, rank, features;
    const void* partials;  // (groups, r, J)
    Parameter gradient;
  };
  LowRank A, B;  // the gradient of A is (r, J), that of B is transposed: (J, r)
};
void reduce_gradients(const Stream&, const Reduction&);

}  // namespace naslora
