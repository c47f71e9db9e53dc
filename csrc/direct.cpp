#include "csrc/direct.h"

namespace py = pybind11;

namespace fastconv {

namespace {

py::object attribute(PyObject* object, PyObject* name) {
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

bool same(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

}  // namespace

Direct::Direct(py::object owner, py::object watch, py::object op, py::tuple arguments, py::list empty, py::list fixed, py::list off)
    : owner_(std::move(owner)),
      held_watch_(std::move(watch)),
      op_(std::move(op)),
      arguments_(std::move(arguments)),
      held_{empty, fixed, off},
      watch_(py::cast<const Watch&>(held_watch_)) {
  if (arguments_.size() != 2) throw py::value_error("Direct: arguments must be two");
  for (const py::handle dict : empty) {
    if (!PyDict_Check(dict.ptr())) throw py::type_error("Direct: empty must be dictionaries");
    empty_.push_back(dict.ptr());
  }
  for (const py::handle entry : fixed) {
    const auto triple = py::cast<py::tuple>(entry);
    if (triple.size() != 3) throw py::value_error("Direct: fixed must be triples of object, name and value");
    fixed_.push_back({triple[0].ptr(), triple[1].ptr(), triple[2].ptr()});
  }
  for (const py::handle function : off) off_.push_back(function.ptr());
  const py::module_ torch = py::module_::import("torch");
  tensor_ = torch.attr("Tensor");
  float32_ = torch.attr("float32");
  strided_ = torch.attr("strided");
}

// In eval mode, uncompiled and without hooks of its own.
bool Direct::serves_module(PyObject* module) const {
  static PyObject *const training = interned("training"), *const compiled = interned("_compiled_call_impl");
  static PyObject* const hooks[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                                    interned("_backward_pre_hooks")};
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!dict) throw py::error_already_set();
  const auto find = [&](PyObject* name) {
    PyObject* const value = PyDict_GetItemWithError(dict.ptr(), name);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
  };
  if (find(training) != Py_False) return false;
  if (PyObject* const own = find(compiled); own && own != Py_None) return false;
  for (PyObject* const name : hooks) {
    PyObject* const registered = find(name);
    if (!registered || !PyDict_Check(registered) || PyDict_GET_SIZE(registered) > 0) return false;
  }
  return true;
}

// Images as the kernels take them, that want no gradient.
bool Direct::serves_input(PyObject* x) const {
  static PyObject *const dtype = interned("dtype"), *const layout = interned("layout"), *const is_cpu = interned("is_cpu"),
                         *const requires_grad = interned("requires_grad"), *const ndim = interned("ndim");
  if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != tensor_.ptr()) return false;
  return attribute(x, dtype).is(float32_) && attribute(x, layout).is(strided_) && attribute(x, is_cpu).ptr() == Py_True &&
         attribute(x, requires_grad).ptr() == Py_False && PyLong_AsLong(attribute(x, ndim).ptr()) == 4;
}

py::object Direct::operator()(py::handle module, py::handle x) const {
  const auto clear = [&] {
    for (PyObject* const dict : empty_)
      if (PyDict_GET_SIZE(dict) > 0) return false;
    for (const Fixed& fixed : fixed_)
      if (!same(attribute(fixed.object, fixed.name).ptr(), fixed.value)) return false;
    for (PyObject* const function : off_) {
      const auto value = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
      if (!value) throw py::error_already_set();
      if (value.ptr() != Py_False && value.ptr() != Py_None) return false;
    }
    return true;
  };
  if (!serves_input(x.ptr()) || !serves_module(module.ptr()) || !clear() || !watch_.unchanged()) return py::none();
  PyObject* const stack[] = {x.ptr(), PyTuple_GET_ITEM(arguments_.ptr(), 0), PyTuple_GET_ITEM(arguments_.ptr(), 1)};
  PyObject* const result = PyObject_Vectorcall(op_.ptr(), stack, 3, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace fastconv
