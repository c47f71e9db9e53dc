// A module's call as one step from Python to the operator.
//
// Between two calls a network's data pushes everything else out of the caches, Python's code and objects, too: the twenty Python functions
// between `fast(x)` and the operator, 10 us when they are in the caches, took 50 to 100 of MobileNet V2's 2600 us.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "csrc/watch.h"

namespace fastconv {

class Direct {
 public:
  // Calls op(x, *arguments), two of them, while nothing says otherwise: `watch` sees no change, the dictionaries in `empty` are, each
  // (object, name, value) of `fixed` holds, no function in `off` says true.
  // owner: kept as long as this.
  Direct(pybind11::object owner, pybind11::object watch, pybind11::object op, pybind11::tuple arguments, pybind11::list empty,
         pybind11::list fixed, pybind11::list off);
  // None where the module has to see to the call itself.
  pybind11::object operator()(pybind11::handle module, pybind11::handle x) const;

 private:
  bool serves_module(PyObject* module) const;
  bool serves_input(PyObject* x) const;

  struct Fixed {
    PyObject *object, *name, *value;
  };
  pybind11::object owner_, held_watch_, op_;
  pybind11::tuple arguments_;
  const pybind11::list held_[3];  // keep what follows alive
  const Watch& watch_;
  std::vector<PyObject*> empty_, off_;
  std::vector<Fixed> fixed_;
  pybind11::object tensor_, float32_, strided_;
};

}  // namespace fastconv
