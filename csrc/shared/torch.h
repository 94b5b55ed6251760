// Tensors and operators of PyTorch, through its stable C interface
// (torch/csrc/inductor/aoti_torch/c/shim.h). The functions come as addresses when the extension is
// loaded, so it builds without torch and one binary serves every torch. Only Python's limited API
// is used, so that it serves every Python from 3.10 on, too.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "vocabulary.h"

namespace naslora {

using Handle = void*;    // a reference to a tensor; torch calls it AtenTensorHandle
using Value = uint64_t;  // an argument or a result of an operator; torch calls it StableIValue
using Operator = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// X(result, name without aoti_torch_, arguments). Functions of int32_t with arguments return 0 if
// they succeed. Those of CUDA, behind the others, are null where torch has no CUDA.
#define NASLORA_TORCH(X)                                                                        \
  X(int32_t, get_data_ptr, Handle, void**)                                                      \
  X(int32_t, get_dim, Handle, int64_t*)                                                         \
  X(int32_t, get_sizes, Handle, int64_t**)                                                      \
  X(int32_t, get_strides, Handle, int64_t**)                                                    \
  X(int32_t, get_dtype, Handle, int32_t*)                                                       \
  X(int32_t, get_device_type, Handle, int32_t*)                                                 \
  X(int32_t, get_device_index, Handle, int32_t*)                                                \
  X(int32_t, get_storage_offset, Handle, int64_t*)                                              \
  X(int32_t, get_storage_size, Handle, int64_t*)                                                \
  X(int32_t, empty_strided, int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, \
    Handle*)                                                                                    \
  X(int32_t, _reinterpret_tensor, Handle, int64_t, const int64_t*, const int64_t*, int64_t,     \
    Handle*)                                                                                    \
  X(int32_t, delete_tensor_object, Handle)                                                      \
  X(int32_t, copy_, Handle, Handle, int32_t)                                                    \
  X(int32_t, zero_, Handle)                                                                     \
  X(int32_t, cpu_addmm_out, Handle, Handle, Handle, Handle, double, double)                     \
  X(bool, grad_mode_is_enabled)                                                                 \
  X(void, grad_mode_set_enabled, bool)                                                          \
  X(void, check, bool, const char*, const char*, uint32_t, const char*)                         \
  X(int32_t, library_init_impl, const char*, const char*, const char*, uint32_t, void**)        \
  X(int32_t, library_impl, void*, const char*, Operator)                                        \
  X(int32_t, device_type_cpu)                                                                   \
  X(int32_t, dtype_float32)                                                                     \
  X(int32_t, dtype_float64)                                                                     \
  X(int32_t, dtype_bfloat16)                                                                    \
  X(int32_t, dtype_float16)                                                                     \
  X(int32_t, dtype_int64)                                                                       \
  X(int32_t, get_current_cuda_stream, int32_t, void**)                                          \
  X(int32_t, cuda_addmm_out, Handle, Handle, Handle, Handle, double, double)

struct Torch {
#define NASLORA_MEMBER(result, name, ...) result (*name)(__VA_ARGS__);
  NASLORA_TORCH(NASLORA_MEMBER)
#undef NASLORA_MEMBER
};
static Torch torch;

// Whether allocated memory of a CPU is filled with NaN, for tests. torch does so for allocations
// that it dispatches, which those of its C interface on a CPU are not.
static bool poisoned = false;

inline void succeeded(int32_t status) {
  if (status) throw std::runtime_error("PyTorch cannot compute a step of an operator");
}

// Dtypes of tensors that no map has.
constexpr Dtype kInt64 = static_cast<Dtype>(4), kOther = static_cast<Dtype>(5);
constexpr const char* kDtypeNames[] = {"float32", "float64", "bfloat16",
                                       "float16", "int64",   "other"};
constexpr int64_t kItemSizes[] = {4, 8, 2, 2, 8};

inline int32_t torch_dtype(int code) {
  static const int32_t dtypes[] = {torch.dtype_float32(), torch.dtype_float64(),
                                   torch.dtype_bfloat16(), torch.dtype_float16(),
                                   torch.dtype_int64()};
  return dtypes[code];
}
// The dtype in which maps of a dtype are computed and summed.
inline Dtype sum_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

using Sizes = std::vector<int64_t>;

// A tensor and what the kernels need to know of it; or none, with null data.
struct Tensor {
  Handle handle = nullptr;
  bool owned = false;  // whether the handle is deleted at the end
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  Dtype dtype = kOther;
  int32_t device_type = 0, device = 0;
  void* data = nullptr;

  Tensor() = default;
  Tensor(Handle handle, bool owned) : handle(handle), owned(owned) {
    if (!handle) return;
    int32_t code;
    succeeded(torch.get_dim(handle, &dim) | torch.get_sizes(handle, &sizes) |
              torch.get_strides(handle, &strides) | torch.get_dtype(handle, &code) |
              torch.get_device_type(handle, &device_type) |
              torch.get_device_index(handle, &device) | torch.get_data_ptr(handle, &data));
    for (int i = 0; i < 5; ++i)
      if (code == torch_dtype(i)) dtype = static_cast<Dtype>(i);
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    if (this == &other) return *this;
    if (owned) torch.delete_tensor_object(handle);
    memcpy(static_cast<void*>(this), &other, sizeof(Tensor));
    other.owned = false;
    return *this;
  }
  ~Tensor() {
    if (owned) torch.delete_tensor_object(handle);
  }

  explicit operator bool() const { return handle != nullptr; }
  Tensor borrowed() const { return Tensor(handle, false); }
  int64_t size(int64_t i) const { return sizes[i < 0 ? dim + i : i]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim; ++i) product *= sizes[i];
    return product;
  }
  Sizes shape() const { return Sizes(sizes, sizes + dim); }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; step *= sizes[i--])
      if (sizes[i] != 1 && strides[i] != step && numel() != 0) return false;
    return true;
  }
  // Whether the storage is as large as the tensor, which nothing but the caller's care ensures.
  bool held() const {
    int64_t offset, bytes, last = 0;
    succeeded(torch.get_storage_offset(handle, &offset) | torch.get_storage_size(handle, &bytes));
    for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i];
    return numel() == 0 || (offset + last + 1) * kItemSizes[static_cast<int>(dtype)] <= bytes;
  }
  Map map() const { return {data, {strides[0], strides[1], strides[2], strides[3]}}; }
};

inline Tensor empty(const Tensor& like, Dtype dtype, const Sizes& sizes, Sizes strides = {}) {
  if (strides.empty()) {
    strides.resize(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * larger(sizes[i], 1);
  }
  Handle handle;
  succeeded(torch.empty_strided(sizes.size(), sizes.data(), strides.data(),
                                torch_dtype(static_cast<int>(dtype)), like.device_type, like.device,
                                &handle));
  Tensor made(handle, true);
  if (poisoned && made.device_type == torch.device_type_cpu() && made.data)
    memset(made.data, 0xff, made.numel() * kItemSizes[static_cast<int>(dtype)]);
  return made;
}
inline Tensor empty_like(const Tensor& like) { return empty(like, like.dtype, like.shape()); }
// An uninitialised contiguous gradient, of size 0 if it is not needed.
inline Tensor gradient_like(const Tensor& like, bool needed) {
  return empty(like, like.dtype, needed ? like.shape() : Sizes{0});
}
inline void copy(const Tensor& to, const Tensor& from) {
  succeeded(torch.copy_(to.handle, from.handle, 0));
}
inline void zero(const Tensor& tensor) {
  if (tensor.numel()) succeeded(torch.zero_(tensor.handle));
}
inline Tensor view(const Tensor& tensor, const Sizes& sizes, const Sizes& strides) {
  Handle handle;
  succeeded(torch._reinterpret_tensor(tensor.handle, sizes.size(), sizes.data(), strides.data(), 0,
                                      &handle));
  return Tensor(handle, true);
}
inline Tensor transposed(const Tensor& t) {
  return view(t, {t.sizes[1], t.sizes[0]}, {t.strides[1], t.strides[0]});
}
// The tensor, or a contiguous copy in a dtype.
inline Tensor contiguous(const Tensor& tensor, Dtype dtype) {
  if (!tensor || (tensor.dtype == dtype && tensor.is_contiguous())) return tensor.borrowed();
  Tensor made = empty(tensor, dtype, tensor.shape());
  copy(made, tensor);
  return made;
}
// (..., features) as a matrix (tokens, features) whose rows are contiguous; a copy if need be.
inline Tensor rows(const Tensor& grid) {
  const int64_t features = grid.size(-1), tokens = features ? grid.numel() / features : 0;
  int64_t step = features, expected = -1;  // of a row; of the next dimension
  bool regular = features == 1 || grid.strides[grid.dim - 1] == 1;
  for (int64_t i = grid.dim - 2; i >= 0; --i) {
    if (grid.sizes[i] == 1) continue;
    if (expected == -1)
      step = grid.strides[i];
    else
      regular &= grid.strides[i] == expected;
    expected = grid.strides[i] * grid.sizes[i];
  }
  if (regular || tokens == 0) return view(grid, {tokens, features}, {step, 1});
  return view(contiguous(grid, grid.dtype), {tokens, features}, {features, 1});
}
// out += a b
inline void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  const bool cpu = out.device_type == torch.device_type_cpu();
  const auto addmm = cpu ? torch.cpu_addmm_out : torch.cuda_addmm_out;
  succeeded(addmm(out.handle, out.handle, a.handle, b.handle, 1.0, 1.0));
}

// The arguments of an operator, in the order of its schema. All are to be read.
class Arguments {
 public:
  explicit Arguments(const Value* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*next_++), true); }
  Tensor tensor_or_none() {
    auto* value = reinterpret_cast<Value*>(*next_++);
    Handle handle = value ? reinterpret_cast<Handle>(*value) : nullptr;
    ::operator delete(value);
    return Tensor(handle, handle != nullptr);
  }
  double number() {
    double value;
    memcpy(&value, next_++, sizeof(value));
    return value;
  }
  bool flag() { return (*next_++ & 0xff) != 0; }

 private:
  const Value* next_;
};

// In their scope autograd records nothing.
struct NoGrad {
  const bool enabled = torch.grad_mode_is_enabled();
  NoGrad() { torch.grad_mode_set_enabled(false); }
  ~NoGrad() { torch.grad_mode_set_enabled(enabled); }
};

using Function = std::vector<Tensor> (*)(Arguments);

template <Function function>
void call(Value* stack) {
  const NoGrad no_grad;
  std::vector<Tensor> results = function(Arguments(stack));
  for (Tensor& result : results) {
    *stack++ = reinterpret_cast<Value>(result.handle);
    result.owned = false;
  }
}

// A function as an operator. Python gets std::invalid_argument as a ValueError, other exceptions as
// a RuntimeError.
template <Function function>
void as_operator(Value* stack, uint64_t, uint64_t) {
#if defined(_WIN32)  // an exception of Zig's library must not reach code of Microsoft's compiler
  thread_local char message[512];
  try {
    return call<function>(stack);
  } catch (const std::exception& error) {
    strncpy(message, error.what(), sizeof(message) - 1);
  }
  torch.check(false, "", "", 0, message);
#else
  call<function>(stack);
#endif
}

struct Registration {
  const char* name;
  Operator function;
};

// use_torch(address): gets the functions from address(name), which returns 0 for those that torch
// does not export
static PyObject* use_torch(PyObject*, PyObject* address) {
  const char* name;
  PyObject* number;
#define NASLORA_GET(result, function, ...)                                               \
  name = "aoti_torch_" #function;                                                        \
  number = PyObject_CallFunction(address, "s", name);                                    \
  if (!number) return nullptr;                                                           \
  torch.function = reinterpret_cast<decltype(torch.function)>(PyLong_AsVoidPtr(number)); \
  Py_DECREF(number);                                                                     \
  if (!torch.function && !strstr(name, "cuda")) {                                        \
    PyErr_Format(PyExc_ImportError, "this PyTorch does not export %s", name);            \
    return nullptr;                                                                      \
  }
  NASLORA_TORCH(NASLORA_GET)
#undef NASLORA_GET
  Py_RETURN_NONE;
}

// Registers operators for a namespace and a key of the dispatcher, for good.
inline PyObject* register_all(PyObject* arguments, const std::vector<Registration>& operators) {
  const char *space, *key;
  void* library;
  if (!PyArg_ParseTuple(arguments, "ss", &space, &key)) return nullptr;
  int32_t failed = torch.library_init_impl(space, key, __FILE__, __LINE__, &library);
  for (const Registration& entry : operators)
    if (!failed) failed = torch.library_impl(library, entry.name, entry.function);
  if (!failed) Py_RETURN_NONE;
  PyErr_Format(PyExc_RuntimeError, "PyTorch does not register the operators of %s", space);
  return nullptr;
}

// poison(bool): whether what operators allocate on a CPU is filled with NaN
static PyObject* poison(PyObject*, PyObject* value) {
  poisoned = PyObject_IsTrue(value);
  Py_RETURN_NONE;
}

// Makes the module of this binary. `methods` ends with an empty entry.
static PyObject* make_module(const char* name, const char* doc, PyMethodDef* methods) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, name, doc, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

}  // namespace naslora
