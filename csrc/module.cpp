// fastconv._C: importing it registers the operators.
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.doc() = "fastconv's compiled kernels"; }
