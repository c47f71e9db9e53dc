// Notices when the tensors that a plan was made from have been written, moved or replaced.
//
// Between two calls a network's data pushes everything else out of the caches, so the check, some hundred tensors, is a walk over cold
// pointers: 260 us for MobileNet V2 in Python, 6% of its time on two cores. Here they are read in loads that do not wait for each other.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace fastconv {

// A name for attributes and dictionaries, made once.
PyObject* interned(const char* name);

// Finds out where torch keeps tensors' versions: at import, while nothing else has been told to make tensors otherwise.
void find_versions();

class Watch {
 public:
  // tensors[i] stands in the dictionary owners[i] under keys[i]; the `counted` ones count their in-place writes (_version), the `addressed`
  // ones are asked for their address as well; `children` are dictionaries whose values must stay the same objects.
  Watch(pybind11::list tensors, pybind11::list owners, pybind11::list keys, pybind11::list counted, pybind11::list addressed,
        pybind11::list children);
  bool unchanged() const;
  // Whether versions are read where torch keeps them; else every tensor is asked.
  bool reads_versions() const { return reads_versions_; }

 private:
  using Items = std::vector<std::pair<PyObject*, PyObject*>>;
  bool same_dictionaries() const;
  bool same_versions() const;
  static Items items(PyObject* dict);

  // Everything below is kept alive by these lists.
  pybind11::list held_;
  struct Place {
    PyObject *tensor, *owner, *key;
  };
  std::vector<Place> places_;
  struct Counted {
    PyObject* tensor;
    long long version;
    const char* implementation;  // torch's object behind it
  };
  bool reads_versions_ = true;
  std::vector<Counted> counted_;
  std::vector<std::pair<PyObject*, unsigned long long>> addresses_;
  std::vector<std::pair<PyObject*, Items>> children_;
  std::vector<PyObject*> dicts_;
  mutable std::vector<uint64_t> tags_;  // the dictionaries' when they were last found unchanged
};

}  // namespace fastconv
