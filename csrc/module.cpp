// fastconv._C: importing it registers the operators; its functions tell which kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "csrc/benchmark.h"
#include "csrc/direct.h"
#include "csrc/ops.h"
#include "csrc/watch.h"
#include "kernels/cpu/isa.h"

namespace py = pybind11;

namespace {

// One row per micro-kernel: what it computes and the largest register tile it uses on the active ISA.
std::vector<py::dict> kernel_table() {
  const fastconv::Kernels& active = fastconv::kernels();
  std::vector<py::dict> rows;
  for (const fastconv::KernelInfo& info : active.info) {
    py::dict row;
    row["op"] = info.op;
    row["dtype"] = "float32";
    row["tile"] = info.tile;
    row["isa"] = active.isa;
    rows.push_back(row);
  }
  return rows;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = FASTCONV_CXX_FLAGS;
  info["isas"] = fastconv::compiled_isas();
  info["torch_target"] = "2.10";
  info["python"] = PY_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastconv's compiled kernels";
  fastconv::choose_isa();
  m.attr("interface") = 11;  // fastconv/_extension.py has the same number: one more with every change that the other side must know
  m.def("isa", [] { return std::string(fastconv::kernels().isa); }, "The instruction set in use.");
  m.def("isas", &fastconv::supported_isas, "Instruction sets compiled in that this CPU supports, slowest first.");
  m.def("set_isa", &fastconv::set_isa, py::arg("name"),
        "Switches the instruction set; for tests. Raises ValueError on an unknown or unsupported name.");
  m.def("kernels", &kernel_table, "The active kernels: dicts of op, dtype, tile and isa.");
  m.def("fma_gflops", &fastconv::fma_gflops, "Measured fused multiply-add peak of one core on the active ISA, GFLOP/s.");
  m.def("bandwidth_gbs", &fastconv::bandwidth_gbs, py::arg("bytes"), py::arg("kind") = "read", py::arg("budget") = 0.05,
        "Best GB/s of one core over a working set of so many bytes, kind 'read' or 'copy', within a budget of seconds.");
  m.def("pointwise_gflops", &fastconv::pointwise_gflops, py::arg("pixels"), py::arg("in_channels"), py::arg("out_channels"),
        py::arg("budget") = 0.2, "Best GFLOP/s of the pointwise kernel on one core within a budget of seconds.");
  m.def("build_info", &build_info, "Compiler, flags, instruction sets compiled in, and the oldest torch this build runs on.");
  m.def("advise_huge_pages", &fastconv::advise_huge_pages, py::arg("address"), py::arg("bytes"),
        "Asks the system for huge pages, which it may refuse, where a block of memory has room for them.");
  m.def("return_free_memory", &fastconv::return_free_memory, "Gives what the C library's allocator keeps back to the system.");
  m.def("collapse_pages", &fastconv::collapse_pages, py::arg("address"), py::arg("bytes"),
        "Asks the system to put memory that is in use on huge pages, where it fills them.");
  m.def("relative_power", &fastconv::relative_power_at, py::arg("address"), py::arg("outputs"), py::arg("inputs"),
        "The mean square of dense float32 weights (outputs, inputs) that are not 0, each a part of its output's largest; 0 if not finite.");
  // No operator: a finalizer runs wherever the garbage collector does, and a tracer at work there would record it.
  m.def("program_free", &fastconv::program_free, py::arg("program"), "Forgets a program of torch.ops.fastconv.program_new.");
  py::class_<fastconv::Watch>(m, "Watch", "Notices when tensors have been written, moved or replaced, or children of modules replaced.")
      .def(py::init<py::list, py::list, py::list, py::list, py::list, py::list>(), py::arg("tensors"), py::arg("owners"), py::arg("keys"),
           py::arg("counted"), py::arg("addressed"), py::arg("children"))
      .def("unchanged", &fastconv::Watch::unchanged)
      .def_property_readonly("reads_versions", &fastconv::Watch::reads_versions,
                             "Whether in-place writes are noticed without asking tensors.");
  fastconv::find_versions();
  py::class_<fastconv::Direct>(m, "Direct", "Calls a module's operator where nothing stands in the way, else returns None.")
      .def(py::init<py::object, py::object, py::object, py::tuple, py::list, py::list, py::list>(), py::arg("owner"), py::arg("watch"),
           py::arg("op"), py::arg("arguments"), py::arg("empty"), py::arg("fixed"), py::arg("off"))
      .def("__call__", &fastconv::Direct::operator());
}
