// The operators of attention, as naslora_kernels/ops.py documents them.
#pragma once

#include "../shared/operators.h"
#include "kernels.h"

namespace naslora {

// The operands of attention, with the features of a token next to each other.
struct AttentionTensors {
  Tensor q, k, v, rel_h, rel_w;

  explicit AttentionTensors(Arguments& a)
      : q(a.tensor()), k(a.tensor()), v(a.tensor()), rel_h(a.tensor()), rel_w(a.tensor()) {}

  void check(const Checks& check) const {
    check.map("q", q);
    const Sizes shape = q.shape();
    const int64_t height = rel_h.dim ? rel_h.size(-1) : 0, width = rel_w.dim ? rel_w.size(-1) : 0;
    check.tensor("rel_h", rel_h, {shape[0], shape[1], shape[2], height});
    check.tensor("rel_w", rel_w, {shape[0], shape[1], shape[2], width});
    const Sizes keys = {shape[0], shape[1], height * width, shape[3]};
    check.tensor("k", k, keys);
    check.tensor("v", v, keys);
  }
};

// Copies tensors whose features are not contiguous. The copies live as long as this.
class Readable {
 public:
  Tokens operator()(const Tensor& t) {
    const bool readable = t.strides[3] == 1;
    copies_.push_back(readable ? t.borrowed() : contiguous(t, t.dtype));
    const Tensor& read = copies_.back();
    return {read.data, {read.strides[0], read.strides[1], read.strides[2]}};
  }
  Attention operator()(const AttentionTensors& t, double scale) {
    return {t.q.dtype,        t.q.sizes[0],     t.q.sizes[1],    t.q.sizes[2], t.rel_h.sizes[3],
            t.rel_w.sizes[3], t.q.sizes[3],     scale,           (*this)(t.q), (*this)(t.k),
            (*this)(t.v),     (*this)(t.rel_h), (*this)(t.rel_w)};
  }

 private:
  std::vector<Tensor> copies_;
};

// (B, heads, N, d) that lies in memory as (B, N, heads, d), so that joining the heads copies
// nothing.
inline Tensor tokens_first(const Tensor& like, bool needed = true) {
  if (!needed) return gradient_like(like, false);
  const Sizes s = like.shape();
  return empty(like, like.dtype, s, {s[1] * s[2] * s[3], s[3], s[1] * s[3], 1});
}

inline std::vector<Tensor> rel_pos_attention(Arguments a) {
  const AttentionTensors operands(a);
  const double scale = a.number();
  operands.check({operands.q, false});
  const Tensor& q = operands.q;
  Tensor o = tokens_first(q);
  Tensor softmax = empty(q, sum_dtype(q.dtype), {2, q.sizes[0], q.sizes[1], q.sizes[2]});
  Readable readable;
  attention_kernels->forward(readable(operands, scale), o.data, softmax.data);
  return results(std::move(o), std::move(softmax));
}

inline std::vector<Tensor> rel_pos_attention_backward(Arguments a) {
  const Tensor grad_o = a.tensor();
  const AttentionTensors operands(a);
  const Tensor o = a.tensor(), saved = a.tensor();
  const double scale = a.number();
  bool need[5];
  for (bool& flag : need) flag = a.flag();
  const Checks check{grad_o, true};
  check.map("grad_o", grad_o);
  check.tensor("q", operands.q, grad_o.shape());
  operands.check(check);
  check.tensor("o", o, grad_o.shape());
  const int64_t* s = grad_o.sizes;
  check.tensor("softmax", saved, {2, s[0], s[1], s[2]}, sum_dtype(grad_o.dtype));

  std::vector<Tensor> gradients =
      results(tokens_first(operands.q, need[0]), tokens_first(operands.k, need[1]),
              tokens_first(operands.v, need[2]), gradient_like(operands.rel_h, need[3]),
              gradient_like(operands.rel_w, need[4]));
  void* out[5];
  for (int i = 0; i < 5; ++i) out[i] = need[i] ? gradients[i].data : nullptr;
  const Tensor softmax = contiguous(saved, saved.dtype);
  Readable readable;
  const Attention attention = readable(operands, scale);
  attention_kernels->backward(attention, {readable(grad_o), readable(o), softmax.data, out[0],
                                          out[1], out[2], out[3], out[4]});
  return gradients;
}

}  // namespace naslora
