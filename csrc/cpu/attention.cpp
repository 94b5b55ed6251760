// The CPU kernels of attention for one instruction set. setup.py compiles this file as kernels.cpp,
// but with the widest vectors.
#include "attention_backward.h"
#include "attention_forward.h"

namespace naslora {
namespace {

void forward(const Attention& a, void* o, void* softmax) {
  with_storage(a.dtype, [&](auto s) { attention_forward<decltype(s)>(a, o, softmax); });
}
void backward(const Attention& a, const AttentionGradients& gradients) {
  with_storage(a.dtype, [&](auto s) { attention_backward<decltype(s)>(a, gradients); });
}

}  // namespace

#define NASLORA_JOIN(a, b) a##b
#define NASLORA_ATTENTION(isa) NASLORA_JOIN(attention_, isa)

extern const AttentionKernels NASLORA_ATTENTION(NASLORA_ISA);
const AttentionKernels NASLORA_ATTENTION(NASLORA_ISA) = {forward, backward};

}  // namespace naslora
