"""Inputs and weights that break kernels, each on a small block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import adapters
from resnet_fast.models.blocks import BasicBlock, Bottleneck
from resnet_fast.plan import BlockPlan, find

from .judging import Check
from .units import block_unit, fused, itself, unit_checks

__all__ = ["Hard", "every", "hard_checks"]


class Hard(NamedTuple):
    """A block in a state, and an input, that break kernels; ``train``: also forward and backward in training."""

    name: str
    module: nn.Module
    x: Tensor
    train: bool = True
    special: bool = False  # infinities or NaN: they must stand where torch's stand


def every() -> Iterator[Hard]:
    """(8 or 4, 32, 6, 6) inputs of a bottleneck with an identity, and of a basic block, whose padding shows."""

    def bottleneck(**change: float) -> nn.Module:
        torch.manual_seed(0)
        return altered(Bottleneck(32, 8), change)

    def basic(**change: float) -> nn.Module:
        torch.manual_seed(0)
        return altered(BasicBlock(32, 32), change)

    def altered(block: nn.Module, change: dict[str, float]) -> nn.Module:
        for name, m in block.named_modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)
                for what, value in change.items():
                    if what.startswith(name):
                        nn.init.constant_(getattr(m, what.removeprefix(f"{name}_")), value)
        return block

    random = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=random).contiguous(memory_format=torch.channels_last)

    def marked(value: float) -> Tensor:
        x = randn(4, 32, 6, 6)
        x[1, 3, 2, 2] = value
        return x

    yield Hard("mean / std = 1000", bottleneck(), 1000 + randn(8, 32, 6, 6))
    even, x = bottleneck(), randn(8, 32, 6, 6)
    x[:, 0] = 3.0
    with torch.no_grad():
        find(even, "conv1").weight[:4, 1:] = 0.0  # four channels of y that are constant, and not 0
    yield Hard("constant channels", even, x)
    yield Hard("gamma = 0", bottleneck(bn1_weight=0.0, bn3_weight=0.0), randn(8, 32, 6, 6))
    yield Hard("beta = 100 before padding", basic(bn1_bias=100.0), randn(4, 32, 6, 6))
    yield Hard("subnormals", bottleneck(), 1e-40 * randn(8, 32, 6, 6))
    yield Hard("one image", basic(), randn(1, 32, 6, 6))
    yield Hard("H * W = 1", basic(), randn(8, 32, 1, 1))
    yield Hard("one image of H * W = 1", basic(), randn(1, 32, 1, 1), train=False)
    yield Hard("inf", basic(), marked(torch.inf), special=True)
    yield Hard("-inf", bottleneck(), marked(-torch.inf), special=True)
    yield Hard("NaN", basic(), marked(torch.nan), special=True)


def _refuses(forward: Callable[[Tensor], Any], x: Tensor) -> str:
    """The type of error that a call in training raises, or "none"."""
    try:
        forward(x)
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error).__name__
    return "none"


def hard_checks(hard: Hard, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Check]:
    """All that ``unit_checks`` checks; and, where torch's training refuses the input, that ours refuses it likewise."""
    module, x = hard.module.to(device), hard.x.to(device)
    plan = adapters.look(module, type(module))
    assert isinstance(plan, BlockPlan)
    unit = block_unit(hard.name, module, plan, decidable=not hard.special)
    found = [c for d in dtypes for c in unit_checks(unit, x, d, hard.train, True if hard.special else None)]
    if not hard.train:
        mine, theirs = (_refuses(make(copy.deepcopy(module).train()), x) for make in (fused, itself))
        same, nan = mine == theirs, float("nan")
        what = f"{hard.name}: raises {mine}, torch {theirs}"
        found.append(Check("train", "float32", "error", what, 1, float(not same), 0.0, 0.0, nan, same))
    return found
