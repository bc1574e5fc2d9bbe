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
    "affine_act_mask",
    "affine_act_maxpool",
    "bn_backward_apply",
    "bn_backward_finalize",
    "bn_backward_sums",
    "bn_finalize",
    "bn_stats",
    "bottleneck",
    "conv_affine_act",
    "conv_backward",
    "conv_backward_sums",
    "conv_dgrad",
    "conv_stats",
    "conv_wgrad",
    "maxpool_backward_apply",
    "maxpool_backward_sums",
    "stats_dtype",
    "whole_stem",
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


def _normalise(
    mean: Tensor, m2: Tensor, n: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From mean, M2 = sum of squares about it, and n values: mean, unbiased var, rstd, scale, shift."""
    var = m2 / (n - 1).clamp(min=1)
    rstd = torch.rsqrt(m2 / n.clamp(min=1) + eps)
    scale = rstd.clone() if gamma is None else gamma * rstd
    shift = -mean * scale
    return mean, var, rstd, scale, shift if beta is None else shift + beta


@op
def bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``y`` (N, K, P, Q) per channel, and the affine that they make: five (K,) tensors.

    mean; var, unbiased, sum((y - mean)^2) / max(NPQ - 1, 1), as running_var takes it; rstd = 1 / sqrt(biased var +
    eps); scale = gamma * rstd; shift = beta - mean * scale (an absent gamma is 1, an absent beta 0).
    Taken of the values as stored (after rounding to the storage dtype), about the mean, never as E[y^2] - E[y]^2.
    Mean and var are 0 where there are no values.
    """
    n = torch.full((), y.numel() // max(y.shape[1], 1), dtype=stats_dtype(y.dtype), device=y.device)
    if y.numel() == 0:  # the mean's NaN would reach gamma's gradient, which is 0
        mean = torch.zeros(y.shape[1], dtype=n.dtype, device=y.device)
        m2 = torch.zeros_like(mean)
    else:
        var, mean = torch.var_mean(_wide(y), dim=(0, 2, 3), correction=0)
        m2 = var * n
    return _normalise(mean, m2, n, gamma, beta, eps)


@op
def bn_finalize(
    n: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``bn_stats`` of the union of T parts: of ranks, in synchronised batch norm.

    ``n`` (T,) values per channel of each part, ``mean`` and unbiased ``var`` (T, K), all in the dtype of statistics; a
    part may be empty. Merged in order by Chan's formula (Chan, Golub, LeVeque 1979). Returns what ``bn_stats`` returns.
    """
    count, total = n.unsqueeze(1), n.sum()
    merged = (count * mean).sum(0) / total.clamp(min=1)
    m2 = (var * (count - 1).clamp(min=0) + count * (mean - merged).square()).sum(0)
    return _normalise(merged, m2, total, gamma, beta, eps)


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
def affine_act_mask(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``affine_act`` with its ReLU, and one bit per element of z: whether a gradient passes, z > 0 or z is NaN.

    Returns z (N, K, P, Q) and mask (N, P, Q, ceil(K / 8)) uint8, contiguous: bit i of byte j belongs to channel
    8 * j + i, the bits behind K are 0. ``affine_act_backward`` takes the mask in the place of z: it is 1/16 of z in
    bfloat16.
    """
    z = affine_act.definition(y, scale, shift, residual, rscale, rshift)
    n, k, p, q = z.shape
    passes = F.pad((~(z <= 0)).permute(0, 2, 3, 1), (0, -k % 8)).view(n, p, q, -(-k // 8), 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=z.device)
    return z, (passes * weights).sum(-1).to(torch.uint8)


def _blocked(z: Tensor, like: Tensor) -> Tensor:
    """Where no gradient passes: from z itself, or from its mask as ``affine_act_mask`` packs it."""
    if z.dtype != torch.uint8:
        return z <= 0
    bits = z.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=z.device)
    return (bits & 1 == 0).flatten(3)[..., : like.shape[1]].permute(0, 3, 1, 2)


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

    ``z`` is the activation (N, K, P, Q), or its mask (uint8, as ``affine_act_mask`` returns it).
    Returns g = dz where the ReLU let z pass, (N, K, P, Q) in the dtype of ``dz``, and three (K,) sums:
    sum(g), sum(g * (y - mean)) and, for a residual with a batch norm of its own, sum(g * (residual - rmean)) (zeros
    without one). From these follow dbeta = sum(g) and dgamma = rstd * sum(g * (y - mean)) of both batch norms.
    """
    g = _wide(dz).masked_fill(_blocked(z, dz), 0)
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
def bn_backward_finalize(
    sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``bn_backward_apply`` needs of the sums, with batch statistics over ``n`` values: b, c, and dgamma.

    b = -scale * rstd^2 * sum_gy / n, c = -scale * sum_g / n, dgamma = rstd * sum_gy; all (K,). (a is ``scale``, and
    dbeta ``sum_g``.) ``n`` = 0, an empty batch, makes b and c 0.
    """
    share = scale * (1.0 / n if n > 0 else 0.0)
    return -share * rstd.square() * sum_gy, -share * sum_g, rstd * sum_gy


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


# ---- row stem: batch norm, ReLU and max-pooling ------------------------------------------------------------------

#: ``index`` of a pooled value that is not > 0: no gradient passes.
POOL_BLOCKED = 9


@op
def affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """z = maxpool(relu(y * scale + shift)), 3 x 3, stride 2, padding 1: the stem behind its convolution, in one pass.

    Returns z (N, K, P, Q) in the dtype of ``y``, P = (H - 1) // 2 + 1, and index (N, K, P, Q) uint8, channels-last:
    3 * r + s of the value that won in its window (r, s) of 3 x 3, or 9 where z <= 0. Values are compared as stored
    (rounded); of equal ones the first in the order of r, s wins, and a NaN wins over all (of several, any).
    """
    z, flat = F.max_pool2d(affine_act.definition(y, scale, shift), 3, 2, 1, return_indices=True)
    w, (p, q) = y.shape[3], z.shape[2:]
    row, column = flat // max(w, 1), flat % max(w, 1)
    r = row - (2 * torch.arange(p, device=y.device) - 1).view(-1, 1)
    s = column - (2 * torch.arange(q, device=y.device) - 1)
    index = (3 * r + s).masked_fill(z <= 0, POOL_BLOCKED).to(torch.uint8)
    return _store(z, y.dtype), _store(index, torch.uint8)


def _unpool(dz: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """g (N, K, H, W) in wide arithmetic: each dz at the value of y that won its window, summed; 0 elsewhere."""
    n, k, h, w = y.shape
    p, q = dz.shape[2:]
    index = index.long()
    row = 2 * torch.arange(p, device=y.device).view(-1, 1) - 1 + index // 3
    column = 2 * torch.arange(q, device=y.device) - 1 + index % 3
    blocked = index == POOL_BLOCKED
    flat = (row * w + column).masked_fill(blocked, 0)
    g = torch.zeros(n, k, h * w, dtype=stats_dtype(y.dtype), device=y.device)
    return g.scatter_add_(2, flat.flatten(2), _wide(dz).masked_fill(blocked, 0).flatten(2)).view(n, k, h, w)


@op
def maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * (y - mean)) per channel, two (K,) tensors, behind ``affine_act_maxpool``.

    ``dz`` (N, K, P, Q) and ``index`` (N, K, P, Q) uint8 of the pooled output, ``y`` (N, K, H, W). g (N, K, H, W) is the
    sum of the dz whose index points there, and is never written.
    """
    g = _unpool(dz, index, y)
    return _sum(g), _sum(g * (_wide(y) - _per_channel(mean)))


@op
def maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """dy = a * g + b * (y - mean) + c, (N, K, H, W) in the dtype of ``y``, with g as in ``maxpool_backward_sums``."""
    g = _unpool(dz, index, y)
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
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
) -> Tensor:
    """A lazy gradient, written out; ``g`` itself where it is not lazy."""
    if y is None or mean is None or a is None or b is None or c is None:
        return g
    return bn_backward_apply.definition(g, y, mean, a, b, c, gscale, gshift)


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
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = conv(x, w), or of the lazy activation relu(x * scale + shift); and ``bn_stats`` of y.

    ``x`` and ``w`` share one dtype. Returns y (N, K, P, Q) in that dtype; mean, unbiased var, rstd, scale and shift of
    y (K,), as ``bn_stats`` does.
    """
    y = F.conv2d(_activation(x, scale, shift), w, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    return (y, *bn_stats.definition(y, gamma, beta, eps))


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
    dw = dw.contiguous(memory_format=CHANNELS_LAST)
    # One tap has two sets of strides: nn.Conv2d's own, which DistributedDataParallel looks for, are the plain ones.
    return dw.flatten(1).view(weight_size) if tuple(weight_size[2:]) == (1, 1) else dw


@op
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
    """``conv_dgrad`` and ``conv_wgrad`` of one convolution, which share a lazy dy: it is formed once.

    The lazy gradient (g, y, mean, a, b, c) may carry the mask of a ReLU behind it, relu(y * gscale + gshift), as in
    ``bn_backward_apply``. ``residual`` (N, C, H, W), another gradient of the same input (of an identity shortcut, of a
    projection), is added to dx. Returns dx (N, C, H, W) and dw (K, C // groups, R, S), in the dtype of ``x``; one that
    is not needed has no elements.
    """
    dy = _gradient(g, y, mean, a, b, c, gscale, gshift)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if needs_x:
        dx = conv_dgrad.definition(dy, w, x.shape, stride, padding, dilation, groups)
        if residual is not None:
            dx = _store(_wide(dx) + _wide(residual), x.dtype)
    if needs_w:
        dw = conv_wgrad.definition(dy, x, w.shape, stride, padding, dilation, groups, scale, shift)
    return dx, dw


@op
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
    """``conv_backward`` of a lazy activation, relu(x * scale + shift), and ``bn_backward_sums`` of what comes out.

    Returns dx (N, C, H, W) behind that ReLU, 0 where it does not let x pass; dw, of no elements if it is not needed;
    and two sums of dx as stored, sum(dx) and sum(dx * (x - xmean)) (C,). dx and x make the next lazy gradient on the
    way back, with the mask already on it.
    """
    dy = _gradient(g, y, mean, a, b, c)
    dx = conv_dgrad.definition(dy, w, x.shape, stride, padding, dilation, groups)
    dx = _store(_masked(dx, x, scale, shift), x.dtype)
    dw = x.new_empty(0)
    if needs_w:
        dw = conv_wgrad.definition(dy, x, w.shape, stride, padding, dilation, groups, scale, shift)
    return (dx, dw, *bn_backward_sums.definition(dx, x, xmean))


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


# ---- row bottleneck: inference, a whole block --------------------------------------------------------------------


@op
def bottleneck(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    w3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    rw: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> Tensor:
    """Inference: z = relu(conv1x1(a2, w3) * scale3 + shift3 + shortcut), a residual bottleneck of stride 1.

    a1 = relu(conv1x1(x, w1) * scale1 + shift1), a2 = relu(conv3x3(a1, w2) * scale2 + shift2), with padding 1 of a1, so
    that outside of the image it is 0 whatever shift1. The shortcut is x itself or, with all three of ``rw``, ``rscale``
    and ``rshift``, conv1x1(x, rw) * rscale + rshift. ``x`` (N, C, H, W); w1 (B, C, 1, 1), w2 (B, B, 3, 3), w3 (K, B, 1,
    1), rw (K, C, 1, 1), in the dtype of ``x``; scales and shifts (B,) and (K,). a1 and a2 are rounded to that dtype.
    Returns z (N, K, H, W) in it.
    """
    conv = conv_affine_act.definition
    a1 = conv(x, w1, shift1, [1, 1], [0, 0], [1, 1], 1, scale1)
    a2 = conv(a1, w2, shift2, [1, 1], [1, 1], [1, 1], 1, scale2)
    residual = x
    if rw is not None and rscale is not None and rshift is not None:
        residual = conv(x, rw, rshift, [1, 1], [0, 0], [1, 1], 1, rscale, relu=False)
    return conv(a2, w3, shift3, [1, 1], [0, 0], [1, 1], 1, scale3, residual)


@op
def whole_stem(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Inference: a whole stem, z = maxpool(relu(conv(x, w) * scale + shift)): stride 2; 3 x 3, stride 2, padding 1.

    ``x`` (N, C, H, W); w (K, C, R, R), R odd, padded by R // 2, in the dtype of ``x``; scale, shift (K,). Returns z in
    that dtype, (N, K, P, Q), channels-last, P = ceil(H / 4), Q = ceil(W / 4). The activation is rounded to it.
    """
    r = w.shape[2] // 2
    z = F.max_pool2d(conv_affine_act.definition(x, w, shift, [2, 2], [r, r], [1, 1], 1, scale), 3, 2, 1)
    return _store(z, x.dtype)
