"""Convolutions: the library's (oneDNN on a CPU, cuDNN on a GPU) with our kernels around them.

Lazy operands are written out first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.backends import library, pointwise

from .bn_act import affine_act, bn_backward_apply_into, bn_stats
from .common import CHANNELS_LAST, dense, matrix

#: stride, padding, dilation, groups; and scale and shift of a lazy activation.
Geometry = tuple[list[int], list[int], list[int], int]
Affine = tuple[Tensor | None, Tensor | None]


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An activation, lazy or not, written out channels-last in ``dtype``."""
    if scale is None or shift is None:
        return x.to(dtype, memory_format=CHANNELS_LAST)
    return affine_act(x, scale, shift).to(dtype)


def _gradient(
    dtype: torch.dtype,
    overwrite: bool,
    g: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
) -> Tensor:
    """A gradient, lazy or not, written out channels-last in ``dtype``; with ``overwrite`` a lazy one over ``g``."""
    if y is None or mean is None or a is None or b is None or c is None:
        return g.to(dtype, memory_format=CHANNELS_LAST)
    return bn_backward_apply_into(g, y, mean, a, b, c, gscale, gshift, overwrite).to(dtype)


def _gradients_dtype(
    g: Tensor, w_size: list[int], input_size: list[int], geometry: Geometry, needs: tuple[bool, bool]
) -> torch.dtype:
    """The dtype of dy for the gradients that are needed, dx and dw: g's own where our kernels widen it as they read."""
    wide = library.arithmetic(g.device, g.dtype)
    if (
        wide != g.dtype
        and (not needs[0] or library.dgrad_widens(g, w_size, input_size, *geometry))
        and (not needs[1] or library.wgrad_widens(g, w_size, input_size, *geometry))
    ):
        return g.dtype
    return wide


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
    wide = library.arithmetic(x.device, x.dtype)
    if library.widens(x, w, stride, padding, dilation, groups):
        wide = x.dtype
    y = library.conv(_activation(x, scale, shift, wide), w.to(wide), stride, padding, dilation, groups).to(x.dtype)
    return (y, *bn_stats(y, gamma, beta, eps))


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
    geometry = (stride, padding, dilation, groups)
    wide = _gradients_dtype(g, list(w.shape), list(input_size), geometry, (True, False))
    dy = _gradient(wide, False, g, y, mean, a, b, c)
    return library.conv_dgrad(dy, w.to(wide), list(input_size), *geometry).to(g.dtype)


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
    geometry = (stride, padding, dilation, groups)
    wide = _gradients_dtype(g, list(weight_size), list(x.shape), geometry, (False, True))
    return _wgrad(_gradient(wide, False, g, y, mean, a, b, c), x, list(weight_size), geometry, (scale, shift))


def _is_pointwise(g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, needs: tuple[bool, bool]) -> bool:
    """Whether the gradients come from one pass of our own: whichever are needed, lest their bits depend on it."""
    stride, padding, _, groups = geometry
    if not any(needs) or g.dtype != x.dtype:
        return False
    dtypes = library.arithmetic(g.device, g.dtype), g.dtype
    return pointwise.why_not(g.device, list(w.shape), list(x.shape), stride, padding, groups, *dtypes) is None


def _wgrad(dy: Tensor, x: Tensor, w_size: list[int], geometry: Geometry, affine: Affine) -> Tensor:
    """dw of a lazy x, in its dtype; it is written out unless the kernel forms it on load."""
    if dy.dtype == x.dtype and library.wgrad_widens(dy, w_size, list(x.shape), *geometry):
        operand = x.contiguous(memory_format=CHANNELS_LAST)
    else:
        operand, affine = _activation(x, *affine, dy.dtype), (None, None)
    return library.conv_wgrad(dy, operand, w_size, *geometry, *affine).to(x.dtype)


def _pointwise(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool],
    affine: Affine,
    lazy: Sequence[Tensor | None],
    residual: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """``conv_backward`` of a 1x1 convolution, in one pass. ``lazy``: y, mean, a, b, c, gscale, gshift, or None."""
    g, x = matrix("g", g), x.contiguous(memory_format=CHANNELS_LAST)
    residual = None if residual is None else matrix("residual", residual, x)
    vectors: dict[str, Tensor | None] = {}
    if None not in affine:
        vectors |= dense(x, scale=affine[0], shift=affine[1])
    y, *rest = lazy
    if y is not None and None not in rest[:4]:
        if None in rest[4:]:  # one alone is as none, as in the definition
            rest[4:] = None, None
        vectors |= dense(g, **dict(zip(("mean", "a", "b", "c", "gscale", "gshift"), rest, strict=True)))
        vectors["y"] = matrix("y", y, g)
    return pointwise.backward(g, x, w, needs, residual, overwrite, **vectors)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool],
    affine: Affine,
    residual: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """``conv_backward`` from dy. ``needs``: dx and dw; ``affine``: scale and shift of a lazy x."""
    dx, dw = x.new_empty(0), x.new_empty(0)
    wide = dy.dtype
    if needs[0]:
        residual = None if residual is None else matrix("residual", residual, x)
        if residual is not None and residual.dtype != wide:
            residual, overwrite = residual.to(wide, memory_format=CHANNELS_LAST), True
        dx = library.conv_dgrad(dy, w.to(wide), list(x.shape), *geometry, residual, overwrite).to(x.dtype)
        residual = None  # a wide copy's memory, for x's
    if needs[1]:
        dw = _wgrad(dy, x, list(w.shape), geometry, affine)
    return dx, dw


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
    geometry, needs = (stride, padding, dilation, groups), (needs_x, needs_w)
    if _is_pointwise(g, x, w, geometry, needs):
        return _pointwise(g, x, w, needs, (scale, shift), (y, mean, a, b, c, gscale, gshift), residual, False)
    wide = _gradients_dtype(g, list(w.shape), list(x.shape), geometry, needs)
    dy = _gradient(wide, False, g, y, mean, a, b, c, gscale, gshift)
    return _conv_backward(dy, x, w, geometry, needs, (scale, shift), residual, False)


def conv_backward_into(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_x: bool,
    needs_w: bool,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    disposable: bool,
    **lazy: Tensor,
) -> tuple[Tensor, Tensor]:
    """``conv_backward`` that may write over ``residual``, which nobody else needs, and over ``g`` if ``disposable``.

    ``lazy``: y, mean, a, b, c, gscale, gshift, or none of them.
    """
    keys = ("y", "mean", "a", "b", "c", "gscale", "gshift")
    geometry, needs = (stride, padding, dilation, groups), (needs_x, needs_w)
    if _is_pointwise(g, x, w, geometry, needs):
        overwrite = residual is not None and residual.data_ptr() != g.data_ptr()
        return _pointwise(g, x, w, needs, (scale, shift), [lazy.get(key) for key in keys], residual, overwrite)
    wide = _gradients_dtype(g, list(w.shape), list(x.shape), geometry, needs)
    dy = _gradient(wide, disposable and g is not residual, g, *map(lazy.get, keys))
    # Not where dy is that memory: dw is still to be read from it.
    overwrite = residual is not None and dy.data_ptr() != residual.data_ptr()
    return _conv_backward(dy, x, w, geometry, needs, (scale, shift), residual, overwrite)


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
    y = F.conv2d(x, w, None, stride, padding, dilation, groups)
    one = y.new_ones(y.shape[1], dtype=torch.float32) if scale is None else scale
    return affine_act(y, one, shift, residual, relu=relu)
