// naslora_kernels._CUDA: registers the operators of the CUDA kernels.
//
// The CUDA runtime is linked statically. It shares the primary context of the device with torch, so
// torch's addresses and streams are valid here.
#include "launches.h"
#if defined(NASLORA_EMULATION)
#include "emulation.h"
#endif

namespace naslora {
namespace {

PyObject* register_operators(PyObject*, PyObject* arguments) {
  return register_all(arguments, operators<Launches>());
}

// groups(tokens, batch, height, width, c) -> into how many groups a low-rank pass divides its rows
// and the cell's backward its pixels, and how many partial sums a group of the latter has
PyObject* groups(PyObject*, PyObject* arguments) {
  long long tokens, batch, height, width, c;
  if (!PyArg_ParseTuple(arguments, "LLLLL", &tokens, &batch, &height, &width, &c)) return nullptr;
  return Py_BuildValue("(LLL)", static_cast<long long>(token_groups(tokens)),
                       static_cast<long long>(cell_groups(batch, height, width, c)),
                       static_cast<long long>(cell_partial_size(c)));
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

// idle(bool): whether launches do nothing
PyObject* idle(PyObject*, PyObject* value) {
  emulation::idle = PyObject_IsTrue(value);
  Py_RETURN_NONE;
}
#endif

PyMethodDef methods[] = {
    {"use_torch", use_torch, METH_O, nullptr},
    {"register_operators", register_operators, METH_VARARGS, nullptr},
    {"groups", groups, METH_VARARGS, nullptr},
    {"poison", poison, METH_O, nullptr},
#if defined(NASLORA_EMULATION)
    {"launches", launches, METH_NOARGS, nullptr},
    {"idle", idle, METH_O, nullptr},
#endif
    {"build_info", build_info, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace naslora

PyMODINIT_FUNC PyInit__CUDA() {
  return naslora::make_module("_CUDA", "NAS-LoRA's CUDA kernels", naslora::methods);
}
