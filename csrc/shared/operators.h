// The operators of the cell and of the adapter layer: what they check, and the order of their
// launches. naslora_kernels/launches.py has the same order for Triton, and says what each launch
// computes. A backend provides the launches, as csrc/cpu/launches.h and csrc/cuda/launches.h do.
#pragma once

#include <algorithm>
#include <optional>

#include "torch.h"

namespace naslora {

constexpr int kParameters = 6;  // alpha, four depthwise kernels, pw
constexpr const char* kParameterNames[] = {"alpha",   "dw_sep3", "dw_sep5",
                                           "dw_dil3", "dw_dil5", "pw"};

// The tensors of a mixed cell.
struct CellTensors {
  Tensor parameters[kParameters], channels;
  int64_t c = 0;

  explicit CellTensors(Arguments& a) {
    for (Tensor& parameter : parameters) parameter = a.tensor();
    channels = a.tensor_or_none();
  }
};

// Checks tensors against the maps or rows of their call. Everybody can call the operators, and
// assignments to `.data` change tensors between forward and backward.
struct Checks {
  const Tensor& like;
  bool backward;

  void fail(const char* name, const std::string& what) const {
    throw std::runtime_error(
        std::string(name) + ": " + what +
        (backward ? "; it changed between forward and backward: keep what the forward got until "
                    "backward has run"
                  : ""));
  }
  static std::string text(const Sizes& sizes) {
    std::string joined;
    for (int64_t size : sizes) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
    return "(" + joined + (sizes.size() == 1 ? ",)" : ")");
  }
  void dtype(const char* name, const Tensor& t, Dtype wanted, bool or_float32 = false) const {
    if (t.dtype == wanted || (or_float32 && t.dtype == Dtype::float32)) return;
    fail(name, std::string("expected ") + kDtypeNames[static_cast<int>(wanted)] + ", got " +
                   kDtypeNames[static_cast<int>(t.dtype)]);
  }
  // A map (B, H, W, channels), or the queries of attention (B, heads, N, d).
  void map(const char* name, const Tensor& t) const {
    if (t.dim != 4 || !t.sizes[1] || !t.sizes[2] || !t.sizes[3])
      fail(name, "expected four sizes, at least 1 behind the batch, got " + text(t.shape()));
    if (t.dtype >= kInt64) fail(name, "expected a floating dtype of the kernels");
    tensor(name, t, t.shape(), t.dtype);
  }
  void tensor(const char* name, const Tensor& t, const Sizes& sizes, Dtype wanted,
              bool or_float32 = false) const {
    if (t.shape() != sizes)
      fail(name, "expected shape " + text(sizes) + ", got " + text(t.shape()));
    dtype(name, t, wanted, or_float32);
    if (t.device_type != like.device_type || t.device != like.device)
      fail(name, "expected the device of the maps");
    if (t.device_type == torch.device_type_cpu() && !t.held())
      fail(name, "its storage has been freed or made smaller");
  }
  void tensor(const char* name, const Tensor& t, const Sizes& sizes) const {
    tensor(name, t, sizes, like.dtype);
  }
  // A parameter has the dtype of the maps, or float32 beside maps of 16 bits.
  void parameter(const char* name, const Tensor& t, const Sizes& sizes) const {
    tensor(name, t, sizes, like.dtype, kItemSizes[static_cast<int>(like.dtype)] == 2);
  }
  void cell(CellTensors& cell, int64_t rank) const {
    const auto& [alpha, sep3, sep5, dil3, dil5, pw] = cell.parameters;
    // The median of three sizes, so that the message names the one tensor that changed.
    int64_t counts[] = {pw.dim ? pw.size(-1) : 0, sep3.dim ? sep3.sizes[0] : 0,
                        sep5.dim ? sep5.sizes[0] : 0};
    std::sort(counts, counts + 3);
    const int64_t c = cell.c = cell.channels ? counts[1] : rank;
    const Sizes shapes[] = {{8}, {c, 3, 3}, {c, 5, 5}, {c, 3, 3}, {c, 5, 5}, {4, c, c}};
    for (int i = 0; i < kParameters; ++i)
      parameter(kParameterNames[i], cell.parameters[i], shapes[i]);
    if (cell.channels) tensor("channels", cell.channels, {c}, kInt64);
    if (c > rank) fail("channels", "expected at most " + std::to_string(rank));
  }
  void folded(const Tensor& kernel, int64_t c) const {
    const int64_t k = kernel.dim == 4 ? kernel.sizes[3] : 0;
    if (k % 2 == 0 || k > 9) fail("kernel", "expected an odd size of at most 9");
    parameter("kernel", kernel, {c, c, k, k});
  }
  // Returns the rank.
  int64_t linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& lora_A,
                 const Tensor& lora_B) const {
    map("x", x);
    const int64_t c_in = x.sizes[3], c_out = weight.dim ? weight.sizes[0] : 0;
    const int64_t rank = lora_A.dim ? lora_A.sizes[0] : 0;
    if (rank == 0) fail("lora_A", "expected a rank of at least 1");
    tensor("weight", weight, {c_out, c_in});
    if (bias) tensor("bias", bias, {c_out});
    parameter("lora_A", lora_A, {rank, c_in});
    parameter("lora_B", lora_B, {c_out, rank});
    return rank;
  }
};

template <typename Launches>
Tensor mix(Launches& launches, const Tensor& z, CellTensors& cell) {
  Tensor y = empty_like(z);
  if (z.numel()) launches.cell_forward(z, cell, y);
  return y;
}

// z = W_e x, (B, H, W, r)
template <typename Launches>
Tensor encode(Launches& launches, const Tensor& x, const Tensor& x_rows, const Tensor& lora_A) {
  Sizes shape = x.shape();
  shape.back() = lora_A.sizes[0];
  Tensor z = empty(x, x.dtype, shape);
  if (z.numel()) launches.low_rank_pass(x_rows, &lora_A, nullptr, 1, &z, nullptr);
  return z;
}

// h = W x + b + s W_d y, (B, H, W, C_out). h starts as the bias and the adapter's part, and the
// frozen product is added to it: adding the adapter's part to it would read and write h once more.
template <typename Launches>
Tensor decode(Launches& launches, const Tensor& x, const Tensor& x_rows, const Tensor& weight,
              const Tensor& bias, const Tensor& lora_B, const Tensor& y, double scaling) {
  Sizes shape = x.shape();
  shape.back() = weight.sizes[0];
  Tensor h = empty(x, x.dtype, shape);
  if (h.numel()) {
    const Tensor h_rows = rows(h);
    launches.low_rank_expand(y, transposed(lora_B), bias, scaling, h_rows);
    add_product(h_rows, x_rows, transposed(weight));
  }
  return h;
}

template <typename... Tensors>
std::vector<Tensor> results(Tensors&&... tensors) {
  std::vector<Tensor> all;
  all.reserve(sizeof...(tensors));
  (all.push_back(std::move(tensors)), ...);
  return all;
}

// The gradients of the six parameters, behind `first` gradients.
inline void add_gradients(std::vector<Tensor>& gradients, const CellTensors& cell, bool need_alpha,
                          bool need_weights) {
  for (int i = 0; i < kParameters; ++i)
    gradients.push_back(gradient_like(cell.parameters[i], i == 0 ? need_alpha : need_weights));
}

template <typename Launches>
std::vector<Tensor> mixed_cell(Arguments a) {
  const Tensor z = a.tensor();
  CellTensors cell(a);
  const Checks check{z, false};
  check.map("z", z);
  check.cell(cell, z.sizes[3]);
  Launches launches(z);
  if (cell.c) {
    launches.prepare(cell);
    return results(mix(launches, z, cell));
  }
  Tensor y = empty_like(z);
  copy(y, z);
  return results(std::move(y));
}

template <typename Launches>
std::vector<Tensor> mixed_cell_backward(Arguments a) {
  const Tensor grad_y = a.tensor(), z = a.tensor();
  CellTensors cell(a);
  const bool need_z = a.flag(), need_alpha = a.flag(), need_weights = a.flag();
  const Checks check{grad_y, true};
  check.map("grad_y", grad_y);
  check.tensor("z", z, grad_y.shape());
  check.cell(cell, z.sizes[3]);

  std::vector<Tensor> gradients = results(gradient_like(z, need_z));
  add_gradients(gradients, cell, need_alpha, need_weights);
  if (!z.numel() || !cell.c) {
    if (need_z) copy(gradients[0], grad_y);
    for (int i = 0; i < kParameters; ++i) zero(gradients[1 + i]);
    return gradients;
  }
  Launches launches(z);
  launches.prepare(cell);
  std::optional<typename Launches::CellSums> sums;
  if (need_alpha || need_weights) sums.emplace(z, cell, &gradients[1], need_alpha, need_weights);
  launches.cell_backward(grad_y, z, cell, need_z ? &gradients[0] : nullptr,
                         sums ? &*sums : nullptr);
  launches.reduce(cell, sums ? &*sums : nullptr, nullptr, nullptr);
  return gradients;
}

template <typename Launches>
std::vector<Tensor> nas_lora_linear(Arguments a) {
  const Tensor x = a.tensor(), weight = a.tensor(), bias = a.tensor_or_none();
  const Tensor lora_A = a.tensor(), lora_B = a.tensor();
  CellTensors cell(a);
  const double scaling = a.number();
  const Checks check{x, false};
  check.cell(cell, check.linear(x, weight, bias, lora_A, lora_B));

  Launches launches(x);
  const Tensor x_rows = rows(x);
  Tensor z = encode(launches, x, x_rows, lora_A), y = z.borrowed();
  if (cell.c) {
    launches.prepare(cell);
    y = mix(launches, z, cell);
  }
  Tensor h = decode(launches, x, x_rows, weight, bias, lora_B, y, scaling);
  return results(std::move(h), std::move(z));
}

// The arguments of the layer's backward.
struct LayerBackward {
  Tensor grad_h, x, z, weight, lora_A, lora_B;
  CellTensors cell;
  double scaling;
  bool need_x, need_A, need_B, need_alpha, need_weights;

  explicit LayerBackward(Arguments& a)
      : grad_h(a.tensor()),
        x(a.tensor_or_none()),
        z(a.tensor()),
        weight(a.tensor()),
        lora_A(a.tensor()),
        lora_B(a.tensor()),
        cell(a),
        scaling(a.number()) {
    for (bool* need : {&need_x, &need_A, &need_B, &need_alpha, &need_weights}) *need = a.flag();
    const Checks check{grad_h, true};
    check.map("grad_h", grad_h);
    if (need_A && !x) check.fail("x", "expected for the gradient of lora_A");
    const int64_t rank = z.dim ? z.size(-1) : 0, c_in = weight.dim ? weight.size(-1) : 0;
    check.tensor("z", z, tokens_of(rank));
    check.tensor("weight", weight, {grad_h.sizes[3], c_in});
    check.parameter("lora_A", lora_A, {rank, c_in});
    check.parameter("lora_B", lora_B, {grad_h.sizes[3], rank});
    if (x) check.tensor("x", x, tokens_of(c_in));
    check.map("z", z);
    check.cell(cell, rank);
  }
  Sizes tokens_of(int64_t features) const {
    return {grad_h.sizes[0], grad_h.sizes[1], grad_h.sizes[2], features};
  }
  // Uninitialised: those of x, lora_A, lora_B and of the six parameters.
  std::vector<Tensor> gradients() const {
    std::vector<Tensor> all =
        results(empty(z, z.dtype, need_x ? tokens_of(weight.sizes[1]) : Sizes{0}),
                gradient_like(lora_A, need_A), gradient_like(lora_B, need_B));
    add_gradients(all, cell, need_alpha, need_weights);
    return all;
  }
};

template <typename Launches>
std::vector<Tensor> nas_lora_linear_backward(Arguments a) {
  LayerBackward of(a);
  auto& [grad_h, x, z, weight, lora_A, lora_B, cell, scaling, need_x, need_A, need_B, need_alpha,
         need_weights] = of;
  const bool need_z = need_x || need_A, need_cell = cell.c && (need_alpha || need_weights);
  std::vector<Tensor> gradients = of.gradients();
  const Tensor grad_rows = rows(grad_h);  // (T, C_out)
  if (!grad_rows.numel()) {               // without tokens, or without outputs
    for (const Tensor& gradient : gradients) zero(gradient);
    return gradients;
  }
  const int64_t tokens = grad_rows.sizes[0];
  Launches launches(z);
  launches.prepare(cell);

  std::optional<typename Launches::FactorSum> A_sum, B_sum;
  std::optional<typename Launches::CellSums> cell_sums;
  Tensor y, grad_y, grad_z;
  if (need_B) {
    B_sum.emplace(gradients[2], tokens, true);
    y = cell.c ? mix(launches, z, cell) : contiguous(z, z.dtype);
  }
  if (need_z || need_cell) grad_y = empty_like(z);
  if (grad_y || B_sum) {
    const Tensor decoder = transposed(lora_B);
    launches.low_rank_pass(grad_rows, grad_y ? &decoder : nullptr, y ? &y : nullptr, scaling,
                           grad_y ? &grad_y : nullptr, B_sum ? &*B_sum : nullptr);
  }
  if (cell.c && grad_y) {
    if (need_z) grad_z = empty_like(z);
    if (need_cell) cell_sums.emplace(z, cell, &gradients[3], need_alpha, need_weights);
    launches.cell_backward(grad_y, z, cell, need_z ? &grad_z : nullptr,
                           cell_sums ? &*cell_sums : nullptr);
  } else {
    grad_z = std::move(grad_y);
  }
  if (need_A) {
    A_sum.emplace(gradients[1], tokens, false);
    launches.low_rank_pass(rows(x), nullptr, &grad_z, 1, nullptr, &*A_sum);
  }
  if (need_x) {
    const Tensor grad_x_rows = rows(gradients[0]);
    launches.low_rank_expand(grad_z, lora_A, Tensor(), 1, grad_x_rows);
    add_product(grad_x_rows, grad_rows, weight);
  }
  launches.reduce(cell, cell_sums ? &*cell_sums : nullptr, A_sum ? &*A_sum : nullptr,
                  B_sum ? &*B_sum : nullptr);
  if (!need_cell)
    for (int i = 0; i < kParameters; ++i) zero(gradients[3 + i]);
  return gradients;
}

template <typename Launches>
std::vector<Tensor> folded_cell(Arguments a) {
  const Tensor z = a.tensor(), kernel = a.tensor();
  const double avg_weight = a.number(), max_weight = a.number();
  const Checks check{z, false};
  check.map("z", z);
  check.folded(kernel, z.sizes[3]);
  Tensor y = empty_like(z);
  if (z.numel()) Launches(z).folded_cell(z, kernel, avg_weight, max_weight, y);
  return results(std::move(y));
}

template <typename Launches>
std::vector<Tensor> folded_linear(Arguments a) {
  const Tensor x = a.tensor(), weight = a.tensor(), bias = a.tensor_or_none();
  const Tensor lora_A = a.tensor(), lora_B = a.tensor(), kernel = a.tensor();
  const double avg_weight = a.number(), max_weight = a.number();
  const Checks check{x, false};
  check.folded(kernel, check.linear(x, weight, bias, lora_A, lora_B));
  Launches launches(x);
  const Tensor x_rows = rows(x);
  if constexpr (Launches::kFoldsInOneLaunch) {
    Sizes shape = x.shape();
    shape.back() = weight.sizes[0];
    Tensor h = empty(x, x.dtype, shape);
    if (h.numel()) {
      launches.folded_update(x, x_rows, bias, lora_A, lora_B, kernel, avg_weight, max_weight, h);
      add_product(rows(h), x_rows, transposed(weight));
    }
    return results(std::move(h));
  } else {
    const Tensor z = encode(launches, x, x_rows, lora_A), y = empty_like(z);
    if (z.numel()) launches.folded_cell(z, kernel, avg_weight, max_weight, y);
    return results(decode(launches, x, x_rows, weight, bias, lora_B, y, 1));
  }
}

template <typename Launches>
std::vector<Registration> operators() {
  return {
      {"mixed_cell", as_operator<mixed_cell<Launches>>},
      {"mixed_cell_backward", as_operator<mixed_cell_backward<Launches>>},
      {"nas_lora_linear", as_operator<nas_lora_linear<Launches>>},
      {"nas_lora_linear_backward", as_operator<nas_lora_linear_backward<Launches>>},
      {"folded_cell", as_operator<folded_cell<Launches>>},
      {"folded_linear", as_operator<folded_linear<Launches>>},
  };
}

}  // namespace naslora
