"""Inference on the CPU: batch norm folded into the convolution, one library call per convolution, nothing in between.

Two promises make this safe to switch on by itself: folded weights are never stale (:class:`FoldCache`), and NaN and
infinity come out as torch's own modules would have them (:func:`folded_block`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import buffers, switches
from .dispatch import backend, choose, hook, prepare, reasons
from .functional import to_channels_last
from .layers import ConvBn, layer_tensors, scale_shift
from .watch import Watch

__all__ = ["FoldCache", "Folded", "Program", "arithmetic", "cast", "folded_block", "magnitude"]

#: Magnitudes that float32 and bfloat16 still hold, with room for the rounding of every layer, and for what Winograd's
#: transforms make of them on the way, up to 36 times as large.
_LARGEST = 1e36


#: Multiply-adds per value of a block's input and output from which a wider arithmetic earns back the two conversions:
#: estimated at 4 ps saved a multiply-add and 400 ps a value converted; networks agree (docs/conv.md, entry 4).
_INTENSE = 100


def arithmetic(device: torch.device, dtype: torch.dtype, layers: Sequence[ConvBn], projection: bool) -> torch.dtype:
    """The dtype in which a block is computed for inputs of ``dtype``: wider, where the hardware is faster so.

    ``projection``: the last layer is the shortcut's.
    """
    ask = hook("conv_affine_act", "arithmetic", device, dtype)
    wide = dtype if ask is None else ask(dtype)
    if wide == dtype:
        return dtype
    main = layers[:-1] if projection else layers
    macs, positions = (float(layers[-1].weight.numel()) if projection else 0.0), 1
    for layer in reversed(main):  # per position of the output
        macs += layer.weight.numel() * positions
        positions *= layer.stride[0] * layer.stride[1]
    first = main[0]
    values = first.weight.shape[1] * first.groups * positions + main[-1].weight.shape[0]
    return wide if macs / values >= _INTENSE else dtype


@functools.lru_cache(maxsize=64)
def _can_watch(device: torch.device) -> bool:
    """Whether memory on ``device`` can be fingerprinted: by the native backend, on the CPU."""
    return device.type == "cpu" and reasons("bn_stats", device, torch.float32)["native"] is None


class _Packed(NamedTuple):
    """What depends on the input's shape: the weight, laid out for it, and the output's shape."""

    w: Tensor
    out: tuple[int, int, int, int]


class Folded:
    """A convolution with its batch norm folded in: z = act(conv(x, w * scale) + shift + residual).

    By its running statistics, for CPU inputs of ``dtype``; done in float32 and rounded once. The weight is laid out as
    the backend wants it, for each input shape anew; of the last ``SHAPES`` shapes the layouts are kept.
    |conv(x) + shift| <= ``gain`` * max|x| + ``offset``.
    """

    SHAPES = 4

    @torch.no_grad()
    def __init__(self, layer: ConvBn, device: torch.device, dtype: torch.dtype) -> None:
        w, gamma, beta, mean, var = layer_tensors(layer)
        assert w is not None and mean is not None and var is not None
        _, self._scale, shift = scale_shift(mean, var, gamma, beta, layer.eps)
        rows = (w.to(shift.dtype) * self._scale.view(-1, 1, 1, 1)).abs().sum(dim=(1, 2, 3))
        self.gain, self.offset = rows.amax().item(), shift.abs().amax().item()
        if not math.isfinite(self.gain + self.offset):
            self.gain = self.offset = _ENDLESS
        self.shift = shift.to(dtype)
        self.dtype = dtype
        self.relu = layer.relu
        self._weight = layer.weight
        self._geometry = layer.geometry
        self._packed: dict[torch.Size, _Packed] = {}
        # The backend's own functions: the ops' detour over the dispatcher would cost as much as a small convolution.
        self._function = choose("conv_affine_act", device, dtype).function
        self._into, self._plain = (hook("conv_affine_act", name, device, dtype) for name in ("into", "plain"))

    def pack(self, x: Tensor) -> _Packed:
        """The weight for inputs like ``x``, and the shape of z."""
        packed = self._packed.get(x.shape)
        return self._pack(x) if packed is None else packed

    @torch.no_grad()
    def _pack(self, x: Tensor) -> _Packed:
        stride, padding, dilation, _ = self._geometry
        k, _, r, s = self._weight.shape
        p, q = (
            (size + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
            for i, (size, kernel) in enumerate(((x.shape[2], r), (x.shape[3], s)))
        )
        folded = (self._weight.to(self._scale.dtype) * self._scale.view(-1, 1, 1, 1)).to(x.dtype)
        packed = _Packed(prepare("conv_affine_act", folded, x, *self._geometry), (x.shape[0], k, p, q))
        for shape in list(self._packed)[: -self.SHAPES + 1]:
            self._packed.pop(shape, None)
        self._packed[x.shape] = packed
        return packed

    def __call__(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """z = act(conv(x) + shift + residual); with ``overwrite`` over ``residual``, where the backend can."""
        w, out = self.pack(x)
        if self._into is not None:
            if not overwrite and (kept := buffers.empty(out, x.dtype)) is not None:
                # Filling kept memory costs far less than the page faults of new memory.
                residual, overwrite = kept.zero_() if residual is None else kept.copy_(residual), True
            if overwrite:
                return self._into(residual, x, w, self.shift, *self._geometry, self.relu)
        if self._plain is not None and residual is None:
            z = self._plain(x, w, self.shift, *self._geometry, self.relu)
            return z if z.is_contiguous(memory_format=torch.channels_last) else to_channels_last(z)
        return self._function(x, w, self.shift, *self._geometry, None, residual, self.relu)

    def bound(self, magnitude: float) -> float:
        """The largest |conv(x) + shift| that an x of this magnitude can give."""
        return self.gain * magnitude + self.offset


class _Entry(NamedTuple):
    """What one block's folded layers were made of, and they."""

    static: tuple[Any, ...]
    tensors: list[Tensor]
    memory: Any  # backends.native.Memory
    folded: list[Folded]
    situation: Any
    watch: Watch | None

    def holds(self) -> bool:
        return self.watch is not None and self.watch.unchanged() and self.memory.holds()


class FoldCache:
    """The folded layers of one block, made anew whenever anything that they were made of has changed.

    Change is seen by the identity, address and version counter of every tensor, and, for writes that bump no counter
    (``p.data.mul_(2)``), by a fingerprint of the memory: all of every vector, and a word in every 16 KB of a weight.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None  # replaced whole, so that threads may share the cache
        self.seen: Any = None  # the caller's own: what its last look at the block found
        self.decision: Any = None  # likewise: that the block is better run as it was

    @property
    def is_folded(self) -> bool:
        """Whether there are folded layers, looked after by a watch, and nothing whatever has changed since."""
        return self._entry is not None and self._entry.holds()

    def recall(self, situation: Any) -> list[Folded] | None:
        """What ``get`` last returned, if it was for this ``situation`` and nothing whatever has changed since."""
        entry = self._entry
        return entry.folded if entry is not None and entry.situation == situation and entry.holds() else None

    def get(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layers: Sequence[ConvBn],
        situation: Any = None,
        watch: Watch | None = None,
    ) -> list[Folded] | None:
        """Every layer folded for ``dtype``; None where changes could not be seen: off the CPU, without our kernels.

        ``situation``: all, besides what ``watch`` watches, that made the caller come here; for ``recall``.
        """
        if not _can_watch(device) or not switches.on("folding"):
            return None
        static = (dtype, choose("conv_affine_act", device, dtype), *(layer[_TENSOR_FIELDS:] for layer in layers))
        tensors = [t for layer in layers for t in layer[:_TENSOR_FIELDS] if isinstance(t, Tensor)]
        entry = self._entry
        if (
            entry is not None
            and entry.static == static
            and len(entry.tensors) == len(tensors)
            and all(map(is_, entry.tensors, tensors))
            and entry.memory.holds()
        ):
            entry = entry._replace(situation=situation, watch=watch)
        else:
            memory = backend("native").Memory(tensors)  # first: what is written meanwhile is seen the next time
            folded = [Folded(layer, device, dtype) for layer in layers]
            entry = _Entry(static, tensors, memory, folded, situation, watch)
        self._entry = entry
        return entry.folded


#: The leading fields of ConvBn, up to and with ``bias``, are tensors; the rest are numbers.
_TENSOR_FIELDS = 7

#: In place of NaN and infinity: no bound survives it, and a product with 0 does not turn it into NaN.
_ENDLESS = 1e300


def magnitude(x: Tensor) -> float:
    """max|x| of a channels-last tensor, huge where x holds a NaN or an infinity; one pass."""
    low, high = torch.aminmax(x.detach().permute(0, 2, 3, 1).reshape(-1))
    largest = max(-low.item(), high.item())
    return largest if math.isfinite(largest) else _ENDLESS


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` channels-last in ``dtype``: itself, or a copy."""
    if x.dtype == dtype:
        return to_channels_last(x)
    kept = buffers.empty(x.shape, dtype)
    if kept is not None:
        return kept.copy_(x)
    return x.to(dtype, memory_format=torch.channels_last)


def folded_block(
    x: Tensor,
    layers: Sequence[Folded],
    *,
    projection: Folded | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
    disposable: bool = False,
    known: float | None = None,
) -> tuple[Tensor, float] | None:
    """``residual_block`` for inference, on folded layers: one library call per convolution, nothing in between.

    Args:
        x, layers, projection, residual, identity: as for ``residual_block``; ``x`` channels-last, the projection
            folded without a ReLU.
        disposable: nobody needs ``x`` afterwards, so z may be written over it.
        known: max|x| or more, if that is known.

    Returns z and a bound of max|z|. None where a value inside might overflow, or ``x`` holds a NaN or an infinity: a
    library's ReLU need not let those pass, torch's does, so the caller takes another path. What cannot overflow is
    known from the weights' row sums; ``x`` is measured only where no bound is known, or where it has grown too large.
    """
    side_bound = 0.0 if residual is None else magnitude(to_channels_last(residual))

    def bound(largest: float) -> float:
        top = inner = largest
        for layer in layers:
            inner = layer.bound(inner)
            top = max(top, inner)
        side = projection.bound(largest) if projection else largest if identity else side_bound
        return max(top, inner + side)

    out = _ENDLESS if known is None else bound(known)
    if not out < _LARGEST:
        out = bound(magnitude(x))
        if not out < _LARGEST:
            return None
    z = _run(x, layers, projection, residual, identity, disposable)
    return None if z is None else (z, out)


def _run(
    x: Tensor,
    layers: Sequence[Folded],
    projection: Folded | None,
    residual: Tensor | None,
    identity: bool,
    disposable: bool,
    side: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """``folded_block`` of an ``x`` known to be harmless. None where the residual's shape is another than z's.

    ``side`` makes the residual, a new tensor.
    """
    overwrite = False
    if projection is not None:
        residual, overwrite = projection(x), True
    elif identity:
        residual, overwrite = x, disposable
    elif side is not None:
        residual, overwrite = side(x), True
    for layer in layers[:-1]:
        x = layer(x)
    if residual is not None:
        residual = to_channels_last(residual)
        if residual.shape != layers[-1].pack(x).out:
            return None  # torch's own rules of broadcasting, or its error
    return layers[-1](x, residual, overwrite)


class _Step(NamedTuple):
    """One block of a program. Below max|x| = ``limit`` nothing inside can overflow; |z| <= gain * max|x| + offset."""

    layers: list[Folded]
    projection: Folded | None
    identity: bool
    side: Callable[[Tensor], Tensor] | None
    gain: float
    offset: float
    limit: float


def _step(
    layers: list[Folded], projection: Folded | None, identity: bool, side: Callable[[Tensor], Tensor] | None
) -> _Step:
    """Bounds are affine in max|x|, layer by layer: gain * max|x| + offset."""
    limit, gain, offset = _LARGEST, 1.0, 0.0

    def check() -> None:
        nonlocal limit
        limit = min(limit, (_LARGEST - offset) / max(gain, 1e-30))

    for layer in layers:
        gain, offset = layer.gain * gain, layer.bound(offset)
        check()
    if projection is not None:
        gain, offset = gain + projection.gain, offset + projection.offset
    elif identity or side is not None:
        gain += 1.0
    check()
    return _Step(layers, projection, identity, side, gain, offset, limit)


class Program:
    """The blocks of a stage, folded, back to back: one look at whether anything has changed, and at most one at x.

    Made of the caches of its blocks, which have just run: ``blocks`` gives each one's cache, whether it has a
    projection, whether its shortcut is the identity, and what else makes it: a new tensor, of numbers no larger than
    those of x. ``situation`` and ``watch`` are the stage's, as for FoldCache.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[FoldCache, bool, bool, Callable[[Tensor], Tensor] | None]],
        situation: Any,
        watch: Watch,
    ) -> None:
        self._situation, self._watch = situation, watch
        self._steps: list[_Step] = []
        tensors: list[Tensor] = []
        for cache, projection, identity, side in blocks:
            entry = cache._entry
            assert entry is not None
            end = len(entry.folded) - projection
            self._steps.append(_step(entry.folded[:end], entry.folded[-1] if projection else None, identity, side))
            tensors += entry.tensors
        self._memory = backend("native").Memory(tensors)

    def holds(self, situation: Any) -> bool:
        """Whether all is as it was when the program was made."""
        return self._situation == situation and self._watch.unchanged() and self._memory.holds()

    def __call__(self, x: Tensor, known: float | None = None) -> tuple[Tensor, float] | None:
        """z in the dtype in which it was computed, and a bound of max|z|; ``known``: max|x| or more, if that is known.

        None, with ``x`` as it was, where a value inside might overflow or a shape does not fit. Bounds grow from block
        to block; where one has grown too large, what it is of is measured.
        """
        operand, bound = x, _ENDLESS if known is None else known
        for step in self._steps:
            if not bound < step.limit:
                bound = magnitude(operand)
                if not bound < step.limit:
                    return None
            operand = cast(operand, step.layers[0].dtype)
            z = _run(operand, step.layers, step.projection, None, step.identity, operand is not x, step.side)
            if z is None:
                return None
            operand, bound = z, step.gain * bound + step.offset
        return operand, bound
