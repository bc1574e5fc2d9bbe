"""resnet_fast.models: its blocks have torchvision's attributes; its networks a stem with and without max-pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Adapter, BlockPlan, HostPlan, Part
from .torchvision import BASIC, CHAIN, STEM, basic, bottleneck


def plain(block: Any) -> BlockPlan:
    return BlockPlan("plain", BASIC)


def _forward(net: Any, x: Tensor, part: Part) -> Tensor:
    x = part.chain(0, x, net.layer1, net.layer2, net.layer3, net.layer4)
    return net.fc(torch.flatten(net.avgpool(x), 1))


def _forward_cifar(net: Any, x: Tensor, part: Part) -> Tensor:
    x = part.chain(0, x, net.layer1, net.layer2, net.layer3)
    return net.fc(torch.flatten(net.avgpool(x), 1))


def stem(net: Any) -> HostPlan:
    return HostPlan("stem", (STEM,), "forward", _forward)


def cifar_stem(net: Any) -> HostPlan:
    return HostPlan("stem", (BlockPlan("stem", CHAIN),), "forward", _forward_cifar)


_HOME = "resnet_fast.models"
ADAPTERS: dict[str, Adapter] = {
    f"{_HOME}.blocks.BasicBlock": basic,
    f"{_HOME}.blocks.Bottleneck": bottleneck,
    f"{_HOME}.blocks.PlainBasicBlock": plain,
    f"{_HOME}.networks.ResNet": stem,
    f"{_HOME}.networks.CifarResNet": cifar_stem,
}
