"""Batch norm, ReLU and residual: statistics, the normalised activation, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _C

from .common import dense, empty_image, launch, matrix, matrix_size, unlike, vectors, workspace


def bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = matrix("y", y)
    mean, var, rstd, scale, shift = vectors(y, 5)
    launch(
        "bn_stats",
        y.device,
        y=y,
        **dense(y, gamma=gamma, beta=beta),
        mean=mean,
        var=var,
        rstd=rstd,
        scale=scale,
        shift=shift,
        workspace=workspace(y),
        eps=eps,
        **matrix_size(y),
    )
    return mean, var, rstd, scale, shift


def bn_stats_update(buffers: list[Tensor], values: list[Tensor], factor: float, counters: list[Tensor]) -> bool:
    """Each of ``buffers`` moves by ``factor`` towards its value in ``values``, and ``counters`` go up by one, in place.

    False, and nothing is done, where that is not for these kernels: all on the CPU, dense, float32, counters int64.
    """
    if not all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in values):
        return False
    if not all(b.dtype is torch.float32 and b.is_cpu and b.is_contiguous() and not b.is_inference() for b in buffers):
        return False
    if not all(c.dtype is torch.int64 and c.is_cpu and c.numel() == 1 and not c.is_inference() for c in counters):
        return False
    sizes = [b.numel() for b in buffers]
    if sizes != [v.numel() for v in values]:
        return False
    _C.cpu.bn_stats_update(buffers=buffers, values=values, sizes=sizes, factor=factor, counters=counters)
    torch.autograd.graph.increment_version([*buffers, *counters])
    return True


def bn_finalize(
    n: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if mean.dim() != 2:
        raise ValueError(f"mean: found {mean.dim()} dimensions, supported are 2 (T, K)")
    for name, t, size in (("n", n, mean.shape[:1]), ("var", var, mean.shape)):
        if t.shape != size or t.device != mean.device:
            raise unlike(name, t, size, None, mean.device)
    means = mean.to(torch.float32).contiguous()
    mean, variance, rstd, scale, shift = vectors(means, 5)
    launch(
        "bn_finalize",
        n.device,
        n=n.to(torch.float32).contiguous(),
        means=means,
        vars=var.to(torch.float32).contiguous(),
        **dense(means, gamma=gamma, beta=beta),
        mean=mean,
        var=variance,
        rstd=rstd,
        scale=scale,
        shift=shift,
        parts=means.shape[0],
        k=means.shape[1],
        eps=eps,
    )
    return mean, variance, rstd, scale, shift


def _affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    rscale: Tensor | None,
    rshift: Tensor | None,
    relu: bool,
    mask: Tensor | None,
) -> Tensor:
    """``affine_act``; ``y`` is channels-last already."""
    if rscale is None or rshift is None:  # one alone is as none, as in the definition
        rscale = rshift = None
    z = empty_image(y.shape, y)
    launch(
        "affine_act",
        y.device,
        y=y,
        **dense(y, scale=scale, shift=shift, rscale=rscale, rshift=rshift),
        residual=None if residual is None else matrix("residual", residual, y),
        z=z,
        mask=mask,
        relu=relu,
        **matrix_size(y),
    )
    return z


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    return _affine_act(matrix("y", y), scale, shift, residual, rscale, rshift, relu, None)


def affine_act_mask(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    mask = torch.empty((n, p, q, -(-k // 8)), dtype=torch.uint8, device=y.device)
    return _affine_act(y, scale, shift, residual, rscale, rshift, True, mask), mask


def _gate(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """z as an argument: the activation, or its mask."""
    if z.dtype != torch.uint8:
        return {"z": matrix("z", z, y)}
    n, k, p, q = y.shape
    if z.shape != (n, p, q, -(-k // 8)) or z.device != y.device:
        raise unlike("z", z, (n, p, q, -(-k // 8)), torch.uint8, y.device)
    return {"mask": z.contiguous()}


def affine_act_backward(
    dz: Tensor,
    z: Tensor,
    y: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    rmean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = matrix("y", y)
    g = empty_image(y.shape, y)
    sum_g, sum_gy, sum_gr = vectors(y, 3)
    if residual is None or rmean is None:
        residual = rmean = None
        sum_gr.zero_()
    launch(
        "affine_act_backward",
        y.device,
        dz=matrix("dz", dz, y),
        **_gate(z, y),
        y=y,
        **dense(y, mean=mean, rmean=rmean),
        ry=None if residual is None else matrix("residual", residual, y),
        g=g,
        sum_g=sum_g,
        sum_gy=sum_gy,
        sum_gry=None if rmean is None else sum_gr,
        workspace=workspace(y),
        **matrix_size(y),
    )
    return g, sum_g, sum_gy, sum_gr


def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if scale is None or shift is None:
        scale = shift = None
    y = matrix("y", y)
    sum_g, sum_gy = vectors(y, 2)
    launch(
        "bn_backward_sums",
        y.device,
        dz=matrix("dz", dz, y),
        y=y,
        **dense(y, mean=mean, scale=scale, shift=shift),
        sum_g=sum_g,
        sum_gy=sum_gy,
        workspace=workspace(y),
        **matrix_size(y),
    )
    return sum_g, sum_gy


def bn_backward_finalize(
    sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float
) -> tuple[Tensor, Tensor, Tensor]:
    if sum_g.dim() != 1:
        raise ValueError(f"sum_g: found {sum_g.dim()} dimensions, supported is 1")
    channels = sum_g.unsqueeze(0)
    b, c, dgamma = vectors(channels, 3)
    launch(
        "bn_backward_finalize",
        sum_g.device,
        **dense(channels, sum_g=sum_g, sum_gy=sum_gy, rstd=rstd, scale=scale),
        b=b,
        c=c,
        dgamma=dgamma,
        n=n,
        k=sum_g.shape[0],
    )
    return b, c, dgamma


def bn_backward_apply_into(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """``bn_backward_apply``, with ``overwrite`` over ``dz``: memory that is in the caches already."""
    if scale is None or shift is None:
        scale = shift = None
    y = matrix("y", y)
    dz = matrix("dz", dz, y)
    dy = dz if overwrite else empty_image(y.shape, y)
    launch(
        "bn_backward_apply",
        y.device,
        dz=dz,
        y=y,
        **dense(y, mean=mean, a=a, b=b, c=c, scale=scale, shift=shift),
        dy=dy,
        **matrix_size(y),
    )
    return dy


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
    return bn_backward_apply_into(dz, y, mean, a, b, c, scale, shift, False)
