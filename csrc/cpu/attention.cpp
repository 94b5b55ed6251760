// The CPU kernels of attention for one instruction set. setup.py compiles this file as kernels.cpp,
// but with the widest vectors.
// Where the set has products of bfloat16, other numbers take the kernels of AVX-512.
#if defined(__AVX512BF16__)
#include "bf16_backward.h"
#else
#include "attention_backward.h"
#include "attention_forward.h"
#endif

namespace naslora {

extern const AttentionKernels attention_avx512;

namespace {

void forward(const Attention& a, void* o, void* softmax) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::bfloat16) return bf16_forward(a, o, softmax);
  attention_avx512.forward(a, o, softmax);
#else
  with_storage(a.dtype, [&](auto s) { attention_forward<decltype(s)>(a, o, softmax); });
#endif
}
void backward(const Attention& a, const AttentionGradients& gradients) {
#if defined(__AVX512BF16__)
  if (a.dtype == Dtype::bfloat16) return Bf16Backward(a, gradients).run();
  attention_avx512.backward(a, gradients);
#else
  with_storage(a.dtype, [&](auto s) { attention_backward<decltype(s)>(a, gradients); });
#endif
}

}  // namespace

#define NASLORA_JOIN(a, b) a##b
#define NASLORA_ATTENTION(isa) NASLORA_JOIN(attention_, isa)

extern const AttentionKernels NASLORA_ATTENTION(NASLORA_ISA);
const AttentionKernels NASLORA_ATTENTION(NASLORA_ISA) = {forward, backward};

}  // namespace naslora
