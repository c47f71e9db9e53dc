#include "csrc/watch.h"

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace fastconv {

namespace {

constexpr uintptr_t LINE = 64;

PyObject* interned(const char* name) {
  PyObject* text = PyUnicode_InternFromString(name);
  if (!text) throw py::error_already_set();
  return text;
}

long long version_of(PyObject* tensor) {
  static PyObject* const name = interned("_version");
  const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!value) throw py::error_already_set();
  return PyLong_AsLongLong(value.ptr());
}

unsigned long long address_of(PyObject* tensor) {
  static PyObject* const name = interned("data_ptr");
  const py::object value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!value) throw py::error_already_set();
  return PyLong_AsUnsignedLongLong(value.ptr());
}

}  // namespace

Watch::Watch(py::list tensors, py::list owners, py::list keys, py::list counted, py::list addressed, py::list children) {
  const auto add = [&](const void* address, uintptr_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / LINE * LINE, end = reinterpret_cast<uintptr_t>(address) + bytes;
    for (uintptr_t line = begin; line < end; line += LINE) lines_.push_back(reinterpret_cast<const char*>(line));
  };
  const auto add_dict = [&](PyObject* dict) {
    if (!PyDict_Check(dict)) throw py::type_error("Watch: owners and children must be dictionaries");
    add(dict, sizeof(PyDictObject));
    dicts_.push_back(dict);
  };
  if (owners.size() != tensors.size() || keys.size() != tensors.size())
    throw py::value_error("Watch: tensors, owners and keys must be of one length");
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* tensor = tensors[i].ptr();
    places_.push_back({tensor, owners[i].ptr(), keys[i].ptr()});
    add(tensor, 64);
    const auto* implementation = reinterpret_cast<const char*>(py::cast<uintptr_t>(tensors[i].attr("_cdata")));
    add(implementation, 192);
    implementations_.push_back(implementation);
    add_dict(owners[i].ptr());
  }
  for (const py::handle tensor : counted) versions_.emplace_back(tensor.ptr(), version_of(tensor.ptr()));
  for (const py::handle tensor : addressed) {
    addresses_.emplace_back(tensor.ptr(), address_of(tensor.ptr()));
  }
  for (const py::handle dict : children) {
    add_dict(dict.ptr());
    children_.emplace_back(dict.ptr(), items(dict.ptr()));
  }
  for (const py::list& list : {tensors, owners, keys, counted, addressed, children}) held_.append(py::tuple(list));
  for (const py::handle dict : children) held_.append(py::list(dict.attr("items")()));
  std::sort(lines_.begin(), lines_.end());
  lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  std::sort(dicts_.begin(), dicts_.end());
  dicts_.erase(std::unique(dicts_.begin(), dicts_.end()), dicts_.end());
}

Watch::Items Watch::items(PyObject* dict) {
  Items items;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) items.emplace_back(key, value);
  return items;
}

void Watch::prefetch() const {
  for (const char* line : lines_) __builtin_prefetch(line);
  // What a tensor's first words point at, its version counter and storage among them. Whatever they are, fetching is harmless.
  for (const char* implementation : implementations_) {
    const char* words[8];
    std::memcpy(words, implementation, sizeof(words));
    for (const char* word : words) __builtin_prefetch(word);
  }
  for (PyObject* dict : dicts_) {
    const char* table = reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(dict)->ma_keys);
    for (uintptr_t line = 0; line < 4; ++line) __builtin_prefetch(table + line * LINE);
  }
}

bool Watch::unchanged() const {
  prefetch();
  for (const Place& place : places_) {
    PyObject* now = PyDict_GetItemWithError(place.owner, place.key);
    if (!now && PyErr_Occurred()) throw py::error_already_set();
    if (now != place.tensor) return false;
  }
  for (const auto& [tensor, version] : versions_)
    if (version_of(tensor) != version) return false;
  for (const auto& [tensor, address] : addresses_)
    if (address_of(tensor) != address) return false;
  for (const auto& [dict, then] : children_) {
    PyObject *key, *value;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++i)
      if (i == then.size() || key != then[i].first || value != then[i].second) return false;
    if (i != then.size()) return false;
  }
  return true;
}

}  // namespace fastconv
