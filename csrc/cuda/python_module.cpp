// naslora_kernels._CUDA: hands addresses, sizes and streams from Python to the CUDA kernels.
//
// Like _C it knows no PyTorch and keeps to Python's limited API: one binary serves every torch and
// every Python from 3.10 on. The CUDA runtime is linked into it; what it shares with torch is the
// device's primary context, in which torch's addresses and streams are valid.
#include "../python_arguments.h"
#include "kernels.h"
#if defined(NASLORA_EMULATION)
#include "emulation.h"
#endif

namespace naslora {
namespace {

Dtype dtype_argument(Arguments& a) { return static_cast<Dtype>(a.integer()); }

Stream stream_argument(Arguments& a) {
  Stream stream;
  stream.device = static_cast<int>(a.integer());
  stream.handle = a.address();
  return stream;
}

Map map_argument(Arguments& a) {
  Map m;
  m.data = a.address();
  for (int64_t& stride : m.stride) stride = a.integer();
  return m;
}

Parameter parameter_argument(Arguments& a) {
  Parameter p;
  p.data = a.address();
  p.dtype = dtype_argument(a);
  return p;
}

void maps_argument(Arguments& a, Maps& maps) {
  maps.dtype = dtype_argument(a);
  for (int64_t* size : {&maps.batch, &maps.height, &maps.width, &maps.rank}) *size = a.integer();
  maps.c = a.integer();
  maps.channels = static_cast<const int64_t*>(a.address());
  maps.z = map_argument(a);
}

Cell cell_argument(Arguments& a) {
  Cell cell;
  maps_argument(a, cell);
  cell.alpha = parameter_argument(a);
  for (Parameter& dw : cell.dw) dw = parameter_argument(a);
  cell.pw = parameter_argument(a);
  return cell;
}

Reduction::LowRank low_rank_argument(Arguments& a) {
  Reduction::LowRank p;
  p.groups = a.integer();
  p.rank = a.integer();
  p.columns = a.integer();
  p.partials = a.address();
  p.gradient = parameter_argument(a);
  return p;
}

PyObject* cell_forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  const Cell cell = cell_argument(a);
  void* y = a.address();
  return compute(a, [&] { naslora::cell_forward(stream, cell, y); });
}

PyObject* cell_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  const Cell cell = cell_argument(a);
  const Map grad_y = map_argument(a);
  void* grad_z = a.address();
  void* partials = a.address();
  return compute(a, [&] { naslora::cell_backward(stream, cell, grad_y, grad_z, partials); });
}

PyObject* folded_cell_forward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  FoldedCell cell;
  maps_argument(a, cell);
  cell.kernel = parameter_argument(a);
  cell.size = a.integer();
  cell.average = a.real();
  cell.maximum = a.real();
  void* y = a.address();
  return compute(a, [&] { naslora::folded_cell_forward(stream, cell, y); });
}

PyObject* low_rank_pass(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  LowRankPass p;
  p.dtype = dtype_argument(a);
  p.rows = a.address();
  p.row_stride = a.integer();
  p.tokens = a.integer();
  p.columns = a.integer();
  p.rank = a.integer();
  p.matrix = parameter_argument(a);
  for (int64_t& stride : p.matrix_stride) stride = a.integer();
  p.u = a.address();
  p.scale = a.real();
  p.product = a.address();
  p.partials = a.address();
  return compute(a, [&] { naslora::low_rank_pass(stream, p); });
}

PyObject* low_rank_expand(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  LowRankExpand p;
  p.dtype = dtype_argument(a);
  p.u = a.address();
  p.tokens = a.integer();
  p.columns = a.integer();
  p.rank = a.integer();
  p.matrix = parameter_argument(a);
  for (int64_t& stride : p.matrix_stride) stride = a.integer();
  p.bias = parameter_argument(a);
  p.scale = a.real();
  p.out = a.address();
  return compute(a, [&] { naslora::low_rank_expand(stream, p); });
}

PyObject* reduce_gradients(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const Stream stream = stream_argument(a);
  Reduction p;
  p.float64 = a.integer();
  p.cell_groups = a.integer();
  p.c = a.integer();
  p.cell_partials = a.address();
  p.alpha = parameter_argument(a);
  for (Parameter& dw : p.dw) dw = parameter_argument(a);
  p.pw = parameter_argument(a);
  p.grad_alpha = parameter_argument(a);
  for (Parameter& dw : p.grad_dw) dw = parameter_argument(a);
  p.grad_pw = parameter_argument(a);
  p.A = low_rank_argument(a);
  p.B = low_rank_argument(a);
  return compute(a, [&] { naslora::reduce_gradients(stream, p); });
}

PyObject* row_groups(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const int64_t tokens = a.integer();
  return a.complete() ? PyLong_FromLongLong(naslora::row_groups(tokens)) : nullptr;
}

PyObject* cell_groups(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const int64_t batch = a.integer(), height = a.integer(), width = a.integer(), c = a.integer();
  if (!a.complete()) return nullptr;
  return PyLong_FromLongLong(naslora::cell_groups(batch, height, width, c));
}

PyObject* cell_partial_size(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  const int64_t c = a.integer();
  return a.complete() ? PyLong_FromLongLong(naslora::cell_partial_size(c)) : nullptr;
}

// build_info() -> (nvcc's version, architectures compiled), both as setup.py names them
PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("(ss)", NASLORA_NVCC_VERSION, NASLORA_CUDA_ARCHITECTURES);
}

#if defined(NASLORA_EMULATION)
// launches() -> (kernel, blocks in x, in y, threads, bytes of shared memory) of each since last time
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
    NASLORA_FAST(cell_forward),
    NASLORA_FAST(cell_backward),
    NASLORA_FAST(folded_cell_forward),
    NASLORA_FAST(low_rank_pass),
    NASLORA_FAST(low_rank_expand),
    NASLORA_FAST(reduce_gradients),
    NASLORA_FAST(row_groups),
    NASLORA_FAST(cell_groups),
    NASLORA_FAST(cell_partial_size),
#if defined(NASLORA_EMULATION)
    {"launches", launches, METH_NOARGS, nullptr},
#endif
    {"build_info", build_info, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_CUDA",
                      "NAS-LoRA's CUDA kernels",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace
}  // namespace naslora

PyMODINIT_FUNC PyInit__CUDA() { return PyModule_Create(&naslora::module); }
