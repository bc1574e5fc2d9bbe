"""The paper's ImageNet and CIFAR-10 networks and their constructors (arXiv 1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from resnet_fast.models.blocks import (
    SHORTCUTS,
    VERSIONS,
    BasicBlock,
    Block,
    Bottleneck,
    NormLayer,
    PlainBasicBlock,
    check_choice,
    check_positive,
    conv3x3,
    make_stage,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PlainOptions(TypedDict, total=False):
    """Keyword arguments of the plain networks."""

    num_classes: int
    in_channels: int
    norm_layer: NormLayer


class CifarOptions(PlainOptions, total=False):
    """Keyword arguments of the CIFAR residual networks."""

    shortcut: str
    zero_init_residual: bool


class ResNetOptions(CifarOptions, total=False):
    """Keyword arguments of the ImageNet residual networks."""

    version: str


def _check_options(
    block: Block, num_classes: int, in_channels: int, shortcut: str, version: str, zero_init_residual: bool
) -> None:
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    check_choice("shortcut", shortcut, SHORTCUTS)
    check_choice("version", version, VERSIONS)
    if zero_init_residual and issubclass(block, PlainBasicBlock):
        raise ValueError("zero_init_residual=True is not supported by plain blocks: they would output zeros")


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """Initialise as the package docstring says; zero_init_residual: gamma = 0 in each block's last norm."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero_init_residual:
        return
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            gamma = getattr(last, "weight", None)
            if gamma is None:
                raise ValueError(f"zero_init_residual=True needs a norm_layer with a weight, found {last}")
            nn.init.zeros_(gamma)


class ResNet(nn.Module):
    """An ImageNet network of the paper (table 1): 7x7 stem, max-pool, four stages, average pool, classifier.

    Shapes: (N, in_channels, H, W) -> (N, num_classes). Stages have width 64, 128, 256, 512 (times 4 for
    Bottleneck) at 1/4, 1/8, 1/16, 1/32 of the input's height and width, rounded up.

    Args:
        block: BasicBlock, Bottleneck or PlainBasicBlock.
        layers: blocks in each of the four stages.
        num_classes: default 1000.
        in_channels: default 3.
        shortcut: "A" subsampled identity with zero channels where the shape changes, "B" (default) a 1x1
            projection there, "C" a projection on every block. Plain blocks have no shortcut and ignore it.
        version: where a strided Bottleneck strides, see Bottleneck; default "v1.5". Other blocks ignore it.
        zero_init_residual: start each block's last norm at gamma = 0, so that the block begins as its
            shortcut (Goyal et al., arXiv 1706.02677); default False.
        norm_layer: called with a channel count; default nn.BatchNorm2d.

    Raises:
        ValueError: unknown shortcut or version; a count below 1; ``layers`` not of length four;
            zero_init_residual with plain blocks or with a norm_layer that has no weight.
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        shortcut: str = "B",
        version: str = "v1.5",
        zero_init_residual: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_options(block, num_classes, in_channels, shortcut, version, zero_init_residual)
        if len(layers) != 4:
            raise ValueError(f"layers={layers!r} is not supported; use four block counts, one per stage")
        for depth in layers:
            check_positive("layers: block count", depth)
        e = block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = make_stage(block, 64, 64, layers[0], 1, shortcut, version, norm_layer)
        self.layer2 = make_stage(block, 64 * e, 128, layers[1], 2, shortcut, version, norm_layer)
        self.layer3 = make_stage(block, 128 * e, 256, layers[2], 2, shortcut, version, norm_layer)
        self.layer4 = make_stage(block, 256 * e, 512, layers[3], 2, shortcut, version, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * e, num_classes)
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """A CIFAR-10 network of the paper (section 4.2): 3x3 stem, three stages, average pool, classifier.

    Shapes: (N, in_channels, H, W) -> (N, num_classes), in the paper H = W = 32. Stages of n blocks have
    width 16, 32, 64 at 1, 1/2, 1/4 of the input's height and width. 6n + 2 layers.

    Args:
        block: BasicBlock or PlainBasicBlock.
        n: blocks in each stage.
        num_classes: default 10.
        in_channels: default 3.
        shortcut: "A" (default, as in the paper), "B" or "C", see ResNet. Plain blocks ignore it.
        zero_init_residual: see ResNet; default False.
        norm_layer: called with a channel count; default nn.BatchNorm2d.

    Raises:
        ValueError: unknown shortcut; a count below 1; zero_init_residual with plain blocks or with a
            norm_layer that has no weight.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PlainBasicBlock],
        n: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str = "A",
        zero_init_residual: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        version = "v1.5"  # of no effect on two-layer blocks
        _check_options(block, num_classes, in_channels, shortcut, version, zero_init_residual)
        check_positive("n", n)
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = make_stage(block, 16, 16, n, 1, shortcut, version, norm_layer)
        self.layer2 = make_stage(block, 16, 32, n, 2, shortcut, version, norm_layer)
        self.layer3 = make_stage(block, 32, 64, n, 2, shortcut, version, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-18 (the paper, table 1); options and errors: ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-34 (the paper, table 1); options and errors: ResNet's."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50 (the paper, table 1, with version="v1"); options and errors: ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101 (the paper, table 1, with version="v1"); options and errors: ResNet's."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-152 (the paper, table 1, with version="v1"); options and errors: ResNet's."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def _plain(
    layers: Sequence[int],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    norm_layer: NormLayer = nn.BatchNorm2d,
) -> ResNet:
    return ResNet(PlainBasicBlock, layers, num_classes=num_classes, in_channels=in_channels, norm_layer=norm_layer)


def plain18(**options: Unpack[PlainOptions]) -> ResNet:
    """ResNet-18 without shortcuts (the paper, section 4.1); takes num_classes, in_channels, norm_layer."""
    return _plain((2, 2, 2, 2), **options)


def plain34(**options: Unpack[PlainOptions]) -> ResNet:
    """ResNet-34 without shortcuts (the paper, section 4.1); takes num_classes, in_channels, norm_layer."""
    return _plain((3, 4, 6, 3), **options)


def cifar_resnet20(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-20, 0.27 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 3, **options)


def cifar_resnet32(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-32, 0.46 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 5, **options)


def cifar_resnet44(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-44, 0.66 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 7, **options)


def cifar_resnet56(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-56, 0.85 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 9, **options)


def cifar_resnet110(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-110, 1.7 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 18, **options)


def cifar_resnet1202(**options: Unpack[CifarOptions]) -> CifarResNet:
    """CIFAR ResNet-1202, 19.4 M parameters (the paper, table 6); options and errors: CifarResNet's."""
    return CifarResNet(BasicBlock, 200, **options)


def _cifar_plain(
    n: int, *, num_classes: int = 10, in_channels: int = 3, norm_layer: NormLayer = nn.BatchNorm2d
) -> CifarResNet:
    return CifarResNet(PlainBasicBlock, n, num_classes=num_classes, in_channels=in_channels, norm_layer=norm_layer)


def cifar_plain20(**options: Unpack[PlainOptions]) -> CifarResNet:
    """CIFAR plain-20 (the paper, section 4.2); takes num_classes, in_channels, norm_layer."""
    return _cifar_plain(3, **options)


def cifar_plain32(**options: Unpack[PlainOptions]) -> CifarResNet:
    """CIFAR plain-32 (the paper, section 4.2); takes num_classes, in_channels, norm_layer."""
    return _cifar_plain(5, **options)


def cifar_plain44(**options: Unpack[PlainOptions]) -> CifarResNet:
    """CIFAR plain-44 (the paper, section 4.2); takes num_classes, in_channels, norm_layer."""
    return _cifar_plain(7, **options)


def cifar_plain56(**options: Unpack[PlainOptions]) -> CifarResNet:
    """CIFAR plain-56 (the paper, section 4.2); takes num_classes, in_channels, norm_layer."""
    return _cifar_plain(9, **options)


def cifar_plain110(**options: Unpack[PlainOptions]) -> CifarResNet:
    """CIFAR plain-110 (the paper, section 4.2); takes num_classes, in_channels, norm_layer."""
    return _cifar_plain(18, **options)
