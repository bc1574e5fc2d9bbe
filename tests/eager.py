"""Each op as plain eager torch computes it, by its own batch_norm, relu and convolution, for tolerance.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.ops import stats_dtype

Kwargs = dict[str, Any]


def _affine(y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None = None) -> Tensor:
    """(y - mean) * scale + shift, by eager batch norm in eval mode."""
    mean = torch.zeros_like(scale) if mean is None else mean
    # F.batch_norm of torch 2.11 refuses an eps of 0, in eval mode too.
    var, cudnn = torch.ones_like(scale), torch.backends.cudnn.enabled
    return torch.batch_norm(y, scale, shift, mean, var, False, 0.0, 0.0, cudnn)


def _eager_affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    z = _affine(y, scale, shift)
    if residual is not None:
        z = z + (residual if rscale is None or rshift is None else _affine(residual, rscale, rshift))
    return torch.relu(z) if relu else z


def _eager_normalise(
    mean: Tensor, var: Tensor, biased: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    rstd = (biased + eps).rsqrt()
    scale = rstd if gamma is None else gamma * rstd
    return mean, var, rstd, scale, (0 if beta is None else beta) - mean * scale


def _eager_bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, ...]:
    one = torch.ones(y.shape[1], dtype=stats_dtype(y.dtype), device=y.device)
    _, mean, rstd = torch.native_batch_norm(y, one, 0 * one, None, None, True, 0.0, eps)
    n = y.numel() // max(y.shape[1], 1)
    biased = rstd**-2 - eps
    return _eager_normalise(mean, biased * n / max(n - 1, 1), biased, gamma, beta, eps)


def _eager_bn_finalize(
    n: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Over the moments E[y] and E[y^2], the other way to merge."""
    share = (n / n.sum()).unsqueeze(1)
    merged = (share * mean).sum(0)
    square = (share * mean.square() + var * (n - 1).clamp(min=0).unsqueeze(1) / n.sum()).sum(0)
    biased = square - merged.square()
    return _eager_normalise(merged, biased * n.sum() / (n.sum() - 1), biased, gamma, beta, eps)


def _eager_sums(g: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(mean)
    _, sum_gy, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, y, one, None, None, mean, one, True, 0.0, [True, True, True]
    )
    return sum_g, sum_gy


def _eager_affine_act_mask(y: Tensor, scale: Tensor, shift: Tensor, *residual: Tensor, **rest: Tensor) -> Any:
    z = _eager_affine_act(y, scale, shift, *residual, **rest)
    bits = F.pad(~(z <= 0).permute(0, 2, 3, 1), (0, -z.shape[1] % 8))
    mask = sum(bits[..., i::8].to(torch.uint8) << i for i in range(8))
    return z, mask


def _eager_mask(dz: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return dz
    return torch.ops.aten.threshold_backward(dz, _eager_affine_act(y, scale, shift), 0)


def _eager_affine_act_backward(
    dz: Tensor, z: Tensor, y: Tensor, mean: Tensor, residual: Tensor | None = None, rmean: Tensor | None = None
) -> tuple[Tensor, ...]:
    if z.dtype == torch.uint8:
        bits = torch.stack([(z >> i) & 1 for i in range(8)], -1).flatten(3)[..., : dz.shape[1]]
        z = bits.permute(0, 3, 1, 2).to(dz.dtype)
    g = torch.ops.aten.threshold_backward(dz, z, 0)
    if residual is None or rmean is None:
        return (g, *_eager_sums(g, y, mean), torch.zeros_like(mean))
    return (g, *_eager_sums(g, y, mean), _eager_sums(g, residual, rmean)[1])


def _eager_bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    return _eager_sums(_eager_mask(dz, y, scale, shift), y, mean)


def _eager_bn_backward_apply(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    g = _eager_mask(dz, y, scale, shift)
    return _affine(g, a, torch.zeros_like(a)) + _affine(y, b, c, mean)


def _eager_bn_backward_finalize(sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float) -> Any:
    dgamma = sum_gy * rstd
    if n == 0:
        return torch.zeros_like(scale), torch.zeros_like(scale), dgamma
    return -scale * rstd * dgamma / n, -scale * sum_g / n, dgamma


def _eager_affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The index by unfolding: which of nine comes first."""
    full = _eager_affine_act(y, scale, shift)
    n, k, h, w = full.shape
    p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    windows = F.pad(full, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).reshape(n, k, p, q, 9)
    z, index = windows.max(-1)
    return z, index.masked_fill(z <= 0, 9).to(torch.uint8)


def _eager_unpool(dz: Tensor, index: Tensor, y: Tensor) -> Tensor:
    w, (p, q) = y.shape[3], dz.shape[2:]
    row = 2 * torch.arange(p, device=y.device).view(-1, 1) - 1 + index.long() // 3
    flat = row * w + 2 * torch.arange(q, device=y.device) - 1 + index.long() % 3
    blocked = index == 9
    flat, dz = flat.masked_fill(blocked, 0), dz.masked_fill(blocked, 0).contiguous()
    y = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # max_pool2d's backward looks at its size
    return torch.ops.aten.max_pool2d_with_indices_backward(
        dz, y, [3, 3], [2, 2], [1, 1], [1, 1], False, flat.contiguous()
    )


def _eager_maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    return _eager_sums(_eager_unpool(dz, index, y), y, mean)


def _eager_maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    return _eager_bn_backward_apply(_eager_unpool(dz, index, y), y, mean, a, b, c)


def _eager_activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if scale is None or shift is None else _eager_affine_act(x, scale, shift)


def _eager_conv_stats(
    x: Tensor, w: Tensor, *geometry: Any, scale: Tensor | None = None, shift: Tensor | None = None, **norm: Any
) -> tuple[Tensor, ...]:
    y = F.conv2d(_eager_activation(x, scale, shift), w, None, *geometry)
    return (y, *_eager_bn_stats(y, **norm))


def _eager_conv_dgrad(g: Tensor, w: Tensor, input_size: list[int], *geometry: Any, **lazy: Tensor) -> Tensor:
    dy = _eager_bn_backward_apply(g, **lazy) if lazy else g
    return torch.nn.grad.conv2d_input(input_size, w, dy, *geometry)


def _eager_conv_wgrad(
    g: Tensor,
    x: Tensor,
    weight_size: list[int],
    *geometry: Any,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **lazy: Tensor,
) -> Tensor:
    dy = _eager_bn_backward_apply(g, **lazy) if lazy else g
    return torch.nn.grad.conv2d_weight(_eager_activation(x, scale, shift), weight_size, dy, *geometry)


def _eager_conv_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    *geometry: Any,
    needs_x: bool,
    needs_w: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
    residual: Tensor | None = None,
    **lazy: Tensor,
) -> tuple[Tensor, Tensor]:
    assert needs_x and needs_w
    dy = _eager_bn_backward_apply(g, **lazy, scale=gscale, shift=gshift) if lazy else g
    dx = torch.nn.grad.conv2d_input(x.shape, w, dy, *geometry)
    dx = dx if residual is None else dx + residual
    return dx, _eager_conv_wgrad(dy, x, list(w.shape), *geometry, scale=scale, shift=shift)


def _eager_conv_backward_sums(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    *geometry: Any,
    needs_w: bool,
    xmean: Tensor,
    scale: Tensor,
    shift: Tensor,
    **lazy: Tensor,
) -> tuple[Tensor, ...]:
    dx, dw = _eager_conv_backward(g, x, w, *geometry, needs_x=True, needs_w=needs_w, scale=scale, shift=shift, **lazy)
    dx = _eager_mask(dx, x, scale, shift)
    return (dx, dw, *_eager_sums(dx, x, xmean))


def _eager_conv_affine_act(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    *geometry: Any,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    y = F.conv2d(x, w, None, *geometry)
    return _eager_affine_act(y, torch.ones_like(shift) if scale is None else scale, shift, residual, relu=relu)


def _eager_bottleneck(
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
    a1 = torch.relu(_affine(F.conv2d(x, w1), scale1, shift1))
    a2 = torch.relu(_affine(F.conv2d(a1, w2, padding=1), scale2, shift2))
    side = x if rw is None or rscale is None or rshift is None else _affine(F.conv2d(x, rw), rscale, rshift)
    return torch.relu(_affine(F.conv2d(a2, w3), scale3, shift3) + side)


def _eager_whole_stem(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.conv2d(x, w, None, 2, w.shape[2] // 2)
    return F.max_pool2d(torch.relu(_affine(y, scale, shift)), 3, 2, 1)


EAGER: dict[str, Callable[..., Any]] = {
    "bn_stats": _eager_bn_stats,
    "bn_finalize": _eager_bn_finalize,
    "affine_act": _eager_affine_act,
    "affine_act_mask": _eager_affine_act_mask,
    "affine_act_backward": _eager_affine_act_backward,
    "bn_backward_sums": _eager_bn_backward_sums,
    "bn_backward_finalize": _eager_bn_backward_finalize,
    "bn_backward_apply": _eager_bn_backward_apply,
    "affine_act_maxpool": _eager_affine_act_maxpool,
    "maxpool_backward_sums": _eager_maxpool_backward_sums,
    "maxpool_backward_apply": _eager_maxpool_backward_apply,
    "conv_stats": _eager_conv_stats,
    "conv_dgrad": _eager_conv_dgrad,
    "conv_wgrad": _eager_conv_wgrad,
    "conv_backward": _eager_conv_backward,
    "conv_backward_sums": _eager_conv_backward_sums,
    "conv_affine_act": _eager_conv_affine_act,
    "bottleneck": _eager_bottleneck,
    "whole_stem": _eager_whole_stem,
}


def eager(op: str, kwargs: Kwargs) -> Any:
    """The op as plain torch computes it in the dtype of its inputs."""
    if "stride" not in kwargs:
        return EAGER[op](**kwargs)
    names = list(kwargs)
    lead = names[: names.index("groups") + 1]  # what stands before the options is positional
    return EAGER[op](*(kwargs[k] for k in lead), **{k: v for k, v in kwargs.items() if k not in lead})
