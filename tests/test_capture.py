"""capture(): what it refuses, its bookkeeping without a GPU, and graphs on one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.models import resnet18
from tests.fusing import calibrated
from tests.tolerance import assert_close, assert_same_bits

# The package's attribute of this name is the function.
CAPTURE: Any = __import__("importlib").import_module("resnet_fast.capture")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()


# ---- what is refused


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match=r"found device cpu, supported is cuda.* Remedy: call the model itself"):
        resnet_fast.capture(small(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda model: model.train(),
            ValueError,
            r"training mode in \(root\), 0, 1, ...; supported is eval.*model.eval",
        ),
        (lambda model: model[1].train(), ValueError, "training mode in 1; supported"),
        (lambda model: lambda x: x, TypeError, "model: found function, supported is torch.nn.Module"),
    ],
)
def test_models(change: Callable[[nn.Module], Any], error: type[Exception], message: str) -> None:
    model = small()
    changed = change(model)
    with pytest.raises(error, match=message):
        resnet_fast.capture(model if isinstance(changed, nn.Module) else changed, torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "examples, error, message",
    [
        ([], ValueError, "example_input: found no tensor"),
        ([[1, 2]], TypeError, "example_input: found list, supported are a tensor and a list of them"),
    ],
)
def test_examples(examples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resnet_fast.capture(small(), examples)


def fake(requires_grad: bool = False, device: int = 0) -> Any:
    """A tensor on a GPU, as far as the checks look."""
    found = torch.empty(1, 3, 8, 8).as_subclass(_OnGpu)
    found.where, found.wants = torch.device("cuda", device), requires_grad
    return found


class _OnGpu(Tensor):
    where: torch.device
    wants: bool

    @property
    def device(self) -> torch.device:
        return self.where

    @property
    def requires_grad(self) -> bool:
        return self.wants

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_examples_on_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"example_input: found requires_grad=True.* Remedy: x.detach\(\)"):
        resnet_fast.capture(small(), fake(True))
    with pytest.raises(ValueError, match=r"found device cuda:0, and 0.weight is on cpu. Remedy: model.to\(x.device\)"):
        resnet_fast.capture(small(), fake())


# ---- bookkeeping, with a forward in the place of a graph


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes captured. Replaying computes the output from the static input into the static output."""
    shapes: list[tuple[int, ...]] = []

    def record(model: nn.Module, example: Tensor, stream: Any, pool: Any) -> Any:
        shapes.append(tuple(example.shape))
        x = example.clone()
        output = {"out": torch.no_grad()(model)(x)}

        def replay() -> None:
            with torch.no_grad():
                output["out"].copy_(model(x))

        return CAPTURE._Graph(x, output, SimpleNamespace(replay=replay))

    monkeypatch.setattr(CAPTURE, "_record", record)
    monkeypatch.setattr(CAPTURE, "_check_examples", lambda model, examples: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return shapes


def test_one_graph_for_each_shape(recorded: list[tuple[int, ...]]) -> None:
    model = small()
    x, larger = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 9, 7)
    captured = resnet_fast.capture(model, [x, larger, torch.zeros_like(x)])
    assert recorded == [(1, 3, 8, 8), (2, 3, 9, 7)]
    assert captured.inputs == ["(1, 3, 8, 8) float32 on cpu", "(2, 3, 9, 7) float32 on cpu"]
    for t in (x, larger, x + 1):
        assert_same_bits(captured(t)["out"], model(t).detach())


def test_inputs_without_a_graph(recorded: list[tuple[int, ...]]) -> None:
    captured = resnet_fast.capture(small(), torch.randn(1, 3, 8, 8))
    for wrong in (torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8).double()):
        with pytest.raises(
            ValueError, match=r"x: found .*, captured are \(1, 3, 8, 8\) float32 on cpu. Remedy: capture"
        ):
            captured(wrong)
    with pytest.raises(TypeError, match="x: found list"):
        captured([1])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"requires_grad=True.* Remedy: x.detach"):
        captured(torch.randn(1, 3, 8, 8, requires_grad=True))
    with torch.no_grad():
        captured(torch.randn(1, 3, 8, 8, requires_grad=True))


def test_outputs_are_buffers_or_copies(recorded: list[tuple[int, ...]]) -> None:
    model, x = small(), torch.randn(1, 3, 8, 8)
    captured = resnet_fast.capture(model, x)
    first = captured(x)["out"]
    assert captured(2 * x)["out"] is first
    assert_same_bits(first, model(2 * x).detach())
    cloned = resnet_fast.capture(model, x, clone=True)
    first = cloned(x)["out"]
    assert cloned(2 * x)["out"] is not first
    assert_same_bits(first, model(x).detach())


def test_what_was_replaced_is_noticed(recorded: list[tuple[int, ...]]) -> None:
    def halved(model: nn.Module) -> None:
        model[0].weight.data = model[0].weight.data / 2

    def new_parameter(model: nn.Module) -> None:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    def new_module(model: nn.Module) -> None:
        model[2] = nn.Identity()

    def more(model: nn.Module) -> None:
        model.append(nn.ReLU())

    def buffer(model: nn.Module) -> None:
        model[1].running_mean = torch.ones(8)

    x = torch.randn(1, 3, 8, 8)
    for change in (halved, new_parameter, new_module, more, buffer, nn.Module.double):
        model = small()
        captured = resnet_fast.capture(model, x)
        change(model)
        with pytest.raises(
            RuntimeError, match=r"was replaced after the capture.* Remedy: capture\(model, example\) again"
        ):
            captured(x.to(next(model.parameters()).dtype)) if change is not nn.Module.double else _replay(captured, x)
    model = small()
    captured = resnet_fast.capture(model, x)
    model.train()
    with pytest.raises(RuntimeError, match="found training mode, captured in eval"):
        captured(x)


def _replay(captured: Any, x: Tensor) -> None:
    """A graph goes on in the dtype of its capture; the stand-in's forward cannot."""
    for graph in captured._graphs.values():
        graph.graph.replay = lambda: None
    captured(x)


def test_changes_in_place_are_seen(recorded: list[tuple[int, ...]]) -> None:
    model, x = small(), torch.randn(1, 3, 8, 8)
    captured = resnet_fast.capture(model, x)
    before = captured(x)["out"].clone()
    model.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    after = captured(x)["out"]
    assert_same_bits(after, model(x).detach())
    assert not torch.equal(before, after)


# ---- the capture itself, with what torch.cuda offers for it played on a CPU


class _Stream:
    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Cuda:
    """Streams, and graphs whose capture fails at its end as torch's does: the current stream is not put back."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = _Stream("cuda:0")
        self.pools: list[object] = []
        self.streams: list[Any] = []
        self.capturing = False
        for name, value in {
            "Stream": _Stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "current_stream": lambda: self.current,
            "device": lambda device: contextlib.nullcontext(),
            "graph": self.graph,
            "graph_pool_handle": lambda: "shared",
            "stream": self.stream,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(CAPTURE, "_check_examples", lambda model, examples: None)

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: object = None, stream: Any = None) -> Iterator[None]:
        self.pools.append(pool)
        self.streams.append(stream)
        before, self.current, self.capturing = self.current, stream, True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.capturing = False
        self.current = before


@pytest.mark.parametrize("clone", [False, True])
def test_memory_is_shared_where_outputs_are_copied(monkeypatch: pytest.MonkeyPatch, clone: bool) -> None:
    """A shared pool's graphs write over each other's outputs. Each capture is on one stream, of the input's GPU."""
    cuda = _Cuda(monkeypatch)
    x = torch.randn(1, 3, 8, 8)
    resnet_fast.capture(small(), [x, x[..., :5]], clone=clone)
    assert cuda.pools == (["shared"] * 2 if clone else [None] * 2)
    first, second = cuda.streams
    assert first is second and first.device == x.device


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is named, and not that the capture did; and the stream is the caller's again."""
    cuda = _Cuda(monkeypatch)

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if cuda.capturing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return x

    before = cuda.current
    with pytest.raises(RuntimeError, match=r"cannot be captured \(operation not permitted .*\).* Remedy: call"):
        resnet_fast.capture(Waits().eval(), torch.randn(2))
    assert cuda.current is before


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [None, "native", "triton", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_graphs_of_a_network(dtype: torch.dtype, asked: str | None) -> None:
    """Replays equal the model bit for bit, for several shapes in turns, NCHW and channels-last, new weights too."""
    torch.manual_seed(0)
    model = calibrated(resnet18()).eval().to("cuda", dtype).to(memory_format=torch.channels_last)
    if asked != "plain":
        resnet_fast.fuse(model, backend=asked)
    shapes = ((1, 3, 64, 64), (4, 3, 65, 49))
    captured = resnet_fast.capture(model, [torch.randn(s, device="cuda").to(dtype) for s in shapes], clone=True)
    for _ in range(2):
        for shape in shapes:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
                with torch.inference_mode():
                    assert_close(captured(x), copy.deepcopy(model).double()(x.double()), model(x))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)


@pytest.mark.gpu
def test_graphs_under_autocast() -> None:
    torch.manual_seed(0)
    model = resnet_fast.fuse(calibrated(resnet18()).eval().cuda().to(memory_format=torch.channels_last))
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        captured = resnet_fast.capture(model, x)
        expected = model(x)
        with torch.inference_mode():  # its buffer can be written outside of it
            again = resnet_fast.capture(model, x.clone())
    assert_same_bits(again(x), captured(x))
    z = captured(x)
    assert z.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(z, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.gpu
def test_a_forward_that_waits_for_the_gpu() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    with pytest.raises(RuntimeError, match=r"cannot be captured .* Remedy: call the model itself"):
        resnet_fast.capture(Waits().eval(), torch.randn(2, device="cuda"))
    torch.cuda.synchronize()
    assert torch.ones(1, device="cuda").item() == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
def test_outputs_of_other_shapes_stay() -> None:
    """Replays of one shape leave the buffers of the others alone, in any order."""
    torch.manual_seed(0)
    model = resnet_fast.fuse(calibrated(resnet18()).eval().cuda().to(memory_format=torch.channels_last))
    images = [torch.randn(n, 3, 64, 64, device="cuda") for n in (4, 1, 2)]
    captured = resnet_fast.capture(model, images)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        outputs = {i: captured(images[i]) for i in order}
        before = {i: z.clone() for i, z in outputs.items()}
        for i in reversed(order):
            for j in order:
                assert_same_bits(outputs[j], before[j])
            captured(images[i])
