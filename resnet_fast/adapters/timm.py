"""timm.models.resnet: BasicBlock, Bottleneck and the stem, where nothing stands between the layers.

Attention (SE, ECA), anti-aliasing, DropBlock and DropPath stand between: such a block keeps its own forward. A deep
stem (ResNet-D) is a chain of three.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..plan import Refusal
from .common import Adapter, BlockPlan, ConvBnPath, HostPlan, Part, shortcut, text_of

_EXTRAS = ("se", "aa", "drop_block", "drop_path")


def _block(kind: str, count: int, block: Any) -> BlockPlan | str:
    for name in _EXTRAS:
        m = getattr(block, name, None)
        if m is not None and type(m) is not nn.Identity:
            return f"{name} ({type(m).__name__}) stands between the layers"
    layers = tuple(ConvBnPath(f"conv{i}", f"bn{i}", f"act{i}") for i in range(1, count + 1))
    return BlockPlan(kind, layers, shortcut(block, "downsample"), idle=_EXTRAS)


def basic(block: Any) -> BlockPlan | str:
    return _block("basic", 2, block)


def bottleneck(block: Any) -> BlockPlan | str:
    return _block("bottleneck", 3, block)


def _forward(net: Any, x: Tensor, part: Part) -> Tensor:
    if net.grad_checkpointing:
        raise Refusal("grad_checkpointing is on, which runs the stages in its own way")
    x = part(0, x)
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def stem(net: Any) -> HostPlan | str:
    if text_of(type(net).forward_features) not in ("b3983db7730ce961",):
        return "this timm's ResNet.forward_features is not the one that is known here; the stem runs as it is"
    conv1 = net.conv1
    if type(conv1) is nn.Sequential and len(conv1) == 7:
        names = list(conv1._modules)
        deep = tuple(ConvBnPath(*(f"conv1.{name}" for name in names[i : i + 3])) for i in (0, 3))
        layers = (*deep, ConvBnPath(f"conv1.{names[6]}", "bn1", "act1"))
    else:
        layers = (ConvBnPath("conv1", "bn1", "act1"),)
    return HostPlan("stem", (BlockPlan("stem", layers, pool="maxpool"),), "forward_features", _forward)


ADAPTERS: dict[str, Adapter] = {
    "timm.models.resnet.BasicBlock": basic,
    "timm.models.resnet.Bottleneck": bottleneck,
    "timm.models.resnet.ResNet": stem,
}
