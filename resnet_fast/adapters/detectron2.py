"""detectron2.modeling.backbone.resnet: its blocks and stem, whose convolutions hold their norms; ReLUs are functions.

detectron2 is not among the tested libraries: the tests have blocks of the same structure.
"""

from __future__ import annotations

from typing import Any

from .common import Adapter, BlockPlan, ConvBnPath, Norm


def _layer(name: str, act: bool = True) -> ConvBnPath:
    return ConvBnPath(name, f"{name}.norm", act)


def _block(kind: str, count: int, block: Any) -> BlockPlan:
    layers = tuple(_layer(f"conv{i}") for i in range(1, count + 1))
    if block.shortcut is None:
        return BlockPlan(kind, layers, "identity", idle=("shortcut",))
    return BlockPlan(kind, layers, _layer("shortcut", act=False))


def basic(block: Any) -> BlockPlan:
    return _block("basic", 2, block)


def bottleneck(block: Any) -> BlockPlan:
    return _block("bottleneck", 3, block)


def stem(block: Any) -> BlockPlan:
    return BlockPlan("stem", (_layer("conv1"),), pool=True)


_HOME = "detectron2.modeling.backbone.resnet"
ADAPTERS: dict[str, Adapter] = {
    f"{_HOME}.BasicBlock": basic,
    f"{_HOME}.BottleneckBlock": bottleneck,
    f"{_HOME}.BasicStem": stem,
}
NORMS = {"detectron2.layers.batch_norm.FrozenBatchNorm2d": Norm(frozen=True)}
