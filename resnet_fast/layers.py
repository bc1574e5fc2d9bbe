"""A convolution and its batch norm as tensors and numbers: what its vectors come to, and its running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .dispatch import hook

__all__ = ["ConvBn", "Moves", "layer_tensors", "scale_shift", "unit", "update_at_once", "update_running"]


class ConvBn(NamedTuple):
    """One convolution and its batch norm, as tensors and numbers.

    ``weight`` (K, C // groups, R, S) in the dtype of x; ``gamma``, ``beta``, ``running_mean``, ``running_var`` and
    ``bias`` (K,) or None, of any floating-point dtype; ``num_batches_tracked`` () int64 or None.
    ``batch_stats``: normalise by the batch's statistics, as in training, and update the running ones, if there are any,
    by ``momentum`` (None: cumulative average over ``num_batches_tracked``). ``relu`` follows the norm. ``group``: the
    process group over whose ranks the batch's statistics are taken, as nn.SyncBatchNorm does; None: this process alone.
    """

    weight: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.1
    batch_stats: bool = True
    relu: bool = True
    group: Any = None

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation, groups: the trailing arguments of every convolution op.

        A filter one tap wide has no dilation; oneDNN does not know, and crashes on a grouped 1x1 with one.
        """
        dilation = list(self.dilation)
        if max(dilation) > 1:
            dilation = [1 if taps == 1 else d for taps, d in zip(self.weight.shape[2:], dilation, strict=True)]
        return list(self.stride), list(self.padding), dilation, self.groups


def scale_shift(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd, scale = gamma * rstd, shift = beta - mean * scale; all (K,) in the dtype of ``mean``."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else gamma.to(mean.dtype) * rstd
    shift = -mean * scale
    return rstd, scale, shift if beta is None else shift + beta.to(mean.dtype)


def layer_tensors(layer: ConvBn) -> list[Tensor | None]:
    """A layer's tensors as the Function takes them: vectors wide, a convolution's bias folded into beta."""
    wide = ops.stats_dtype(layer.weight.dtype)
    if layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]:  # in training nobody else would see it
        raise ValueError(f"bias: found {tuple(layer.bias.shape)}, supported is ({layer.weight.shape[0]},)")
    gamma, beta = layer.gamma, layer.beta
    if gamma is not None and gamma.dtype is not wide:
        gamma = gamma.to(wide)
    if beta is not None and beta.dtype is not wide:
        beta = beta.to(wide)
    if layer.batch_stats:
        # The mean cancels the bias: its gradient is zero, but it has one.
        if layer.bias is not None and layer.bias.requires_grad:
            nothing = layer.bias.to(wide) * 0
            beta = nothing if beta is None else beta + nothing
        return [layer.weight, gamma, beta, None, None]
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("running_mean, running_var: found None, needed where batch_stats is False")
    mean, var = layer.running_mean.to(wide), layer.running_var.to(wide)
    if layer.bias is not None:
        # bn(y + bias) is bn(y) with bias * gamma * rstd more beta.
        lift = layer.bias.to(wide) * scale_shift(mean, var, gamma, None, layer.eps)[1]
        beta = lift if beta is None else beta + lift
    return [layer.weight, gamma, beta, mean, var]


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale 1 and shift 0 for every channel of ``x``."""
    zero = torch.zeros(x.shape[1], dtype=ops.stats_dtype(x.dtype), device=x.device)
    return zero + 1, zero


@torch.no_grad()
def update_running(layers: Sequence[ConvBn], statistics: Sequence[Tensor], empty: bool) -> None:
    """nn.BatchNorm2d's update of every layer, outside the ops, which never write their inputs.

    ``statistics``: mean and unbiased var of each layer, flat. A batch that is ``empty`` is counted, and moves nothing,
    as in torch.
    """
    moved: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # by momentum: buffers, and what they move towards
    counters = []
    for i, layer in enumerate(layers):
        if not layer.batch_stats or layer.running_mean is None or layer.running_var is None:
            continue
        mean, var = statistics[2 * i : 2 * i + 2]
        if layer.bias is not None:
            mean = mean + layer.bias.to(mean.dtype)  # the convolution ran without it: batch norm cancels it
        if layer.num_batches_tracked is not None:
            counters.append(layer.num_batches_tracked)
        if empty and layer.group is None:
            continue
        if layer.momentum is None:
            factor: float | Tensor = 0.0
            if layer.num_batches_tracked is not None:  # a tensor: no host synchronisation
                factor = 1.0 / (layer.num_batches_tracked + 1).to(mean.dtype)
            for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
                buffer.copy_(buffer.to(value.dtype).lerp_(value, factor))
            continue
        buffers, values = moved.setdefault(layer.momentum, ([], []))
        buffers += [layer.running_mean, layer.running_var]
        values += [mean, var]
    if counters:
        torch._foreach_add_(counters, 1)
    for factor, (buffers, values) in moved.items():
        if all(b.dtype == v.dtype for b, v in zip(buffers, values, strict=True)):
            torch._foreach_lerp_(buffers, values, factor)
            continue
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(buffer.to(value.dtype).lerp_(value, factor))


class Moves(NamedTuple):
    """The running statistics of layers that all have one momentum: mean, var, mean, ...; and their counters."""

    buffers: list[Tensor]
    momentum: float
    counters: list[Tensor]


def update_at_once(moves: Moves | None, x: Tensor, statistics: list[Tensor]) -> bool:
    """``update_running`` in one native call; False, and nothing is done, where it must go its own way."""
    update = None if moves is None or x.numel() == 0 else hook("bn_stats", "update", x.device, x.dtype)
    return update is not None and moves is not None and update(moves[0], statistics, *moves[1:])
