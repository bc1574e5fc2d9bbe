"""transformers: ResNet and RT-DETR's ResNet, their blocks, stems and layers; the DETR family's frozen batch norms."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan import Refusal
from .common import Adapter, BlockPlan, ConvBnPath, HostPlan, Norm, Opaque, Part, text_of

_CONV_LAYERS = ("ResNetConvLayer", "RTDetrResNetConvLayer")
_SHORTCUTS = ("ResNetShortCut", "RTDetrResNetShortCut")


def _layer(home: str) -> ConvBnPath:
    return ConvBnPath(f"{home}.convolution", f"{home}.normalization", f"{home}.activation")


def conv_layer(layer: Any) -> BlockPlan:
    return BlockPlan("conv_bn_act", (ConvBnPath("convolution", "normalization", "activation"),))


def conv_shortcut(layer: Any) -> BlockPlan:
    return BlockPlan("conv_bn", (ConvBnPath("convolution", "normalization"),))


def _block(kind: str, block: Any) -> BlockPlan | str:
    if not all(type(m).__name__ in _CONV_LAYERS for m in block.layer):
        return "layer holds something other than ResNetConvLayer"
    names = list(block.layer._modules)
    layers = [_layer(f"layer.{name}") for name in names]
    # The last layer has no activation of its own: the block's stands behind the sum.
    idle = (f"layer.{names[-1]}.activation",)
    layers[-1] = ConvBnPath(layers[-1].conv, layers[-1].bn, "activation")
    side = block.shortcut
    if type(side) is nn.Identity:
        return BlockPlan(kind, tuple(layers), "identity", (*idle, "shortcut"))
    if type(side).__name__ in _SHORTCUTS:
        return BlockPlan(kind, tuple(layers), ConvBnPath("shortcut.convolution", "shortcut.normalization"), idle)
    return BlockPlan(kind, tuple(layers), Opaque("shortcut"), idle)


def basic(block: Any) -> BlockPlan | str:
    return _block("basic", block)


def bottleneck(block: Any) -> BlockPlan | str:
    return _block("bottleneck", block)


def _forward(net: Any, x: Any, part: Part) -> Any:
    if x.shape[1] != net.num_channels:
        raise Refusal("x has another number of channels than the configuration")
    return part(0, x)


def stem(net: Any) -> HostPlan | str:
    """One convolution layer, or a Sequential of three, and the pooling."""
    if text_of(type(net).forward) not in ("ae02d3a1457ce82e",):
        return f"this transformers' {type(net).__name__}.forward is not the one that is known here"
    deep = type(net.embedder) is nn.Sequential
    homes = [f"embedder.{name}" for name in net.embedder._modules] if deep else ["embedder"]
    part = BlockPlan("stem", tuple(_layer(home) for home in homes), pool="pooler")
    return HostPlan("stem", (part,), "forward", _forward)


_PARTS: dict[str, Adapter] = {
    "ConvLayer": conv_layer,
    "ShortCut": conv_shortcut,
    "BasicLayer": basic,
    "BottleNeckLayer": bottleneck,
    "Embeddings": stem,
}
_RESNETS = ("resnet.modeling_resnet.ResNet", "rt_detr.modeling_rt_detr_resnet.RTDetrResNet")
ADAPTERS: dict[str, Adapter] = {
    f"transformers.models.{home}{name}": adapter for home in _RESNETS for name, adapter in _PARTS.items()
}
#: Where the frozen batch norms of the DETR family live: every model has a copy of its own, with eps in its text.
_DETRS = {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "detr": "Detr",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "MMGroundingDino",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}
NORMS = {
    f"transformers.models.{home}.modeling_{home}.{name}FrozenBatchNorm2d": Norm(frozen=True, eps=1e-5)
    for home, name in _DETRS.items()
}
