// Runs the plans that naslora_kernels/plans.py makes. One call looks up the plan of some tensors,
// allocates what it needs and makes its launches. In Python this takes several times as long.
//
// Tensors are handled through torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h), which
// stays the same from version to version. Its functions come as addresses, so no library of torch
// is linked. A handle of a tensor is what that interface calls AtenTensorHandle.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "python_arguments.h"

namespace naslora {

using Handle = void*;

// The functions, in the order of TORCH_FUNCTIONS in plans.py. They return 0 if they succeed.
struct Torch {
  int32_t (*get_data_ptr)(Handle, void**);
  int32_t (*get_layout)(Handle, int32_t*);
  int32_t (*get_dim)(Handle, int64_t*);
  int32_t (*get_sizes)(Handle, int64_t**);
  int32_t (*get_strides)(Handle, int64_t**);
  int32_t (*get_dtype)(Handle, int32_t*);
  int32_t (*get_device_type)(Handle, int32_t*);
  int32_t (*get_device_index)(Handle, int32_t*);
  int32_t (*get_storage_offset)(Handle, int64_t*);
  int32_t (*get_storage_size)(Handle, int64_t*);  // in bytes
  int32_t (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, Handle*);
  // A view; the offset is that of its first element from the tensor's.
  int32_t (*reinterpret_tensor)(Handle, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                int64_t offset, Handle*);
  int32_t (*delete_tensor)(Handle);
  size_t (*element_size)(int32_t dtype);
  int32_t (*cpu)();      // the type of device
  int32_t (*bytes)();    // the dtype of bytes
  int32_t (*strided)();  // the layout of dense tensors

  // Two functions of Python: a list of tensors to a list of capsules with new handles, and back.
  PyObject *to_handles, *to_tensors;
};
static Torch torch;

// Whether allocated memory of a CPU is filled with NaN, for tests. torch does so for allocations
// that it dispatches, which those of its C interface on a CPU are not.
static bool poisoned = false;

// A reference to a Python object, or null. It is given up at the end.
struct Object {
  PyObject* object;

  explicit Object(PyObject* owned) : object(owned) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object); }
  operator PyObject*() const { return object; }
  PyObject* release() {
    PyObject* owned = object;
    object = nullptr;
    return owned;
  }
};

// Handles that are deleted at the end.
struct Handles : std::vector<Handle> {
  Handles() = default;
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    for (Handle handle : *this) {
      if (handle) torch.delete_tensor(handle);
    }
  }
};

struct Layout {
  int64_t dim, *sizes, *strides;

  // Elements from the first to the last one.
  int64_t extent() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dim; ++i) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    return last + 1;
  }
};

// What a plan depends on of one tensor.
struct Description {
  Layout layout;
  int32_t dtype, device_type, device_index;

  // False if the tensor has no such things, as it is not dense.
  bool read(Handle tensor) {
    int32_t layout_kind;
    if (torch.get_layout(tensor, &layout_kind) || layout_kind != torch.strided()) return false;
    return torch.get_dim(tensor, &layout.dim) == 0 && torch.get_sizes(tensor, &layout.sizes) == 0 &&
           torch.get_strides(tensor, &layout.strides) == 0 &&
           torch.get_dtype(tensor, &dtype) == 0 &&
           torch.get_device_type(tensor, &device_type) == 0 &&
           torch.get_device_index(tensor, &device_index) == 0;
  }

  void append_to(std::string& key) const {
    const auto append = [&](const auto* numbers, int64_t count) {
      key.append(reinterpret_cast<const char*>(numbers), count * sizeof(*numbers));
    };
    append(&layout.dim, 1);
    append(layout.sizes, layout.dim);
    append(layout.strides, layout.dim);
    append(&dtype, 1);
    append(&device_type, 1);
    append(&device_index, 1);
  }

  // Whether the storage is as large as the tensor, which nothing but the caller's care ensures.
  bool held(Handle tensor) const {
    int64_t offset, size;
    if (torch.get_storage_offset(tensor, &offset) || torch.get_storage_size(tensor, &size)) {
      return false;
    }
    const int64_t extent = layout.extent();
    const int64_t item = static_cast<int64_t>(torch.element_size(dtype));
    return extent == 0 || (offset + extent) * item <= size;
  }
};

// Sizes or strides, read from a tuple.
struct Integers {
  int64_t count, values[8];  // no tensor of the operators has more dimensions

  explicit Integers(PyObject* tuple) : count(PyTuple_Size(tuple)) {
    if (count > 8) throw std::invalid_argument("a tensor has more than eight dimensions");
    for (int64_t i = 0; i < count; ++i) {
      values[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    }
  }
};

// One call of run_plan.
class PlanRun {
 public:
  // Returns the results, a tensor or a list; the key if there is no plan; None where the operator
  // has to do without one.
  PyObject* run(PyObject* plans, PyObject* tensors, PyObject* numbers, PyObject* stream) {
    Object bytes(describe(tensors, true));
    if (!bytes || bytes == Py_None) return bytes.release();
    Object key(PyTuple_Pack(2, bytes.object, numbers));
    if (!key) return nullptr;
    PyObject* plan = PyDict_GetItemWithError(plans, key);
    if (!plan) return PyErr_Occurred() ? nullptr : key.release();
    Py_INCREF(plan);  // a step may run other Python code
    Object held(plan);
    if (!allocate(PyTuple_GetItem(plan, kMade), PyTuple_GetItem(plan, kOffsets))) Py_RETURN_NONE;
    if (!follow(plan, stream)) return nullptr;
    Object all(results(PyTuple_GetItem(plan, kResults)));
    if (!all || PyTuple_GetItem(plan, kSingle) != Py_True) return all.release();
    PyObject* one = PyList_GetItem(all, 0);
    Py_XINCREF(one);
    return one;
  }

  // Returns all that plans and checks depend on except for values, as bytes. None if a tensor is
  // not dense, or if its storage on a CPU is smaller than it and is looked at.
  PyObject* describe(PyObject* tensors, bool look_at_storages) {
    tensors_.reserve(32);
    addresses_.reserve(32);
    if (!take(tensors)) return nullptr;
    std::string key;
    key.reserve(2048);
    size_t next = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
      if (PyTuple_GetItem(tensors, i) == Py_None) {
        key += '-';
        continue;
      }
      Handle tensor = tensors_[next++];
      Description of_tensor;
      if (!of_tensor.read(tensor)) Py_RETURN_NONE;
      if (look_at_storages && of_tensor.device_type == torch.cpu() && !of_tensor.held(tensor)) {
        Py_RETURN_NONE;
      }
      of_tensor.append_to(key);
      if (next == 1) first_ = of_tensor;
    }
    return PyBytes_FromStringAndSize(key.data(), key.size());
  }

 private:
  // The fields of Plan in plans.py.
  enum { kMade, kOffsets, kSteps, kResults, kSingle };

  // Gets the handles of the tensors that are not None.
  bool take(PyObject* tensors) {
    Object given(PyList_New(0));
    for (Py_ssize_t i = 0; given && i < PyTuple_Size(tensors); ++i) {
      PyObject* tensor = PyTuple_GetItem(tensors, i);
      if (tensor != Py_None && PyList_Append(given, tensor)) return false;
    }
    Object capsules(given ? PyObject_CallFunctionObjArgs(torch.to_handles, given.object, nullptr)
                          : nullptr);
    if (!capsules) return false;
    for (Py_ssize_t i = 0; i < PyList_Size(capsules); ++i) {
      tensors_.push_back(PyCapsule_GetPointer(PyList_GetItem(capsules, i), nullptr));
    }
    return !PyErr_Occurred();
  }

  // Makes the tensors and the buffer, on the device of the first tensor.
  bool allocate(PyObject* made, PyObject* offsets) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(made); ++i) {
      PyObject* one = PyTuple_GetItem(made, i);
      const Integers sizes(PyTuple_GetItem(one, 0)), strides(PyTuple_GetItem(one, 1));
      const auto dtype = static_cast<int32_t>(PyLong_AsLong(PyTuple_GetItem(one, 2)));
      if (!add_empty(tensors_, sizes.count, sizes.values, strides.values, dtype)) return false;
    }
    for (Handle tensor : tensors_) {
      void* data;
      if (torch.get_data_ptr(tensor, &data)) return false;
      addresses_.push_back(data);
    }
    const Py_ssize_t parts = PyTuple_Size(offsets) - 1;
    if (parts == 0) return true;
    const int64_t bytes = PyLong_AsLongLong(PyTuple_GetItem(offsets, parts)), step = 1;
    void* start;
    if (!add_empty(buffer_, 1, &bytes, &step, torch.bytes())) return false;
    if (torch.get_data_ptr(buffer_[0], &start)) return false;
    for (Py_ssize_t i = 0; i < parts; ++i) {
      const int64_t offset = PyLong_AsLongLong(PyTuple_GetItem(offsets, i));
      addresses_.push_back(static_cast<char*>(start) + offset);
    }
    return true;
  }

  bool add_empty(Handles& handles, int64_t dim, const int64_t* sizes, const int64_t* strides,
                 int32_t dtype) {
    Handle handle;
    if (torch.empty_strided(dim, sizes, strides, dtype, first_.device_type, first_.device_index,
                            &handle)) {
      return false;
    }
    handles.push_back(handle);
    if (poisoned && first_.device_type == torch.cpu()) {
      int64_t bytes;
      void* data;
      if (torch.get_storage_size(handle, &bytes) || torch.get_data_ptr(handle, &data)) return false;
      if (bytes > 0) memset(data, 0xff, static_cast<size_t>(bytes));
    }
    return true;
  }

  bool follow(PyObject* plan, PyObject* stream) {
    PyObject* steps = PyTuple_GetItem(plan, kSteps);
    for (Py_ssize_t i = 0; i < PyTuple_Size(steps); ++i) {
      PyObject* step = PyTuple_GetItem(steps, i);
      PyObject* function = PyTuple_GetItem(step, 0);
      PyObject* arguments = PyTuple_GetItem(step, 1);
      PyObject* places = PyTuple_GetItem(step, 2);
      Object values(arguments == Py_None ? views(places) : launch(arguments, places, stream));
      Object result(values ? PyObject_CallObject(function, values) : nullptr);
      if (!result) return false;
    }
    return true;
  }

  // The arguments of a launch: the stream, and constants with addresses at some places.
  PyObject* launch(PyObject* arguments, PyObject* places, PyObject* stream) {
    const Py_ssize_t streams = PyTuple_Size(stream), count = PyTuple_Size(arguments);
    Object values(PyTuple_New(streams + count));
    if (!values) return nullptr;
    for (Py_ssize_t i = 0; i < streams + count; ++i) {
      PyObject* value =
          i < streams ? PyTuple_GetItem(stream, i) : PyTuple_GetItem(arguments, i - streams);
      Py_INCREF(value);
      PyTuple_SetItem(values, i, value);
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(places); i += 2) {
      const auto place = PyLong_AsSsize_t(PyTuple_GetItem(places, i));
      const auto address = PyLong_AsSsize_t(PyTuple_GetItem(places, i + 1));
      PyTuple_SetItem(values, streams + place, PyLong_FromVoidPtr(addresses_[address]));
    }
    return PyErr_Occurred() ? nullptr : values.release();
  }

  // The arguments of a method of tensors: views, each of a tensor, sizes and strides.
  PyObject* views(PyObject* descriptions) {
    Handles handles;
    for (Py_ssize_t i = 0; i < PyTuple_Size(descriptions); ++i) {
      PyObject* one = PyTuple_GetItem(descriptions, i);
      const auto tensor = PyLong_AsSsize_t(PyTuple_GetItem(one, 0));
      const Integers sizes(PyTuple_GetItem(one, 1)), strides(PyTuple_GetItem(one, 2));
      Handle view;
      if (torch.reinterpret_tensor(tensors_[tensor], sizes.count, sizes.values, strides.values, 0,
                                   &view)) {
        PyErr_SetString(PyExc_RuntimeError, "torch makes no view of a tensor");
        return nullptr;
      }
      handles.push_back(view);
    }
    Object list(to_tensors(handles));
    return list ? PyList_AsTuple(list) : nullptr;
  }

  // The allocated tensors that are returned, and None where an index is None.
  PyObject* results(PyObject* indices) {
    Handles handles;
    std::vector<Py_ssize_t> order;
    for (Py_ssize_t i = 0; i < PyTuple_Size(indices); ++i) {
      PyObject* index = PyTuple_GetItem(indices, i);
      if (index == Py_None) continue;
      order.push_back(i);
      Handle& handle = tensors_[PyLong_AsSsize_t(index)];
      handles.push_back(handle);
      handle = nullptr;
    }
    Object made(to_tensors(handles));
    if (!made || order.size() == static_cast<size_t>(PyTuple_Size(indices))) return made.release();
    Object all(PyList_New(PyTuple_Size(indices)));
    if (!all) return nullptr;
    size_t next = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(indices); ++i) {
      const bool returned = next < order.size() && order[next] == i;
      PyObject* value = returned ? PyList_GetItem(made, next++) : Py_None;
      Py_INCREF(value);
      PyList_SetItem(all, i, value);
    }
    return all.release();
  }

  // Gives the handles away and returns their tensors as a list.
  static PyObject* to_tensors(Handles& handles) {
    Object capsules(PyList_New(0));
    for (Handle handle : handles) {
      Object capsule(capsules ? PyCapsule_New(handle, nullptr, nullptr) : nullptr);
      if (!capsule || PyList_Append(capsules, capsule)) return nullptr;
    }
    PyObject* tensors = PyObject_CallFunctionObjArgs(torch.to_tensors, capsules.object, nullptr);
    if (tensors) handles.clear();
    return tensors;
  }

  Handles tensors_, buffer_;  // given and made
  std::vector<void*> addresses_;
  Description first_;
};

// A method with a number of arguments, for a function of a PlanRun and the arguments.
template <typename Body>
PyObject* with_plan_run(Py_ssize_t wanted, Py_ssize_t count, const Body& body) {
  if (count != wanted) {
    PyErr_Format(PyExc_TypeError, "wrong number of arguments: %zd", count);
    return nullptr;
  }
  try {
    PlanRun run;
    return body(run);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// describe(tensors) -> bytes or None; see PlanRun::describe
static PyObject* describe(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return with_plan_run(1, count, [&](PlanRun& run) { return run.describe(values[0], false); });
}

// run_plan(plans, tensors, numbers, stream) -> results, a key, or None; see PlanRun::run
static PyObject* run_plan(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return with_plan_run(
      4, count, [&](PlanRun& run) { return run.run(values[0], values[1], values[2], values[3]); });
}

// poison(bool): whether what plans allocate on a CPU is filled with NaN
static PyObject* poison(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments a(values, count);
  bool wanted;
  a.read(wanted);
  if (!a.complete()) return nullptr;
  poisoned = wanted;
  Py_RETURN_NONE;
}

// use_torch(to_handles, to_tensors, *addresses): gets the functions of Torch
static PyObject* use_torch(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count < 2) {
    PyErr_Format(PyExc_TypeError, "wrong number of arguments: %zd", count);
    return nullptr;
  }
  Torch t;
  Arguments a(values + 2, count - 2);
  a.read(t.get_data_ptr, t.get_layout, t.get_dim, t.get_sizes, t.get_strides, t.get_dtype,
         t.get_device_type, t.get_device_index, t.get_storage_offset, t.get_storage_size,
         t.empty_strided, t.reinterpret_tensor, t.delete_tensor, t.element_size, t.cpu, t.bytes,
         t.strided);
  if (!a.complete()) return nullptr;
  t.to_handles = values[0];
  t.to_tensors = values[1];
  Py_INCREF(t.to_handles);  // for good
  Py_INCREF(t.to_tensors);
  torch = t;
  Py_RETURN_NONE;
}

}  // namespace naslora
