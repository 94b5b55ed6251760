// How the Python modules read their arguments and report errors.
//
// Every argument is an integer or a float: tensors come as addresses, sizes and strides. Arguments
// are positional and are read in order. Only Python's limited API is used, so that one binary
// serves every Python from 3.10 on.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "vocabulary.h"

namespace naslora {

class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}

  // Reads the next arguments into the fields, in order. Missing ones read as zero.
  template <typename... Fields>
  void read(Fields&... fields) {
    (read_field(fields), ...);
  }

  // Whether every argument was read, was there and was a number. If not, a Python error is set.
  bool complete() const {
    if (PyErr_Occurred()) return false;
    if (!missing_ && next_ == count_) return true;
    PyErr_Format(PyExc_TypeError, "wrong number of arguments: %zd", count_);
    return false;
  }

 private:
  PyObject* next() {
    if (next_ < count_) return values_[next_++];
    missing_ = true;
    return nullptr;
  }
  int64_t integer() {
    PyObject* value = next();
    return value ? PyLong_AsLongLong(value) : 0;
  }

  void read_field(int64_t& field) { field = integer(); }
  void read_field(int& field) { field = static_cast<int>(integer()); }
  void read_field(bool& field) { field = integer() != 0; }
  void read_field(Dtype& field) { field = static_cast<Dtype>(integer()); }
  void read_field(double& field) {
    PyObject* value = next();
    field = value ? PyFloat_AsDouble(value) : 0;
  }
  template <typename T>
  void read_field(T*& address) {
    address = reinterpret_cast<T*>(static_cast<intptr_t>(integer()));
  }
  template <typename T, size_t kCount>
  void read_field(T (&array)[kCount]) {
    for (T& field : array) read_field(field);
  }
  void read_field(Map& map) { read(map.data, map.stride); }
  void read_field(CellShape& s) {
    read(s.dtype, s.batch, s.height, s.width, s.rank, s.c, s.channels);
  }
  // A struct of one module: its function read_from names its fields.
  template <typename T>
  auto read_field(T& fields) -> decltype(fields.read_from(*this)) {
    fields.read_from(*this);
  }

  PyObject* const* values_;
  Py_ssize_t count_, next_ = 0;
  bool missing_ = false;
};

// Calls body() without the interpreter's lock and returns None. C++ exceptions become Python
// errors.
template <typename Body>
PyObject* compute(const Arguments& arguments, const Body& body) {
  if (!arguments.complete()) return nullptr;
  PyObject* type = nullptr;
  std::string message;
  Py_BEGIN_ALLOW_THREADS try { body(); } catch (const std::bad_alloc&) {
    type = PyExc_MemoryError;
  } catch (const std::invalid_argument& error) {
    type = PyExc_ValueError;
    message = error.what();
  } catch (const std::exception& error) {
    type = PyExc_RuntimeError;
    message = error.what();
  }
  Py_END_ALLOW_THREADS if (!type) Py_RETURN_NONE;
  PyErr_SetString(type, message.c_str());
  return nullptr;
}

// A method of a module, for a function of (module, arguments, count).
#define NASLORA_METHOD(function)                                                         \
  {#function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function)), \
   METH_FASTCALL, nullptr}

// Makes the module of this binary. `methods` ends with an empty entry.
static PyObject* make_module(const char* name, const char* doc, PyMethodDef* methods) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, name, doc, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

}  // namespace naslora
