// The vocabulary of csrc: each concept has one name, on the CPU and in CUDA.
//
// Data
//   map           A tensor (B, H, W, r), channels last, with any strides: z, y or a gradient.
//   row, column   Of an image's pixels. A row of a matrix is named with its matrix: a row of x.
//   rank r        The number of channels of a map.
//   selected      The c of r channels that pass through the cell; the set S of the paper. The
//                 others are the rest. They are copied.
//   token         One pixel as a row of the wide matrix x (T, J); T = B H W.
//   feature       A column of x; J is C_in or C_out.
//   x, u          The wide matrix (T, J) and the skinny matrix (T, r) of a low-rank product.
//   factor        The matrix (r, J) between them: lora_A, or lora_B transposed.
//   grad_t        dL/dt, the gradient of the loss with respect to t. In loops, g is grad_y.
//
// The cell
//   op            One of the eight operations, in the order of alpha. The first four are the
//                 convolutions.
//   mixture       a = softmax(alpha).
//   dw, pw        The weights of the depthwise and of the pointwise convolutions.
//   kernel K      The folded kernel: the one convolution that equals the mixture of all operations
//                 except the poolings.
//   tap           A position in a convolution kernel. The folded kernel has 41 taps, the four
//                 depthwise kernels have 68 weight taps.
//   out, in       Output and input channel of K. They keep these names in the backward.
//   source,       The channels that a loop reads and writes: (in, out) in the forward, (out, in) in
//   target        the backward, which uses the transposed K.
//   argmax        Which pixel of a 3x3 window has the maximum (drawing in cell_math.h).
//
// Attention
//   head          One of the attentions of an image; d features of each token belong to it.
//   query, key    Tokens as the rows and the columns of the scores.
//   scores S      scale q k^T + rel_h + rel_w, (queries, keys) of one head. p = softmax(S).
//   ds, dp        dL/dS and dL/dp; dq, dk, dv, drel_h and drel_w in the same way.
//   block         Consecutive queries, or consecutive keys. A tile of scores is a block of keys
//                 times a block of queries, stored in this order.
//   part          The queries of one head that one task has.
//
// Work and memory
//   tile          The rectangle of one image that is worked on at once. A tiling says how maps are
//                 cut into tiles.
//   halo          The pixels around a tile that its taps reach.
//   plane         One channel of a tile with its halo, row by row, zero outside the image. A tap is
//                 a constant offset between positions of a plane.
//   arena         Hands out arrays of one allocation.
//   scratch       On the CPU: memory of one thread, kept between calls.
//   shared        In CUDA: the shared memory of one block.
//   task, group   The work behind one partial sum: a range of tiles or of tokens. It is a task on
//                 the CPU, a group in CUDA.
//   partials      The partial sums of all tasks or groups. The second stage adds them in order.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define NASLORA_HOST_DEVICE __host__ __device__
#else
#define NASLORA_HOST_DEVICE
#endif

namespace naslora {

// The order is part of the Python interface: Python passes these numbers.
enum class Dtype : int64_t { float32, float64, bfloat16, float16 };

// A map of any strides. Strides are in elements.
struct Map {
  const void* data;
  int64_t stride[4];
};

// The shape of a cell's maps, and the channels that it selects.
struct CellShape {
  Dtype dtype;  // of the maps
  int64_t batch, height, width, rank;
  int64_t c;                // number of selected channels
  const int64_t* channels;  // (c,) the selected channels, or null for all
};

NASLORA_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NASLORA_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
NASLORA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NASLORA_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_div(a, multiple) * multiple;
}

}  // namespace naslora
