// The CPU kernels for one instruction set, without attention. setup.py compiles this file once for
// each, with NASLORA_ISA (its name) and NASLORA_VECTOR_BYTES (the size of its vectors) defined.
#include "kernels.h"

#include "cell_backward.h"
#include "cell_forward.h"
#include "folded_cell.h"
#include "low_rank.h"

namespace naslora {
namespace {

void forward(const Cell& cell, void* y) {
  with_storage(cell.dtype, [&](auto s) { cell_forward<decltype(s)>(cell, y); });
}
void backward(const Cell& cell, const Map& grad_y, const CellGradients& gradients) {
  with_storage(cell.dtype, [&](auto s) { cell_backward<decltype(s)>(cell, grad_y, gradients); });
}
void folded(const FoldedCell& cell, void* y) {
  with_storage(cell.dtype, [&](auto s) { folded_cell<decltype(s)>(cell, y); });
}
void pass(const LowRankPass& p) {
  with_storage(p.dtype, [&](auto s) { low_rank_pass<decltype(s)>(p); });
}
void expand(const LowRankExpand& p) {
  with_storage(p.dtype, [&](auto s) { low_rank_expand<decltype(s)>(p); });
}
void update(const FoldedUpdate& p) {
  with_storage(p.cell.dtype, [&](auto s) { folded_update<decltype(s)>(p); });
}

}  // namespace

#define NASLORA_JOIN(a, b) a##b
#define NASLORA_KERNELS(isa) NASLORA_JOIN(kernels_, isa)

extern const Kernels NASLORA_KERNELS(NASLORA_ISA);
const Kernels NASLORA_KERNELS(NASLORA_ISA) = {forward, backward, folded, pass, expand, update};

}  // namespace naslora
