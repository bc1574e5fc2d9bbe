"""How a block of a GPU's inference is run: which way, by whose measurement, and what explain() says of it.

There is no GPU here: where the device alone matters it is said to be one, and the ways run on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import dispatch, inference, inference_tuning, schedule, tables, tuning
from resnet_fast.dispatch import use_backend
from resnet_fast.fuse import blocks
from resnet_fast.inference import Like, Request, Way, run_way
from resnet_fast.models import Bottleneck, resnet50
from resnet_fast.tables import Candidate, Row
from resnet_fast.tuning import TuningWarning, warmup
from tests import cuda_on_cpu
from tests.able import needs_machine
from tests.blocks import KINDS, Block
from tests.tolerance import assert_close, to_float64

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("empty_cache")

needs_triton = pytest.mark.skipif(
    dispatch.reasons("conv_affine_act", CPU, torch.float32)["triton"] is not None, reason="needs Triton's interpreter"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:0 is an H200 to those that ask; every backend for GPUs is able, and the kernels are those of cuda_on_cpu."""
    native, original = cuda_on_cpu.native(), dispatch.backend
    able = {"native", "triton", "cudnn"}

    def why_not(name: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if name in able and hasattr(original(name), op) else "not on this GPU"

    monkeypatch.setattr(dispatch, "_why_not", why_not)
    monkeypatch.setattr(dispatch, "backend", lambda name: native if name == "native" else original(name))
    monkeypatch.setattr(native.common, "_shared_limit_of_gpu", lambda device: 227 << 10)
    monkeypatch.setattr(tables, "device_name", lambda device: "An H200" if device.type == "cuda" else "a CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    dispatch._choose.cache_clear()


@pytest.fixture(autouse=True)
def no_choices_kept() -> Iterator[None]:
    yield
    dispatch._choose.cache_clear()


def requests(model: nn.Module, shape: tuple[int, ...], device: torch.device = GPU) -> dict[str, Request]:
    """What inference of each block depends on, by its name."""
    seen = schedule.inputs(model, shape, BFLOAT16)
    found = {}
    for name, module, plan, _ in blocks(model):
        for request in schedule.requests(module, plan, seen, device):
            found[name] = request
    return found


def row(request: Request, **seconds: float) -> Row:
    """A row of a table; "mixed" is the first convolution by Triton and the others by the library."""
    mixed = {"convolutions": ["triton", *["library"] * (len(request.every) - 1)]}
    candidates = [Candidate(n, mixed if n == "mixed" else None, s) for n, s in seconds.items()]
    return Row(request.signature, tuple(sorted(candidates, key=lambda c: c.seconds)), "test")


SHAPE = (8, 64, 16, 16)


def stages() -> nn.Module:
    """Of ResNet-50's stages 1 to 3: 0 to 1, 2 to 3, 4."""

    def first(inputs: int, width: int, stride: int) -> Bottleneck:
        side = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        return Bottleneck(inputs, width, stride, side)

    return half(
        nn.Sequential(
            first(64, 64, 1), Bottleneck(256, 64), first(256, 128, 2), Bottleneck(512, 128), first(512, 256, 2)
        )
    )


def lines(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> dict[str, schedule.Step]:
    """explain()'s line of each block, on the GPU."""
    found = resnet_fast.explain(model, shape, dtype=BFLOAT16, device=GPU)
    assert all(len(r.steps) == 1 for r in found if r.block)
    return {r.name: r.steps[0] for r in found if r.block}


def half(model: nn.Module) -> nn.Module:
    return model.eval().bfloat16().to(memory_format=torch.channels_last)


# ---- which way


@needs_machine
def test_unmeasured_blocks_run_as_before_and_say_so(gpu: None) -> None:
    found = lines(half(resnet50()), (8, 3, 64, 64))
    assert {step.direction for step in found.values()} == {"inference"}
    assert {step.runs for step in found.values()} == {"library"}
    whole = "; one kernel for all of it can run it, too; warmup(model.eval(), input_shape) decides"
    assert all(s.reason.startswith("not measured, and no GPU has run the other ways; ") for s in found.values())
    # The stem and stages 1 and 2 have a kernel, but for the block of stride 2.
    assert {name for name, step in found.items() if step.reason.endswith(whole)} == {
        "", *(f"layer1.{i}" for i in range(3)), *(f"layer2.{i}" for i in range(1, 4)),
    }  # fmt: skip
    assert "; not in one kernel: stride (2, 2), padding (1, 1)" in found["layer2.0"].reason
    assert "; not in one kernel: width 256 (supported: 64, 128)" in found["layer3.1"].reason
    with use_backend("native"):
        assert lines(half(resnet50()), (8, 3, 64, 64))[""].runs == "stem"


@needs_machine
def test_the_fastest_way_runs_by_block(gpu: None) -> None:
    """And explain() says by how much; what is not measured, at this size, is as before."""
    model = stages()
    asked = requests(model, SHAPE)
    dispatch.add_rows(GPU, [
        row(asked["0"], bottleneck=1e-4, triton=2e-4, library=3e-4),
        row(asked["3"], library=1e-4, bottleneck=1.5e-4),
        row(asked["2"], mixed=1e-4, library=1.25e-4),
        row(asked["4"], unfused=1e-4, library=3e-4),
    ])  # fmt: skip
    found = lines(model)
    assert found["0"].runs == "bottleneck" and found["0"].reason == "measured: 2.00x triton on An H200"
    assert found["3"].runs == "library" and found["3"].reason.startswith("measured: 1.50x bottleneck on ")
    assert found["2"].runs == "mixed (triton, library, library, library)"
    assert found["2"].reason.startswith("measured: 1.25x library on An H200; not in one kernel: stride")
    assert found["4"].runs == "unfused" and "measured: 3.00x library" in found["4"].reason
    assert found["1"].runs == "library"  # another size has no row, as another block
    larger = requests(model, (16, *SHAPE[1:]))["0"]
    assert inference.choose_way(larger) == Way("library")
    for backend, way in (("native", "bottleneck"), ("triton", "triton"), ("cudnn", "cudnn"), ("torch", "library")):
        with use_backend(backend):
            assert inference.choose_way(asked["0"]) == Way(way)
        assert lines(resnet_fast.fuse(copy.deepcopy(model), backend=backend))["0"].runs == way
    pinned = lines(resnet_fast.fuse(copy.deepcopy(model), backend="native"))
    assert pinned["0"].reason == "asked for" and pinned["2"].runs == "library"
    assert pinned["2"].reason.startswith("asked for; not in one kernel: stride (2, 2)")


@needs_machine
def test_ways_that_cannot_run_are_passed_over(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's ReLU drops NaN; a build without the kernel; a table of another version."""
    model = stages()
    asked = requests(model, SHAPE)
    first = asked["0"]
    dispatch.add_rows(GPU, [row(first, cudnn=1e-4, bottleneck=2e-4, library=3e-4)])
    step = lines(model)["0"]
    assert step.runs == "bottleneck"
    assert step.reason == (
        "measured: 1.50x library on An H200; left out: cudnn, 100 us: its ReLU makes 0 of NaN; "
        "fuse(model, backend='cudnn') asks for it"
    )
    monkeypatch.setattr(cuda_on_cpu.native().common, "_shared_limit_of_gpu", lambda device: 99 << 10)
    step = lines(model)["0"]
    assert step.runs == "library" and "bottleneck, 200 us: width 64 needs 165888 bytes" in step.reason
    wrong = [Candidate("warp", None, 1e-5), Candidate("mixed", {"convolutions": ["warp"] * 4}, 2e-5)]
    wrong += [Candidate("mixed", {"convolutions": ["triton"]}, 3e-5), Candidate("library", {"convolutions": [1]}, 4e-5)]
    dispatch.add_rows(GPU, [Row(first.signature, tuple(wrong), "test")])
    assert inference.choose_way(first) == Way("library")
    assert lines(model)["0"].reason.count("this version has no such way") == 4


def test_what_cannot_be_asked() -> None:
    model = stages().train()
    with pytest.raises(ValueError, match=r"device: found cuda for a model in training mode.*model.eval"):
        resnet_fast.explain(model, SHAPE, device="cuda")
    with pytest.raises(ValueError, match="device: found meta, supported are cpu and cuda"):
        resnet_fast.explain(model.eval(), SHAPE, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: found cuda, and torch sees no CUDA device here"):
            resnet_fast.explain(model, SHAPE, device="cuda")
    steps = {s[2:] for r in resnet_fast.explain(model, SHAPE) for s in r.steps}
    assert steps == {("folded weights", "on a CPU there is nothing to choose")}


# ---- each way's numbers


@pytest.mark.parametrize("way", [Way("library"), Way("unfused"), Way("triton"), Way("mixed")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ways_are_right(kind: str, way: Way) -> None:
    if way.name in ("triton", "mixed") and dispatch.reasons("conv_affine_act", CPU, torch.float32)["triton"]:
        pytest.skip("needs Triton's interpreter")
    block = Block(kind, torch.float16, train=False)
    if way.name == "mixed":
        way = Way("mixed", tuple(("triton", "library")[i % 2] for i in range(len(block.every))))
    request = Request(block.x, block.layers, block.projection, block.residual is not None, block.identity)
    with torch.no_grad():
        z = run_way(way, request, block.residual)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_close(z, block.map(lambda name, t: to_float64(t)).torchs(), block.torchs())


@pytest.mark.parametrize("way", ["unfused", "library"])
def test_stem_by_every_way(way: str) -> None:
    block = Block("chain1", train=False)
    with torch.no_grad():
        z = run_way(Way(way), Request(block.x, block.layers, pool=True))
    ref64 = F.max_pool2d(block.map(lambda name, t: to_float64(t)).torchs(), 3, 2, 1)
    assert_close(z, ref64, F.max_pool2d(block.torchs(), 3, 2, 1))


@needs_machine
@pytest.mark.parametrize("h, w", [(7, 5), (33, 40)])
def test_stem_in_one_kernel(kernels: None, h: int, w: int) -> None:
    """By use_backend("native"), from the batch norm's own tensors."""
    block = Block("chain1", torch.float16, train=False)
    layer = block.layers[0]._replace(stride=(2, 2), padding=(3, 3), weight=torch.randn(64, 3, 7, 7).half() / 12)
    layer = layer._replace(**{n: torch.rand(64) + 0.5 for n in ("gamma", "beta", "running_mean", "running_var")})
    x = torch.randn(2, 3, h, w).half()
    request = Request(x, [layer], pool=True)
    with torch.no_grad(), use_backend("native"):
        assert inference.choose_way(request) == Way("stem")
        z = inference.fused_block(x, [layer], pool=True)
    wide = layer._replace(
        **{n: getattr(layer, n).double() for n in ("weight", "gamma", "beta", "running_mean", "running_var")}
    )
    ref64, torchs = (run_way(Way("unfused"), Request(t, [la], pool=True)) for t, la in ((x.double(), wide), (x, layer)))
    assert z is not None
    assert_close(z, ref64, torchs)
    for change, reason in (
        ({"stride": (1, 1)}, "stride"),
        ({"padding": (2, 2)}, "padding"),
        ({"weight": torch.randn(64, 3, 5, 5).half()}, "a filter"),
    ):
        other = request._replace(layers=[layer._replace(**change)])
        assert reason in (inference.whole_stem_why_not(other) or "")
    assert "supported: a stem" in (inference.whole_stem_why_not(request._replace(pool=False)) or "")


@needs_machine
def test_a_measured_block_runs_its_way(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """fused_block() asks the table of x's device."""
    block = Block("projection", torch.float16, train=False)
    request = Request(block.x, block.layers, block.projection)
    ran: list[Way] = []
    monkeypatch.setattr(inference, "run_way", lambda way, *_: ran.append(way))

    class OnGpu(Tensor):
        device = GPU

    with torch._C.DisableTorchFunctionSubclass():
        x = block.x.as_subclass(OnGpu)
        monkeypatch.setattr(inference.f, "_check", lambda *_: None)
        for name in ("triton", "mixed", "unfused", "library"):
            dispatch.add_rows(GPU, [row(request, **{name: 1e-4})])
            inference.fused_block(x, block.layers, projection=block.projection)
    assert [way.name for way in ran] == ["triton", "mixed", "unfused"]


# ---- warmup


class Clock:
    """A timer that runs nothing: seconds by the way's name, of single convolutions as of blocks."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, function: Callable[[], object], device: torch.device) -> float:
        way: Way = function.args[0]  # type: ignore[attr-defined]
        single = len(function.args[1].layers) == 1  # type: ignore[attr-defined]
        return self.seconds.get(f"single_{way.name}" if single else way.name, 1.0)


def tuner(clock: Clock) -> Any:
    return tuning._Tuner(CPU, clock, tuning._Bar(1, False))


def small_block(first: bool = True) -> Request:
    """A bottleneck with the whole-block kernel."""
    down = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256)) if first else None
    model = Bottleneck(64 if first else 256, 64, downsample=down).eval().half()
    seen = schedule.inputs(model, (1, 64 if first else 256, 3, 4))
    (found,) = [r for _, m, plan, _ in blocks(model)
                for r in schedule.requests(m, plan, seen)]  # fmt: skip
    return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has the GPU's backends: cuda_on_cpu's kernels and Triton's interpreter."""
    native, original = cuda_on_cpu.native(), dispatch.backend
    monkeypatch.setattr(dispatch, "backend", lambda name: native if name == "native" else original(name))
    dispatch._choose.cache_clear()


@needs_machine
@needs_triton
@pytest.mark.parametrize("first", [True, False], ids=["projection", "identity"])
def test_every_way_is_measured(kernels: None, first: bool) -> None:
    """Each on the same numbers, which must be torch's; convolutions one by one where Triton wins some."""
    request = small_block(first)
    found = inference_tuning.measure(request, tuner(Clock(bottleneck=0.5, triton=0.75)), "a block")
    assert found is not None and found.signature == request.signature and found.signature.op == "inference"
    assert [c.backend for c in found.candidates[:2]] == ["bottleneck", "triton"]
    assert {c.backend for c in found.candidates} == {"bottleneck", "triton", "library", "unfused"}

    class ByFilter(Clock):
        def __call__(self, function: Callable[[], object], device: torch.device) -> float:
            request: Request = function.args[1]  # type: ignore[attr-defined]
            three = len(request.layers) == 1 and request.layers[0].weight.shape[2] == 3
            return 0.1 if three and function.args[0].name == "triton" else super().__call__(function, device)  # type: ignore[attr-defined]

    found = inference_tuning.measure(request, tuner(ByFilter(mixed=0.1, single_triton=2.0)), "a block")
    assert found is not None and found.candidates[0].backend == "mixed"
    expected = ["library", "triton", "library", *(["library"] if first else [])]
    assert found.candidates[0].config == {"convolutions": expected}


@needs_machine
@needs_triton
@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_a_kernel_that_fails_is_left_out(kernels: None, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bottleneck(x: Tensor, w1: Tensor, *_: Any) -> Tensor:
        if failure == "raises":
            raise RuntimeError("no kernel image\nand more")
        return torch.ones(x.shape[0], 256, *x.shape[2:]).half()

    monkeypatch.setattr(cuda_on_cpu.native(), "bottleneck", bottleneck)
    dispatch._choose.cache_clear()
    expected = "no kernel image" if failure == "raises" else "output 0 is off by"
    measuring = tuner(Clock(bottleneck=0.1))
    with pytest.warns(TuningWarning, match=f"leaves out bottleneck for a block of 4: .*{expected}"):
        found = inference_tuning.measure(small_block(), measuring, "a block of 4")
    assert found is not None and "bottleneck" not in {c.backend for c in found.candidates}
    assert len(measuring.left_out) == 1 and "and more" not in measuring.left_out[0]


def test_a_summand_from_elsewhere_is_measured_too() -> None:
    block = Block("residual", train=False)
    request = Request(Like(CPU, torch.float32, tuple(block.x.shape)), block.layers, residual=True)
    found = inference_tuning.measure(request, tuner(Clock(library=0.5)), "a block")
    assert found is not None and found.candidates[0].backend == "library"
    assert found.signature.flags == (False, True, False, False)


@needs_machine
def test_warmup_in_eval(gpu: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every distinct block once; kept for later processes; explain() then knows them all."""
    original = schedule.requests
    monkeypatch.setattr(schedule, "requests", lambda module, plan, seen, device=None: original(module, plan, seen, GPU))
    monkeypatch.setattr(
        inference_tuning, "measure", lambda request, tuner, what: row(request, mixed=1e-4, library=2e-4, unfused=3e-4)
    )
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())
    model = half(nn.Sequential(*stages(), Bottleneck(1024, 256)))
    model.append(copy.deepcopy(model[-1]))  # the same once more
    report = warmup(model, SHAPE, dtype=BFLOAT16, progress=False)
    assert len(report.measured) == 6 and report.path is not None and report.path.parent == empty_cache
    assert "An H200: 6 measured, 0 known before" in str(report)
    assert {step.reason.partition(" on ")[0] for step in lines(model).values()} == {"measured: 2.00x library"}
    dispatch.forget()
    assert warmup(model, SHAPE, dtype=BFLOAT16, progress=False).known == 6
    assert {step.runs.partition(" ")[0] for step in lines(model).values()} == {"mixed"}
    with pytest.raises(ValueError, match="inside use_backend"), use_backend("triton"):
        warmup(model, SHAPE, dtype=BFLOAT16)


def test_warmup_in_eval_on_a_cpu(empty_cache: Path) -> None:
    """There is one way, and warmup says so."""
    model = Bottleneck(16, 4).eval()
    report = warmup(model, (1, 16, 4, 4))
    assert report.measured == () and report.path is None and not empty_cache.exists()
    assert "nothing to measure: a CPU's inference runs on folded weights" in str(report)
    with pytest.raises(ValueError, match="model: found no block that is fused"):
        warmup(nn.Conv2d(16, 4, 1).eval(), (1, 16, 4, 4))
