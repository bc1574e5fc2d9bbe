"""DenseNet, torchvision's and timm's: the layers inside its dense blocks. Stem and transitions are sequences.

A layer takes a list of feature maps or one of them: norm and ReLU of what they make side by side, then convolution,
norm and ReLU. The 3x3 convolution behind, which feeds other layers' norms, runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import Refusal, norm_of
from .common import Adapter, BlockPlan, ConvBnPath, HostPlan, NormAct, Part, text_of

#: Measured with densenet121 (docs/bn_act.md, entry 36).
_SLOW = "in inference on a CPU a narrow convolution behind a wide norm gains nothing from fusing"


def _forward(layer: Any, x: Any, part: Part) -> Tensor:
    features = [x] if isinstance(x, Tensor) else x
    if not (layer.training or torch.is_grad_enabled()) and features[0].device.type == "cpu":
        raise Refusal(_SLOW)
    saves = getattr(layer, "memory_efficient", False) or getattr(layer, "grad_checkpointing", False)
    if saves and layer.any_requires_grad(features):
        raise Refusal("memory_efficient: checkpointing runs the layer's first half in its own way")
    new = layer.conv2(part(1, part(0, torch.cat(features, 1))))
    return F.dropout(new, p=layer.drop_rate, training=layer.training) if layer.drop_rate > 0 else new


def _texts(layer: Any, first_half: str) -> tuple[str, str]:
    return text_of(type(layer).forward), text_of(getattr(type(layer), first_half))


def _plan(first: NormAct, second: ConvBnPath) -> HostPlan:
    idle = () if not second.has_inner_act else (f"{second.bn}.drop",)
    return HostPlan("dense layer", (first, BlockPlan("conv_bn_act", (second,), idle=idle)), "forward", _forward)


def torchvision_layer(layer: Any) -> HostPlan | str:
    if _texts(layer, "bn_function") not in (("605fb4d99e3247cb", "f45c6b180e942a47"),):
        return "this torchvision's _DenseLayer.forward is not the one that is known here"
    return _plan(NormAct("norm1", "relu1"), ConvBnPath("conv1", "norm2", "relu2"))


def timm_layer(layer: Any) -> HostPlan | str:
    if _texts(layer, "bottleneck_fn") not in (("aca4dc05d49b5722", "2502cdd355dada97"),):
        return "this timm's DenseLayer.forward is not the one that is known here"
    for name in ("norm1", "norm2"):
        m = getattr(layer, name)
        if (norm := norm_of(type(m))) is None or not norm.inner:
            return f"{name} is {type(m).__name__}, supported is BatchNormAct2d"
    return _plan(NormAct("norm1", "norm1.act"), ConvBnPath("conv1", "norm2", "norm2.act"))


ADAPTERS: dict[str, Adapter] = {
    "torchvision.models.densenet._DenseLayer": torchvision_layer,
    "timm.models.densenet.DenseLayer": timm_layer,
}
