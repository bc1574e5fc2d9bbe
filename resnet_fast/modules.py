"""Fused modules to build networks from: ConvBnAct2d, BasicBlock, Bottleneck, Stem.

The blocks are those of He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. All take
x (N, C, H, W) in the dtype of their weights, or under autocast any, best channels-last: float32, bfloat16 and float16
run fused, float64 does not. A wrong x gets torch's own errors. H / stride below is rounded up.

Each can be built by itself or ``from_modules(...)``, which takes over existing modules (and so their parameters,
buffers and hooks). The blocks' keys are torchvision's. They run the same plans as ``fuse()``'d models; where a guard
fails (a hook on an inner module, say), they run their submodules one after the other.
"""

from __future__ import annotations

import numbers
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import FoldCache
from .plan import BlockPlan, ConvBnPath, Opaque, Refusal
from .running import run

__all__ = ["BasicBlock", "Bottleneck", "ConvBnAct2d", "Stem"]


class FusedModule(nn.Module):
    """A module with a plan: fused where the guards hold, else ``unfused``.

    ``refusal``: why the last call ran unfused, for explain(); None where it did not.
    """

    plan: BlockPlan
    refusal: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._cache = FoldCache()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "refusal")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, P, Q), channels-last."""
        if torch.compiler.is_compiling():  # the compiler fuses in its own way, and wants plain modules to read
            return self.unfused(x)
        refusal = None
        try:
            z = run(self, self.plan, x, self._cache)[0]
        except Refusal as error:
            refusal = str(error)
        if refusal != self.refusal:
            self.refusal = refusal
        return z if refusal is None else self.unfused(x)

    def unfused(self, x: Tensor) -> Tensor:
        """The same by the submodules, one after the other; not in place, where a hook may have seen the output."""
        raise NotImplementedError


def _expect(name: str, module: object, *kinds: type) -> None:
    if not isinstance(module, kinds):
        supported = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: found {type(module).__name__}, supported: {supported}")


def _expect_integer(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: found {value!r}, supported are integers from {least} on")


def _expect_sizes(in_channels: object, channels: object, stride: object = 1) -> None:
    for name, value in (("in_channels", in_channels), ("channels", channels), ("stride", stride)):
        _expect_integer(name, value)


def _conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(out_channels)


class ConvBnAct2d(FusedModule):
    """z = relu(bn(conv(x))). Keys ``conv.*`` and ``bn.*``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for nn.Conv2d, but that
            ``padding`` None (the default) is dilation * (kernel_size // 2), which keeps H and W at stride 1 where
            kernel_size is odd, and ``bias`` is False. Each one integer, for both directions.
        relu: whether a ReLU follows.
        eps, momentum: as for nn.BatchNorm2d.

    (N, in_channels, H, W) -> (N, out_channels, P, Q). Raises ``ValueError`` for an argument that it does not support.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        relu: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        for name, value in {**numbers, "stride": stride, "dilation": dilation, "groups": groups}.items():
            _expect_integer(name, value)
        if padding is not None:
            _expect_integer("padding", padding, 0)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: found {groups}, supported are divisors of in_channels = {in_channels} and "
                f"out_channels = {out_channels}"
            )
        if not isinstance(eps, (int, float)) or not eps >= 0:
            raise ValueError(f"eps: found {eps!r}, supported are numbers from 0 on")
        if momentum is not None and not isinstance(momentum, (int, float)):
            raise ValueError(f"momentum: found {momentum!r}, supported are numbers, and None for a cumulative average")
        if padding is None:
            padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.relu = relu

    @classmethod
    def from_modules(cls, conv: nn.Conv2d, bn: nn.Module, relu: bool = True) -> ConvBnAct2d:
        """Take over a convolution and its norm: their parameters, buffers and train/eval state.

        Raises ``TypeError`` where ``conv`` is no nn.Conv2d.
        """
        _expect("conv", conv, nn.Conv2d)
        _expect("bn", bn, nn.Module)
        self = cls.__new__(cls)
        FusedModule.__init__(self)
        self.conv, self.bn, self.relu = conv, bn, relu  # type: ignore[assignment]
        self.training = bn.training
        return self

    @property
    def plan(self) -> BlockPlan:  # type: ignore[override]
        return _CONV_RELU if self.relu else _CONV

    def unfused(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y


_CONV = BlockPlan("conv_bn_act", (ConvBnPath("conv", "bn", False),))
_CONV_RELU = BlockPlan("conv_bn_act", (ConvBnPath("conv", "bn", True),))


class _Residual(FusedModule):
    """What the two residual blocks share: the shortcut."""

    expansion: ClassVar[int]
    _layers: ClassVar[tuple[ConvBnPath, ...]]
    _kind: ClassVar[str]
    downsample: nn.Module | None

    def _shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
        """Option B: a projection where the shape changes."""
        if stride == 1 and in_channels == out_channels:
            return None
        return nn.Sequential(*_conv_bn(in_channels, out_channels, 1, stride))

    @property
    def plan(self) -> BlockPlan:  # type: ignore[override]
        side = self.downsample
        key = (
            "identity" if side is None else "projection" if type(side) is nn.Sequential and len(side) == 2 else "opaque"
        )
        return _PLANS[self._kind, key]

    @classmethod
    def from_modules(cls, *modules: nn.Module, downsample: nn.Module | None = None) -> Any:
        """Take over ``conv1, bn1, conv2, bn2, ...`` in this order, and a shortcut: None (identity) or any module.

        Raises ``TypeError`` for another number of modules, or one of another kind.
        """
        self = cls.__new__(cls)
        FusedModule.__init__(self)
        count = len(cls._layers)
        if len(modules) != 2 * count:
            raise TypeError(
                f"modules: found {len(modules)}, {cls.__name__} takes {2 * count}: conv and bn, {count} times"
            )
        for i in range(count):
            conv, bn = modules[2 * i : 2 * i + 2]
            _expect(f"conv{i + 1}", conv, nn.Conv2d)
            _expect(f"bn{i + 1}", bn, nn.Module)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", bn)
        self.downsample = downsample
        self.training = modules[1].training
        return self

    def unfused(self, x: Tensor) -> Tensor:
        out = x
        for i, layer in enumerate(self._layers):
            out = getattr(self, layer.bn)(getattr(self, layer.conv)(out))
            if i < len(self._layers) - 1:
                out = F.relu(out)
        total = out + (x if self.downsample is None else self.downsample(x))
        return F.relu(total.to(out.dtype))  # under autocast as the fused forward, which stays in the low dtype


class BasicBlock(_Residual):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), 3x3 convolutions; torchvision's keys.

    Args:
        in_channels: channels of x.
        channels: channels of both convolutions, and of z.
        stride: of conv1 and of the shortcut.

    (N, in_channels, H, W) -> (N, channels, H / stride, W / stride). The shortcut is a projection where the shape
    changes. Raises ``ValueError`` for an argument that is not an integer from 1 on.
    """

    expansion = 1
    _kind = "basic"
    _layers = tuple(ConvBnPath(f"conv{i}", f"bn{i}", True) for i in (1, 2))

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        _expect_sizes(in_channels, channels, stride)
        self.conv1, self.bn1 = _conv_bn(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.downsample = self._shortcut(in_channels, channels, stride)


class Bottleneck(_Residual):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3, 1x1; torchvision's keys.

    Args:
        in_channels: channels of x.
        channels: channels of conv1 and conv2; z has four times as many.
        stride: of the block.
        version: "v1.5" strides the 3x3 (torchvision's), "v1" the first 1x1 (the paper's).

    (N, in_channels, H, W) -> (N, 4 * channels, H / stride, W / stride). The shortcut is a projection where the shape
    changes. Raises ``ValueError`` for another version, or an argument that is not an integer from 1 on.
    """

    expansion = 4
    _kind = "bottleneck"
    _layers = tuple(ConvBnPath(f"conv{i}", f"bn{i}", True) for i in (1, 2, 3))

    def __init__(self, in_channels: int, channels: int, stride: int = 1, *, version: str = "v1.5") -> None:
        super().__init__()
        _expect_sizes(in_channels, channels, stride)
        if version not in ("v1", "v1.5"):
            raise ValueError(f"version: found {version!r}, supported are 'v1' and 'v1.5'")
        first, second = (stride, 1) if version == "v1" else (1, stride)
        self.conv1, self.bn1 = _conv_bn(in_channels, channels, 1, first)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3, second)
        self.conv3, self.bn3 = _conv_bn(channels, channels * self.expansion, 1)
        self.downsample = self._shortcut(in_channels, channels * self.expansion, stride)


_PLANS = {
    (kind._kind, key): BlockPlan(kind._kind, kind._layers, side)
    for kind in (BasicBlock, Bottleneck)
    for key, side in (
        ("identity", "identity"),
        ("projection", ConvBnPath("downsample.0", "downsample.1")),
        ("opaque", Opaque("downsample")),
    )
}


class Stem(FusedModule):
    """maxpool(relu(bn1(conv1(x)))): 7x7/2 convolution and 3x3/2 max-pool. Keys ``conv1.*`` and ``bn1.*``.

    Args:
        in_channels: 3 for images.
        channels: 64 in every ImageNet ResNet.

    (N, in_channels, H, W) -> (N, channels, H / 4, W / 4). Raises ``ValueError`` for an argument that is not an integer
    from 1 on.
    """

    plan = BlockPlan("stem", (ConvBnPath("conv1", "bn1", True),), pool="maxpool")

    def __init__(self, in_channels: int = 3, channels: int = 64) -> None:
        super().__init__()
        _expect_sizes(in_channels, channels)
        self.conv1, self.bn1 = _conv_bn(in_channels, channels, 7, 2)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)

    @classmethod
    def from_modules(cls, conv1: nn.Conv2d, bn1: nn.Module, maxpool: nn.Module | None = None) -> Stem:
        """Take over a stem's modules. Without ``maxpool`` there is no pooling (CIFAR stems).

        Raises ``TypeError`` where ``conv1`` is no nn.Conv2d.
        """
        _expect("conv1", conv1, nn.Conv2d)
        _expect("bn1", bn1, nn.Module)
        self = cls.__new__(cls)
        FusedModule.__init__(self)
        self.conv1, self.bn1 = conv1, bn1  # type: ignore[assignment]
        self.maxpool = nn.Identity() if maxpool is None else maxpool
        self.training = bn1.training
        return self

    def unfused(self, x: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn1(self.conv1(x))))
