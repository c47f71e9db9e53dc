#include "csrc/watch.h"

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace fastconv {

namespace {

constexpr uintptr_t LINE = 64;

// The C functions behind Tensor._version and Tensor.data_ptr(), for plain tensors and parameters: finding them by name anew took half the
// time of a check. Null where a torch defines them otherwise; then they are asked for by name.
struct Accessors {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  getter version = nullptr;
  void* closure = nullptr;
  PyCFunction data_ptr = nullptr;

  Accessors() {
    const py::module_ torch = py::module_::import("torch");
    tensor = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    parameter = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).release().ptr());
    const py::object counter = torch.attr("Tensor").attr("_version"), method = torch.attr("Tensor").attr("data_ptr");
    const py::object inherited = torch.attr("nn").attr("Parameter");
    if (py::object(inherited.attr("_version")).ptr() != counter.ptr() || py::object(inherited.attr("data_ptr")).ptr() != method.ptr())
      return;
    if (Py_IS_TYPE(counter.ptr(), &PyGetSetDescr_Type)) {
      const PyGetSetDef* const definition = reinterpret_cast<PyGetSetDescrObject*>(counter.ptr())->d_getset;
      version = definition->get;
      closure = definition->closure;
    }
    if (Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) {
      const PyMethodDef* const definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
      if (definition->ml_flags == METH_NOARGS) data_ptr = definition->ml_meth;
    }
  }
  bool serve(PyObject* object) const { return Py_IS_TYPE(object, tensor) || Py_IS_TYPE(object, parameter); }
  static const Accessors& get() {
    static const Accessors* const accessors = new Accessors;  // torch's types outlive every use
    return *accessors;
  }
};

long long version_of(PyObject* tensor) {
  static PyObject* const name = interned("_version");
  const Accessors& known = Accessors::get();
  const py::object value = py::reinterpret_steal<py::object>(known.version && known.serve(tensor) ? known.version(tensor, known.closure)
                                                                                                  : PyObject_GetAttr(tensor, name));
  if (!value) throw py::error_already_set();
  return PyLong_AsLongLong(value.ptr());
}

unsigned long long address_of(PyObject* tensor) {
  static PyObject* const name = interned("data_ptr");
  const Accessors& known = Accessors::get();
  const py::object value = py::reinterpret_steal<py::object>(
      known.data_ptr && known.serve(tensor) ? known.data_ptr(tensor, nullptr) : PyObject_CallMethodNoArgs(tensor, name));
  if (!value) throw py::error_already_set();
  return PyLong_AsUnsignedLongLong(value.ptr());
}

// A number that changes whenever the dictionary does, where this Python keeps one; else zero.
uint64_t tag_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

}  // namespace

PyObject* interned(const char* name) {
  PyObject* text = PyUnicode_InternFromString(name);
  if (!text) throw py::error_already_set();
  return text;
}

Watch::Watch(py::list tensors, py::list owners, py::list keys, py::list counted, py::list addressed, py::list children) {
  const auto add_dict = [&](PyObject* dict) {
    if (!PyDict_Check(dict)) throw py::type_error("Watch: owners and children must be dictionaries");
    dicts_.push_back(dict);
  };
  if (owners.size() != tensors.size() || keys.size() != tensors.size())
    throw py::value_error("Watch: tensors, owners and keys must be of one length");
  for (size_t i = 0; i < tensors.size(); ++i) {
    places_.push_back({tensors[i].ptr(), owners[i].ptr(), keys[i].ptr()});
    add_dict(owners[i].ptr());
  }
  for (const py::handle tensor : counted) {
    const auto* implementation = reinterpret_cast<const char*>(py::cast<uintptr_t>(tensor.attr("_cdata")));
    Counted& entry = counted_.emplace_back(Counted{tensor.ptr(), version_of(tensor.ptr()), implementation, {}});
    std::memcpy(entry.words, implementation, sizeof(entry.words));
  }
  for (const py::handle tensor : addressed) addresses_.emplace_back(tensor.ptr(), address_of(tensor.ptr()));
  for (const py::handle dict : children) {
    add_dict(dict.ptr());
    children_.emplace_back(dict.ptr(), items(dict.ptr()));
  }
  for (const py::list& list : {tensors, owners, keys, counted, addressed, children}) held_.append(py::tuple(list));
  for (const py::handle dict : children) held_.append(py::list(dict.attr("items")()));
  std::sort(dicts_.begin(), dicts_.end());
  dicts_.erase(std::unique(dicts_.begin(), dicts_.end()), dicts_.end());
  for (PyObject* dict : dicts_) tags_.push_back(tag_of(dict));
}

Watch::Items Watch::items(PyObject* dict) {
  Items items;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) items.emplace_back(key, value);
  return items;
}

// Of the counted tensor: what its version's getter reads. Addresses of then: if they are no longer right, fetching them is harmless.
void Watch::prefetch(const Counted& counted) {
  const auto lines = [](const void* from, size_t bytes) {
    for (size_t at = 0; at < bytes + LINE; at += LINE) __builtin_prefetch(static_cast<const char*>(from) + std::min(at, bytes - 1));
  };
  lines(counted.tensor, 64);
  lines(counted.implementation, 192);
  for (const char* word : counted.words) __builtin_prefetch(word);
}

bool Watch::same_dictionaries() const {
  for (PyObject* dict : dicts_) __builtin_prefetch(&reinterpret_cast<const PyDictObject*>(dict)->ma_used);
  bool tagged = true;
  for (size_t i = 0; i < dicts_.size() && tagged; ++i) tagged = tags_[i] != 0 && tag_of(dicts_[i]) == tags_[i];
  if (tagged) return true;
  for (PyObject* dict : dicts_) {
    const char* table = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
    for (uintptr_t line = 0; line < 4; ++line) __builtin_prefetch(table + line * LINE);
  }
  for (const Place& place : places_) {
    PyObject* now = PyDict_GetItemWithError(place.owner, place.key);
    if (!now && PyErr_Occurred()) throw py::error_already_set();
    if (now != place.tensor) return false;
  }
  for (const auto& [dict, then] : children_) {
    PyObject *key, *value;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++i)
      if (i == then.size() || key != then[i].first || value != then[i].second) return false;
    if (i != then.size()) return false;
  }
  for (size_t i = 0; i < dicts_.size(); ++i) tags_[i] = tag_of(dicts_[i]);  // written, but with the same objects
  return true;
}

bool Watch::unchanged() const {
  if (!same_dictionaries()) return false;
  // A getter takes 50 ns in the caches: what the next ones read has time to arrive meanwhile.
  constexpr size_t AHEAD = 12;
  for (size_t i = 0; i < std::min(AHEAD, counted_.size()); ++i) prefetch(counted_[i]);
  for (size_t i = 0; i < counted_.size(); ++i) {
    if (i + AHEAD < counted_.size()) prefetch(counted_[i + AHEAD]);
    if (version_of(counted_[i].tensor) != counted_[i].version) return false;
  }
  for (const auto& [tensor, address] : addresses_)
    if (address_of(tensor) != address) return false;
  return true;
}

}  // namespace fastconv
