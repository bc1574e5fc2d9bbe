"""A Watch notices every change that a plan's guards could have read."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resnet_fast import models, watch
from resnet_fast.watch import Watch

PATHS = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1", "se")


@pytest.fixture(params=["native", "python"], autouse=True)
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test by the native comparison, where there is one, and by Python's."""
    if request.param == "python":
        monkeypatch.setattr(watch, "_comparison", lambda: watch.unchanged_in_python)
    elif watch._comparison() is watch.unchanged_in_python:
        pytest.skip("resnet_fast._C is not built")


def block() -> models.BasicBlock:
    return models.BasicBlock(4, 8, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))).eval()


CHANGES: dict[str, Callable[[models.BasicBlock], object]] = {
    "train": lambda b: b.train(),
    "train one norm": lambda b: b.bn2.train(),
    "replaced module": lambda b: setattr(b, "bn1", nn.BatchNorm2d(8).eval()),
    "replaced in a container": lambda b: b.downsample.__setitem__(1, nn.BatchNorm2d(8).eval()),
    "added to a container": lambda b: b.downsample.append(nn.ReLU()),
    "a module where there was none": lambda b: setattr(b, "se", nn.Dropout()),
    "replaced parameter": lambda b: setattr(b.conv1, "weight", nn.Parameter(b.conv1.weight.detach())),
    "removed parameter": lambda b: setattr(b.bn1, "bias", None),
    "replaced buffer": lambda b: setattr(b.bn1, "running_var", b.bn1.running_var.clone()),
    "number": lambda b: setattr(b.bn1, "eps", 0.25),
    "stride": lambda b: setattr(b.conv2, "stride", (2, 2)),
    "hook": lambda b: b.relu.register_forward_hook(print),
    "pre-hook": lambda b: b.conv2.register_forward_pre_hook(print),
    "backward hook": lambda b: b.bn2.register_full_backward_hook(print),
    "hook on a container": lambda b: b.downsample.register_forward_hook(print),
    "forward": lambda b: setattr(b.conv1, "forward", print),
    "class": lambda b: setattr(b.conv1, "__class__", type("Mine", (nn.Conv2d,), {})),
    "parametrization": lambda b: torch.nn.utils.parametrizations.weight_norm(b.conv1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_change_is_seen(change: Callable[[models.BasicBlock], object]) -> None:
    b = block()
    seen = Watch(b, PATHS)
    assert seen.unchanged() and seen.unchanged()
    change(b)
    assert not seen.unchanged()


def test_use_is_no_change() -> None:
    b = block()
    seen = Watch(b, PATHS)
    with torch.no_grad():
        b(torch.randn(2, 4, 8, 8))
    b.register_forward_hook(print)  # the block's own: its caller's business
    b.state_dict()
    list(b.parameters())
    assert seen.unchanged()


def test_a_value_that_moves_to_another_dictionary_is_a_change() -> None:
    """As many values, the same ones in the same order, and yet in other places."""
    b = block()
    b.bn1.register_parameter("late", None)
    seen = Watch(b, PATHS)
    del b.bn1._parameters["late"]
    assert not seen.unchanged()


def test_a_watched_model_is_collected() -> None:
    b = block()
    b.seen = [Watch(b, PATHS)]  # a cycle, as caches make
    gone = weakref.ref(b)
    del b
    gc.collect()
    assert gone() is None


def test_without_attributes_modules_and_parameters_count_alone() -> None:
    b = block()
    seen = Watch(b, PATHS, attributes=False)
    b.train()
    b.conv1.register_forward_hook(lambda *_: None)
    assert seen.unchanged()
    b.bn1 = nn.BatchNorm2d(8)
    assert not seen.unchanged()
    seen = Watch(b, PATHS, attributes=False)
    b.conv2.weight = nn.Parameter(b.conv2.weight.detach())
    assert not seen.unchanged()
