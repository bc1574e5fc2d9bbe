"""The vocabulary: every fused operation, defined once in plain torch.

A definition is at the same time the documentation of its op, the reference in the tests (run in float64 it is the
oracle), and the fallback that works on every device and dtype. ``ops.affine_act(...)`` runs the fastest backend that
can (see :mod:`resnet_fast.dispatch`); ``ops.affine_act.definition(...)`` runs the text below.

Conventions, for all ops:

* ``x`` (N, C, H, W) input, ``w`` (K, C // groups, R, S) weight, ``y`` (N, K, P, Q) convolution output, ``z`` (N, K, P,
  Q) activation; NPQ = N * P * Q. Activations are float32, bfloat16 or float16 (float64 in the definitions alone) and
  channels-last; other layouts are converted, outputs are always channels-last.
* Per-channel vectors (``mean``, ``var``, ``scale``, ``shift``, sums) are (K,) float32 (float64 beside float64
  activations).
* ``relu`` keeps NaN. A gradient passes the ReLU where its output is not <= 0, as in torch.
* A *lazy activation* is (y, scale, shift) and means relu(y * scale + shift). A *lazy gradient* is (g, y, mean, a, b, c)
  and means a * g + b * (y - mean) + c. Either may stand where a convolution expects its operand, so that a backend
  can form it on load and never write it to memory. Zero padding is applied after the transform.
* Ops allocate their outputs, never write their inputs, and know nothing of autograd (that is ``functional``'s part).

Source of the formulas: Ioffe and Szegedy 2015 (arXiv 1502.03167); docs/bn_act.md derives the lazy gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import op

__all__ = [
    "affine_act",
    "affine_act_backward",
    "bn_backward_apply",
    "bn_backward_sums",
    "bn_stats",
    "conv_affine_act",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "stats_dtype",
]

CHANNELS_LAST = torch.channels_last


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, scales and sums beside activations of ``dtype``: float32, or float64 beside float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(t: Tensor) -> Tensor:
    """``t`` in the dtype in which arithmetic is done."""
    return t.to(stats_dtype(t.dtype))


def _per_channel(v: Tensor) -> Tensor:
    """(K,) as (1, K, 1, 1), to broadcast over N, P and Q."""
    return v.view(1, -1, 1, 1)


def _sum(t: Tensor) -> Tensor:
    """Sum over N, P, Q: (N, K, P, Q) -> (K,)."""
    return t.sum(dim=(0, 2, 3))


def _store(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The one rounding, and the one layout."""
    return t.to(dtype).contiguous(memory_format=CHANNELS_LAST)


def _masked(dz: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """g in wide arithmetic: ``dz`` where relu(y * scale + shift) lets it pass; all of ``dz`` without a scale."""
    dz = _wide(dz)
    if scale is None or shift is None:
        return dz
    blocked = _wide(y) * _per_channel(scale) + _per_channel(shift) <= 0
    return dz.masked_fill(blocked, 0)


# ---- row bn_act: memory-bound -----------------------------------------------------------------------------------


@op
def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``y`` (N, K, P, Q) per channel: two (K,) tensors.

    Taken of the values as stored (after rounding to the storage dtype), about the mean, never as E[y^2] - E[y]^2.
    Both are 0 where there are no values.
    """
    if y.numel() == 0:  # var_mean's NaN would reach gamma's gradient, which is 0
        mean = y.new_zeros(y.shape[1], dtype=stats_dtype(y.dtype))
        return mean, torch.zeros_like(mean)
    var, mean = torch.var_mean(_wide(y), dim=(0, 2, 3), correction=0)
    return mean, var


@op
def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """z = act(y * scale + shift [+ residual | + residual * rscale + rshift]), act = relu or the identity.

    ``residual`` (N, K, P, Q) in the dtype of ``y``. Returns z (N, K, P, Q) in the dtype of ``y``, rounded once.
    """
    z = _wide(y) * _per_channel(scale) + _per_channel(shift)
    if residual is not None:
        r = _wide(residual)
        z = z + (r if rscale is None or rshift is None else r * _per_channel(rscale) + _per_channel(rshift))
    return _store(torch.relu(z) if relu else z, y.dtype)


@op
def affine_act_backward(
    dz: Tensor,
    z: Tensor,
    y: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    rmean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of a block's end, z = relu(y * scale + shift + residual ...), in one pass.

    Returns g = dz where the ReLU let z pass, (N, K, P, Q) in the dtype of ``dz``, and three (K,) sums:
    sum(g), sum(g * (y - mean)) and, for a residual with a batch norm of its own, sum(g * (residual - rmean)) (zeros
    without one). From these follow dbeta = sum(g) and dgamma = rstd * sum(g * (y - mean)) of both batch norms.
    """
    g = _wide(dz).masked_fill(z <= 0, 0)
    sum_g = _sum(g)
    sum_gy = _sum(g * (_wide(y) - _per_channel(mean)))
    if residual is None or rmean is None:
        sum_gr = torch.zeros_like(sum_g)
    else:
        sum_gr = _sum(g * (_wide(residual) - _per_channel(rmean)))
    return _store(g, dz.dtype), sum_g, sum_gy, sum_gr


@op
def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * (y - mean)) per channel, two (K,) tensors; g is ``dz`` behind relu(y * scale + shift).

    The ReLU's mask is formed again from y, so z need not have been kept. Without ``scale`` there was no ReLU: g = dz.
    """
    g = _masked(dz, y, scale, shift)
    return _sum(g), _sum(g * (_wide(y) - _per_channel(mean)))


@op
def bn_backward_apply(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The lazy gradient, written out: dy = a * g + b * (y - mean) + c, with g as in ``bn_backward_sums``.

    With batch statistics a = gamma * rstd, b = -a * rstd^2 * sum(g * (y - mean)) / NPQ, c = -a * sum(g) / NPQ; with
    running statistics b = c = 0. (y - mean) is formed first: it loses no digits when the mean dwarfs the deviation.
    """
    g = _masked(dz, y, scale, shift)
    dy = g * _per_channel(a) + (_wide(y) - _per_channel(mean)) * _per_channel(b) + _per_channel(c)
    return _store(dy, y.dtype)


# ---- row conv: compute-bound ------------------------------------------------------------------------------------


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """A lazy activation, written out; ``x`` itself where there is no scale."""
    return x if scale is None or shift is None else affine_act.definition(x, scale, shift)


def _gradient(
    g: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
) -> Tensor:
    """A lazy gradient, written out; ``g`` itself where it is not lazy."""
    if y is None or mean is None or a is None or b is None or c is None:
        return g
    return bn_backward_apply.definition(g, y, mean, a, b, c)


@op
def conv_stats(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(x, w), or of the lazy activation relu(x * scale + shift); and ``bn_stats`` of y.

    ``x`` and ``w`` share one dtype. Returns y (N, K, P, Q) in that dtype, mean and biased variance (K,).
    """
    y = F.conv2d(_activation(x, scale, shift), w, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    return (y, *bn_stats.definition(y))


@op
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
    """Gradient of a convolution's input, (N, C, H, W) = ``input_size``, from dy or a lazy gradient (N, K, P, Q)."""
    dy = _gradient(g, y, mean, a, b, c)
    # A view of one element gives the size without the memory: the input's values have no part in dx.
    x = dy.new_empty(1).expand(input_size)
    dx = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    return dx.contiguous(memory_format=CHANNELS_LAST)


@op
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
    """Gradient of a convolution's weight, (K, C // groups, R, S) = ``weight_size``, in the dtype of ``x``.

    Both operands may be lazy: the gradient (g, y, mean, a, b, c) and the input relu(x * scale + shift).
    """
    dy = _gradient(g, y, mean, a, b, c)
    w = dy.new_empty(1).expand(weight_size)
    dw = torch.ops.aten.convolution_backward(
        dy,
        _activation(x, scale, shift),
        w,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [False, True, False],
    )[1]
    return dw.contiguous(memory_format=CHANNELS_LAST)


@op
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
    """Inference: z = act(conv(x, w) * scale + shift + residual); ``scale`` is absent where it is folded into ``w``.

    ``w`` is an ordinary weight or what ``dispatch.prepare("conv_affine_act", ...)`` made of a folded one.
    Returns z (N, K, P, Q) in the dtype of ``x``.
    """
    y = F.conv2d(x, w, None, stride, padding, dilation, groups)
    return affine_act.definition(y, torch.ones_like(shift) if scale is None else scale, shift, residual, relu=relu)
