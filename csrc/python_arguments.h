// How the Python modules take their arguments: as integers and floats, read in order.
//
// It keeps to Python's limited API, so one binary serves every Python from 3.10 on.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <new>
#include <string>

namespace naslora {

class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}

  int64_t integer() {
    if (next_ >= count_) {
      missing_ = true;
      return 0;
    }
    return PyLong_AsLongLong(values_[next_++]);
  }
  double real() {
    if (next_ >= count_) {
      missing_ = true;
      return 0;
    }
    return PyFloat_AsDouble(values_[next_++]);
  }
  void* address() { return reinterpret_cast<void*>(static_cast<intptr_t>(integer())); }

  // Whether all were there and were numbers; sets Python's error otherwise.
  bool complete() const {
    if (PyErr_Occurred()) return false;
    if (!missing_ && next_ == count_) return true;
    PyErr_Format(PyExc_TypeError, "wrong number of arguments: %zd", count_);
    return false;
  }

 private:
  PyObject* const* values_;
  Py_ssize_t count_, next_ = 0;
  bool missing_ = false;
};

// Computes without the interpreter's lock; C++ exceptions become Python's.
template <typename Body>
PyObject* compute(const Arguments& arguments, const Body& body) {
  if (!arguments.complete()) return nullptr;
  PyObject* type = nullptr;
  std::string message;
  Py_BEGIN_ALLOW_THREADS try { body(); } catch (const std::bad_alloc&) {
    type = PyExc_MemoryError;
  } catch (const std::exception& error) {
    type = PyExc_RuntimeError;
    message = error.what();
  }
  Py_END_ALLOW_THREADS if (!type) Py_RETURN_NONE;
  PyErr_SetString(type, message.c_str());
  return nullptr;
}

// An entry of a module's table of methods, for a function (module, arguments, count).
#define NASLORA_FAST(function)                                                           \
  {#function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function)), \
   METH_FASTCALL, nullptr}

}  // namespace naslora
