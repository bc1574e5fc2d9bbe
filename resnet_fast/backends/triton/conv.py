"""The ops of row conv: our convolutions where they have the geometry, else the library's between our bn_act kernels.

``unsupported`` says which geometries are whose, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.backends import library

from .bn_act import affine_act
from .bn_act_backward import bn_backward_apply, bn_backward_sums
from .bn_stats import bn_stats
from .common import CHANNELS_LAST, affine_of, matrix, vector
from .conv_affine_act import conv_affine_act as inference
from .conv_common import Config, Geometry, Gradient, geometry_of, unsupported
from .conv_descriptor import conv_descriptor
from .conv_descriptor import options as descriptor_tiles
from .conv_dgrad import conv_dgrad as dgrad
from .conv_fprop import conv_fprop as fprop
from .conv_pointwise import conv_pointwise_backward
from .conv_pointwise import options as shared_tiles
from .conv_ways import USUAL, Way, parsed, way, within
from .conv_wgrad import conv_wgrad as wgrad

__all__ = [
    "configured",
    "conv_affine_act",
    "conv_backward",
    "conv_backward_sums",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "unsupported",
]


def _weight(w: Tensor, like: Tensor) -> Tensor:
    """``w`` as the kernels read it, (K, R, S, C) in memory: the layout that channels-last training keeps it in."""
    if w.dim() != 4 or w.dtype != like.dtype or w.device != like.device:
        raise ValueError(
            f"w: found {tuple(w.shape)} {w.dtype} on {w.device}, expected 4 dimensions, {like.dtype} on {like.device}"
        )
    return w.contiguous(memory_format=CHANNELS_LAST)


def _vector(name: str, v: Tensor, y: Tensor) -> Tensor:
    """``vector`` of what is not optional."""
    checked = vector(name, v, y)
    assert checked is not None
    return checked


def _geometry(
    x_size: list[int],
    w_size: list[int],
    conv: tuple[list[int], list[int], list[int], int],
    g: Tensor | None = None,
) -> Geometry | None:
    """The geometry if our kernels have it, checked against the gradient ``g`` of its output; None for the library."""
    geometry = geometry_of(x_size, w_size, *conv)
    if geometry is not None and g is not None:
        expected = (geometry.N, geometry.K, geometry.P, geometry.Q)
        if g.shape != expected:
            raise ValueError(f"g: found {tuple(g.shape)}, expected {expected}")
    return geometry


def _lazy(
    g: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
) -> tuple[Tensor, Gradient]:
    """g and what makes it lazy, checked and laid out."""
    if y is None or mean is None or a is None or b is None or c is None:
        return matrix("g", g), Gradient()
    y = matrix("y", y)
    g = matrix("dz", g, y)
    mean, a, b, c = (vector(name, v, y) for name, v in (("mean", mean), ("a", a), ("b", b), ("c", c)))
    return g, Gradient(y, mean, a, b, c, *affine_of(y, gscale, gshift, "g").values())


def _gradient(g: Tensor, lazy: Gradient) -> Tensor:
    """A lazy gradient, written out."""
    return g if lazy.y is None else bn_backward_apply(g, *lazy)  # type: ignore[arg-type]


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """A lazy activation, written out."""
    return x if scale is None or shift is None else affine_act(x, scale, shift)


def conv_stats(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = matrix("x", x)
    w = _weight(w, x)
    scale, shift = affine_of(x, scale, shift).values()
    geometry, chosen = _geometry(list(x.shape), list(w.shape), (stride, padding, dilation, groups)), way("fprop")
    if chosen.written:
        x, scale, shift = _activation(x, scale, shift), None, None
    if geometry is None or chosen.library:
        y = F.conv2d(_activation(x, scale, shift), w, None, stride, padding, dilation, groups)
        y = y.contiguous(memory_format=CHANNELS_LAST)
        return (y, *bn_stats(y, gamma, beta, eps))
    per_y = x.new_empty(1).expand(1, geometry.K)  # K alone is looked at
    norm = vector("gamma", gamma, per_y), vector("beta", beta, per_y), eps
    if (
        chosen.descriptor
        and chosen.tile in descriptor_tiles(geometry, x.dtype, x.device)
        and not (x.data_ptr() | w.data_ptr()) % 16
    ):
        return conv_descriptor(x, w, geometry, scale, shift, *norm, chosen.tile)
    return fprop(x, w, geometry, scale, shift, *norm, None if chosen.descriptor else chosen.tile)


def conv_dgrad(
    g: Tensor,
    w: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    g, lazy = _lazy(g, y, mean, a, b, c)
    w = _weight(w, g)
    geometry = _geometry(list(input_size), list(w.shape), (stride, padding, dilation, groups), g)
    if geometry is None:
        return library.conv_dgrad(_gradient(g, lazy), w, list(input_size), stride, padding, dilation, groups)
    return dgrad(g, w, geometry, lazy)[0]


def conv_wgrad(
    g: Tensor,
    x: Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    g, lazy = _lazy(g, y, mean, a, b, c)
    x = matrix("x", x)
    scale, shift = affine_of(x, scale, shift).values()
    return _wgrad(g, x, list(weight_size), (stride, padding, dilation, groups), lazy, scale, shift)


def _wgrad(
    g: Tensor,
    x: Tensor,
    weight_size: list[int],
    conv: tuple[list[int], list[int], list[int], int],
    lazy: Gradient,
    scale: Tensor | None,
    shift: Tensor | None,
    chosen: Way = USUAL,
) -> Tensor:
    """dw of checked operands."""
    if x.dtype != g.dtype or x.device != g.device:
        raise ValueError(f"x: found {x.dtype} on {x.device}, expected {g.dtype} on {g.device}")
    geometry = _geometry(list(x.shape), weight_size, conv, g)
    if geometry is None or chosen.library:
        return library.conv_wgrad(_gradient(g, lazy), _activation(x, scale, shift), weight_size, *conv)
    if chosen.written:
        x, scale, shift = _activation(x, scale, shift), None, None
    return wgrad(g, x, geometry, lazy, scale, shift, chosen.tile)


def _shared_tile(geometry: Geometry | None, x: Tensor) -> Config | None:
    """The tile of dgrad and wgrad in one kernel, where a table asks for it and the shape has it."""
    tile = way("shared").tile
    return (
        tile
        if tile is not None and geometry is not None and tile in shared_tiles(geometry, x.dtype, x.device)
        else None
    )


def conv_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_x: bool,
    needs_w: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    g, lazy = _lazy(g, y, mean, a, b, c, gscale, gshift)
    x = matrix("x", x)
    w = _weight(w, x)
    scale, shift = affine_of(x, scale, shift).values()
    residual = None if residual is None else matrix("residual", residual, x)
    conv = (stride, padding, dilation, groups)
    geometry = _geometry(list(x.shape), list(w.shape), conv, g)
    tile = _shared_tile(geometry, x) if needs_x and needs_w else None
    if geometry is not None and tile is not None:
        dx, dw = conv_pointwise_backward(g, x, w, geometry, lazy, tile, scale, shift, residual)
        return dx, dw
    of_x, of_w = way("dgrad"), way("wgrad")
    if geometry is None or (needs_x and of_x.apart) or (needs_w and of_w.apart):  # once, and then for both
        g, lazy = _gradient(g, lazy), Gradient()
    dx, dw = x.new_empty(0), x.new_empty(0)
    if needs_x and (geometry is None or of_x.library):
        dx = library.conv_dgrad(g, w, list(x.shape), *conv, residual)
    elif needs_x and geometry is not None:
        dx = dgrad(g, w, geometry, lazy, residual, tile=of_x.tile)[0]
    if needs_w:
        dw = _wgrad(g, x, list(w.shape), conv, lazy, scale, shift, of_w)
    return dx, dw


def conv_backward_sums(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_w: bool,
    xmean: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, lazy = _lazy(g, y, mean, a, b, c)
    x = matrix("x", x)
    w = _weight(w, x)
    xmean, scale, shift = (_vector(name, v, x) for name, v in (("xmean", xmean), ("scale", scale), ("shift", shift)))
    conv = (stride, padding, dilation, groups)
    geometry = _geometry(list(x.shape), list(w.shape), conv, g)
    tile = _shared_tile(geometry, x) if needs_w else None
    if geometry is not None and tile is not None:
        return conv_pointwise_backward(g, x, w, geometry, lazy, tile, scale, shift, None, xmean)  # type: ignore[return-value]
    of_x, of_w = way("dgrad"), way("wgrad")
    if geometry is None or of_x.apart or (needs_w and of_w.apart):
        g, lazy = _gradient(g, lazy), Gradient()
    if geometry is None or of_x.library:
        dx = library.conv_dgrad(g, w, list(x.shape), *conv)
        # The mask alone: 1 * g + 0 * (x - mean) + 0.
        zero = torch.zeros_like(scale)
        dx = bn_backward_apply(dx, x, zero, zero + 1, zero, zero, scale, shift)
        sum_g, sum_gx = bn_backward_sums(dx, x, xmean)
    else:
        dx, sum_g, sum_gx = dgrad(g, w, geometry, lazy, None, x, xmean, scale, shift, of_x.tile)
    dw = _wgrad(g, x, list(w.shape), conv, lazy, scale, shift, of_w) if needs_w else x.new_empty(0)
    return dx, dw, sum_g, sum_gx


def conv_affine_act(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    x = matrix("x", x)
    w = _weight(w, x)
    geometry = _geometry(list(x.shape), list(w.shape), (stride, padding, dilation, groups))
    if geometry is None:
        y = F.conv2d(x, w, None, stride, padding, dilation, groups)
        one = y.new_ones(y.shape[1], dtype=torch.float32) if scale is None else scale
        return affine_act(y, one, shift, residual, relu=relu)
    z = x.new_empty(1).expand(geometry.N, geometry.K, geometry.P, geometry.Q)  # its size alone is looked at
    if residual is not None:
        residual = matrix("residual", residual, z)
    return inference(x, w, geometry, vector("scale", scale, z), _vector("shift", shift, z), residual, relu)


def configured(op: str, config: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that runs ``op`` as ``config`` says. Raises ``ValueError`` for a way that is not known."""
    functions = {f.__name__: f for f in (conv_stats, conv_backward, conv_backward_sums)}
    return within(parsed(op, config), functions[op])
