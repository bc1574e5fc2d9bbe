// resnet_fast._C: addresses and sizes in, nothing out. The caller has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "resnet_fast.h"

namespace py = pybind11;
using py::arg;

namespace resnet_fast {

const char* build_record();  // build_record.cpp

namespace {

/// An operand: where it lies. The caller keeps it alive.
struct Address {
  uintptr_t value = 0;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace
}  // namespace resnet_fast

/// From an address, from None (which is 0), or from whatever has a data_ptr(), as tensors do.
template <>
struct pybind11::detail::type_caster<resnet_fast::Address> {
  PYBIND11_TYPE_CASTER(resnet_fast::Address, const_name("int | Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    object address = reinterpret_borrow<object>(source);
    if (!PyLong_Check(source.ptr())) {
      static PyObject* const name = PyUnicode_InternFromString("data_ptr");
      address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
      if (!address) throw error_already_set();
    }
    value.value = PyLong_AsSize_t(address.ptr());
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

namespace resnet_fast {
namespace {

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
      [f = ops.bn_stats](Address y, Address gamma, Address beta, Address mean, Address var,
                         Address rstd, Address scale, Address shift, Address workspace, int64_t npq,
                         int64_t k, float eps, DType dtype, Address stream) {
        f({y, gamma, beta, mean, var, rstd, scale, shift, workspace, npq, k, eps, dtype, stream});
      },
      arg("y"), arg("gamma") = 0, arg("beta") = 0, arg("mean"), arg("var"), arg("rstd"),
      arg("scale"), arg("shift"), arg("workspace"), arg("npq"), arg("k"), arg("eps"), arg("dtype"),
      arg("stream") = 0);

  define(
      module, "bn_finalize",
      [f = ops.bn_finalize](Address n, Address means, Address vars, Address gamma, Address beta,
                            Address mean, Address var, Address rstd, Address scale, Address shift,
                            int64_t parts, int64_t k, float eps, Address stream) {
        f({n, means, vars, gamma, beta, mean, var, rstd, scale, shift, parts, k, eps, stream});
      },
      arg("n"), arg("means"), arg("vars"), arg("gamma") = 0, arg("beta") = 0, arg("mean"),
      arg("var"), arg("rstd"), arg("scale"), arg("shift"), arg("parts"), arg("k"), arg("eps"),
      arg("stream") = 0);

  define(
      module, "affine_act",
      [f = ops.affine_act](Address y, Address scale, Address shift, Address residual,
                           Address rscale, Address rshift, Address z, Address mask, int64_t npq,
                           int64_t k, DType dtype, bool relu, Address stream) {
        f({y, scale, shift, residual, rscale, rshift, z, mask, npq, k, dtype, relu, stream});
      },
      arg("y"), arg("scale"), arg("shift"), arg("residual") = 0, arg("rscale") = 0,
      arg("rshift") = 0, arg("z"), arg("mask") = 0, arg("npq"), arg("k"), arg("dtype"), arg("relu"),
      arg("stream") = 0);
}

void bind_bn_act_backward(py::module_& module, const BnActBackward& ops) {
  define(
      module, "affine_act_backward",
      [f = ops.affine_act_backward](Address dz, Address z, Address mask, Address y, Address mean,
                                    Address ry, Address rmean, Address g, Address sum_g,
                                    Address sum_gy, Address sum_gry, Address workspace, int64_t npq,
                                    int64_t k, DType dtype, Address stream) {
        f({dz, z, mask, y, mean, ry, rmean, g, sum_g, sum_gy, sum_gry, workspace, npq, k, dtype,
           stream});
      },
      arg("dz"), arg("z") = 0, arg("mask") = 0, arg("y"), arg("mean"), arg("ry") = 0,
      arg("rmean") = 0, arg("g"), arg("sum_g"), arg("sum_gy"), arg("sum_gry") = 0, arg("workspace"),
      arg("npq"), arg("k"), arg("dtype"), arg("stream") = 0);

  define(
      module, "bn_backward_sums",
      [f = ops.bn_backward_sums](Address dz, Address y, Address mean, Address scale, Address shift,
                                 Address sum_g, Address sum_gy, Address workspace, int64_t npq,
                                 int64_t k, DType dtype, Address stream) {
        f({dz, y, mean, scale, shift, sum_g, sum_gy, workspace, npq, k, dtype, stream});
      },
      arg("dz"), arg("y"), arg("mean"), arg("scale") = 0, arg("shift") = 0, arg("sum_g"),
      arg("sum_gy"), arg("workspace"), arg("npq"), arg("k"), arg("dtype"), arg("stream") = 0);

  define(
      module, "bn_backward_finalize",
      [f = ops.bn_backward_finalize](Address sum_g, Address sum_gy, Address rstd, Address scale,
                                     Address b, Address c, Address dgamma, double n, int64_t k,
                                     Address stream) {
        f({sum_g, sum_gy, rstd, scale, b, c, dgamma, n, k, stream});
      },
      arg("sum_g"), arg("sum_gy"), arg("rstd"), arg("scale"), arg("b"), arg("c"), arg("dgamma"),
      arg("n"), arg("k"), arg("stream") = 0);

  define(
      module, "bn_backward_apply",
      [f = ops.bn_backward_apply](Address dz, Address y, Address mean, Address a, Address b,
                                  Address c, Address scale, Address shift, Address dy, int64_t npq,
                                  int64_t k, DType dtype, Address stream) {
        f({dz, y, mean, a, b, c, scale, shift, dy, npq, k, dtype, stream});
      },
      arg("dz"), arg("y"), arg("mean"), arg("a"), arg("b"), arg("c"), arg("scale") = 0,
      arg("shift") = 0, arg("dy"), arg("npq"), arg("k"), arg("dtype"), arg("stream") = 0);
}

void bind_stem(py::module_& module, const Stem& ops) {
  define(
      module, "affine_act_maxpool",
      [f = ops.affine_act_maxpool](Address y, Address scale, Address shift, Address z,
                                   Address index, int64_t n, int64_t h, int64_t w, int64_t k,
                                   DType dtype, Address stream) {
        f({y, scale, shift, z, index, n, h, w, k, dtype, stream});
      },
      arg("y"), arg("scale"), arg("shift"), arg("z"), arg("index"), arg("n"), arg("h"), arg("w"),
      arg("k"), arg("dtype"), arg("stream") = 0);
}

void bind_stem_backward(py::module_& module, const StemBackward& ops) {
  define(
      module, "maxpool_backward_sums",
      [f = ops.maxpool_backward_sums](Address dz, Address index, Address y, Address mean,
                                      Address sum_g, Address sum_gy, Address workspace, int64_t n,
                                      int64_t h, int64_t w, int64_t k, DType dtype,
                                      Address stream) {
        f({dz, index, y, mean, sum_g, sum_gy, workspace, n, h, w, k, dtype, stream});
      },
      arg("dz"), arg("index"), arg("y"), arg("mean"), arg("sum_g"), arg("sum_gy"), arg("workspace"),
      arg("n"), arg("h"), arg("w"), arg("k"), arg("dtype"), arg("stream") = 0);

  define(
      module, "maxpool_backward_apply",
      [f = ops.maxpool_backward_apply](
          Address dz, Address index, Address y, Address mean, Address a, Address b, Address c,
          Address dy, int64_t n, int64_t h, int64_t w, int64_t k, DType dtype,
          Address stream) { f({dz, index, y, mean, a, b, c, dy, n, h, w, k, dtype, stream}); },
      arg("dz"), arg("index"), arg("y"), arg("mean"), arg("a"), arg("b"), arg("c"), arg("dy"),
      arg("n"), arg("h"), arg("w"), arg("k"), arg("dtype"), arg("stream") = 0);
}

#ifndef RESNET_FAST_WITHOUT_CPU  // tests/cuda_on_cpu builds the CUDA kernels alone
void bind_winograd(py::module_& module, const Winograd& ops) {
  define(module, "winograd_weight_size", ops.winograd_weight_size, arg("c"), arg("k"));

  define(
      module, "winograd_weight",
      [f = ops.winograd_weight](Address w, Address u, int64_t c, int64_t k, int64_t c_stride,
                                int64_t k_stride, int64_t tap_stride, bool flip, DType dtype) {
        f({w, u, c, k, c_stride, k_stride, tap_stride, flip, dtype});
      },
      arg("w"), arg("u"), arg("c"), arg("k"), arg("c_stride"), arg("k_stride"), arg("tap_stride"),
      arg("flip"), arg("dtype"));

  define(
      module, "winograd_workspace",
      [f = ops.winograd_workspace](int64_t n, int64_t h, int64_t w, int64_t c, int64_t k,
                                   int64_t threads) {
        return f({nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, n, h, w, c, k, threads});
      },
      arg("n"), arg("h"), arg("w"), arg("c"), arg("k"), arg("threads"));

  define(
      module, "winograd_conv",
      [f = ops.winograd_conv](Address x, Address u, Address shift, Address residual, Address z,
                              Address workspace, int64_t n, int64_t h, int64_t w, int64_t c,
                              int64_t k, int64_t threads, DType dtype, bool relu) {
        f({x, u, shift, residual, z, workspace, n, h, w, c, k, threads, dtype, relu});
      },
      arg("x"), arg("u"), arg("shift") = 0, arg("residual") = 0, arg("z"), arg("workspace"),
      arg("n"), arg("h"), arg("w"), arg("c"), arg("k"), arg("threads"), arg("dtype"), arg("relu"));
}

void bind_winograd_gradient(py::module_& module, const WinogradGradient& ops) {
  const auto of_shape = [&](const char* name, int64_t (*f)(const WinogradWgrad&)) {
    define(
        module, name,
        [f](int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t threads) {
          return f({nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, n, h, w, c, k, threads});
        },
        arg("n"), arg("h"), arg("w"), arg("c"), arg("k"), arg("threads"));
  };
  of_shape("winograd_wgrad_units", ops.winograd_wgrad_units);
  of_shape("winograd_wgrad_workspace", ops.winograd_wgrad_workspace);

  define(
      module, "winograd_wgrad",
      [f = ops.winograd_wgrad](Address dy, Address x, Address scale, Address shift, Address dw,
                               Address workspace, int64_t n, int64_t h, int64_t w, int64_t c,
                               int64_t k, int64_t threads, DType dtype) {
        f({dy, x, scale, shift, dw, workspace, n, h, w, c, k, threads, dtype});
      },
      arg("dy"), arg("x"), arg("scale") = 0, arg("shift") = 0, arg("dw"), arg("workspace"),
      arg("n"), arg("h"), arg("w"), arg("c"), arg("k"), arg("threads"), arg("dtype"));
}

void bind_pointwise(py::module_& module, const Pointwise& ops) {
  const auto of_shape = [&](const char* name, int64_t (*f)(const PointwiseBackward&)) {
    define(
        module, name,
        [f](int64_t npq, int64_t channels, int64_t k, int64_t threads) {
          PointwiseBackward args{};
          args.npq = npq, args.channels = channels, args.k = k, args.threads = threads;
          return f(args);
        },
        arg("npq"), arg("channels"), arg("k"), arg("threads"));
  };
  of_shape("pointwise_backward_units", ops.pointwise_backward_units);
  of_shape("pointwise_backward_workspace", ops.pointwise_backward_workspace);

  define(
      module, "pointwise_backward",
      [f = ops.pointwise_backward](Address g, Address y, Address mean, Address a, Address b,
                                   Address c, Address gscale, Address gshift, Address x,
                                   Address scale, Address shift, Address w, Address residual,
                                   Address dx, Address dw, Address workspace, int64_t npq,
                                   int64_t channels, int64_t k, int64_t threads, DType dtype) {
        f({g, y,        mean, a,  b,         c,   gscale,   gshift, x,       scale, shift,
           w, residual, dx,   dw, workspace, npq, channels, k,      threads, dtype});
      },
      arg("g"), arg("y") = 0, arg("mean") = 0, arg("a") = 0, arg("b") = 0, arg("c") = 0,
      arg("gscale") = 0, arg("gshift") = 0, arg("x"), arg("scale") = 0, arg("shift") = 0, arg("w"),
      arg("residual") = 0, arg("dx") = 0, arg("dw") = 0, arg("workspace"), arg("npq"),
      arg("channels"), arg("k"), arg("threads"), arg("dtype"));
}

/// A dictionary's own memory, and what it points to first, will be read soon.
void ask_for(const PyObject* dict, bool with_keys) {
  constexpr int LINE = 64, LINES = 5;
  if (!with_keys) return __builtin_prefetch(dict);
  const PyDictObject* d = reinterpret_cast<const PyDictObject*>(dict);
  const char* keys = reinterpret_cast<const char*>(d->ma_keys);
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(keys + i * LINE);
}

/// See bind_cpu. Everything is compared by identity, dictionaries in their own order. `values`, and
/// `sizes` as int64, are of all `contents`, one after the other. Nothing of Python's runs here.
bool unchanged(const py::tuple& contents, const py::bytes& sizes, const py::tuple& values,
               const py::tuple& empty, const py::tuple& objects, const py::tuple& kinds) {
  constexpr Py_ssize_t AHEAD = 4;  // dictionaries that are on their way: most of them are misses
  const Py_ssize_t count = PyTuple_GET_SIZE(contents.ptr());
  const auto dict = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(contents.ptr(), i); };
  const auto size = [&, p = PyBytes_AS_STRING(sizes.ptr())](Py_ssize_t i) {
    int64_t size;
    std::memcpy(&size, p + i * sizeof size, sizeof size);
    return size;
  };
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + 2 * AHEAD < count) ask_for(dict(i + 2 * AHEAD), false);
    if (i + AHEAD < count) ask_for(dict(i + AHEAD), true);
    if (PyDict_Size(dict(i)) != size(i)) return false;
    PyObject* value = nullptr;
    for (Py_ssize_t place = 0; PyDict_Next(dict(i), &place, nullptr, &value); ++at) {
      if (value != PyTuple_GET_ITEM(values.ptr(), at)) return false;
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(empty.ptr()); ++i) {
    if (PyDict_Size(PyTuple_GET_ITEM(empty.ptr(), i)) != 0) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects.ptr()); ++i) {
    const PyObject* kind = PyTuple_GET_ITEM(kinds.ptr(), i);
    if (reinterpret_cast<const PyObject*>(Py_TYPE(PyTuple_GET_ITEM(objects.ptr(), i))) != kind) {
      return false;
    }
  }
  return true;
}

/// See bind_cpu. `then` holds four int64 of each tensor: its address, its version counter (-1: it
/// is not asked), and where its own object and its storage's lie, which are asked for ahead.
/// `data_ptr` and `version` are the descriptors of torch.Tensor.
bool in_place(const py::tuple& tensors, const py::bytes& then, py::handle data_ptr,
              py::handle version) {
  constexpr int LINE = 64, LINES = 3;
  constexpr Py_ssize_t AHEAD = 6;
  struct State {
    int64_t address, version, object, storage;
  };
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors.ptr());
  const char* states = PyBytes_AS_STRING(then.ptr());
  const auto state = [=](Py_ssize_t i) {
    State state;
    std::memcpy(&state, states + i * sizeof state, sizeof state);
    return state;
  };
  const auto equals = [](PyObject* number, int64_t expected) {
    if (!number) throw py::error_already_set();
    const bool same = PyLong_AsLongLong(number) == expected;
    Py_DECREF(number);
    return same;
  };
  const auto get = Py_TYPE(version.ptr())->tp_descr_get;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) {
      __builtin_prefetch(PyTuple_GET_ITEM(tensors.ptr(), i + AHEAD));
      const State next = state(i + AHEAD);
      const char* object = reinterpret_cast<const char*>(next.object);
      for (int line = 0; line < LINES; ++line) __builtin_prefetch(object + line * LINE);
      __builtin_prefetch(reinterpret_cast<const char*>(next.storage));
    }
    PyObject* t = PyTuple_GET_ITEM(tensors.ptr(), i);
    const State expected = state(i);
    if (!equals(PyObject_Vectorcall(data_ptr.ptr(), &t, 1, nullptr), expected.address))
      return false;
    if (expected.version < 0) continue;
    PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(t));
    if (!equals(get(version.ptr(), t, kind), expected.version)) return false;
  }
  return true;
}

/// Sizes of a convolution, in the order of DirectConv.
using DirectShape = std::array<int64_t, 14>;

DirectConv direct_args(const DirectShape& shape) {
  DirectConv args{};
  std::copy(shape.begin(), shape.end(), &args.n);
  return args;
}

void bind_direct(py::module_& module, const Direct& ops) {
  module.def("direct_panel", ops.direct_panel, "Output channels that lie together in weights.");
  module.def(
      "direct_workspace",
      [f = ops.direct_workspace](const DirectShape& shape) { return f(direct_args(shape)); },
      arg("shape"));
  define(
      module, "direct_conv",
      [f = ops.direct_conv](Address x, Address weights, Address shift, Address residual, Address z,
                            Address workspace, const DirectShape& shape, bool relu) {
        DirectConv args = direct_args(shape);
        args.x = x;
        args.weights = weights;
        args.shift = shift;
        args.residual = residual;
        args.z = z;
        args.workspace = workspace;
        args.relu = relu;
        f(args);
      },
      arg("x"), arg("weights"), arg("shift") = 0, arg("residual") = 0, arg("z"), arg("workspace"),
      arg("shape"), arg("relu"));
}

void bind_cpu(py::module_ module) {
  bind_bn_act(module, {cpu::bn_workspace, cpu::bn_stats, cpu::bn_finalize, cpu::affine_act});
  bind_bn_act_backward(module, {cpu::affine_act_backward, cpu::bn_backward_sums,
                                cpu::bn_backward_finalize, cpu::bn_backward_apply});
  bind_stem(module, {cpu::affine_act_maxpool});
  bind_stem_backward(module, {cpu::maxpool_backward_sums, cpu::maxpool_backward_apply});

  bind_winograd(module, {cpu::winograd_weight_size, cpu::winograd_weight, cpu::winograd_workspace,
                         cpu::winograd_conv});
  bind_winograd_gradient(
      module, {cpu::winograd_wgrad_units, cpu::winograd_wgrad_workspace, cpu::winograd_wgrad});
  bind_pointwise(module, {cpu::pointwise_backward_units, cpu::pointwise_backward_workspace,
                          cpu::pointwise_backward});
  bind_direct(module, {cpu::direct_panel, cpu::direct_workspace, cpu::direct_conv});

  module.def("isa", cpu::isa, "The instruction set chosen for this process.");

  // Local: a process may hold two builds of this module.
  py::class_<cpu::Fingerprint>(module, "Fingerprint", py::module_local(),
                               "A hash of buffers, which must stay where they are.")
      .def(py::init([](const std::vector<std::pair<uintptr_t, int64_t>>& spans, int64_t whole,
                       int64_t stride) {
             std::vector<cpu::Span> list;
             for (const auto& [address, nbytes] : spans) list.push_back({Address{address}, nbytes});
             return cpu::Fingerprint(list, whole, stride);
           }),
           py::kw_only(), arg("spans"), arg("whole"), arg("stride"))
      .def("value", &cpu::Fingerprint::value, NoGil());

  module.def(
      "unchanged", unchanged, arg("contents"), arg("sizes"), arg("values"), arg("empty"),
      arg("objects"), arg("kinds"),
      "Whether dictionaries hold the very values that they held, others nothing, and objects "
      "are of the types that they were of.");

  module.def("in_place", in_place, arg("tensors"), arg("then"), arg("data_ptr"), arg("version"),
             "Whether tensors lie where they lay, and none was written to by what counts writes.");

  define(
      module, "bn_stats_update",
      [](const std::vector<Address>& buffers, const std::vector<Address>& values,
         const std::vector<int64_t>& sizes, float factor, const std::vector<Address>& counters) {
        if (buffers.size() != values.size() || buffers.size() != sizes.size()) {
          throw py::value_error("bn_stats_update: buffers, values and sizes differ in length");
        }
        for (size_t i = 0; i < buffers.size(); ++i) {
          cpu::lerp(buffers[i], values[i], sizes[i], factor);
        }
        for (int64_t* counter : counters) ++*counter;
      },
      arg("buffers"), arg("values"), arg("sizes"), arg("factor"), arg("counters"));

  define(
      module, "huge_pages",
      [](const Address& address, int64_t nbytes) { return cpu::huge_pages({address, nbytes}); },
      arg("address"), arg("nbytes"));

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
#endif

#if RESNET_FAST_WITH_CUDA
void bind_cuda(py::module_ module) {
  bind_bn_act(module, {cuda::bn_workspace, cuda::bn_stats, cuda::bn_finalize, cuda::affine_act});
  bind_bn_act_backward(module, {cuda::affine_act_backward, cuda::bn_backward_sums,
                                cuda::bn_backward_finalize, cuda::bn_backward_apply});
  bind_stem(module, {cuda::affine_act_maxpool});
  bind_stem_backward(module, {cuda::maxpool_backward_sums, cuda::maxpool_backward_apply});
  define(
      module, "bottleneck",
      [](Address x, Address w1, Address scale1, Address shift1, Address w2, Address scale2,
         Address shift2, Address w3, Address scale3, Address shift3, Address rw, Address rscale,
         Address rshift, Address z, int64_t n, int64_t h, int64_t w, int64_t c, int64_t width,
         int64_t k, DType dtype, Address stream) {
        cuda::bottleneck({x,      w1,     scale1, shift1, w2,     scale2, shift2, w3,
                          scale3, shift3, rw,     rscale, rshift, z,      n,      h,
                          w,      c,      width,  k,      dtype,  stream});
      },
      arg("x"), arg("w1"), arg("scale1"), arg("shift1"), arg("w2"), arg("scale2"), arg("shift2"),
      arg("w3"), arg("scale3"), arg("shift3"), arg("rw") = 0, arg("rscale") = 0, arg("rshift") = 0,
      arg("z"), arg("n"), arg("h"), arg("w"), arg("c"), arg("width"), arg("k"), arg("dtype"),
      arg("stream") = 0);
  define(module, "bottleneck_shared", cuda::bottleneck_shared, arg("c"), arg("width"), arg("k"),
         arg("projection"), arg("resident"));
  define(
      module, "whole_stem",
      [](Address x, Address weight, Address scale, Address shift, Address z, int64_t n, int64_t h,
         int64_t w, DType dtype, Address stream) {
        cuda::whole_stem({x, weight, scale, shift, z, n, h, w, dtype, stream});
      },
      arg("x"), arg("weight"), arg("scale"), arg("shift"), arg("z"), arg("n"), arg("h"), arg("w"),
      arg("dtype"), arg("stream") = 0);
  module.def("whole_stem_shared", cuda::whole_stem_shared,
             "Bytes of shared memory that whole_stem() needs.");
  module.def("shared_limit", cuda::shared_limit,
             "Bytes of shared memory that a block may have on the current device.");
  module.def("driver_ok", cuda::driver_ok, "Empty, or why the driver cannot serve this build.");
}
#endif

}  // namespace
}  // namespace resnet_fast

PYBIND11_MODULE(_C, module) {
  using namespace resnet_fast;
  module.doc() = "The native kernels of resnet_fast.";

  // Local: a process may hold two builds of this module.
  py::enum_<DType>(module, "DType", py::module_local(), "Storage type of an operand.")
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);

  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(build_record()); },
      "What was built, with what, and why not more.");

#ifndef RESNET_FAST_WITHOUT_CPU
  bind_cpu(module.def_submodule("cpu"));
#endif
#if RESNET_FAST_WITH_CUDA
  bind_cuda(module.def_submodule("cuda"));
#endif
}
