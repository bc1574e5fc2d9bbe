"""models.macs() against the paper's table 1 (arXiv 1512.03385) and torch's own count; the model stays as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast import models
from tests import libraries
from tests.test_models import assert_same_tensors, on_meta


@pytest.mark.parametrize(
    ("depth", "shortcut", "paper", "exact"),
    [
        (18, "A", 1.8, 1_794_805_760),
        (18, "B", 1.8, 1_814_073_344),
        (34, "A", 3.6, 3_644_493_824),
        (101, "B", 7.6, 7_570_194_432),
        (152, "B", 11.3, 11_282_415_616),
    ],
)
def test_macs_round_to_the_papers(depth: int, shortcut: str, paper: float, exact: int) -> None:
    count = models.macs(on_meta(f"resnet{depth}", shortcut=shortcut, version="v1"))
    assert count == exact
    assert round(count / 1e9, 1) == paper


def test_macs_where_the_paper_cut_and_did_not_round() -> None:
    """3.858e9 is the paper's 3.8e9 for ResNet-50, and 3.664e9 its 3.6e9 if its ResNet-34 was option B."""
    for depth, paper, exact in ((50, 3.8, 3_857_973_248), (34, 3.6, 3_663_761_408)):
        count = models.macs(on_meta(f"resnet{depth}", version="v1"))
        assert count == exact
        assert math.floor(count / 1e8) / 10 == paper


def oracle(model: nn.Module, *shape: int) -> int:
    """Half of the floating-point operations that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_macs_equal_torchs_flop_counter(shortcut: str, version: str) -> None:
    model = on_meta("resnet50", shortcut=shortcut, version=version, num_classes=10, in_channels=4).eval()
    assert models.macs(model, (4, 33, 47)) == oracle(model, 4, 33, 47)


def test_macs_of_other_layers() -> None:
    shared = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), padding=1, groups=2, dilation=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(2),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.AdaptiveAvgPool1d(6),
        shared,
        nn.ReLU(),
        shared,
    )
    assert models.macs(model, (4, 11, 13)) == oracle(model, 4, 11, 13)


def test_macs_of_torchvision_models() -> None:
    torchvision = libraries.require("torchvision")
    for name in ("resnet18", "mobilenet_v2", "densenet121"):
        with torch.device("meta"):
            model = getattr(torchvision.models, name)(num_classes=10).eval()
        assert models.macs(model, (3, 64, 64)) == oracle(model, 3, 64, 64)


def test_macs_leave_the_model_untouched() -> None:
    model = models.cifar_resnet20().train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = copy.deepcopy(model.state_dict())
    calls = []
    model.conv1.register_forward_hook(lambda *args: calls.append(args))
    hooks = [list(m._forward_hooks) for m in model.modules()]

    def assert_untouched() -> None:
        assert [m.training for m in model.modules()] == modes
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert list(after) == list(tensors)
        assert all(after[name] is tensor for name, tensor in tensors.items())
        assert_same_tensors(model.state_dict(), before)
        assert [list(m._forward_hooks) for m in model.modules()] == hooks
        assert all(p.grad is None for p in model.parameters())

    assert models.macs(model, (3, 8, 8)) > 0
    assert len(calls) == 1
    assert_untouched()
    with pytest.raises(RuntimeError, match="channel"):
        models.macs(model, (4, 8, 8))
    assert_untouched()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_macs_in_any_dtype_and_mode(mode: Any) -> None:
    expected = models.macs(on_meta("cifar_resnet20"), (3, 32, 32))
    model = models.cifar_resnet20().bfloat16()
    with mode():
        assert models.macs(model, (3, 32, 32)) == expected
        assert models.macs(copy.deepcopy(model).double(), torch.Size((3, 32, 32))) == expected


def test_macs_look_inside_a_compiled_model() -> None:
    model = models.cifar_resnet20()
    compiled: Any = torch.compile(model, backend="eager")
    assert models.macs(compiled, (3, 32, 32)) == models.macs(model, (3, 32, 32))


@pytest.mark.gpu
def test_macs_of_a_model_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = models.resnet18().cuda()
    allocated = torch.cuda.memory_allocated()
    assert models.macs(model) == 1_814_073_344
    assert torch.cuda.memory_allocated() == allocated
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize("size", [(), (3, 0, 8), (3, -1, 8), (3.0, 8, 8), "abc"])
def test_macs_reject_a_bad_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"input_size=.*supported.*integers"):
        models.macs(models.cifar_resnet20(), size)
