"""A bound of max|x| goes from the stem to the stages, and never past anyone who could have written to the tensor."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import folding, guards, models
from tests.able import needs_native
from tests.fusing import calibrated

pytestmark = needs_native  # nothing is folded without
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


def network() -> models.ResNet:
    return calibrated(models.resnet18(num_classes=10)).eval()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What max|x| was taken of."""
    seen: list[Tensor] = []
    original = folding.magnitude
    monkeypatch.setattr(folding, "magnitude", lambda x: (seen.append(x), original(x))[1])
    return seen


def run(model: nn.Module, x: Tensor = X, inference: bool = False) -> Tensor:
    with torch.inference_mode(inference), torch.no_grad():
        return model(x).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_image_alone_is_measured(measured: list[Tensor], dtype: torch.dtype) -> None:
    plain = network().to(dtype)
    model = resnet_fast.fuse(copy.deepcopy(plain))
    x = X.to(dtype)
    first = run(model, x)
    for _ in range(2):
        measured.clear()
        again = run(model, x)
        assert len(measured) == 1 and measured[0].shape == x.shape
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(first, run(plain, x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again, first, rtol=tolerance, atol=tolerance)


def in_place(t: Tensor) -> None:
    t[0, 3, 1, 2] = torch.nan


def through_data(t: Tensor) -> None:
    t.data[0, 3, 1, 2] = torch.nan


def through_memory(t: Tensor) -> None:
    t.detach().permute(0, 2, 3, 1).numpy()[0, 1, 2, 3] = torch.inf


@contextlib.contextmanager
def after_a_stage(model: Any, write: Callable[[Tensor], None]) -> Iterator[None]:
    handle = model.layer1.register_forward_hook(lambda m, args, out: write(out))
    yield
    handle.remove()


@contextlib.contextmanager
def before_a_stage(model: Any, write: Callable[[Tensor], None]) -> Iterator[None]:
    handle = model.layer3.register_forward_pre_hook(lambda m, args: write(args[0]))
    yield
    handle.remove()


@contextlib.contextmanager
def before_a_block(model: Any, write: Callable[[Tensor], None]) -> Iterator[None]:
    handle = model.layer2[0].register_forward_pre_hook(lambda m, args: write(args[0]))
    yield
    handle.remove()


@contextlib.contextmanager
def own_forward(model: Any, write: Callable[[Tensor], None]) -> Iterator[None]:
    stage, original = model.layer2, model.layer2.forward
    stage.forward = lambda x: (write(x), original(x))[1]
    yield
    del stage.forward


@contextlib.contextmanager
def on_every_module(model: Any, write: Callable[[Tensor], None]) -> Iterator[None]:
    stage = model.layer2

    def hook(m: nn.Module, args: Any, out: Any) -> None:
        if m is stage:
            write(out)

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("write", [in_place, through_data, through_memory], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "where", [after_a_stage, before_a_stage, before_a_block, own_forward, on_every_module], ids=lambda f: f.__name__
)
def test_a_write_between_stages_is_seen(where: Any, write: Callable[[Tensor], None], inference: bool) -> None:
    plain = network()
    model = resnet_fast.fuse(copy.deepcopy(plain))
    before = run(model, inference=inference)
    for _ in range(2):
        results = []
        for m in (plain, model):
            with where(m, write):
                results.append(run(m, inference=inference))
        assert torch.equal(results[0].isnan(), results[1].isnan()) and results[1][0].isnan().any()
        assert results[1][1].isfinite().all()
        torch.testing.assert_close(run(model, inference=inference), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e30, 1e38])
def test_what_the_image_holds_comes_out_as_in_torch(value: float) -> None:
    plain = network()
    model = resnet_fast.fuse(copy.deepcopy(plain))
    run(model)
    x = X.clone()
    x[1, 0, 20, 20] = value
    ours, theirs = run(model, x), run(plain, x)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)


def test_another_pooling_hands_nothing_on(measured: list[Tensor]) -> None:
    """A bound of the convolution's output says nothing about what someone else's pooling makes of it."""
    model = resnet_fast.fuse(network())
    model.maxpool = nn.LPPool2d(2, 3, 2)
    for _ in range(3):
        measured.clear()
        ours = run(model)
    assert len(measured) >= 2
    torch.testing.assert_close(ours, run(resnet_fast.unfuse(model)), rtol=1e-4, atol=1e-4)


def test_a_deep_stage_is_measured_where_its_bound_has_grown(measured: list[Tensor]) -> None:
    """The bound of 24 blocks passes float32's range: what is in between is measured again, and it is one program."""
    stage = nn.Sequential(*(models.BasicBlock(16, 16) for _ in range(24))).eval()
    for m in stage.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.fill_(1.5)
    fused = resnet_fast.fuse(copy.deepcopy(stage))
    x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    for _ in range(3):
        measured.clear()
        ours = run(fused, x)
    assert fused.__dict__["_resnet_fast"].program is not None and 1 < len(measured) < 24
    torch.testing.assert_close(ours, run(stage, x), rtol=1e-4, atol=1e-4)
    x[0, 0, 0, 0] = torch.nan
    assert torch.equal(run(fused, x).isnan(), run(stage, x).isnan())


def padded() -> models.CifarResNet:
    """Shortcuts of option A: the image subsampled, and channels of zeros."""
    return calibrated(models.cifar_resnet20()).eval()


SMALL = X[..., ::2, ::2].contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [32, 31, 1])
def test_option_a_runs_as_one_program(measured: list[Tensor], dtype: torch.dtype, size: int) -> None:
    plain = padded().to(dtype)
    model = resnet_fast.fuse(copy.deepcopy(plain))
    x = SMALL[..., :size, :size].to(dtype)
    for _ in range(3):
        measured.clear()
        ours = run(model, x)
    assert [name for name in ("layer1", "layer2", "layer3") if programmed(model, name)] == [
        "layer1",
        "layer2",
        "layer3",
    ]
    assert len(measured) == 1 and measured[0].shape == x.shape
    theirs, reference = run(plain, x), run(copy.deepcopy(plain).double(), x.double())
    error = (theirs - reference).abs().max().item()
    assert (ours - reference).abs().max().item() <= 2 * error + 16 * torch.finfo(
        dtype
    ).eps * reference.abs().max().item()


def programmed(model: nn.Module, name: str) -> bool:
    return model.get_submodule(name).__dict__["_resnet_fast"].program is not None


class Halved(models.SubsamplePad):
    """Not what its base class is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


SHORTCUTS: dict[str, Callable[[models.BasicBlock], Any]] = {
    "stride": lambda b: setattr(b.downsample, "stride", 1),  # and then the sum is refused, as torch refuses it
    "channels": lambda b: setattr(b.downsample, "in_channels", 40),
    "class": lambda b: setattr(b, "downsample", Halved(16, 32, 2)),
    "own_class": lambda b: setattr(b.downsample, "__class__", Halved),
    "module": lambda b: setattr(
        b, "downsample", nn.Sequential(nn.MaxPool2d(1, 2), nn.ConstantPad3d((0,) * 5 + (16,), 9.0))
    ),
    "forward": lambda b: setattr(b.downsample, "forward", lambda x: models.SubsamplePad.forward(b.downsample, x) + 1),
    "hook": lambda b: b.downsample.register_forward_hook(lambda m, args, out: out * 3),
    "pre_hook": lambda b: b.downsample.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
}


@pytest.mark.parametrize("change", SHORTCUTS.values(), ids=SHORTCUTS)
@pytest.mark.parametrize("later", [True, False], ids=["later", "before"])
def test_another_shortcut_is_seen(change: Callable[[models.BasicBlock], Any], later: bool) -> None:
    """Before the stage became a program, and after."""
    plain = padded()
    model = resnet_fast.fuse(copy.deepcopy(plain))
    if later:
        for _ in range(3):
            run(model, SMALL)
        assert programmed(model, "layer2")
    answers: list[Any] = []
    for m in (plain, model):
        change(m.layer2[0])
        for _ in range(3):
            try:
                answer: Any = run(m, SMALL)
            except RuntimeError as error:
                answer = type(error)
        answers.append(answer)
    theirs, ours = answers
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        assert ours is theirs


def swap_data(b: models.BasicBlock) -> None:
    b.conv1.weight.data = b.conv1.weight.detach() * 2


CHANGES: dict[str, Callable[[models.BasicBlock], Any]] = {
    "eps": lambda b: setattr(b.bn1, "eps", 0.5),
    "momentum": lambda b: setattr(b.bn2, "momentum", None),
    "frozen": lambda b: b.conv1.weight.requires_grad_(False),
    "all frozen": lambda b: b.requires_grad_(False),
    "replaced": lambda b: setattr(b.bn1, "weight", nn.Parameter(b.bn1.weight.detach() * 2)),
    "data": swap_data,
    "statistics": lambda b: setattr(b.bn1, "running_mean", b.bn1.running_mean + 1),
    "norm in eval": lambda b: b.bn1.eval(),
    "double": lambda b: b.double(),
    "data of a vector": lambda b: setattr(b.bn1.weight, "data", b.bn1.weight.data * 2),
    "hook": lambda b: b.bn1.register_forward_hook(lambda m, args, out: out * 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_training_follows_changes(change: Callable[[models.BasicBlock], Any]) -> None:
    """What is prepared of a block in training is not used a step too long."""
    plain = models.BasicBlock(8, 8).train()
    fused = resnet_fast.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with guards.any_size():
        for step in range(4):
            if step == 2:
                change(plain), change(fused)
            at = x.to(plain.conv1.weight.dtype).requires_grad_()
            results: list[Any] = []
            for m in (plain, fused):
                m.zero_grad()
                try:
                    z = m(at)
                except RuntimeError as error:
                    results.append(type(error))
                    continue
                (dx,) = torch.autograd.grad(z.square().sum(), at)
                results.append([z, dx, *(b.clone() for b in m.buffers())])
            if isinstance(results[0], list):
                torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
            else:
                assert results[0] == results[1]


def test_running_statistics_count_their_writes() -> None:
    """Who keeps a batch norm's buffers, folded weights or autograd, sees that a step has moved them."""
    block = resnet_fast.fuse(models.BasicBlock(8, 8).train())
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with guards.any_size():
        before = [b._version for b in block.buffers()]
        block(x)
    assert all(b._version > v for b, v in zip(block.buffers(), before, strict=True))
