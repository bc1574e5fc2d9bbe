"""Batch norm, ReLU and residual add around a convolution, and their backward: the twin of csrc/cuda/bn_act.cu.

Arithmetic is fp32 whatever the storage. Every reduction has two stages, row blocks into a workspace and then the row
blocks in a fixed order; tiles follow from the shape alone, and there are no atomics: results are bitwise equal from run
to run. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    Tile,
    affine,
    affine_of,
    channels,
    empty_like,
    launch,
    matrix,
    place,
    relu,
    row_blocks,
    sized,
    vector,
    vectors,
    where_active,
)

# Chosen by bytes in flight, not yet measured on a GPU. At the 42 to 80 registers that these compile to, 800 to 1400
# threads fit on a multiprocessor, each with 48 to 128 bytes under way: about 60 KB, where 25 KB cover the latency of an
# H200's memory. Of 2-byte types at 64 channels, a vector is 16 rows of a tile.
_ELEMENTWISE = {1: Tile(vectors=4, warps=4), 2: Tile(vectors=2, warps=4)}  # by the number of operands read
_REDUCTION = Tile(vectors=1, warps=4)
#: Tiles whose loads are under way together in a loop over rows.
_STATS_UNROLL = 4
_SUMS_UNROLL = 2
# The second stage: 8 channels are one 32-byte sector of the workspace.
_FINISH_CHANNELS = 64 if INTERPRETED else 8
_FINISH_BLOCKS = 2 if INTERPRETED else 256
_VECTOR = 128  # channels of a program that works on per-channel vectors alone


# ---- elementwise


@triton.jit
def pack_bits(passes, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_NPQ, BLOCK_K) of 0 and 1 to (BLOCK_NPQ, BLOCK_K // 8) bytes: bit i of byte j is channel 8 * j + i."""
    bits = tl.reshape(passes.to(tl.int32), (BLOCK_NPQ, BLOCK_K // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(byte, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse of pack_bits: 0 and not 0."""
    bits = byte.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8)[None, None, :])
    return tl.reshape(bits, (BLOCK_NPQ, BLOCK_K))


@triton.jit(do_not_specialize=["NPQ"])
def affine_act_kernel(
    y,
    scale,
    shift,
    residual,
    rscale,
    rshift,
    z,
    mask,
    NPQ,
    K,
    RELU: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = act(y * scale + shift [+ residual | + residual * rscale + rshift]);  mask = the bits of z > 0

    Shapes    y, residual, z (NPQ, K) channels-last; mask (NPQ, ceil(K / 8)) uint8; scale, shift, ... (K,) fp32
    Tiles     one program per BLOCK_NPQ x BLOCK_K of z; grid cdiv(NPQ, BLOCK_NPQ) * cdiv(K, BLOCK_K)
    Traffic   reads y, residual, writes z, mask: (3 * itemsize + 1/8) * NPQ * K; no reuse, bandwidth is the limit
    Numerics  fp32 from load to store; one rounding, at the store; relu(NaN) = NaN; the mask is of z as stored
    Source    ops.affine_act, ops.affine_act_mask; docs/bn_act.md
    """
    row_block, k = place(K, BLOCK_K)
    first = row_block * BLOCK_NPQ
    row = tl.arange(0, BLOCK_NPQ)[:, None]
    inside = (row < NPQ - first) & (k < K)[None, :]
    offset = row * K + k[None, :]  # (BLOCK_NPQ, BLOCK_K), int32: what is large goes into the pointers
    value = tl.load(y + first * K + offset, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        r = tl.load(residual + first * K + offset, mask=inside, other=0.0).to(tl.float32)
    value = affine(value, channels(scale, k, K), channels(shift, k, K))
    if residual is not None:
        if rscale is not None:
            r = affine(r, channels(rscale, k, K), channels(rshift, k, K))
        value += r
    if RELU:
        value = relu(value)
    stored = value.to(z.dtype.element_ty)
    tl.store(z + first * K + offset, stored, mask=inside)
    if mask is not None:
        passes = (where_active(stored.to(tl.float32), 1.0) != 0) & inside
        byte = pack_bits(passes, BLOCK_NPQ, BLOCK_K)
        K8 = tl.cdiv(K, 8)
        j = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        tl.store(
            mask + first * K8 + (row * K8 + j[None, :]),
            byte,
            mask=(row < NPQ - first) & (j < K8)[None, :],
        )


def _affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    rscale: Tensor | None,
    rshift: Tensor | None,
    relu: bool,
    packed: bool,
) -> tuple[Tensor, Tensor | None]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    z = empty_like(y)
    mask = y.new_empty((n, p, q, triton.cdiv(k, 8)), dtype=torch.uint8) if packed else None
    if residual is None:
        rscale = rshift = None
    tile = _ELEMENTWISE[1 if residual is None else 2]
    blocks = tile.blocks(k, y.element_size())
    launch(
        affine_act_kernel,
        triton.cdiv(npq, blocks["BLOCK_NPQ"]) * triton.cdiv(k, blocks["BLOCK_K"]),
        y.device,
        y=y,
        scale=vector("scale", scale, y),
        shift=vector("shift", shift, y),
        residual=None if residual is None else matrix("residual", residual, y),
        **affine_of(y, rscale, rshift, "r"),
        z=z,
        mask=mask,
        NPQ=npq,
        K=k,
        RELU=relu,
        **blocks,
        num_warps=tile.warps,
    )
    return z, mask


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    return _affine_act(y, scale, shift, residual, rscale, rshift, relu, packed=False)[0]


def affine_act_mask(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    z, mask = _affine_act(y, scale, shift, residual, rscale, rshift, relu=True, packed=True)
    assert mask is not None
    return z, mask


@triton.jit(do_not_specialize=["NPQ"])
def bn_backward_apply_kernel(
    dz,
    y,
    mean,
    a,
    b,
    c,
    scale,
    shift,
    dy,
    NPQ,
    K,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy = a * g + b * (y - mean) + c;  g = dz where y * scale + shift > 0 else 0, or dz without a scale

    Shapes    dz, y, dy (NPQ, K) channels-last; mean, a, b, c, scale, shift (K,) fp32
    Tiles     as affine_act
    Traffic   reads dz, y, writes dy: 3 * NPQ * K * itemsize; no reuse, bandwidth is the limit
    Numerics  fp32 from load to store; one rounding, at the store; the mask as affine_act formed it, bit for bit
    Source    ops.bn_backward_apply; docs/bn_act.md
    """
    row_block, k = place(K, BLOCK_K)
    first = row_block * BLOCK_NPQ
    row = tl.arange(0, BLOCK_NPQ)[:, None]
    inside = (row < NPQ - first) & (k < K)[None, :]
    offset = row * K + k[None, :]  # (BLOCK_NPQ, BLOCK_K)
    g = tl.load(dz + first * K + offset, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + first * K + offset, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        g = where_active(affine(value, channels(scale, k, K), channels(shift, k, K)), g)
    rest = tl.fma(value - channels(mean, k, K), channels(b, k, K), channels(c, k, K))
    result = tl.fma(g, channels(a, k, K), rest)
    tl.store(dy + first * K + offset, result.to(dy.dtype.element_ty), mask=inside)


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
    y = matrix("y", y)
    n, k, p, q = y.shape
    dy = empty_like(y)
    tile = _ELEMENTWISE[2]
    blocks = tile.blocks(k, y.element_size())
    launch(
        bn_backward_apply_kernel,
        triton.cdiv(n * p * q, blocks["BLOCK_NPQ"]) * triton.cdiv(k, blocks["BLOCK_K"]),
        y.device,
        dz=matrix("dz", dz, y),
        y=y,
        mean=vector("mean", mean, y),
        a=vector("a", a, y),
        b=vector("b", b, y),
        c=vector("c", c, y),
        **affine_of(y, scale, shift),
        dy=dy,
        NPQ=n * p * q,
        K=k,
        **blocks,
        num_warps=tile.warps,
    )
    return dy


# ---- reductions, stage 1: row blocks into the workspace


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


@triton.jit(do_not_specialize=["NPQ", "rows_per_block", "row_blocks"])
def bn_backward_sums_kernel(
    dz,
    y,
    mean,
    scale,
    shift,
    workspace,
    NPQ,
    K,
    rows_per_block,
    row_blocks,
    UNROLL: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = dz where y * scale + shift > 0 else 0, or dz without a scale

    Shapes    dz, y (NPQ, K) channels-last; mean, scale, shift (K,) fp32; workspace (2, row blocks, K) fp32
    Tiles     as bn_stats
    Traffic   reads dz, y: 2 * NPQ * K * itemsize
    Numerics  fp32 sums per row of the tile, then over its rows by a fixed tree; row blocks merged in double, in order
    Source    ops.bn_backward_sums; docs/bn_act.md
    """
    row_block, k = place(K, BLOCK_K)
    first = row_block * rows_per_block
    rows = tl.minimum(NPQ - first, rows_per_block).to(tl.int32)
    row = tl.arange(0, BLOCK_NPQ)[:, None]
    valid = (k < K)[None, :]
    offset = row * K + k[None, :]  # (BLOCK_NPQ, BLOCK_K)
    dz += first * K
    y += first * K
    centre = channels(mean, k, K)
    if scale is not None:
        scales = channels(scale, k, K)
        shifts = channels(shift, k, K)
    sum_g = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    sum_gy = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    for _start in range(0, rows, BLOCK_NPQ * UNROLL):
        for _ in tl.static_range(UNROLL):
            g = tl.load(dz + offset, mask=(row < rows) & valid, other=0.0).to(tl.float32)
            value = tl.load(y + offset, mask=(row < rows) & valid, other=0.0).to(tl.float32)
            if scale is not None:
                g = where_active(affine(value, scales, shifts), g)
            sum_g += g
            sum_gy = tl.fma(g, value - centre, sum_gy)
            dz += BLOCK_NPQ * K
            y += BLOCK_NPQ * K
            row += BLOCK_NPQ
    out = workspace + row_block * K + k
    tl.store(out, tl.sum(sum_g, axis=0), mask=k < K)
    tl.store(out + row_blocks.to(tl.int64) * K, tl.sum(sum_gy, axis=0), mask=k < K)


@triton.jit(do_not_specialize=["NPQ", "rows_per_block", "row_blocks"])
def affine_act_backward_kernel(
    dz,
    z,
    y,
    mean,
    residual,
    rmean,
    g,
    workspace,
    NPQ,
    K,
    rows_per_block,
    row_blocks,
    PACKED: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g = dz where z > 0 else 0;  sum_g = sum(g);  sum_gy = sum(g * (y - mean));  sum_gr likewise of the residual

    Shapes    dz, y, residual, g (NPQ, K) channels-last; z likewise or, PACKED, its mask (NPQ, ceil(K / 8)) uint8;
              mean, rmean (K,) fp32; workspace (2 or 3, row blocks, K) fp32
    Tiles     as bn_stats
    Traffic   reads dz, z, y, residual, writes g: 5 * NPQ * K * itemsize (4 without residual, z 1/8 byte if PACKED)
    Numerics  as bn_backward_sums; g is dz or 0, exactly
    Source    ops.affine_act_backward; docs/bn_act.md
    """
    row_block, k = place(K, BLOCK_K)
    first = row_block * rows_per_block
    rows = tl.minimum(NPQ - first, rows_per_block).to(tl.int32)
    row = tl.arange(0, BLOCK_NPQ)[:, None]
    valid = (k < K)[None, :]
    offset = row * K + k[None, :]  # (BLOCK_NPQ, BLOCK_K)
    dz += first * K
    y += first * K
    g += first * K
    if residual is not None:
        residual += first * K
        rcentre = channels(rmean, k, K)
        sum_gr = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    if PACKED:
        K8 = tl.cdiv(K, 8)
        j = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
        z += first * K8
        offset8 = row * K8 + j  # (BLOCK_NPQ, BLOCK_K // 8)
    else:
        z += first * K
    centre = channels(mean, k, K)
    sum_g = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    sum_gy = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    for _start in range(0, rows, BLOCK_NPQ):
        inside = (row < rows) & valid
        gradient = tl.load(dz + offset, mask=inside, other=0.0)
        if PACKED:
            byte = tl.load(z + offset8, mask=(row < rows) & (j < K8), other=0)
            z += BLOCK_NPQ * K8
        else:
            gate = tl.load(z + offset, mask=inside, other=0.0).to(tl.float32)
            z += BLOCK_NPQ * K
        value = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            r = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        if PACKED:
            gradient = tl.where(unpack_bits(byte, BLOCK_NPQ, BLOCK_K) != 0, gradient, 0.0)
        else:
            gradient = where_active(gate, gradient)
        tl.store(g + offset, gradient, mask=inside)
        gradient = gradient.to(tl.float32)
        sum_g += gradient
        sum_gy = tl.fma(gradient, value - centre, sum_gy)
        if residual is not None:
            sum_gr = tl.fma(gradient, r - rcentre, sum_gr)
            residual += BLOCK_NPQ * K
        dz += BLOCK_NPQ * K
        y += BLOCK_NPQ * K
        g += BLOCK_NPQ * K
        row += BLOCK_NPQ
    out = workspace + row_block * K + k
    plane = row_blocks.to(tl.int64) * K
    tl.store(out, tl.sum(sum_g, axis=0), mask=k < K)
    tl.store(out + plane, tl.sum(sum_gy, axis=0), mask=k < K)
    if residual is not None:
        tl.store(out + 2 * plane, tl.sum(sum_gr, axis=0), mask=k < K)


# ---- reductions, stage 2: the row blocks in order


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
    reference = tl.load(workspace + k, mask=inside & (row_blocks > 0), other=0.0).to(tl.float64)
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


@triton.jit(do_not_specialize=["row_blocks"])
def finish_sums_kernel(
    workspace,
    sum_g,
    sum_gy,
    sum_gr,
    K,
    row_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_g, sum_gy, sum_gr = the sums of each row block's sums

    Shapes    workspace (2 or 3, row blocks, K) fp32; sum_g, sum_gy, sum_gr (K,) fp32, the last may be absent
    Tiles     as finish_stats
    Traffic   reads the workspace, mostly from L2
    Numerics  double, by a fixed tree
    Source    ops.affine_act_backward, ops.bn_backward_sums, ops.maxpool_backward_sums; docs/bn_act.md
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    plane = row_blocks.to(tl.int64) * K
    first = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float64)
    second = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float64)
    third = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float64)
    for start in range(0, row_blocks, BLOCK_ROWS):
        block = (start + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
        there = (block < row_blocks) & inside[None, :]
        at = workspace + block * K + k[None, :]
        first += tl.load(at, mask=there, other=0.0).to(tl.float64)
        second += tl.load(at + plane, mask=there, other=0.0).to(tl.float64)
        if sum_gr is not None:
            third += tl.load(at + 2 * plane, mask=there, other=0.0).to(tl.float64)
    tl.store(sum_g + k, tl.sum(first, axis=0).to(tl.float32), mask=inside)
    tl.store(sum_gy + k, tl.sum(second, axis=0).to(tl.float32), mask=inside)
    if sum_gr is not None:
        tl.store(sum_gr + k, tl.sum(third, axis=0).to(tl.float32), mask=inside)


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
        triton.cdiv(k, _FINISH_CHANNELS),
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
        BLOCK_ROWS=_FINISH_BLOCKS,
        BLOCK_K=_FINISH_CHANNELS,
        num_warps=8,
    )
    return mean, var, rstd, scale, shift


def finish_sums(workspace: Tensor) -> tuple[Tensor, ...]:
    """The sums over the row blocks of ``workspace`` (2 or 3, row blocks, K) float32: as many (K,) vectors."""
    sums, blocks, k = workspace.shape
    out = vectors(workspace, k, sums)
    launch(
        finish_sums_kernel,
        triton.cdiv(k, _FINISH_CHANNELS),
        workspace.device,
        workspace=workspace,
        sum_g=out[0],
        sum_gy=out[1],
        sum_gr=out[2] if sums == 3 else None,
        K=k,
        row_blocks=blocks,
        BLOCK_ROWS=_FINISH_BLOCKS,
        BLOCK_K=_FINISH_CHANNELS,
        num_warps=8,
    )
    return out


def bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    gamma, beta = vector("gamma", gamma, y), vector("beta", beta, y)
    blocks = _REDUCTION.blocks(k, y.element_size())
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
        UNROLL=_STATS_UNROLL,
        **blocks,
        num_warps=_REDUCTION.warps,
    )
    return finish_stats(workspace, npq, rows, gamma, beta, eps)


def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    blocks = _REDUCTION.blocks(k, y.element_size())
    rows, count = row_blocks(npq, k, blocks["BLOCK_NPQ"])
    workspace = y.new_empty((2, count, k), dtype=torch.float32)
    launch(
        bn_backward_sums_kernel,
        count * triton.cdiv(k, blocks["BLOCK_K"]),
        y.device,
        dz=matrix("dz", dz, y),
        y=y,
        mean=vector("mean", mean, y),
        **affine_of(y, scale, shift),
        workspace=workspace,
        NPQ=npq,
        K=k,
        rows_per_block=rows,
        row_blocks=count,
        UNROLL=_SUMS_UNROLL,
        **blocks,
        num_warps=_REDUCTION.warps,
    )
    sum_g, sum_gy = finish_sums(workspace)
    return sum_g, sum_gy


def affine_act_backward(
    dz: Tensor,
    z: Tensor,
    y: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    rmean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    if residual is None or rmean is None:
        residual = rmean = None
    packed = z.dtype == torch.uint8
    if packed:
        z = sized("z", z, (n, p, q, triton.cdiv(k, 8)), torch.uint8, y.device)
    else:
        z = matrix("z", z, y)
    g = empty_like(y)
    blocks = _REDUCTION.blocks(k, y.element_size())
    rows, count = row_blocks(npq, k, blocks["BLOCK_NPQ"])
    workspace = y.new_empty((2 if residual is None else 3, count, k), dtype=torch.float32)
    launch(
        affine_act_backward_kernel,
        count * triton.cdiv(k, blocks["BLOCK_K"]),
        y.device,
        dz=matrix("dz", dz, y),
        z=z,
        y=y,
        mean=vector("mean", mean, y),
        residual=None if residual is None else matrix("residual", residual, y),
        rmean=vector("rmean", rmean, y),
        g=g,
        workspace=workspace,
        NPQ=npq,
        K=k,
        rows_per_block=rows,
        row_blocks=count,
        PACKED=packed,
        **blocks,
        num_warps=_REDUCTION.warps,
    )
    sums = finish_sums(workspace)
    sum_gr = sums[2] if residual is not None else y.new_zeros(k, dtype=torch.float32)
    return g, sums[0], sums[1], sum_gr


# ---- on per-channel vectors alone


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
        triton.cdiv(k, _VECTOR),
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
        BLOCK_K=_VECTOR,
        num_warps=4,
    )
    return out_mean, out_var, rstd, scale, shift


@triton.jit
def bn_backward_finalize_kernel(sum_g, sum_gy, rstd, scale, b, c, dgamma, share, K, BLOCK_K: tl.constexpr):
    """b = -scale * rstd^2 * sum_gy / n;  c = -scale * sum_g / n;  dgamma = rstd * sum_gy

    Shapes    sum_g, sum_gy, rstd, scale, b, c, dgamma (K,) fp32; share = 1 / n, or 0 where n is 0
    Tiles     one program per BLOCK_K channels
    Traffic   reads 4, writes 3 vectors
    Numerics  fp32
    Source    ops.bn_backward_finalize; docs/bn_act.md
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    r = tl.load(rstd + k, mask=inside, other=0.0)
    gy = tl.load(sum_gy + k, mask=inside, other=0.0) * r
    factor = -share * tl.load(scale + k, mask=inside, other=0.0)
    tl.store(b + k, factor * r * gy, mask=inside)
    tl.store(c + k, factor * tl.load(sum_g + k, mask=inside, other=0.0), mask=inside)
    tl.store(dgamma + k, gy, mask=inside)


def bn_backward_finalize(
    sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float
) -> tuple[Tensor, Tensor, Tensor]:
    if sum_g.dim() != 1:
        raise ValueError(f"sum_g: found {sum_g.dim()} dimensions, expected 1 (K,)")
    like = sum_g.view(1, -1)  # channels are dimension 1
    k = sum_g.shape[0]
    b, c, dgamma = vectors(sum_g, k, 3)
    launch(
        bn_backward_finalize_kernel,
        triton.cdiv(k, _VECTOR),
        sum_g.device,
        sum_g=vector("sum_g", sum_g, like),
        sum_gy=vector("sum_gy", sum_gy, like),
        rstd=vector("rstd", rstd, like),
        scale=vector("scale", scale, like),
        b=b,
        c=c,
        dgamma=dgamma,
        share=1.0 / n if n > 0 else 0.0,
        K=k,
        BLOCK_K=_VECTOR,
        num_warps=4,
    )
    return b, c, dgamma
