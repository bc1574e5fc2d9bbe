"""torchvision.models.resnet: BasicBlock, Bottleneck (ResNet, ResNeXt, wide ResNet) and the stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import sequential
from .common import Adapter, Alone, BlockPlan, ConvBnPath, HostPlan, Norm, Part, residual, text_of

CHAIN = (ConvBnPath("conv1", "bn1", "relu"),)
STEM = BlockPlan("stem", CHAIN, pool="maxpool")
BASIC = tuple(ConvBnPath(f"conv{i}", f"bn{i}", "relu") for i in (1, 2))
BOTTLENECK = tuple(ConvBnPath(f"conv{i}", f"bn{i}", "relu") for i in (1, 2, 3))


def basic(block: Any) -> BlockPlan:
    return residual("basic", BASIC, block)


def bottleneck(block: Any) -> BlockPlan:
    return residual("bottleneck", BOTTLENECK, block)


def _forward(net: Any, x: Tensor, part: Part) -> Tensor:
    x = part.chain(0, x, net.layer1, net.layer2, net.layer3, net.layer4)
    return net.fc(torch.flatten(net.avgpool(x), 1))


def stem(net: Any) -> HostPlan | str:
    if text_of(type(net)._forward_impl) not in ("9c951761811fa95e",):
        return "this torchvision's ResNet._forward_impl is not the one that is known here; the stem runs as it is"
    return HostPlan("stem", (STEM,), "_forward_impl", _forward)


def layers(net: Any) -> HostPlan | str | None:
    """IntermediateLayerGetter, the body of detection and segmentation models: a network's children, some returned."""
    if text_of(type(net).forward) not in ("b0287c1eb639f14e",):
        return "this torchvision's IntermediateLayerGetter.forward is not the one that is known here"
    return sequential.children(net, "forward", net.return_layers)


def quantizable(net: Any) -> str:
    return Alone("quantizable: torch.ao.quantization fuses and converts its layers itself")


_QUANTIZABLE = (
    *("resnet.QuantizableResNet", "resnet.QuantizableBasicBlock", "resnet.QuantizableBottleneck"),
    *("googlenet.QuantizableGoogLeNet", "inception.QuantizableInception3"),
    *("mobilenetv2.QuantizableMobileNetV2", "mobilenetv3.QuantizableMobileNetV3"),
    "shufflenetv2.QuantizableShuffleNetV2",
)

ADAPTERS: dict[str, Adapter] = {
    "torchvision.models.resnet.BasicBlock": basic,
    "torchvision.models.resnet.Bottleneck": bottleneck,
    "torchvision.models.resnet.ResNet": stem,
    "torchvision.models._utils.IntermediateLayerGetter": layers,
    **{f"torchvision.models.quantization.{name}": quantizable for name in _QUANTIZABLE},
}
NORMS = {"torchvision.ops.misc.FrozenBatchNorm2d": Norm(frozen=True)}
