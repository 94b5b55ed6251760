// The launches of csrc/shared/operators.h on a CPU. The kernels read parameters and write their
// gradients in the dtype of sums, and add up their sums themselves. So sums are the gradients
// themselves, except where a gradient has another dtype.
#pragma once

#include "../shared/operators.h"
#include "kernels.h"

namespace naslora {

// A gradient, and the sum that is rounded to it at the end if their dtypes differ.
struct Sum {
  Tensor gradient, total;

  Sum() = default;
  explicit Sum(const Tensor& of) : gradient(of.borrowed()) {
    const Dtype dtype = sum_dtype(of.dtype);
    total = of.dtype == dtype ? of.borrowed() : empty(of, dtype, of.shape());
  }
  void round() const {
    if (total.handle != gradient.handle) copy(gradient, total);
  }
};

struct Launches {
  static constexpr bool kFoldsInOneLaunch = true;

  struct FactorSum : Sum {
    bool transposed;
    FactorSum(const Tensor& gradient, int64_t, bool transposed)
        : Sum(gradient), transposed(transposed) {}
  };
  struct CellSums {
    Sum sums[kParameters];
    CellSums(const Tensor&, const CellTensors&, const Tensor* gradients, bool need_alpha,
             bool need_weights) {
      for (int i = 0; i < kParameters; ++i)
        if (i == 0 ? need_alpha : need_weights) sums[i] = Sum(gradients[i]);
    }
  };

  explicit Launches(const Tensor& maps) : maps_(maps.dtype), dtype_(sum_dtype(maps.dtype)) {}

  void prepare(CellTensors& cell) const {
    for (Tensor& parameter : cell.parameters)
      if (parameter.dtype != dtype_ || !parameter.is_contiguous())
        parameter = contiguous(parameter, dtype_);
    if (cell.channels && !cell.channels.is_contiguous())
      cell.channels = contiguous(cell.channels, kInt64);
  }

  void cell_forward(const Tensor& z, const CellTensors& cell, Tensor& y) const {
    kernels->cell_forward(describe(z, cell), y.data);
  }

  void cell_backward(const Tensor& grad_y, const Tensor& z, const CellTensors& cell,
                     const Tensor* grad_z, CellSums* sums) const {
    CellGradients g = {};
    if (grad_z) g.z = grad_z->data;
    if (sums) {
      const Sum* s = sums->sums;
      g.alpha = s[0].total.data;
      for (int i = 0; i < 4; ++i) g.dw[i] = s[1 + i].total.data;
      g.pw = s[5].total.data;
    }
    kernels->cell_backward(describe(z, cell), grad_y.map(), g);
  }

  void low_rank_pass(const Tensor& x, const Tensor* factor, const Tensor* u, double scale,
                     const Tensor* product, const FactorSum* sum) const {
    const Tensor plain = factor ? contiguous(*factor, dtype_) : Tensor();
    LowRankPass p = {};
    p.dtype = maps_;
    p.x = x.data, p.x_stride = x.strides[0];
    p.tokens = x.sizes[0], p.features = x.sizes[1], p.rank = (u ? u : product)->size(-1);
    p.scale = scale, p.factor = plain.data;
    if (product) p.product = product->data;
    if (u) p.u = u->data;
    if (sum) {
      p.gradient = sum->total.data;
      for (int i = 0; i < 2; ++i)
        p.gradient_stride[i] = sum->total.strides[sum->transposed ? 1 - i : i];
    }
    kernels->low_rank_pass(p);
  }

  void low_rank_expand(const Tensor& u, const Tensor& factor, const Tensor& bias, double scale,
                       const Tensor& out) const {
    const Tensor plain = contiguous(factor, dtype_), start = contiguous(bias, dtype_);
    kernels->low_rank_expand({maps_, u.data, plain.data, start.data, out.sizes[0], out.sizes[1],
                              factor.sizes[0], scale, out.data});
  }

  void folded_cell(const Tensor& z, const Tensor& kernel, double avg_weight, double max_weight,
                   Tensor& y) const {
    const Tensor taps = contiguous(kernel, dtype_);
    FoldedCell cell = folded(z, taps, avg_weight, max_weight);
    cell.z = z.map();
    kernels->folded_cell(cell, y.data);
  }

  // The adapter's part of a folded layer in one launch, whose z and y stay in the cache.
  void folded_update(const Tensor& x, const Tensor& x_rows, const Tensor& bias,
                     const Tensor& lora_A, const Tensor& lora_B, const Tensor& kernel,
                     double avg_weight, double max_weight, Tensor& h) const {
    const Tensor taps = contiguous(kernel, dtype_), encoder = contiguous(lora_A, dtype_);
    const Tensor decoder = contiguous(transposed(lora_B), dtype_);
    const Tensor start = contiguous(bias, dtype_);
    kernels->folded_update({folded(x, taps, avg_weight, max_weight), x_rows.data, x_rows.strides[0],
                            x_rows.sizes[1], encoder.data, decoder.data, start.data, h.size(-1),
                            h.data});
  }

  void reduce(const CellTensors&, CellSums* cell, FactorSum* A, FactorSum* B) const {
    if (cell)
      for (const Sum& sum : cell->sums) sum.round();
    for (FactorSum* sum : {A, B})
      if (sum) sum->round();
  }

 private:
  CellShape shape(const Tensor& maps, int64_t rank, int64_t c, const void* channels) const {
    return {maps_,
            maps.sizes[0],
            maps.sizes[1],
            maps.sizes[2],
            rank,
            c,
            static_cast<const int64_t*>(channels)};
  }
  Cell describe(const Tensor& z, const CellTensors& cell) const {
    const Tensor* p = cell.parameters;
    return {shape(z, z.sizes[3], cell.c, cell.channels.data),
            p[0].data,
            {p[1].data, p[2].data, p[3].data, p[4].data},
            p[5].data,
            z.map()};
  }
  // Without the map.
  FoldedCell folded(const Tensor& maps, const Tensor& taps, double avg_weight,
                    double max_weight) const {
    const int64_t c = taps.sizes[0];
    return {shape(maps, c, c, nullptr), taps.data, taps.sizes[3], avg_weight, max_weight, {}};
  }

  Dtype maps_, dtype_;
};

}  // namespace naslora
