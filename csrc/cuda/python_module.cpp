// naslora_kernels._CUDA: passes addresses, sizes and streams from Python to the CUDA kernels.
//
// Like _C it does not use PyTorch's C++ API, so one binary serves every torch. The CUDA runtime is
// linked statically. It shares the primary context of the device with torch, so torch's addresses
// and streams are valid here.
#include <tuple>

#include "../shared/plans.h"
#include "../shared/python_arguments.h"
#include "kernels.h"
#if defined(NASLORA_EMULATION)
#include "emulation.h"
#endif

namespace naslora {
namespace {

// A method whose arguments are a stream and the fields of one struct.
template <typename Fields, void (*kernel)(const Stream&, const Fields&)>
PyObject* call(PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  Stream stream;
  Fields fields;
  a.read(stream, fields);
  return compute(a, [&] { kernel(stream, fields); });
}
PyObject* low_rank_pass(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return call<LowRankPass, naslora::low_rank_pass>(values, count);
}
PyObject* low_rank_expand(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return call<LowRankExpand, naslora::low_rank_expand>(values, count);
}
PyObject* reduce_gradients(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return call<Reduction, naslora::reduce_gradients>(values, count);
}

// A method whose arguments are a stream, a cell and y.
template <typename AnyCell, void (*kernel)(const Stream&, const AnyCell&, void*)>
PyObject* call_forward(PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  Stream stream;
  AnyCell cell;
  void* y;
  a.read(stream, cell, y);
  return compute(a, [&] { kernel(stream, cell, y); });
}
PyObject* cell_forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return call_forward<Cell, naslora::cell_forward>(values, count);
}
PyObject* folded_cell_forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return call_forward<FoldedCell, naslora::folded_cell_forward>(values, count);
}

PyObject* cell_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  Stream stream;
  Cell cell;
  Map grad_y;
  void *grad_z, *partials;
  a.read(stream, cell, grad_y, grad_z, partials);
  return compute(a, [&] { naslora::cell_backward(stream, cell, grad_y, grad_z, partials); });
}

// A method that computes a number from some numbers.
template <typename... Numbers>
PyObject* number(int64_t (*function)(Numbers...), PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  std::tuple<Numbers...> numbers;
  std::apply([&](auto&... n) { a.read(n...); }, numbers);
  return a.complete() ? PyLong_FromLongLong(std::apply(function, numbers)) : nullptr;
}
PyObject* row_groups(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return number(token_groups, values, count);
}
PyObject* cell_groups(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return number(naslora::cell_groups, values, count);
}
PyObject* cell_partial_size(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return number(naslora::cell_partial_size, values, count);
}

// build_info() -> (nvcc's version, the compiled architectures), both from setup.py
PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("(ss)", NASLORA_NVCC_VERSION, NASLORA_CUDA_ARCHITECTURES);
}

#if defined(NASLORA_EMULATION)
// launches() -> (kernel, blocks in x, in y, threads, bytes of shared memory) of every launch since
// the last call
PyObject* launches(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const emulation::Launch& l : emulation::launches) {
    PyObject* entry = Py_BuildValue("(sIIin)", l.kernel, l.blocks_x, l.blocks_y, l.threads,
                                    static_cast<Py_ssize_t>(l.shared_bytes));
    if (!list || !entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
    Py_XDECREF(entry);
  }
  emulation::launches.clear();
  return list;
}
#endif

PyMethodDef methods[] = {
    NASLORA_METHOD(cell_forward),
    NASLORA_METHOD(cell_backward),
    NASLORA_METHOD(folded_cell_forward),
    NASLORA_METHOD(low_rank_pass),
    NASLORA_METHOD(low_rank_expand),
    NASLORA_METHOD(reduce_gradients),
    NASLORA_METHOD(row_groups),
    NASLORA_METHOD(cell_groups),
    NASLORA_METHOD(cell_partial_size),
    NASLORA_METHOD(describe),
    NASLORA_METHOD(poison),
    NASLORA_METHOD(run_plan),
    NASLORA_METHOD(use_torch),
#if defined(NASLORA_EMULATION)
    {"launches", launches, METH_NOARGS, nullptr},
#endif
    {"build_info", build_info, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace naslora

PyMODINIT_FUNC PyInit__CUDA() {
  return naslora::make_module("_CUDA", "NAS-LoRA's CUDA kernels", naslora::methods);
}
