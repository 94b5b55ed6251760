// The launches of csrc/shared/operators.h on a GPU, on the current stream of the maps' device.
#pragma once

#include "../shared/operators.h"
#include "kernels.h"

namespace naslora {

inline Parameter parameter(const Tensor& tensor) {
  return {tensor.data, tensor ? tensor.dtype : Dtype::float32};
}

struct Launches {
  static constexpr bool kFoldsInOneLaunch = false;

  // Partial sums of the gradient of lora_A or lora_B.
  struct FactorSum {
    Tensor gradient, partials;
    FactorSum(const Tensor& of, int64_t tokens, bool transposed) : gradient(of.borrowed()) {
      const int64_t rank = of.sizes[transposed], columns = of.sizes[!transposed];
      partials = empty(of, sum_dtype(of.dtype), {token_groups(tokens), rank, columns});
    }
  };
  struct CellSums {
    const Tensor* gradients;
    bool need_alpha, need_weights;
    Tensor partials;
    CellSums(const Tensor& z, const CellTensors& cell, const Tensor* gradients, bool need_alpha,
             bool need_weights)
        : gradients(gradients), need_alpha(need_alpha), need_weights(need_weights) {
      const int64_t* s = z.sizes;
      partials = empty(z, sum_dtype(z.dtype),
                       {cell_groups(s[0], s[1], s[2], cell.c), cell_partial_size(cell.c)});
    }
  };

  explicit Launches(const Tensor& maps) : dtype_(maps.dtype), stream_{maps.device, nullptr} {
    if (maps.device_type == torch.device_type_cpu())
      stream_.device = 0;  // the emulation
    else
      succeeded(torch.get_current_cuda_stream(maps.device, &stream_.handle));
  }

  void prepare(CellTensors& cell) const {
    for (Tensor& p : cell.parameters)
      if (!p.is_contiguous()) p = contiguous(p, p.dtype);
    if (cell.channels && !cell.channels.is_contiguous())
      cell.channels = contiguous(cell.channels, kInt64);
  }

  void cell_forward(const Tensor& z, const CellTensors& cell, Tensor& y) const {
    naslora::cell_forward(stream_, describe(z, cell), y.data);
  }

  void cell_backward(const Tensor& grad_y, const Tensor& z, const CellTensors& cell,
                     const Tensor* grad_z, CellSums* sums) const {
    naslora::cell_backward(stream_, describe(z, cell), grad_y.map(),
                           grad_z ? grad_z->data : nullptr, sums ? sums->partials.data : nullptr);
  }

  void low_rank_pass(const Tensor& x, const Tensor* factor, const Tensor* u, double scale,
                     const Tensor* product, const FactorSum* sum) const {
    LowRankPass p = {};
    p.dtype = dtype_;
    p.x = x.data, p.x_stride = x.strides[0];
    p.tokens = x.sizes[0], p.features = x.sizes[1], p.rank = (u ? u : product)->size(-1);
    if (factor) p.factor = parameter(*factor), set_strides(p.factor_stride, *factor);
    p.scale = scale;
    if (u) p.u = u->data;
    if (product) p.product = product->data;
    if (sum) p.partials = sum->partials.data;
    naslora::low_rank_pass(stream_, p);
  }

  void low_rank_expand(const Tensor& u, const Tensor& factor, const Tensor& bias, double scale,
                       const Tensor& out) const {
    const Tensor start = contiguous(bias, bias.dtype);
    LowRankExpand p = {};
    p.dtype = dtype_;
    p.u = u.data;
    p.tokens = out.sizes[0], p.features = out.sizes[1], p.rank = factor.sizes[0];
    p.factor = parameter(factor), set_strides(p.factor_stride, factor);
    p.bias = parameter(start);
    p.scale = scale, p.out = out.data;
    naslora::low_rank_expand(stream_, p);
  }

  void folded_cell(const Tensor& z, const Tensor& kernel, double avg_weight, double max_weight,
                   const Tensor& y) const {
    const Tensor taps = contiguous(kernel, kernel.dtype);
    naslora::folded_cell_forward(stream_,
                                 {shape(z, z.sizes[3], nullptr), z.map(), parameter(taps),
                                  taps.sizes[3], avg_weight, max_weight},
                                 y.data);
  }

  void reduce(const CellTensors& cell, CellSums* sums, FactorSum* A, FactorSum* B) const {
    if (!sums && !A && !B) return;
    Reduction r = {};
    r.float64 = dtype_ == Dtype::float64;
    r.c = cell.c;
    Parameter* parameters[] = {&r.alpha, r.dw, r.dw + 1, r.dw + 2, r.dw + 3, &r.pw};
    Parameter* gradients[] = {&r.grad_alpha, r.grad_dw,     r.grad_dw + 1,
                              r.grad_dw + 2, r.grad_dw + 3, &r.grad_pw};
    for (int i = 0; i < kParameters; ++i) {
      *parameters[i] = parameter(cell.parameters[i]);
      if (sums && (i == 0 ? sums->need_alpha : sums->need_weights))
        *gradients[i] = parameter(sums->gradients[i]);
    }
    if (sums) r.cell_groups = sums->partials.sizes[0], r.cell_partials = sums->partials.data;
    if (A) r.A = low_rank(*A);
    if (B) r.B = low_rank(*B);
    naslora::reduce_gradients(stream_, r);
  }

 private:
  static void set_strides(int64_t (&strides)[2], const Tensor& factor) {
    for (int i = 0; i < 2; ++i) strides[i] = factor.strides[i];
  }
  static Reduction::LowRank low_rank(const FactorSum& sum) {
    const int64_t* s = sum.partials.sizes;
    return {s[0], s[1], s[2], sum.partials.data, parameter(sum.gradient)};
  }
  CellShape shape(const Tensor& maps, int64_t c, const void* channels) const {
    const int64_t* s = maps.sizes;
    return {dtype_, s[0], s[1], s[2], s[3], c, static_cast<const int64_t*>(channels)};
  }
  Cell describe(const Tensor& z, const CellTensors& cell) const {
    const Tensor* p = cell.parameters;
    return {shape(z, cell.c, cell.channels.data),
            z.map(),
            parameter(p[0]),
            {parameter(p[1]), parameter(p[2]), parameter(p[3]), parameter(p[4])},
            parameter(p[5])};
  }

  Dtype dtype_;
  Stream stream_;
};

}  // namespace naslora
