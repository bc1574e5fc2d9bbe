"""Networks of styles that no tested library has: detectron2's blocks, and those of CIFAR repositories.

detectron2 is not installable from the index: its classes' names, attributes and structure are built here, so that
fuse() takes them for detectron2's own. The CIFAR-style blocks are as repositories write them: ReLU as a function, a
shortcut that is an empty Sequential or a lambda, branches as Sequentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _as(module: str) -> Callable[[type], type]:
    """The class says that it is of ``module``."""

    def rename(cls: type) -> type:
        cls.__module__ = module
        return cls

    return rename


# ---- detectron2 -------------------------------------------------------------------------------------------------


@_as("detectron2.layers.wrappers")
class Conv2d(nn.Conv2d):
    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


@_as("detectron2.layers.batch_norm")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


def _conv(c: int, k: int, size: int, norm: Any, stride: int = 1, dilation: int = 1, groups: int = 1) -> Conv2d:
    padding = dilation * (size // 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": False}
    return Conv2d(c, k, size, norm=norm(k), **options)


HOME = "detectron2.modeling.backbone.resnet"


@_as(HOME)
class BasicBlock(nn.Module):
    def __init__(self, c: int, k: int, stride: int = 1, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.shortcut = None if c == k else _conv(c, k, 1, norm, stride)
        self.conv1 = _conv(c, k, 3, norm, stride)
        self.conv2 = _conv(k, k, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@_as(HOME)
class BottleneckBlock(nn.Module):
    def __init__(
        self,
        c: int,
        k: int,
        middle: int,
        stride: int = 1,
        norm: Any = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = None if c == k else _conv(c, k, 1, norm, stride)
        self.conv1 = _conv(c, middle, 1, norm, first)
        self.conv2 = _conv(middle, middle, 3, norm, second, dilation, groups)
        self.conv3 = _conv(middle, k, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out += shortcut
        return F.relu_(out)


@_as(HOME)
class BasicStem(nn.Module):
    def __init__(self, k: int = 16, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = _conv(3, k, 7, norm, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


def detectron2(norm: str = "BN", block: str = "bottleneck") -> nn.Module:
    """A stem and three stages, the last one dilated, the first one frozen as FREEZE_AT=2 does."""
    kinds: dict[str, Any] = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": lambda k: nn.GroupNorm(4, k)}
    layer = kinds[norm]
    if block == "basic":
        stages = [BasicBlock(16, 16, norm=layer), BasicBlock(16, 32, 2, layer), BasicBlock(32, 32, norm=layer)]
    else:
        stages = [
            nn.Sequential(BottleneckBlock(16, 32, 8, norm=layer), BottleneckBlock(32, 32, 8, norm=layer)),
            BottleneckBlock(32, 64, 16, 2, layer, stride_in_1x1=True, groups=4),
            BottleneckBlock(64, 64, 16, norm=layer, dilation=2),
        ]
    model = nn.Sequential(BasicStem(norm=layer), *stages)
    for p in [*model[0].parameters(), *model[1].parameters()]:
        p.requires_grad_(False)
    return model


# ---- CIFAR repositories -----------------------------------------------------------------------------------------


class LambdaLayer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _shortcut(option: str, c: int, k: int, stride: int) -> nn.Module:
    if stride == 1 and c == k:
        return nn.Sequential()
    if option == "A":
        return LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, (k - c) // 2, (k - c) // 2)))
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


class _Functional:
    """CIFAR's blocks, under the names that the repositories use."""

    class BasicBlock(nn.Module):
        def __init__(self, c: int, k: int, stride: int = 1, option: str = "B") -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(k)
            self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(k)
            self.shortcut = _shortcut(option, c, k, stride)

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += self.shortcut(x)
            return F.relu(out)

    class Bottleneck(nn.Module):
        def __init__(self, c: int, k: int, stride: int = 1, option: str = "B") -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(c, k // 4, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(k // 4)
            self.conv2 = nn.Conv2d(k // 4, k // 4, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(k // 4)
            self.conv3 = nn.Conv2d(k // 4, k, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(k)
            self.downsample = None if stride == 1 and c == k else _shortcut(option, c, k, stride)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            identity = x
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.relu(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out = torch.add(identity, out)
            return self.relu(out)

    class ResidualBlock(nn.Module):
        """Branches as Sequentials, and a ReLU made on the spot."""

        def __init__(self, c: int, k: int, stride: int = 1, option: str = "B") -> None:
            super().__init__()
            self.residual_function = nn.Sequential(
                nn.Conv2d(c, k, 3, stride, 1, bias=False),
                nn.BatchNorm2d(k),
                nn.ReLU(inplace=True),
                nn.Conv2d(k, k, 3, padding=1, bias=False),
                nn.BatchNorm2d(k),
            )
            self.shortcut = _shortcut(option, c, k, stride)

        def forward(self, x: Tensor) -> Tensor:
            return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


def cifar(block: str = "BasicBlock", option: str = "B") -> nn.Module:
    """A functional stem, two stages of two blocks, pooling and a classifier."""
    make = getattr(_Functional, block)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(make(16, 16), make(16, 16))
            self.layer2 = nn.Sequential(make(16, 32, 2, option), make(32, 32))
            self.linear = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.layer2(self.layer1(out))
            out = F.avg_pool2d(out, out.size()[3])
            return self.linear(out.view(out.size(0), -1))

    return Net()


# ---- a U-Net as tutorials write it ------------------------------------------------------------------------------


class Down(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, padding=1), nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return torch.relu(self.bn2(self.conv2(x)))


class Up(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(c, k, 2, 2)
        self.convs = Down(c, k)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([skip, self.up(x)], dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Down(3, 8), Down(8, 16), Down(16, 32)
        self.up2, self.up1 = Up(32, 16), Up(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.down3(F.max_pool2d(two, 2))
        return self.head(self.up1(self.up2(three, two), one))
