#include "call.h"

#include <cxxabi.h>
#include <unistd.h>

#include <new>
#include <string>

namespace py = pybind11;

namespace pagedcore {
namespace {

[[noreturn]] void wrong_call(const Signature& signature, const std::string& what) {
  throw py::type_error(std::string(signature.function) + "() " + what);
}

int index_of(const Signature& signature, PyObject* name) {
  for (int i = 0; i < signature.count; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, signature.names[i]) == 0) return i;
  }
  wrong_call(signature, "got an unexpected keyword argument '" + py::cast<std::string>(py::handle(name)) + "'");
}

[[noreturn]] void wrong_scalar(const char* name, const char* expected, PyObject* value) {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  PyErr_Clear();
  throw ArgumentError(Fault::type, name, expected, Py_TYPE(value)->tp_name);
}

void raise(const ArgumentError& error) {
  if (error.fault == Fault::type) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return;
  }
  const char* name = error.fault == Fault::unsupported ? "UnsupportedError"
                     : error.fault == Fault::block     ? "BlockError"
                                                       : "InvalidArgumentError";
  const py::object type = py::module_::import("pagedcore.errors").attr(name);
  const py::object instance =
      error.fault == Fault::block
          ? type(error.what(), py::arg("block") = error.block, py::arg("num_blocks") = error.num_blocks)
          : type(error.what(), py::arg("hint") = error.hint, py::arg("argument") = error.argument,
                 py::arg("expected") = error.expected, py::arg("got") = error.got);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void sort_arguments(const Signature& signature, PyObject* const* interned, PyObject* const* arguments,
                    Py_ssize_t num_positional, PyObject* keyword_names, PyObject** values) {
  if (num_positional > signature.positional) {
    wrong_call(signature, "takes " + std::to_string(signature.positional) + " positional arguments but " +
                              std::to_string(num_positional) + " were given");
  }
  for (Py_ssize_t i = 0; i < num_positional; ++i) values[i] = arguments[i];
  const Py_ssize_t num_keywords = keyword_names ? PyTuple_GET_SIZE(keyword_names) : 0;
  int next = static_cast<int>(num_positional);  // callers mostly name arguments in order
  for (Py_ssize_t i = 0; i < num_keywords; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(keyword_names, i);
    if (next >= signature.count || name != interned[next]) next = index_of(signature, name);
    if (values[next])
      wrong_call(signature, std::string("got multiple values for argument '") + signature.names[next] + "'");
    values[next++] = arguments[num_positional + i];
  }
  for (int i = 0; i < signature.required; ++i) {
    if (!values[i]) wrong_call(signature, std::string("missing required argument: '") + signature.names[i] + "'");
  }
}

void require_all(const Signature& signature, Py_ssize_t count) {
  if (count != signature.count) {
    wrong_call(signature, "takes " + std::to_string(signature.count) + " positional arguments but " +
                              std::to_string(count) + " were given");
  }
}

void set_python_error() {
  try {
    try {
      throw;
    } catch (const ArgumentError& error) {
      raise(error);
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

int64_t int_or_refuse(const char* name, PyObject* value) {
  constexpr const char* kExpected = "an int or None";
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value));
  if (!index) wrong_scalar(name, kExpected, value);
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) throw ArgumentError(Fault::invalid_argument, name, "an int of 64 bits", "one that is larger");
  return result;
}

double float_or_refuse(const char* name, PyObject* value) {
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred()) wrong_scalar(name, "a float or None", value);
  return result;
}

bool bool_or(bool absent, const char* name, PyObject* value) {
  if (!value) return absent;
  if (value == Py_True || value == Py_False) return value == Py_True;
  const auto* number = Py_TYPE(value)->tp_as_number;
  const int truth = value != Py_None && number && number->nb_bool ? number->nb_bool(value) : -1;
  if (truth < 0 || PyObject_RichCompareBool(value, truth ? Py_True : Py_False, Py_EQ) != 1)
    wrong_scalar(name, "a bool", value);
  return truth != 0;
}

void restore_gil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (const abi::__forced_unwind&) {
    // The interpreter has ended and Python exits this daemon thread. The frames above hold Python objects that can no
    // longer be given back, so they are not unwound.
    for (;;) pause();
  }
}

}  // namespace pagedcore
