// naslora_kernels._C: hands addresses and sizes from Python to the kernels.
//
// It knows no PyTorch: tensors come as addresses, and torch's thread pool as the address of a C
// function. So it needs no torch when it is built, and no other build for another torch. It keeps
// to Python's limited API, so one binary serves every Python from 3.10 on.

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu_kernels.h"
#include "python_arguments.h"

namespace naslora {

// setup.py defines NASLORA_FOR_EACH_ISA(X) as X(name) for every set compiled, the best last.
#define NASLORA_DECLARE(isa) extern const Kernels kernels_##isa;
NASLORA_FOR_EACH_ISA(NASLORA_DECLARE)
#undef NASLORA_DECLARE

namespace {

bool machine_has(const char* name) {
#if defined(__x86_64__)
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return !strcmp(name, "baseline");
}

#define NASLORA_ADDRESS(isa) &kernels_##isa,
const Kernels* const compiled[] = {NASLORA_FOR_EACH_ISA(NASLORA_ADDRESS)};
#undef NASLORA_ADDRESS

const Kernels* kernels = nullptr;  // those that this process uses

// torch_parallel_for of torch's stable C interface; null runs everything on the calling thread.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, TaskRange body,
                                     void* context);
TorchParallelFor torch_parallel_for = nullptr;

class Scratch {
 public:
  ~Scratch() { host_free(data_); }
  void* of(size_t bytes) {
    if (bytes > size_) {
      host_free(data_);
      data_ = nullptr;
      size_ = 0;
      data_ = host_allocate(bytes);
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

void* host_allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 1) != 0) throw std::bad_alloc();
#if defined(NASLORA_POISON)
  memset(memory, 0xff, bytes);  // NaN, so that tests see what is read before it is written
#endif
  return memory;
}

void host_free(void* memory) { free(memory); }

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  void* memory = scratch.of(bytes);
#if defined(NASLORA_POISON)
  memset(memory, 0xff, bytes);
#endif
  return memory;
}

void run_tasks(int64_t count, TaskRange body, void* context) {
  if (count <= 0) return;
  if (count == 1 || !torch_parallel_for) return body(0, count, context);
  if (torch_parallel_for(0, count, 1, body, context) != 0) throw std::bad_alloc();
}

namespace {

Map map_argument(Arguments& a) {
  Map m;
  m.data = a.address();
  for (int64_t& stride : m.stride) stride = a.integer();
  return m;
}

Cell cell_argument(Arguments& a) {
  Cell cell;
  cell.dtype = static_cast<Dtype>(a.integer());
  cell.batch = a.integer();
  cell.height = a.integer();
  cell.width = a.integer();
  cell.rank = a.integer();
  cell.c = a.integer();
  cell.channels = static_cast<const int64_t*>(a.address());
  cell.alpha = a.address();
  for (const void*& dw : cell.dw) dw = a.address();
  cell.pw = a.address();
  cell.z = map_argument(a);
  return cell;
}

// ---- The functions ---------------------------------------------------------------------------

PyObject* cell_forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Cell cell = cell_argument(a);
  void* y = a.address();
  return compute(a, [&] { kernels->cell_forward(cell, y); });
}

PyObject* cell_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Cell cell = cell_argument(a);
  const Map grad_y = map_argument(a);
  CellGradients gradients;
  gradients.z = a.address();
  gradients.alpha = a.address();
  for (void*& dw : gradients.dw) dw = a.address();
  gradients.pw = a.address();
  return compute(a, [&] { kernels->cell_backward(cell, grad_y, gradients); });
}

FoldedCell folded_cell_argument(Arguments& a) {
  FoldedCell cell = {};
  cell.dtype = static_cast<Dtype>(a.integer());
  cell.batch = a.integer();
  cell.height = a.integer();
  cell.width = a.integer();
  cell.rank = cell.c = a.integer();
  cell.kernel = a.address();
  cell.kernel_size = a.integer();
  cell.average = a.real();
  cell.maximum = a.real();
  return cell;
}

PyObject* folded_cell(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  FoldedCell cell = folded_cell_argument(a);
  cell.z = map_argument(a);
  void* y = a.address();
  return compute(a, [&] { kernels->folded_cell(cell, y); });
}

PyObject* folded_update(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  FoldedUpdate p;
  p.cell = folded_cell_argument(a);
  p.x = a.address();
  p.x_stride = a.integer();
  p.columns = a.integer();
  p.encoder = a.address();
  p.decoder = a.address();
  p.bias = a.address();
  p.out_columns = a.integer();
  p.h = a.address();
  return compute(a, [&] { kernels->folded_update(p); });
}

PyObject* low_rank_pass(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  LowRankPass p;
  p.dtype = static_cast<Dtype>(a.integer());
  p.x = a.address();
  p.x_stride = a.integer();
  p.tokens = a.integer();
  p.columns = a.integer();
  p.rank = a.integer();
  p.scale = a.real();
  p.matrix = a.address();
  p.product = a.address();
  p.rows = a.address();
  p.gradient = a.address();
  p.gradient_stride_k = a.integer();
  p.gradient_stride_j = a.integer();
  return compute(a, [&] { kernels->low_rank_pass(p); });
}

PyObject* low_rank_expand(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  LowRankExpand p;
  p.dtype = static_cast<Dtype>(a.integer());
  p.rows = a.address();
  p.matrix = a.address();
  p.bias = a.address();
  p.tokens = a.integer();
  p.columns = a.integer();
  p.rank = a.integer();
  p.scale = a.real();
  p.out = a.address();
  return compute(a, [&] { kernels->low_rank_expand(p); });
}

PyObject* set_parallel_for(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  void* function = a.address();
  if (!a.complete()) return nullptr;
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(function);
  Py_RETURN_NONE;
}

// capabilities() -> the instruction sets in this binary that this machine has, the best last
PyObject* capabilities(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* k : compiled) {
    if (!names || !machine_has(k->name)) continue;
    PyObject* name = PyUnicode_FromString(k->name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

// use_capability(name): computes with that instruction set from now on
PyObject* use_capability(PyObject*, PyObject* value) {
  PyObject* bytes = PyUnicode_AsUTF8String(value);
  if (!bytes) return nullptr;
  const char* name = PyBytes_AsString(bytes);
  const Kernels* found = nullptr;
  for (const Kernels* k : compiled)
    if (name && machine_has(k->name) && !strcmp(name, k->name)) found = k;
  Py_DECREF(bytes);
  if (!found) {
    PyErr_Format(PyExc_ValueError, "this machine or this build has no instruction set %R", value);
    return nullptr;
  }
  kernels = found;
  Py_RETURN_NONE;
}

// build_info() -> (compiler, instruction sets compiled)
PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  PyObject* names = PyList_New(0);
  for (const Kernels* k : compiled) {
    PyObject* name = names ? PyUnicode_FromString(k->name) : nullptr;
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names ? Py_BuildValue("(sN)", compiler, names) : nullptr;
}

PyMethodDef methods[] = {
    NASLORA_FAST(cell_forward),
    NASLORA_FAST(cell_backward),
    NASLORA_FAST(folded_cell),
    NASLORA_FAST(folded_update),
    NASLORA_FAST(low_rank_pass),
    NASLORA_FAST(low_rank_expand),
    NASLORA_FAST(set_parallel_for),
    {"capabilities", capabilities, METH_NOARGS, nullptr},
    {"use_capability", use_capability, METH_O, nullptr},
    {"build_info", build_info, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "NAS-LoRA's CPU kernels",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace naslora

PyMODINIT_FUNC PyInit__C() {
  naslora::kernels = naslora::compiled[0];
  return PyModule_Create(&naslora::module);
}
