"""Statistics per channel, of a tensor, of a convolution's tiles or of several ranks, and the affine that they make.

Two stages, as reduce.py says; the parts of a mean are merged in double. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, matrix, place, row_blocks, vector, vectors
from .reduce import FINISH_BLOCKS, FINISH_CHANNELS, REDUCTION, VECTOR

#: Tiles whose loads are under way together in a loop over rows.
_UNROLL = 4


# ---- stage 1: row blocks into the workspace


@triton.jit
def coarse(mean):
    """The first 12 bits of ``mean``; 0 if it is not finite.

    In sums of y - pivot a pivot of many bits would be rounded the same way at every addition, where y itself has few.
    """
    pivot = (mean.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return tl.where(pivot - pivot == 0, pivot, 0.0)


@triton.jit(do_not_specialize=["NPQ", "rows_per_block", "row_blocks"])
def bn_stats_kernel(
    y,
    workspace,
    NPQ,
    K,
    rows_per_block,
    row_blocks,
    UNROLL: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """mean = sum(y) / NPQ;  M2 = sum((y - mean)^2): per row block a pivot, sum(y - pivot) and sum((y - pivot)^2)

    Shapes    y (NPQ, K) channels-last; workspace (3, row blocks, K) fp32: pivot, sum, square
    Tiles     one program per row block x BLOCK_K channels, in tiles of BLOCK_NPQ rows
    Traffic   reads y: NPQ * K * itemsize, once
    Numerics  the pivot is the first tile's mean, to 12 bits; fp32 sums per row of the tile, then over its rows by a
              fixed tree. The mean stays a pair (pivot, sum) until the second stage: in fp32 it would be rounded, and at
              |mean| / std = 1000 that shows in var
    Source    ops.bn_stats; docs/bn_act.md; shifted data, Chan, Golub, LeVeque 1979
    """
    row_block, k = place(K, BLOCK_K)
    first = row_block * rows_per_block
    rows = tl.minimum(NPQ - first, rows_per_block).to(tl.int32)
    row = tl.arange(0, BLOCK_NPQ)[:, None]
    valid = (k < K)[None, :]
    offset = row * K + k[None, :]  # (BLOCK_NPQ, BLOCK_K)
    y += first * K
    value = tl.load(y + offset, mask=(row < rows) & valid, other=0.0).to(tl.float32)
    pivot = coarse(tl.sum(value, axis=0) / tl.minimum(rows, BLOCK_NPQ))
    total = tl.where(row < rows, value - pivot[None, :], 0.0)
    square = total * total
    for _start in range(BLOCK_NPQ, rows, BLOCK_NPQ * UNROLL):
        for _ in tl.static_range(UNROLL):
            y += BLOCK_NPQ * K
            row += BLOCK_NPQ
            value = tl.load(y + offset, mask=(row < rows) & valid, other=0.0).to(tl.float32)
            d = tl.where(row < rows, value - pivot[None, :], 0.0)
            total += d
            square = tl.fma(d, d, square)
    out = workspace + row_block * K + k
    plane = row_blocks.to(tl.int64) * K
    tl.store(out, pivot, mask=k < K)
    tl.store(out + plane, tl.sum(total, axis=0), mask=k < K)
    tl.store(out + 2 * plane, tl.sum(square, axis=0), mask=k < K)


# ---- stage 2: the row blocks in order


@triton.jit
def store_statistics(average, m2, n, gamma, beta, eps, mean, var, rstd, scale, shift, k, K):
    """From mean and M2 of ``n`` values, all in double: the five vectors."""
    inside = k < K
    m2 = tl.where(m2 < 0, 0.0, m2)  # NaN kept
    r = 1.0 / tl.sqrt(m2 / tl.maximum(n, 1.0) + eps)
    factor = r
    if gamma is not None:
        factor = tl.load(gamma + k, mask=inside, other=0.0).to(tl.float64) * r
    factor = factor.to(tl.float32)
    # With scale as it is stored: in y * scale + shift its rounding then meets y - mean, and not the mean alone.
    constant = -average * factor.to(tl.float64)
    if beta is not None:
        constant += tl.load(beta + k, mask=inside, other=0.0).to(tl.float64)
    tl.store(mean + k, average.to(tl.float32), mask=inside)
    tl.store(var + k, (m2 / tl.maximum(n - 1.0, 1.0)).to(tl.float32), mask=inside)
    tl.store(rstd + k, r.to(tl.float32), mask=inside)
    tl.store(scale + k, factor, mask=inside)
    tl.store(shift + k, constant.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["NPQ", "rows_per_block", "row_blocks"])
def finish_stats_kernel(
    workspace,
    gamma,
    beta,
    mean,
    var,
    rstd,
    scale,
    shift,
    NPQ,
    K,
    rows_per_block,
    row_blocks,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """mean, unbiased var, rstd, scale = gamma * rstd, shift = beta - mean * scale from the row blocks of bn_stats

    Shapes    workspace (3, row blocks, K): pivot, sum, square; gamma, ..., mean, var, rstd, scale, shift (K,); all fp32
    Tiles     one program per BLOCK_K channels, in tiles of BLOCK_ROWS row blocks
    Traffic   reads the workspace, mostly from L2
    Numerics  double: M2 = sum of each M2 + n * (mean - reference)^2 less what the reference is off, which is Chan's
              formula for all parts at once. The reference is the first pivot, so nothing cancels; a fixed tree
    Source    ops.bn_stats; docs/bn_act.md; Chan, Golub, LeVeque 1979
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    plane = row_blocks.to(tl.int64) * K
    reference = tl.load(workspace + k, mask=tl.where(row_blocks > 0, inside, False), other=0.0).to(tl.float64)
    first = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float64)
    second = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float64)
    for start in range(0, row_blocks, BLOCK_ROWS):
        block = (start + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
        there = (block < row_blocks) & inside[None, :]
        at = workspace + block * K + k[None, :]
        pivot = tl.load(at, mask=there, other=0.0)
        total = tl.load(at + plane, mask=there, other=0.0).to(tl.float64)
        square = tl.load(at + 2 * plane, mask=there, other=0.0).to(tl.float64)
        n = tl.maximum(tl.minimum(NPQ - block * rows_per_block, rows_per_block), 0).to(tl.float64)
        share = 1.0 / tl.maximum(n, 1.0)
        d = tl.where(there, pivot.to(tl.float64) - reference[None, :] + total * share, 0.0)
        first += n * d
        second += square - total * total * share + n * d * d
    n = NPQ.to(tl.float64)
    off = tl.sum(first, axis=0) / tl.maximum(n, 1.0)
    m2 = tl.sum(second, axis=0) - n * off * off
    store_statistics(reference + off, m2, n, gamma, beta, eps, mean, var, rstd, scale, shift, k, K)


def finish_stats(
    workspace: Tensor, npq: int, rows_per_block: int, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ops.bn_stats`` from its first stage: ``workspace`` (3, row blocks, K) float32 of pivot, sum and square.

    Row block i holds the rows from i * ``rows_per_block`` on; ``gamma`` and ``beta`` are float32 (K,) or None.
    """
    _, blocks, k = workspace.shape
    mean, var, rstd, scale, shift = vectors(workspace, k, 5)
    launch(
        finish_stats_kernel,
        triton.cdiv(k, FINISH_CHANNELS),
        workspace.device,
        workspace=workspace,
        gamma=gamma,
        beta=beta,
        mean=mean,
        var=var,
        rstd=rstd,
        scale=scale,
        shift=shift,
        NPQ=npq,
        K=k,
        rows_per_block=rows_per_block,
        row_blocks=blocks,
        eps=eps,
        BLOCK_ROWS=FINISH_BLOCKS,
        BLOCK_K=FINISH_CHANNELS,
        num_warps=8,
    )
    return mean, var, rstd, scale, shift


def bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    gamma, beta = vector("gamma", gamma, y), vector("beta", beta, y)
    blocks = REDUCTION.blocks(k, y.element_size())
    rows, count = row_blocks(npq, k, blocks["BLOCK_NPQ"])
    workspace = y.new_empty((3, count, k), dtype=torch.float32)
    launch(
        bn_stats_kernel,
        count * triton.cdiv(k, blocks["BLOCK_K"]),
        y.device,
        y=y,
        workspace=workspace,
        NPQ=npq,
        K=k,
        rows_per_block=rows,
        row_blocks=count,
        UNROLL=_UNROLL,
        **blocks,
        num_warps=REDUCTION.warps,
    )
    return finish_stats(workspace, npq, rows, gamma, beta, eps)


# ---- of several ranks


@triton.jit(do_not_specialize=["parts"])
def bn_finalize_kernel(
    n,
    means,
    variances,
    gamma,
    beta,
    mean,
    var,
    rstd,
    scale,
    shift,
    parts,
    K,
    eps,
    BLOCK_K: tl.constexpr,
):
    """mean, unbiased var, rstd, scale = gamma * rstd, shift = beta - mean * scale of the union of the parts

    Shapes    n (parts,), means, variances (parts, K), gamma, beta, mean, var, rstd, scale, shift (K,), all fp32
    Tiles     one program per BLOCK_K channels
    Traffic   reads means and variances
    Numerics  double, part after part by Chan's formula; a part may be empty
    Source    ops.bn_finalize; docs/bn_act.md; Chan, Golub, LeVeque 1979
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    total = tl.zeros((BLOCK_K,), tl.float64)
    average = tl.zeros((BLOCK_K,), tl.float64)
    m2 = tl.zeros((BLOCK_K,), tl.float64)
    for _ in range(parts):
        count = tl.load(n).to(tl.float64)
        d = tl.load(means + k, mask=inside, other=0.0).to(tl.float64) - average
        v = tl.load(variances + k, mask=inside, other=0.0).to(tl.float64)
        share = count / tl.maximum(total + count, 1.0)
        m2 += v * tl.maximum(count - 1.0, 0.0) + d * d * total * share
        average += d * share
        total += count
        n += 1
        means += K
        variances += K
    store_statistics(average, m2, total, gamma, beta, eps, mean, var, rstd, scale, shift, k, K)


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
            raise ValueError(f"{name}: found {tuple(t.shape)} on {t.device}, expected {tuple(size)} on {mean.device}")
    k = mean.shape[1]
    means = mean.to(torch.float32).contiguous()
    out_mean, out_var, rstd, scale, shift = vectors(means, k, 5)
    launch(
        bn_finalize_kernel,
        triton.cdiv(k, VECTOR),
        n.device,
        n=n.to(torch.float32).contiguous(),
        means=means,
        variances=var.to(torch.float32).contiguous(),
        gamma=vector("gamma", gamma, means),
        beta=vector("beta", beta, means),
        mean=out_mean,
        var=out_var,
        rstd=rstd,
        scale=scale,
        shift=shift,
        parts=n.shape[0],
        K=k,
        eps=eps,
        BLOCK_K=VECTOR,
        num_warps=4,
    )
    return out_mean, out_var, rstd, scale, shift
