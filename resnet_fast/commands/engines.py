"""Inference engines for CPUs besides torch, as contenders: OpenVINO and ONNX Runtime, on as many threads as torch."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .judging import name_of
from .steps import in_layout, tensors

__all__ = ["ENGINES", "TITLES", "Engine"]

#: What tables and pictures call them.
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


class Engine:
    """``model`` as an engine runs it: made at the first call, and refused there if its numbers are other ones.

    ``model`` in eval mode, float32 or bfloat16, on a CPU; ``x`` (N, 3, H, W) of its dtype. ONNX Runtime has no
    bfloat16 on a CPU; OpenVINO computes in it, on float32 images and weights, where the processor does. A call returns
    a tensor that the next call may overwrite. Raises ImportError without the library, RuntimeError where it cannot.
    """

    def __init__(self, name: str, model: nn.Module, x: Tensor) -> None:
        self._name, self._model, self._x = name, model, x
        self._run: Callable[[], Any] | None = None

    def __call__(self) -> Tensor:
        if self._run is None:
            self._run = self._made()
        return torch.from_numpy(self._run())

    def _made(self) -> Callable[[], Any]:
        with torch.inference_mode():
            expected = tensors(self._model(self._x))[0].double()
        # Inference tensors cannot be exported; an exporter wants the plain layout, and engines choose their own.
        with torch.inference_mode(False), torch.no_grad():
            model = in_layout(self._model.float(), torch.contiguous_format)
            x = self._x.detach().clone().float().contiguous()
            try:
                run = ENGINES[self._name](model, x, _called(self._x))
            except ModuleNotFoundError as error:
                raise ImportError(f"{error.name} is not installed. Remedy: pip install -e .[engines]") from error
            reference = tensors(model(x))[0].double()
        found = torch.from_numpy(run()).double()
        torchs, engines = (float((t - reference).norm() / reference.norm().clamp(min=1e-30)) for t in (expected, found))
        if not engines <= 4 * torchs + 1e-3:  # what a low dtype costs, and how much of it, is the network's affair
            raise RuntimeError(f"{self._name}: its numbers are {engines:.1%} off the model's in float32")
        return run


def _called(x: Tensor) -> str:
    """The dtype of ``x`` as engines call it: "f32" or "bf16". RuntimeError for others."""
    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if x.dtype not in names:
        raise RuntimeError(f"{name_of(x.dtype)}; supported are float32 and bfloat16")
    return names[x.dtype]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what exporters print and warn of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _openvino(model: nn.Module, x: Tensor, dtype: str) -> Callable[[], Any]:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bf16" and "BF16" not in able:
        raise RuntimeError(f"bfloat16: OpenVINO computes in {', '.join(able)} on this processor")
    with _silent():
        network = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    options = {
        "PERFORMANCE_HINT": "LATENCY",  # one request on all threads, as torch runs it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": dtype,
    }
    request = core.compile_model(network, "CPU", options).create_infer_request()
    images = x.numpy()
    return lambda: request.infer({0: images}, share_inputs=True, share_outputs=True)[0]


def _onnxruntime(model: nn.Module, x: Tensor, dtype: str) -> Callable[[], Any]:
    runtime = importlib.import_module("onnxruntime")
    if dtype != "f32":
        raise RuntimeError("bfloat16: ONNX Runtime has no kernels of it for CPUs")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Threads that wait for work in a loop would take the time of the other contenders.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        with _silent():
            torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)[0]


#: Contenders by their names.
ENGINES: dict[str, Callable[[nn.Module, Tensor, str], Callable[[], Any]]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
