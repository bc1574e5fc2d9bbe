"""The functions that users and modules call: checks, autocast, layout; ``autograd`` has what they run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import AddRelu, Block, Static, forward_block
from .layers import ConvBn, Moves, layer_tensors, unit, update_running

__all__ = [
    "ConvBn",
    "LayoutWarning",
    "add_relu",
    "conv_bn_act",
    "one_channel",
    "residual_block",
    "to_channels_last",
]


class LayoutWarning(UserWarning):
    """An input was not channels-last and had to be copied."""


_layout_said = False


def to_channels_last(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) in channels-last layout: itself, or a copy.

    The first copy of more than 4 channels in a process is said in a :class:`LayoutWarning`. Any dtype. Raises
    ``RuntimeError``, as torch does, for another number of dimensions.
    """
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


def one_channel(z: Tensor) -> Tensor:
    """``z`` for whoever reads it next: of one channel in torch's own strides, for oneDNN errs in channels-last ones."""
    return z if z.shape[1] != 1 else z.clone(memory_format=torch.contiguous_format)


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


_VECTORS = ("gamma", "beta", "running_mean", "running_var", "bias")


def _fault_of(name: str, layer: Any) -> Exception | None:
    """What is wrong with one layer by itself."""
    if not isinstance(layer, ConvBn):
        return TypeError(
            f"{name}: found {type(layer).__name__}, supported is functional.ConvBn. "
            "Remedy: ConvBn(conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, ...)"
        )
    w = layer.weight
    if not isinstance(w, Tensor) or w.dim() != 4:
        found = f"{w.dim()} dimensions" if isinstance(w, Tensor) else type(w).__name__
        return ValueError(f"{name}.weight: found {found}, supported is a tensor (K, C // groups, R, S)")
    for field in _VECTORS:
        v = getattr(layer, field)
        if v is not None and (not isinstance(v, Tensor) or v.shape != w.shape[:1]):
            found = str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__
            return ValueError(f"{name}.{field}: found {found}, supported are None and ({w.shape[0]},), as weight has K")
    for field, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        v = getattr(layer, field)
        is_pair = isinstance(v, (tuple, list)) and len(v) == 2 and all(isinstance(n, int) for n in v)
        if not is_pair or min(v) < least:
            return ValueError(f"{name}.{field}: found {v!r}, supported are two integers from {least} on, for H and W")
    if not isinstance(layer.groups, int) or layer.groups < 1 or w.shape[0] % layer.groups:
        return ValueError(f"{name}.groups: found {layer.groups!r}, supported are divisors of K = {w.shape[0]}")
    return None


def _find_fault(x: Tensor, layers: Any, projection: Any, residual: Any) -> Exception | None:
    """What of the arguments of ``residual_block`` made it fail; None if it was not they. Called after a failure alone,
    so that a call which is right does not pay for it.
    """
    if not isinstance(layers, (list, tuple)) or isinstance(layers, ConvBn) or not layers:
        found = "nothing" if isinstance(layers, (list, tuple)) and not layers else type(layers).__name__
        return TypeError(f"layers: found {found}, supported is a list of at least one functional.ConvBn")
    if residual is not None and not isinstance(residual, Tensor):
        return TypeError(f"residual: found {type(residual).__name__}, supported are a tensor (N, K, P, Q) and None")
    named = [(f"layers[{i}]", layer) for i, layer in enumerate(layers)]
    for name, layer in (*named, *([] if projection is None else [("projection", projection)])):
        fault = _fault_of(name, layer)
        if fault is not None:
            return fault
    channels, source = x.shape[1], "x"
    for name, layer in named:
        fault = _misfit(name, layer, channels, source)
        if fault is not None:
            return fault
        channels, source = layer.weight.shape[0], name
    if projection is None:
        return None
    if projection.weight.shape[0] != channels:
        return ValueError(
            f"projection.weight: found K = {projection.weight.shape[0]}, supported is {channels}, that of {source}"
        )
    return _misfit("projection", projection, x.shape[1], "x")


def _misfit(name: str, layer: ConvBn, channels: int, source: str) -> Exception | None:
    reads = layer.weight.shape[1] * layer.groups
    if reads == channels:
        return None
    return ValueError(
        f"{name}.weight: found {tuple(layer.weight.shape)} with groups={layer.groups}, which reads {reads} channels; "
        f"supported here are {channels}, those of {source}"
    )


def _autocast(
    x: Tensor, residual: Tensor | None, layers: Sequence[ConvBn]
) -> tuple[Tensor, Tensor | None, list[ConvBn]]:
    """Under autocast: the operands of convolutions in the low dtype, as torch's conv2d would have cast them."""
    kind = x.device.type
    # is_autocast_enabled raises for device types that have no autocast, such as meta; and torch.compile of torch 2.11
    # cannot trace the question whether there is one.
    on = (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
    if not on or x.dtype == torch.float64:
        return x, residual, list(layers)
    dtype = torch.get_autocast_dtype(kind)
    cast = [
        layer._replace(weight=layer.weight.to(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))
        for layer in layers
    ]
    return x.to(dtype), None if residual is None else residual.to(dtype), cast


#: What wrong arguments end in, deep inside.
_MISTAKES = AttributeError, IndexError, RuntimeError, TypeError, ValueError


def residual_block(
    x: Tensor,
    layers: Sequence[ConvBn],
    *,
    projection: ConvBn | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
    pool: bool = False,
) -> Tensor:
    """z = act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut), differentiable once; updates running statistics.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16 (float64 through the definitions), best channels-last.
        layers: the main path; a layer's ``relu`` follows its batch norm, the last one's follows the sum.
        projection: the shortcut is this layer, reading ``x`` (options B and C); its ``relu`` is ignored.
        residual: the shortcut is this tensor (N, K, P, Q), computed elsewhere.
        identity: the shortcut is ``x`` itself.
        pool: a 3x3/2 max-pool with padding 1 follows, as in a stem; without a shortcut, behind a ReLU.

    At most one shortcut may be given; none makes a chain. Returns z (N, K, P, Q), channels-last, in the dtype of ``x``
    or of autocast. Under autocast the two summands of ``x``'s gradient (main path and shortcut) are added in autocast's
    dtype and their sum is cast to that of ``x``, where torch casts each and then adds. Raises ``ValueError`` for wrong
    dimensions, or one value per channel where ``batch_stats``, ``TypeError`` for a dtype that is no floating point,
    ``RuntimeError`` for a mix of devices or dtypes, as torch does.
    """
    if torch.compiler.is_compiling():
        return _residual_block(x, layers, projection, residual, identity, pool)
    try:
        return _residual_block(x, layers, projection, residual, identity, pool)
    except _MISTAKES as error:
        fault = _find_fault(x, layers, projection, residual) if isinstance(x, Tensor) and x.dim() == 4 else None
        if fault is None:
            raise
        raise fault from error


def _static(every: Sequence[ConvBn], projection: bool, identity: bool, pool: bool) -> Static:
    return Static(
        geometry=[la.geometry for la in every],
        eps=[la.eps for la in every],
        relu=[la.relu for la in every],
        batch_stats=[la.batch_stats for la in every],
        group=[la.group if la.batch_stats else None for la in every],
        projection=projection,
        identity=identity,
        pool=pool,
    )


def _residual_block(
    x: Tensor,
    layers: Sequence[ConvBn],
    projection: ConvBn | None,
    residual: Tensor | None,
    identity: bool,
    pool: bool,
) -> Tensor:
    if (projection is not None) + (residual is not None) + identity > 1:
        raise ValueError("projection, residual, identity: found more than one, supported is at most one")
    if pool and (projection is not None or residual is not None or identity or not layers[-1].relu):
        raise ValueError("pool: found True, supported without a shortcut and behind a ReLU")
    every = [*layers, projection] if projection is not None else list(layers)
    if isinstance(x, Tensor) and x.dim() == 4:
        x, residual, every = _autocast(x, residual, every)
    _check(x, every)
    x = to_channels_last(x)
    static = _static(every, projection is not None, identity, pool)
    tensors = [t for layer in every for t in layer_tensors(layer)]
    if not torch.compiler.is_compiling():
        static = static._replace(running=every)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *tensors)):
        z, *statistics = Block.apply(static, x, residual, *tensors)
        if static.running is not None:
            return z
    else:
        z, _, _, statistics = forward_block(static, x, residual, tensors, False)
    update_running(every, statistics, empty=x.numel() == 0)
    return z


class Prepared(NamedTuple):
    """A block in training, as far as x does not matter: what ``residual_block`` makes of its layers at each call."""

    static: Static
    tensors: list[Tensor | None]
    weights: list[Tensor]
    vectors: list[Tensor]  # those of the tensors that must be float32
    groups: int  # of the first layer


def prepare(layers: Sequence[ConvBn], projection: ConvBn | None, identity: bool, pool: bool) -> Prepared | None:
    """For :func:`run_prepared`; None where something depends on more than these tensors' being the same."""
    every = [*layers, projection] if projection is not None else list(layers)
    vectors = [v for la in every for v in (la.gamma, la.beta) if v is not None]
    if not all(la.batch_stats and la.bias is None and la.group is None and max(la.dilation) == 1 for la in every):
        return None
    static = _static(every, projection is not None, identity, pool)._replace(running=every)
    momenta = {la.momentum for la in every}
    buffers = [b for la in every for b in (la.running_mean, la.running_var)]
    counters = [la.num_batches_tracked for la in every]
    if len(momenta) == 1 and None not in momenta and not any(t is None for t in (*buffers, *counters)):
        static = static._replace(moves=Moves(buffers, momenta.pop(), counters))  # type: ignore[arg-type]
    tensors = [t for la in every for t in (la.weight, la.gamma, la.beta, None, None)]
    weights = [la.weight for la in every]
    return Prepared(static, tensors, weights, vectors, every[0].groups)


def run_prepared(x: Tensor, prepared: Prepared) -> Tensor | None:
    """``residual_block`` without a residual, outside of autocast, where autograd records; None where it is to be asked.

    x (N, C, H, W) and the weights have been checked: 4-d, one dtype below float64, one device. Errors as there.
    """
    for v in prepared.vectors:
        if v.dtype is not torch.float32:
            return None
    static = prepared.static
    try:
        return Block.apply(static, to_channels_last(x), None, *prepared.tensors)[0]
    except _MISTAKES as error:
        every = static.running
        assert every is not None
        fault = _find_fault(x, list(every[: static.end + 1]), every[-1] if static.projection else None, None)
        if fault is None:
            raise
        raise fault from error


def conv_bn_act(x: Tensor, layer: ConvBn) -> Tensor:
    """z = relu(bn(conv(x))), or without the ReLU where ``layer.relu`` is False. See :func:`residual_block`."""
    return residual_block(x, [layer])


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """z = relu(x + residual), (N, K, P, Q) of one shape, dtype and device; differentiable once, channels-last.

    float32, bfloat16 or float16 (float64 through the definition). Raises ``ValueError`` where ``residual`` is not like
    ``x``, ``RuntimeError`` for another number of dimensions.
    """
    x, residual = to_channels_last(x), to_channels_last(residual)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return AddRelu.apply(x, residual)
    return ops.affine_act(x, *unit(x), residual)
