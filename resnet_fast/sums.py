"""Which sums of a main path and a shortcut are ours: of two tensors of one shape and dtype. Others torch must judge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layers import ConvBn
from .plan import BlockPlan, Refusal

__all__ = ["always_fits", "check_given", "check_summand", "misfit", "sizes"]


def sizes(x: Tensor, layers: list[ConvBn]) -> list[tuple[int, int]]:
    """Height and width of every layer's output."""
    size, found = list(x.shape[2:]), []
    for layer in layers:
        for i in (0, 1):
            span = layer.dilation[i] * (layer.weight.shape[2 + i] - 1)
            size[i] = (size[i] + 2 * layer.padding[i] - span - 1) // layer.stride[i] + 1
        found.append((size[0], size[1]))
    return found


def always_fits(plan: BlockPlan, layers: list[ConvBn], projection: ConvBn | None) -> bool:
    """Whether a shortcut of the block's own is as high and wide as the main path for every input; else see misfit."""
    if projection is None and plan.shortcut != "identity":
        return True
    main, side = _stride(layers), _stride([projection] if projection else [])
    return main is not None and main == side


def _stride(layers: list[ConvBn]) -> tuple[int, int] | None:
    """Of a chain whose output is ceil(size / stride) high and wide for every size: that stride. None of another."""
    total = [1, 1]
    for layer in layers:
        for i in (0, 1):
            if 2 * layer.padding[i] != layer.dilation[i] * (layer.weight.shape[2 + i] - 1):
                return None
            total[i] *= layer.stride[i]
    return total[0], total[1]


def misfit(plan: BlockPlan, x: Tensor, layers: list[ConvBn], projection: ConvBn | None) -> str | None:
    """Why torch's rules of broadcasting would have to judge the block's sum, with a shortcut of its own, at this x."""
    if projection is None and plan.shortcut != "identity":
        return None
    side = sizes(x, [projection])[-1] if projection else tuple(x.shape[2:])
    main = sizes(x, layers)[-1]
    return None if side == main else f"a summand is {side[0]} x {side[1]}, the other one {main[0]} x {main[1]}"


def check_given(residual: Any, x: Tensor, layers: list[ConvBn]) -> None:
    """Refuse a residual from elsewhere that torch's rules of broadcasting would have to judge."""
    shape = (x.shape[0], layers[-1].weight.shape[0], *sizes(x, layers)[-1])
    if tuple(residual.shape) != shape:
        raise Refusal(f"a summand is {tuple(residual.shape)}, the other one {shape}")


def check_summand(t: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a residual from elsewhere that torch's rules of promotion would have to judge."""
    if type(t) is not Tensor and type(t) is not nn.Parameter:
        raise Refusal(f"a summand is {type(t).__name__}, supported is torch.Tensor")
    if t.dim() != 4 or t.dtype != dtype or t.device != device or t.layout is not torch.strided:
        raise Refusal(f"a summand is {tuple(t.shape)}, {t.dtype} on {t.device}, the other one {dtype} on {device}")
