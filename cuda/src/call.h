// How Python calls the ops: argument lists, scalars, the GIL, and exceptions on the way back. Written over the C API
// because a decode step makes two of these calls a layer, and pybind11's dispatch alone costs more than an op's checks.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <optional>

#include "errors.h"
#include "torch_types.h"

namespace pagedcore {

// An argument list: `names` in order; the first `positional` may be given by position, the rest by name only; the first
// `required` must be given.
struct Signature {
  static constexpr int kMaxArguments = 24;

  const char* function;
  int positional;
  int required;
  int count;
  const char* names[kMaxArguments];

  template <class... Names>
  constexpr Signature(const char* function, int positional, int required, Names... names)
      : function(function), positional(positional), required(required), count(sizeof...(names)), names{names...} {}
};

// One call's arguments in the order of their names, null where one was not given. Ops take them apart with a structured
// binding that repeats the names, so that one too many or too few does not compile.
template <int kCount>
using Arguments = std::array<PyObject*, static_cast<size_t>(kCount)>;

// The names of a signature as Python interns them, so that those in a caller's code are mostly the same objects.
template <int kCount>
struct InternedNames {
  std::array<PyObject*, static_cast<size_t>(kCount)> names;

  explicit InternedNames(const Signature& signature) {
    for (size_t i = 0; i < names.size(); ++i) {
      names[i] = PyUnicode_InternFromString(signature.names[i]);
      if (!names[i]) throw pybind11::error_already_set();
    }
  }
};

// Sorts one vectorcall's arguments into `values`, which are null before. Throws a TypeError for a call that does not
// fit, as Python words it.
void sort_arguments(const Signature& signature, PyObject* const* interned, PyObject* const* arguments,
                    Py_ssize_t num_positional, PyObject* keyword_names, PyObject** values);

// Throws a TypeError unless there are as many arguments as names.
void require_all(const Signature& signature, Py_ssize_t count);

// Turns the exception being handled into Python's; call it in a catch block.
void set_python_error();

// A METH_FASTCALL | METH_KEYWORDS function that returns None.
template <const Signature& kSignature, void (*kFunction)(const Arguments<kSignature.count>&)>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t num_positional, PyObject* keyword_names) {
  try {
    static const InternedNames<kSignature.count> interned(kSignature);
    Arguments<kSignature.count> values{};
    sort_arguments(kSignature, interned.names.data(), arguments, num_positional, keyword_names, values.data());
    kFunction(values);
    Py_RETURN_NONE;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

// The same, quicker, for `pagedcore.ops`: a METH_FASTCALL function of all arguments by position. Returns whether it
// ran; where an argument is of a subclass of torch's tensors, nothing was done.
template <const Signature& kSignature, void (*kFunction)(const Arguments<kSignature.count>&)>
PyObject* entry_by_position(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    require_all(kSignature, count);
    if (any_torch_subclass(arguments, count)) Py_RETURN_FALSE;
    Arguments<kSignature.count> values;
    std::copy_n(arguments, count, values.begin());
    kFunction(values);
    Py_RETURN_TRUE;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

inline bool given(PyObject* value) { return value && value != Py_None; }

// An int; what has __index__ counts as one. Absent and None are nullopt, which most scalars of a call are.
int64_t int_or_refuse(const char* name, PyObject* value);
inline std::optional<int64_t> optional_int(const char* name, PyObject* value) {
  return given(value) ? std::optional(int_or_refuse(name, value)) : std::nullopt;
}
// A float; what has __float__ or __index__ counts as one. Absent and None are nullopt.
double float_or_refuse(const char* name, PyObject* value);
inline std::optional<double> optional_float(const char* name, PyObject* value) {
  return given(value) ? std::optional(float_or_refuse(name, value)) : std::nullopt;
}
// A bool, or what equals one: NumPy's and torch's, 0 and 1.
bool bool_or(bool absent, const char* name, PyObject* value);

// Takes the GIL back. Where the interpreter is shutting down, this thread stays here for good.
void restore_gil(PyThreadState* state);

// Runs `work` with the GIL released. Not a guard object: its destructor could be what the interpreter, as it ends,
// unwinds a daemon thread from.
template <class Work>
void without_gil(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  restore_gil(state);
  if (error) std::rethrow_exception(error);
}

}  // namespace pagedcore
