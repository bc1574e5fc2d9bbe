"""The backward of batch norm, ReLU and residual add around a convolution: the twin of csrc/cuda/bn_act_backward.cu.

Arithmetic is fp32 whatever the storage; sums have two stages, as reduce.py says. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bn_act import ELEMENTWISE
from .common import (
    affine,
    affine_of,
    channels,
    empty_like,
    launch,
    matrix,
    place,
    row_blocks,
    sized,
    vector,
    vectors,
    where_active,
)
from .reduce import REDUCTION, VECTOR, finish_sums

#: Tiles whose loads are under way together in a loop over rows.
_UNROLL = 2


# ---- at a block's end: g, and the sums of it


@triton.jit
def unpack_bits(byte, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr):
    """The inverse of bn_act.pack_bits: 0 and not 0."""
    bits = byte.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8)[None, None, :])
    return tl.reshape(bits, (BLOCK_NPQ, BLOCK_K))


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
    blocks = REDUCTION.blocks(k, y.element_size())
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
        num_warps=REDUCTION.warps,
    )
    sums = finish_sums(workspace)
    sum_gr = sums[2] if residual is not None else y.new_zeros(k, dtype=torch.float32)
    return g, sums[0], sums[1], sum_gr


# ---- inside a block: the ReLU's mask is formed again from y


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


def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    n, k, p, q = y.shape
    npq = n * p * q
    blocks = REDUCTION.blocks(k, y.element_size())
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
        UNROLL=_UNROLL,
        **blocks,
        num_warps=REDUCTION.warps,
    )
    sum_g, sum_gy = finish_sums(workspace)
    return sum_g, sum_gy


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
        triton.cdiv(k, VECTOR),
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
        BLOCK_K=VECTOR,
        num_warps=4,
    )
    return b, c, dgamma


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
    tile = ELEMENTWISE[2]
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
