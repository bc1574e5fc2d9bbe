"""segmentation_models_pytorch: the stem of its ResNet encoders. Their blocks are torchvision's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .common import Adapter, BlockPlan, HostPlan, Part, text_of
from .torchvision import CHAIN


def _forward(net: Any, x: Tensor, part: Part) -> list[Tensor]:
    features = [x]
    if net._depth >= 1:
        x = part(0, x)
        features.append(x)
    if net._depth >= 2:
        x = net.layer1(net.maxpool(x))
        features.append(x)
    for depth, name in ((3, "layer2"), (4, "layer3"), (5, "layer4")):
        if net._depth >= depth:
            x = getattr(net, name)(x)
            features.append(x)
    return features


def stem(net: Any) -> HostPlan | str:
    if text_of(type(net).forward) not in ("917bd0edc8b9002a",):
        return "this ResNetEncoder.forward is not the one that is known here; the stem runs as it is"
    return HostPlan("stem", (BlockPlan("stem", CHAIN),), "forward", _forward)


ADAPTERS: dict[str, Adapter] = {"segmentation_models_pytorch.encoders.resnet.ResNetEncoder": stem}
