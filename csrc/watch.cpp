#include "csrc/watch.h"

#include <unistd.h>

#include <algorithm>

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

// Copies `bytes` from an address that may be anything; false if there is no memory. The system reads them: a pipe takes no address on
// trust.
class Reader {
 public:
  Reader() {
    if (pipe(ends_) != 0) ends_[0] = ends_[1] = -1;
  }
  ~Reader() {
    for (const int end : ends_)
      if (end >= 0) close(end);
  }
  bool copy(uintptr_t from, size_t bytes, void* to) const {
    const ssize_t written = write(ends_[1], reinterpret_cast<const void*>(from), bytes);
    return written > 0 && read(ends_[0], to, written) == static_cast<ssize_t>(bytes);
  }

 private:
  int ends_[2];
};

// Where torch keeps the number of a tensor's in-place writes: tensor object -> TensorImpl -> counter -> number. No interface says it, so it
// is looked for in a tensor of our own, which is written to meanwhile; where it is not found, or not in one place alone, tensors are asked.
// (Their getters' cache lines, asked for ahead of time, came no sooner on a Zen 4, where plain loads of them do: 262 tensors 98 us and 30.)
struct VersionPlace {
  size_t implementation = 0, counter = 0, number = 0;  // bytes from the beginning of each
  bool known = false;

  static constexpr size_t OBJECT = 64, IMPLEMENTATION = 128, COUNTER = 32;  // bytes that are searched

  VersionPlace() {
    try {
      find();
    } catch (const py::error_already_set&) {  // a torch that makes no such tensor now
    }
  }

  static const VersionPlace& get() {
    static const VersionPlace place;
    return place;
  }

  const char* implementation_of(PyObject* tensor) const { return at(reinterpret_cast<const char*>(tensor), implementation); }
  long long of(const char* implementation) const {
    return *reinterpret_cast<const volatile uint32_t*>(at(implementation, counter) + number);
  }

 private:
  static const char* at(const char* object, size_t bytes) { return *reinterpret_cast<const char* const volatile*>(object + bytes); }

  void find() {
    const py::object tensor = py::module_::import("torch").attr("zeros")(1, py::arg("device") = "cpu");
    const auto object = reinterpret_cast<uintptr_t>(tensor.ptr());
    const auto address = py::cast<uintptr_t>(tensor.attr("_cdata"));
    const Reader reader;
    uintptr_t words[OBJECT / sizeof(uintptr_t)], fields[IMPLEMENTATION / sizeof(uintptr_t)];
    if (!reader.copy(object, sizeof(words), words) || !reader.copy(address, sizeof(fields), fields)) return;
    const auto* const word = std::find(std::begin(words), std::end(words), address);
    if (word == std::end(words)) return;
    implementation = (word - words) * sizeof(uintptr_t);
    int places = 0;
    for (size_t i = 0; i < std::size(fields); ++i)
      for (size_t j = 0; j < COUNTER; j += sizeof(uint32_t))
        if (counts(tensor, reader, fields[i] + j)) {
          counter = i * sizeof(uintptr_t);
          number = j;
          ++places;
        }
    known = places == 1;
  }

  static bool counts(const py::object& tensor, const Reader& reader, uintptr_t place) {
    for (int i = 0; i < 3; ++i) {
      uint32_t now;
      if (place % sizeof(now) != 0 || !reader.copy(place, sizeof(now), &now)) return false;
      if (now != version_of(tensor.ptr())) return false;
      tensor.attr("zero_")();
    }
    return true;
  }
};

// A number that changes whenever the dictionary does, where this Python keeps one; else zero.
uint64_t tag_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

}  // namespace

void find_versions() { VersionPlace::get(); }

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
    counted_.push_back({tensor.ptr(), version_of(tensor.ptr()), implementation});
    const VersionPlace& place = VersionPlace::get();
    reads_versions_ = reads_versions_ && place.known && place.implementation_of(tensor.ptr()) == implementation &&
                      place.of(implementation) == counted_.back().version;
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

bool Watch::same_versions() const {
  if (!reads_versions_) {
    for (const Counted& counted : counted_)
      if (version_of(counted.tensor) != counted.version) return false;
    return true;
  }
  // In two passes of loads that do not wait for each other.
  const VersionPlace& place = VersionPlace::get();
  bool same = true;
  for (const Counted& counted : counted_) same &= place.implementation_of(counted.tensor) == counted.implementation;
  if (!same) return false;
  for (const Counted& counted : counted_) same &= place.of(counted.implementation) == counted.version;
  return same;
}

bool Watch::unchanged() const {
  if (!same_dictionaries() || !same_versions()) return false;
  for (const auto& [tensor, address] : addresses_)
    if (address_of(tensor) != address) return false;
  return true;
}

}  // namespace fastconv
