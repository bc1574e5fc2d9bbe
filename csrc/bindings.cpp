// resnet_fast._C: addresses and sizes in, nothing out. The caller has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "resnet_fast.h"

namespace py = pybind11;
using py::arg;

namespace resnet_fast {

const char* build_record();  // build_record.cpp

namespace {

using Address = uintptr_t;

/// An address as the pointer that an argument struct wants.
struct Pointer {
  Address address;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

using NoGil = py::call_guard<py::gil_scoped_release>;

/// Keyword-only operands, in order. Those that may be absent are 0 by default.
template <class... Extra, class F>
void define(py::module_& module, const char* name, F f, const Extra&... extra) {
  module.def(name, f, NoGil(), py::kw_only(), extra...);
}

void bind_bn_act(py::module_& module, const BnAct& ops) {
  define(module, "bn_workspace", ops.bn_workspace, arg("npq"), arg("k"));

  define(
      module, "bn_stats",
      [f = ops.bn_stats](Address y, Address mean, Address var, Address workspace, int64_t npq,
                         int64_t k, DType dtype, Address stream) {
        f({Pointer{y}, Pointer{mean}, Pointer{var}, Pointer{workspace}, npq, k, dtype,
           Pointer{stream}});
      },
      arg("y"), arg("mean"), arg("var"), arg("workspace"), arg("npq"), arg("k"), arg("dtype"),
      arg("stream") = 0);

  define(
      module, "affine_act",
      [f = ops.affine_act](Address y, Address scale, Address shift, Address residual,
                           Address rscale, Address rshift, Address z, int64_t npq, int64_t k,
                           DType dtype, bool relu, Address stream) {
        f({Pointer{y}, Pointer{scale}, Pointer{shift}, Pointer{residual}, Pointer{rscale},
           Pointer{rshift}, Pointer{z}, npq, k, dtype, relu, Pointer{stream}});
      },
      arg("y"), arg("scale"), arg("shift"), arg("residual") = 0, arg("rscale") = 0,
      arg("rshift") = 0, arg("z"), arg("npq"), arg("k"), arg("dtype"), arg("relu"),
      arg("stream") = 0);

  define(
      module, "affine_act_backward",
      [f = ops.affine_act_backward](Address dz, Address z, Address y, Address mean, Address ry,
                                    Address rmean, Address g, Address sum_g, Address sum_gy,
                                    Address sum_gry, Address workspace, int64_t npq, int64_t k,
                                    DType dtype, Address stream) {
        f({Pointer{dz}, Pointer{z}, Pointer{y}, Pointer{mean}, Pointer{ry}, Pointer{rmean},
           Pointer{g}, Pointer{sum_g}, Pointer{sum_gy}, Pointer{sum_gry}, Pointer{workspace}, npq,
           k, dtype, Pointer{stream}});
      },
      arg("dz"), arg("z"), arg("y"), arg("mean"), arg("ry") = 0, arg("rmean") = 0, arg("g"),
      arg("sum_g"), arg("sum_gy"), arg("sum_gry") = 0, arg("workspace"), arg("npq"), arg("k"),
      arg("dtype"), arg("stream") = 0);

  define(
      module, "bn_backward_sums",
      [f = ops.bn_backward_sums](Address dz, Address y, Address mean, Address scale, Address shift,
                                 Address sum_g, Address sum_gy, Address workspace, int64_t npq,
                                 int64_t k, DType dtype, Address stream) {
        f({Pointer{dz}, Pointer{y}, Pointer{mean}, Pointer{scale}, Pointer{shift}, Pointer{sum_g},
           Pointer{sum_gy}, Pointer{workspace}, npq, k, dtype, Pointer{stream}});
      },
      arg("dz"), arg("y"), arg("mean"), arg("scale") = 0, arg("shift") = 0, arg("sum_g"),
      arg("sum_gy"), arg("workspace"), arg("npq"), arg("k"), arg("dtype"), arg("stream") = 0);

  define(
      module, "bn_backward_apply",
      [f = ops.bn_backward_apply](Address dz, Address y, Address mean, Address a, Address b,
                                  Address c, Address scale, Address shift, Address dy, int64_t npq,
                                  int64_t k, DType dtype, Address stream) {
        f({Pointer{dz}, Pointer{y}, Pointer{mean}, Pointer{a}, Pointer{b}, Pointer{c},
           Pointer{scale}, Pointer{shift}, Pointer{dy}, npq, k, dtype, Pointer{stream}});
      },
      arg("dz"), arg("y"), arg("mean"), arg("a"), arg("b"), arg("c"), arg("scale") = 0,
      arg("shift") = 0, arg("dy"), arg("npq"), arg("k"), arg("dtype"), arg("stream") = 0);
}

void bind_cpu(py::module_ module) {
  bind_bn_act(module, {cpu::bn_workspace, cpu::bn_stats, cpu::affine_act, cpu::affine_act_backward,
                       cpu::bn_backward_sums, cpu::bn_backward_apply});

  module.def("isa", cpu::isa, "The instruction set chosen for this process.");

  define(
      module, "fingerprint",
      [](const std::vector<Address>& addresses, const std::vector<int64_t>& nbytes,
         int64_t stride) {
        if (addresses.size() != nbytes.size()) {
          throw py::value_error("fingerprint: addresses and nbytes differ in length");
        }
        std::vector<cpu::Span> spans;
        for (size_t i = 0; i < addresses.size(); ++i) {
          spans.push_back({Pointer{addresses[i]}, nbytes[i]});
        }
        return cpu::fingerprint(spans, stride);
      },
      arg("addresses"), arg("nbytes"), arg("stride"));

  module.def(
      "openmp_info",
      [] {
        const cpu::OpenMP info = cpu::openmp_info();
        py::dict result;
        result["max_threads"] = info.max_threads;
        result["runtime"] = info.runtime;
        return result;
      },
      "The threads OpenMP would use, and the library that serves it.");
}

#if RESNET_FAST_WITH_CUDA
void bind_cuda(py::module_ module) {
  bind_bn_act(module, {cuda::bn_workspace, cuda::bn_stats, cuda::affine_act,
                       cuda::affine_act_backward, cuda::bn_backward_sums, cuda::bn_backward_apply});
  module.def("driver_ok", cuda::driver_ok, "Empty, or why the driver cannot serve this build.");
}
#endif

}  // namespace
}  // namespace resnet_fast

PYBIND11_MODULE(_C, module) {
  using namespace resnet_fast;
  module.doc() = "The native kernels of resnet_fast.";

  py::enum_<DType>(module, "DType", "Storage type of an operand.")
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);

  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(build_record()); },
      "What was built, with what, and why not more.");

  bind_cpu(module.def_submodule("cpu"));
#if RESNET_FAST_WITH_CUDA
  bind_cuda(module.def_submodule("cuda"));
#endif
}
