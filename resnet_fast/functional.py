"""The functions that users and modules call: checks, autocast, layout, autograd, running statistics.

A residual block is one ``autograd.Function`` around the ops. Its forward saves the convolution outputs y and the
per-channel statistics; no activation but the block's own output is kept. Its backward forms the masks and the inner
activations again from y, scale and shift.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .dispatch import forced_backend, use_backend

__all__ = [
    "ConvBn",
    "LayoutWarning",
    "conv_bn_act",
    "residual_block",
    "to_channels_last",
]


class LayoutWarning(UserWarning):
    """An input was not channels-last and had to be copied."""


class ConvBn(NamedTuple):
    """One convolution and its batch norm, as tensors and numbers.

    ``weight`` (K, C // groups, R, S); ``gamma``, ``beta``, ``running_mean``, ``running_var``, ``bias`` (K,) or None.
    ``batch_stats``: normalise by the batch's statistics, as in training, and update the running ones, if there are any,
    by ``momentum`` (None: cumulative average over ``num_batches_tracked``). ``relu`` follows the norm.
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

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation, groups: the trailing arguments of every convolution op."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


# ---- what every path shares -------------------------------------------------------------------------------------

_layout_said = False


def to_channels_last(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) in channels-last layout: itself, or a copy, and the first copy in a process is said aloud."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    global _layout_said
    # The first layer's three or four channels cost little and come from a data loader: not worth a word.
    if not _layout_said and x.shape[1] > 4 and not torch.compiler.is_compiling():
        _layout_said = True
        warnings.warn(
            f"x {tuple(x.shape)} is not channels_last and is copied to it at every call (said once a process). "
            "Remedy: model.to(memory_format=torch.channels_last) and x.to(memory_format=torch.channels_last).",
            LayoutWarning,
            stacklevel=3,
        )
    return x.contiguous(memory_format=torch.channels_last)


def scale_shift(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rstd, scale = gamma * rstd, shift = beta - mean * scale; all (K,) in the dtype of ``mean``."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else gamma.to(mean.dtype) * rstd
    shift = -mean * scale
    return rstd, scale, shift if beta is None else shift + beta.to(mean.dtype)


def _check(x: Tensor, layers: Sequence[ConvBn]) -> None:
    """Refuse what torch would refuse, before a kernel sees an address."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        found = f"{x.dim()} dimensions" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: found {found}, supported is a tensor (N, C, H, W)")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: found dtype {x.dtype}, supported are float32, bfloat16, float16. Remedy: x.float()")
    for layer in layers:
        w = layer.weight
        if w.device != x.device:
            raise RuntimeError(
                f"x and weight are on different devices: found {x.device} and {w.device}. "
                f"Remedy: x.to({str(w.device)!r})"
            )
        if w.dtype != x.dtype:
            raise RuntimeError(
                f"x and weight differ in dtype: found {x.dtype} and {w.dtype}. "
                f"Remedy: x.to({w.dtype}), or torch.autocast({x.device.type!r}) for mixed precision"
            )


def _autocast(
    x: Tensor, residual: Tensor | None, layers: Sequence[ConvBn]
) -> tuple[Tensor, Tensor | None, list[ConvBn]]:
    """Under autocast: the operands of convolutions in the low dtype, as torch's conv2d would have cast them."""
    kind = x.device.type
    # is_autocast_enabled raises for device types that have no autocast, such as meta.
    off = not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind)
    if off or x.dtype == torch.float64:
        return x, residual, list(layers)
    dtype = torch.get_autocast_dtype(kind)
    cast = [
        layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
        for layer in layers
    ]
    return x.to(dtype), None if residual is None else residual.to(dtype), cast


@torch.no_grad()
def _update_running(layer: ConvBn, mean: Tensor, var: Tensor, empty: bool) -> None:
    """nn.BatchNorm2d's update, by the unbiased ``var``; outside the ops, which never write their inputs.

    A batch that is ``empty`` is counted, and moves nothing, as in torch.
    """
    if layer.running_mean is None or layer.running_var is None:
        return
    if layer.bias is not None:
        mean = mean + layer.bias.to(mean.dtype)  # the convolution ran without it: batch norm cancels it
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if empty:
        return
    factor: float | Tensor = 0.0
    if layer.momentum is not None:
        factor = layer.momentum
    elif layer.num_batches_tracked is not None:
        factor = (1.0 / layer.num_batches_tracked).to(mean.dtype)  # a tensor: no host synchronisation
    for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
        if buffer.dtype == value.dtype:
            buffer.lerp_(value, factor)
        else:
            buffer.copy_(buffer.to(value.dtype).lerp_(value, factor))


# ---- training: one autograd.Function per block ------------------------------------------------------------------


class _Static(NamedTuple):
    """What the block's Function must know besides its tensors; hashable. One entry per layer, the projection last."""

    geometry: tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], ...]
    eps: tuple[float, ...]
    relu: tuple[bool, ...]
    batch_stats: tuple[bool, ...]
    projection: bool  # the last layer is the shortcut's; it reads x
    identity: bool  # the residual is x itself

    def conv(self, i: int) -> tuple[list[int], list[int], list[int], int]:
        """Trailing arguments of layer i's convolution ops."""
        stride, padding, dilation, groups = self.geometry[i]
        return list(stride), list(padding), list(dilation), groups


#: Tensors per layer in the Function's flat argument list: weight, gamma, beta, and the running mean and var.
_PER_LAYER = 5


class _Layer(NamedTuple):
    """What the backward of one layer needs of its forward; all but w and y are (K,)."""

    w: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor

    def activation(self, relu: bool) -> Tensor:
        """The lazy activation, written out."""
        return ops.affine_act(self.y, self.scale, self.shift, relu=relu)


def _forward_layer(
    static: _Static, i: int, operand: Tensor, tensors: Sequence[Tensor | None]
) -> tuple[_Layer, tuple[Tensor, Tensor]]:
    """y = conv(operand) and the affine that its statistics make. Returns the layer, and mean and unbiased var."""
    w, gamma, beta, mean, var = tensors[_PER_LAYER * i : _PER_LAYER * (i + 1)]
    assert w is not None
    if static.batch_stats[i]:
        y, mean, var = ops.conv_stats(operand, w, *static.conv(i))
        n, _, p, q = y.shape
        if n * p * q == 1:  # nn.BatchNorm2d's own rule, in its own words
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
        statistics = mean, var * (n * p * q / (n * p * q - 1))
    else:
        assert mean is not None and var is not None
        y = F.conv2d(operand, w, None, *static.conv(i)).contiguous(memory_format=torch.channels_last)
        statistics = mean.new_empty(0), var.new_empty(0)
    return _Layer(w, y, mean, *scale_shift(mean, var, gamma, beta, static.eps[i])), statistics


def _forward_block(
    static: _Static, x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, list[_Layer], list[Tensor]]:
    """z, the layers, and their statistics flat: mean, unbiased var, mean, ... (empty where they were given)."""
    end = len(static.geometry) - static.projection - 1
    layers: list[_Layer] = []
    statistics: list[Tensor] = []
    operand = x
    for i in range(len(static.geometry)):
        layer, stats = _forward_layer(static, i, x if i > end else operand, tensors)
        layers.append(layer)
        statistics += stats
        operand = layer.activation(static.relu[i]) if i < end else x
    last, relu = layers[end], static.relu[end]
    if static.projection:
        side = layers[-1]
        z = ops.affine_act(last.y, last.scale, last.shift, side.y, side.scale, side.shift, relu)
    else:
        z = ops.affine_act(last.y, last.scale, last.shift, x if static.identity else residual, relu=relu)
    return z, layers, statistics


class _Backward:
    """The backward pass of one block: the state that its layers share."""

    def __init__(self, static: _Static, x: Tensor, layers: list[_Layer], needs: Sequence[Sequence[bool]]) -> None:
        self.static, self.x, self.layers, self.needs = static, x, layers, needs
        self.grads: list[Tensor | None] = [None] * (_PER_LAYER * len(layers))

    def mask(self, i: int) -> tuple[Tensor, Tensor] | tuple[()]:
        """scale and shift, from which the ops form the mask of the ReLU behind layer i; nothing without a ReLU."""
        return (self.layers[i].scale, self.layers[i].shift) if self.static.relu[i] else ()

    def sums(self, i: int, dz: Tensor, mask: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """sum(g) and sum(g * (y - mean)) of layer i, or None where nothing depends on them."""
        _, gamma, beta = self.needs[i]
        if not (gamma or beta or self.static.batch_stats[i]):
            return None
        return ops.bn_backward_sums(dz, self.layers[i].y, self.layers[i].mean, *mask)

    def parameters(
        self, i: int, dz: Tensor, mask: Sequence[Tensor], sums: tuple[Tensor, Tensor] | None, before: int | None
    ) -> Tensor:
        """Gradients of layer i's weight, gamma and beta, into ``grads``; returns dy. ``before``: the layer it reads."""
        layer, (weight, gamma, beta) = self.layers[i], self.needs[i]
        a = layer.scale
        b = c = torch.zeros_like(a)
        if sums is not None:
            sum_g, sum_gy = sums
            self.grads[_PER_LAYER * i + 1] = sum_gy * layer.rstd if gamma else None
            self.grads[_PER_LAYER * i + 2] = sum_g if beta else None
            if self.static.batch_stats[i]:
                m = layer.y.numel() // layer.y.shape[1]
                b, c = -a * layer.rstd.square() * sum_gy / m, -a * sum_g / m
        dy = ops.bn_backward_apply(dz, layer.y, layer.mean, a, b, c, *mask)
        if weight:
            operand = self.x if before is None else self.layers[before].activation(self.static.relu[before])
            self.grads[_PER_LAYER * i] = ops.conv_wgrad(dy, operand, list(layer.w.shape), *self.static.conv(i))
        return dy


class _Block(torch.autograd.Function):
    """z = act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut), then mean and unbiased var of each layer."""

    @staticmethod
    def forward(
        ctx: Any, static: _Static, x: Tensor, residual: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        z, layers, statistics = _forward_block(static, x, residual, tensors)
        ctx.static, ctx.backend = static, forced_backend()
        # At the block's end z tells the mask; without a residual it follows from y, and z need not be kept.
        end = len(layers) - static.projection - 1
        ctx.keeps_z = static.relu[end] and (static.identity or static.projection or residual is not None)
        ctx.save_for_backward(x, z if ctx.keeps_z else None, *(t for layer in layers for t in layer))
        ctx.mark_non_differentiable(*statistics)
        return (z, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.backend is None:
            return _Block._backward(ctx, dz)
        # On a GPU this runs in autograd's own threads, which know nothing of the forward's use_backend.
        with use_backend(ctx.backend):
            return _Block._backward(ctx, dz)

    @staticmethod
    def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        static: _Static = ctx.static
        x, z, *saved = ctx.saved_tensors
        layers = [_Layer(*saved[i : i + 6]) for i in range(0, len(saved), 6)]
        needs_x, needs_residual = ctx.needs_input_grad[1:3]
        flags = ctx.needs_input_grad[3:]
        needs = [flags[i : i + 3] for i in range(0, len(flags), _PER_LAYER)]  # of weight, gamma, beta
        block = _Backward(static, x, layers, needs)
        end = len(layers) - static.projection - 1
        side = layers[-1] if static.projection else None

        # The block's end: g, and the sums of its batch norms.
        mask: Sequence[Tensor] = () if ctx.keeps_z else block.mask(end)
        if ctx.keeps_z:
            g, sum_g, sum_gy, sum_gr = ops.affine_act_backward(
                dz, z, layers[end].y, layers[end].mean, side.y if side else None, side.mean if side else None
            )
            sums: tuple[Tensor, Tensor] | None = (sum_g, sum_gy)
            side_sums: tuple[Tensor, Tensor] | None = (sum_g, sum_gr)
        else:
            g = dz.contiguous(memory_format=torch.channels_last)
            sums = block.sums(end, g, mask)
            side_sums = block.sums(end + 1, g, ()) if side else None

        dx: Tensor | None = None
        dz = g
        for i in range(end, -1, -1):
            upstream = needs_x or any(any(n) for n in needs[:i])
            if not upstream and not any(needs[i]):
                break
            before = i - 1 if i else None
            dy = block.parameters(i, dz, mask, sums, before)
            if not upstream:
                break
            shape = x.shape if before is None else layers[before].y.shape
            dz = ops.conv_dgrad(dy, layers[i].w, list(shape), *static.conv(i))
            if before is None:
                dx = dz
            else:
                mask = block.mask(before)
                sums = block.sums(before, dz, mask)

        if side and (needs_x or any(needs[-1])):
            dy = block.parameters(end + 1, g, (), side_sums, None)
            if needs_x:
                assert dx is not None
                dx.add_(ops.conv_dgrad(dy, side.w, list(x.shape), *static.conv(end + 1)))
        if static.identity and needs_x:
            assert dx is not None
            dx.add_(g)
        return None, dx, (g if needs_residual else None), *block.grads


def layer_tensors(layer: ConvBn) -> list[Tensor | None]:
    """A layer's tensors as the Function takes them: vectors wide, a convolution's bias folded into beta."""
    wide = ops.stats_dtype(layer.weight.dtype)
    gamma, beta = (None if v is None else v.to(wide) for v in (layer.gamma, layer.beta))
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


def residual_block(
    x: Tensor,
    layers: Sequence[ConvBn],
    *,
    projection: ConvBn | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
) -> Tensor:
    """z = act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut), differentiable once; updates running statistics.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16 (float64 through the definitions), best channels-last.
        layers: the main path; a layer's ``relu`` follows its batch norm, the last one's follows the sum.
        projection: the shortcut is this layer, reading ``x`` (options B and C); its ``relu`` is ignored.
        residual: the shortcut is this tensor (N, K, P, Q), computed elsewhere.
        identity: the shortcut is ``x`` itself.

    At most one shortcut may be given; none makes a chain. Returns z (N, K, P, Q), channels-last, in the dtype of ``x``
    or of autocast. Under autocast the two summands of ``x``'s gradient (main path and shortcut) are added in autocast's
    dtype and their sum is cast to that of ``x``, where torch casts each and then adds. Raises ``ValueError`` for wrong
    dimensions, or one value per channel where ``batch_stats``, ``TypeError`` for a dtype that is no floating point,
    ``RuntimeError`` for a mix of devices or dtypes, as torch does.
    """
    if (projection is not None) + (residual is not None) + identity > 1:
        raise ValueError("projection, residual, identity: found more than one, supported is at most one")
    every = [*layers, projection] if projection is not None else list(layers)
    if isinstance(x, Tensor) and x.dim() == 4:
        x, residual, every = _autocast(x, residual, every)
    _check(x, every)
    x = to_channels_last(x)
    static = _Static(
        geometry=tuple((la.stride, la.padding, la.dilation, la.groups) for la in every),
        eps=tuple(la.eps for la in every),
        relu=tuple(la.relu for la in every),
        batch_stats=tuple(la.batch_stats for la in every),
        projection=projection is not None,
        identity=identity,
    )
    tensors = [t for layer in every for t in layer_tensors(layer)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *tensors)):
        z, *statistics = _Block.apply(static, x, residual, *tensors)
    else:
        z, _, statistics = _forward_block(static, x, residual, tensors)
    for i, layer in enumerate(every):
        if layer.batch_stats:
            mean, var = statistics[2 * i : 2 * i + 2]
            _update_running(layer, mean, var, empty=z.numel() == 0)
    return z


def conv_bn_act(x: Tensor, layer: ConvBn) -> Tensor:
    """z = relu(bn(conv(x))), or without the ReLU where ``layer.relu`` is False. See :func:`residual_block`."""
    return residual_block(x, [layer])
