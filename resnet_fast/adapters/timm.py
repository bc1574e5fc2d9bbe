"""timm: the blocks and stem of timm.models.resnet, ConvNormAct, and feature extractors.

Attention (SE, ECA, ...), anti-aliasing, DropBlock and DropPath stand between the layers of some blocks: those are
traced, the extras run as they are, in their place. A deep stem (ResNet-D) is a chain of three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Refusal, norm_of
from . import sequential, tracing
from .common import Adapter, BlockPlan, ConvBnPath, HostPlan, Norm, Part, residual, text_of

_EXTRAS = ("se", "aa", "drop_block", "drop_path")


def _block(kind: str, count: int, block: Any) -> BlockPlan | HostPlan | str:
    extras = [
        f"{name} ({type(m).__name__})"
        for name in _EXTRAS
        if (m := getattr(block, name, None)) is not None and type(m) is not nn.Identity
    ]
    inner = any((norm := norm_of(type(getattr(block, f"bn{i}")))) and norm.inner for i in range(1, count + 1))
    if not extras and not inner:
        layers = tuple(ConvBnPath(f"conv{i}", f"bn{i}", f"act{i}") for i in range(1, count + 1))
        return residual(kind, layers, block, idle=_EXTRAS)
    plan = tracing.plan(block, kind)
    if plan is None:
        found = ", ".join(f"bn{i} is {type(getattr(block, f'bn{i}')).__name__}" for i in range(1, count + 1))
        return f"{found}; supported is torch.nn.BatchNorm2d"
    return plan


def basic(block: Any) -> BlockPlan | HostPlan | str:
    return _block("basic", 2, block)


def bottleneck(block: Any) -> BlockPlan | HostPlan | str:
    return _block("bottleneck", 3, block)


def _no_checkpointing(net: Any) -> None:
    if net.grad_checkpointing:
        raise Refusal("grad_checkpointing is on, which runs the stages in its own way")


def _forward(net: Any, x: Tensor, part: Part) -> Tensor:
    _no_checkpointing(net)
    return part.chain(0, x, net.layer1, net.layer2, net.layer3, net.layer4)


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


def conv_norm_act(layer: Any) -> BlockPlan | None:
    norm = norm_of(type(layer.bn))
    if norm is None or not norm.inner or type(layer.conv) is not nn.Conv2d:
        return None
    return BlockPlan("conv_bn_act", (ConvBnPath("conv", "bn", "bn.act"),), idle=("aa", "bn.drop"))


def features(net: Any) -> HostPlan | str | None:
    """FeatureListNet and FeatureDictNet: a network's children in order, of which some outputs are returned."""
    if text_of(type(net)._collect) not in ("d69c2779b747df95",):
        return f"this timm's {type(net).__name__}._collect is not the one that is known here; its stem runs as it is"
    return sequential.children(net, "_collect", net.return_layers, _no_checkpointing, _one_tensor)


def _one_tensor(net: Any, x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return torch.cat(x, 1) if net.concat else x[0]
    return x


ADAPTERS: dict[str, Adapter] = {
    "timm.models.resnet.BasicBlock": basic,
    "timm.models.resnet.Bottleneck": bottleneck,
    "timm.models.resnet.ResNet": stem,
    "timm.layers.conv_bn_act.ConvNormAct": conv_norm_act,
    "timm.models._features.FeatureListNet": features,
    "timm.models._features.FeatureDictNet": features,
}
NORMS = {
    "timm.layers.norm_act.BatchNormAct2d": Norm(inner=True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Norm(frozen=True, inner=True),
}
