"""Small modules for tests of fuse(model, generic=True): one class, and the forward that a test gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from tests.fusing import calibrated


class Base(nn.Module):
    """Two convolutions with their norms, and something more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.extra = nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.rate, self.function, self.items = 0.5, F.relu, [1]

    def inner(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


def made(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return calibrated(type(forward.__name__, (Base,), {"forward": forward})())


def fused(forward: Callable[..., Any]) -> nn.Module:
    return resnet_fast.fuse(made(forward), generic=True)


def parts(model: nn.Module) -> list[str]:
    """What is fused, by explain()."""
    return [row.reason for row in resnet_fast.explain(model) if row.status != "not"]


def in_place_sum(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    out = self.bn2(self.conv2(x))
    out += self.pool(x)
    return F.relu_(out)


def options(self: Any, x: Tensor) -> Tensor:
    if self.rate > 0 and self.extra is not None:
        return self.function(self.bn2(self.conv2(self.inner(x)))) * self.rate
    return x
