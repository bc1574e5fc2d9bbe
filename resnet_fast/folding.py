"""Inference on the CPU: batch norm folded into the convolution, one library call per convolution, nothing in between.

Two promises make this safe to switch on by itself: folded weights are never stale (:class:`FoldCache`), and NaN and
infinity come out as torch's own modules would have them (:func:`folded_block`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend, choose, prepare, reasons
from .functional import ConvBn, layer_tensors, scale_shift, to_channels_last

__all__ = ["FoldCache", "Folded", "folded_block"]

_INTO = "conv_affine_act_into"

#: Magnitudes that float32 and bfloat16 still hold, with room for a rounding.
_LARGEST = 1e38


class Folded:
    """A convolution with its batch norm folded in: z = act(conv(x, w * scale) + shift + residual).

    By its running statistics, for inputs of the dtype and device of ``x``; done in float32 and rounded once. The weight
    is laid out as the backend wants it, for each input shape anew; of the last ``SHAPES`` shapes the layouts are kept.
    |conv(x) + shift| <= ``gain`` * max|x| + ``offset``.
    """

    SHAPES = 4

    def __init__(self, layer: ConvBn, x: Tensor) -> None:
        with torch.no_grad():
            w, gamma, beta, mean, var = layer_tensors(layer)
            assert w is not None and mean is not None and var is not None
            _, self._scale, shift = scale_shift(mean, var, gamma, beta, layer.eps)
            rows = (w.to(shift.dtype) * self._scale.view(-1, 1, 1, 1)).abs().sum(dim=(1, 2, 3))
            self.gain = _bounded(rows.amax().item())
            self.offset = _bounded(shift.abs().amax().item())
            self.shift = shift.to(x.dtype)
        self.relu = layer.relu
        self._weight = layer.weight
        self._geometry = layer.geometry
        self._packed: dict[torch.Size, Tensor] = {}
        # The backend's own function: the ops' detour over the dispatcher would cost as much as a small convolution.
        choice = choose("conv_affine_act", x.device, x.dtype)
        self._function = choice.function
        self._into = None if choice.backend == "torch" else getattr(backend(choice.backend), _INTO, None)

    @torch.no_grad()
    def _pack(self, x: Tensor) -> Tensor:
        folded = (self._weight.to(self._scale.dtype) * self._scale.view(-1, 1, 1, 1)).to(x.dtype)
        packed = prepare("conv_affine_act", folded, x, *self._geometry)
        for shape in list(self._packed)[: -self.SHAPES + 1]:
            self._packed.pop(shape, None)
        self._packed[x.shape] = packed
        return packed

    def __call__(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """z = act(conv(x) + shift + residual); with ``overwrite`` over ``residual``, where the backend can."""
        w = self._packed.get(x.shape)
        if w is None:
            w = self._pack(x)
        if overwrite and residual is not None and self._into is not None:
            return self._into(residual, x, w, self.shift, *self._geometry, self.relu)
        return self._function(x, w, self.shift, *self._geometry, None, residual, self.relu)

    def bound(self, magnitude: float) -> float:
        """The largest |conv(x) + shift| that an x of this magnitude can give."""
        return self.gain * magnitude + self.offset


class FoldCache:
    """The folded layers of one block, made anew whenever anything that they were made of has changed.

    Change is seen by the identity, address and version counter of every tensor, and, for writes that bump no counter
    (``p.data.mul_(2)``), by a fingerprint of the memory: all of every vector, and a word in every 16 KB of a weight.
    """

    def __init__(self) -> None:
        self._entry: tuple[Any, ...] | None = None  # replaced whole, so that threads may share the cache

    def get(self, x: Tensor, layers: Sequence[ConvBn]) -> list[Folded] | None:
        """Every layer folded for ``x``; None where changes could not be seen: off the CPU, or without our kernels."""
        if x.device.type != "cpu" or reasons("bn_stats", x.device, x.dtype)["native"] is not None:
            return None
        native = backend("native")
        static = (choose("conv_affine_act", x.device, x.dtype), *(layer[_TENSOR_FIELDS:] for layer in layers))
        tensors = [t for layer in layers for t in layer[:_TENSOR_FIELDS] if isinstance(t, Tensor)]
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        entry = self._entry
        if (
            entry is not None
            and entry[0] == static
            and entry[1] == state
            and all(a is b for a, b in zip(entry[2], tensors, strict=True))
            and entry[3] == native.fingerprint(tensors)
        ):
            return entry[4]
        folded = [Folded(layer, x) for layer in layers]
        self._entry = (static, state, tensors, native.fingerprint(tensors), folded)
        return folded


#: The leading fields of ConvBn, up to and with ``bias``, are tensors; the rest are numbers.
_TENSOR_FIELDS = 7


def _magnitude(x: Tensor) -> float:
    """max|x|, infinite where x holds a NaN: known from the block that made x, or measured by one pass."""
    version = 0 if x.is_inference() else x._version
    known = getattr(x, "_resnet_fast_bound", None)
    if known is not None and known[0] == version:
        return known[1]
    return _measure(x)


def _measure(x: Tensor) -> float:
    low, high = torch.aminmax(x.detach())
    return _bounded(max(-low.item(), high.item()))


def _bounded(value: float) -> float:
    """``value``, or, for NaN and infinities, a number that no bound survives, and that 0 cannot turn into NaN."""
    return value if math.isfinite(value) else 1e300


def folded_block(
    x: Tensor,
    layers: Sequence[Folded],
    *,
    projection: Folded | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
    disposable: bool = False,
) -> Tensor | None:
    """``residual_block`` for inference, on folded layers: one library call per convolution, nothing in between.

    ``disposable``: nobody needs ``x`` afterwards, so z may be written over it.
    None where a value inside might overflow, or ``x`` holds a NaN or an infinity: a library's ReLU need not let those
    pass, torch's does, so the caller takes another path. What cannot overflow is known from the weights' row sums, and
    that bound travels along with z; it is measured only where it has grown too large.
    """
    if x.numel() == 0:
        return None
    side_bound = 0.0 if residual is None else _magnitude(residual)

    def bound(magnitude: float) -> float:
        top = inner = magnitude
        for layer in layers:
            inner = layer.bound(inner)
            top = max(top, inner)
        side = projection.bound(magnitude) if projection else magnitude if identity else side_bound
        return max(top, inner + side)

    out = bound(_magnitude(x))
    if not out < _LARGEST:
        out = bound(_measure(x))
        if not out < _LARGEST:
            return None
    given, x = x, to_channels_last(x)
    overwrite = False
    if projection is not None:
        residual, overwrite = projection(x), True
    elif identity:
        residual, overwrite = x, disposable or x is not given
    for layer in layers[:-1]:
        x = layer(x)
    z = layers[-1](x, residual, overwrite)
    z._resnet_fast_bound = (0 if z.is_inference() else z._version, out)  # type: ignore[attr-defined]
    return z
