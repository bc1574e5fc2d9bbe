"""transformers.models.resnet: basic and bottleneck layers, and the convolution layer that its stem is made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from .common import Adapter, BlockPlan, ConvBnPath, Opaque


def conv_layer(layer: Any) -> BlockPlan:
    return BlockPlan("conv_bn_act", (ConvBnPath("convolution", "normalization", "activation"),))


def conv_shortcut(layer: Any) -> BlockPlan:
    return BlockPlan("conv_bn", (ConvBnPath("convolution", "normalization"),))


def _block(kind: str, block: Any) -> BlockPlan | str:
    if not all(type(m).__name__ == "ResNetConvLayer" for m in block.layer):
        return "layer holds something other than ResNetConvLayer"
    names = list(block.layer._modules)
    layers = [ConvBnPath(f"layer.{n}.convolution", f"layer.{n}.normalization", f"layer.{n}.activation") for n in names]
    # The last layer has no activation of its own: the block's stands behind the sum.
    idle = (f"layer.{names[-1]}.activation",)
    layers[-1] = ConvBnPath(layers[-1].conv, layers[-1].bn, "activation")
    side = block.shortcut
    if type(side) is nn.Identity:
        return BlockPlan(kind, tuple(layers), "identity", idle)
    if type(side).__name__ == "ResNetShortCut":
        return BlockPlan(kind, tuple(layers), ConvBnPath("shortcut.convolution", "shortcut.normalization"), idle)
    return BlockPlan(kind, tuple(layers), Opaque("shortcut"), idle)


def basic(block: Any) -> BlockPlan | str:
    return _block("basic", block)


def bottleneck(block: Any) -> BlockPlan | str:
    return _block("bottleneck", block)


_HOME = "transformers.models.resnet.modeling_resnet"
ADAPTERS: dict[str, Adapter] = {
    f"{_HOME}.ResNetConvLayer": conv_layer,
    f"{_HOME}.ResNetShortCut": conv_shortcut,
    f"{_HOME}.ResNetBasicLayer": basic,
    f"{_HOME}.ResNetBottleNeckLayer": bottleneck,
}
