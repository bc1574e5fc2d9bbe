// The Python module `machine`; the ops themselves are bound by csrc/bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "machine.h"
#include "probes.h"

namespace py = pybind11;

namespace resnet_fast {

const char* build_record() { return R"({"cuda": true, "compiler": "g++, on the CPU"})"; }

}  // namespace resnet_fast

PYBIND11_MODULE(machine, module) {
  using namespace cuda_on_cpu;
  py::register_exception<Fault>(module, "Fault", PyExc_RuntimeError);

  module.def("set_operands",
             [](const std::vector<std::tuple<std::string, uintptr_t, size_t, bool>>& list) {
               std::vector<Operand> operands;
               for (const auto& [name, address, nbytes, writable] : list) {
                 operands.push_back({address, address + nbytes, name, writable});
               }
               set_operands(std::move(operands));
             });
  module.def("set_shared_arrays",
             [](const std::vector<std::tuple<uintptr_t, size_t, std::string>>& list) {
               std::vector<SharedArray> arrays;
               for (const auto& [offset, size, name] : list) arrays.push_back({offset, size, name});
               set_shared_arrays(arrays);
             });
  module.def("set_reversed", [](bool reversed) { machine.reversed = reversed; });

  module.def("set_shared_limit", [](size_t bytes) { machine.shared_limit = bytes; });

  module.def(
      "probe",
      [](const std::string& name, uintptr_t x, uintptr_t w, uintptr_t y,
         const std::vector<int64_t>& size) {
        run_probe(name, {reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(w),
                         reinterpret_cast<void*>(y), size});
      },
      py::kw_only(), py::arg("name"), py::arg("x") = 0, py::arg("w") = 0, py::arg("y") = 0,
      py::arg("size") = std::vector<int64_t>());
}
