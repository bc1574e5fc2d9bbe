"""The paper's residual blocks, their plain twin, the three shortcuts and stages (arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

SHORTCUTS = ("A", "B", "C")
VERSIONS = ("v1", "v1.5")


def check_choice(argument: str, found: object, supported: Sequence[str]) -> None:
    """Raise a ValueError that names the argument unless ``found`` is one of ``supported``."""
    if found not in supported:
        choices = ", ".join(map(repr, supported))
        raise ValueError(f"{argument}={found!r} is not supported; use one of {choices}")


def check_positive(argument: str, found: object) -> None:
    """Raise a ValueError that names the argument unless ``found`` is an integer of at least 1."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{argument}={found!r} is not supported; use an integer of at least 1")


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution, padded by 1, without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class SubsamplePad(nn.Module):
    """Shortcut option A of the paper: the identity, subsampled, with new channels of zeros; no parameters.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). The first
    in_channels channels are ``x[:, :, ::stride, ::stride]``, the rest zero.

    Raises:
        ValueError: out_channels < in_channels, or an argument below 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("stride", stride)
        check_positive("out_channels", out_channels)
        if out_channels < in_channels:
            raise ValueError(f"out_channels={out_channels} is not supported; use at least in_channels={in_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # x[:, :, ::stride, ::stride]; the slice itself would lose channels_last in the pad when H is odd
        x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), 3x3 convolutions (the paper, figure 5 left).

    Shapes: (N, inplanes, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).

    Args:
        inplanes: channels of x.
        planes: channels of both convolutions.
        stride: of conv1; default 1.
        downsample: the shortcut, or None (default) for the identity; it must give the block's output shape.
        norm_layer: called with a channel count; default nn.BatchNorm2d.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainBasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x)))))): BasicBlock without its shortcut (the paper, figure 3 middle).

    Shapes: (N, inplanes, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).

    It is no BasicBlock and has no ``downsample``, so that it is never mistaken for a block that adds.

    Args:
        inplanes: channels of x.
        planes: channels of both convolutions.
        stride: of conv1; default 1.
        norm_layer: called with a channel count; default nn.BatchNorm2d.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)) (the paper, figure 5 right).

    conv1 is 1x1 and reduces to planes, conv2 is 3x3, conv3 is 1x1 and expands to 4 * planes.

    Shapes: (N, inplanes, H, W) -> (N, 4 * planes, ceil(H / stride), ceil(W / stride)).

    Args:
        inplanes: channels of x.
        planes: channels of conv1 and conv2.
        stride: of the block; default 1.
        downsample: the shortcut, or None (default) for the identity; it must give the block's output shape.
        version: "v1.5" (default, torchvision's) strides the 3x3 conv2, "v1" (the paper's) the 1x1 conv1.
        norm_layer: called with a channel count; default nn.BatchNorm2d.

    Raises:
        ValueError: unknown version.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        version: str = "v1.5",
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_choice("version", version, VERSIONS)
        self.conv1 = conv1x1(inplanes, planes, stride if version == "v1" else 1)
        self.bn1 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride if version == "v1.5" else 1)
        self.bn2 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


Block = type[BasicBlock] | type[Bottleneck] | type[PlainBasicBlock]


def _shortcut(option: str, inplanes: int, outplanes: int, stride: int, norm_layer: NormLayer) -> nn.Module | None:
    """The module for a block's ``downsample``, or None where the option is the identity."""
    if option != "C" and stride == 1 and inplanes == outplanes:
        return None
    if option == "A":
        return SubsamplePad(inplanes, outplanes, stride)
    return nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))


def make_stage(
    block: Block,
    inplanes: int,
    planes: int,
    depth: int,
    stride: int,
    shortcut: str,
    version: str,
    norm_layer: NormLayer,
) -> nn.Sequential:
    """Chain ``depth`` blocks, the first strided.

    Each shortcut is built before its block, as in torchvision: the same seed then draws the same weights.
    """
    blocks: list[nn.Module] = []
    outplanes = planes * block.expansion
    for _ in range(depth):
        if issubclass(block, PlainBasicBlock):
            blocks.append(block(inplanes, planes, stride, norm_layer=norm_layer))
        else:
            options: dict[str, Any] = {"version": version} if issubclass(block, Bottleneck) else {}
            downsample = _shortcut(shortcut, inplanes, outplanes, stride, norm_layer)
            blocks.append(block(inplanes, planes, stride, downsample, norm_layer=norm_layer, **options))
        inplanes, stride = outplanes, 1
    return nn.Sequential(*blocks)
