"""The stem behind its convolution: batch norm, ReLU and max-pooling in one pass, and the way back.

The activation between the ReLU and the pool is never written; the gradient is gathered, so that every value is written
once and in a fixed order of additions. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    CHANNELS_LAST,
    INTERPRETED,
    Tile,
    channels,
    empty_like,
    launch,
    matrix,
    sized,
    vector,
)
from .reduce import finish_sums

# Chosen by bytes in flight, not yet measured on a GPU: one access of 16 bytes per operand keeps the bytes of index, of
# which a thread reads as many as it reads values, in step with dz; 4 to 12 operands are under way together.
_TILE = Tile(vectors=1, warps=4)
#: Programs that a launch should have at least: several for each place on a GPU, or one where they write partial sums.
_PROGRAMS = 4 if INTERPRETED else 4096
_PROGRAMS_OF_SUMS = 4 if INTERPRETED else 1024


@triton.jit
def column(NQ, Q, K, rows_per_chunk, chunks, BLOCK_NQ: tl.constexpr, BLOCK_K: tl.constexpr):
    """(images, columns of z, which of them there are, first row of z, channels, number of the program's partial sums).

    A program keeps to BLOCK_NQ columns of z, of any images, and walks down rows_per_chunk of their rows.
    """
    channel_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    k = program % channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    part = program // channel_blocks
    nq = part // chunks * BLOCK_NQ + tl.arange(0, BLOCK_NQ)
    return (nq // Q).to(tl.int64), nq % Q, nq < NQ, part % chunks * rows_per_chunk, k, part


@triton.jit
def row_maximum(left, centre, right, mask, first, scale, shift):
    """The largest key of relu(y * scale + shift), as stored, of the three columns of a window in one row.

    A key is the bits of the value in fp32, which as integers are in the order of values that are not negative (NaN
    above all), and in their last bits ``first`` (15 or less), 14 or 13: the largest key is the largest value, of equal
    ones the first, in one instruction. 16-bit values leave these bits free, 32-bit ones are shifted.
    """
    for s in tl.static_range(3):
        pointer = left if s == 0 else centre if s == 1 else right
        value = tl.fma(tl.load(pointer, mask=mask, other=0.0).to(tl.float32), scale, shift)
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL).to(left.dtype.element_ty).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN may have a sign
        if left.dtype.element_ty == tl.float32:
            bits = bits.to(tl.int64) << 16
        if s == 0:
            key = bits | first
        else:
            key = tl.maximum(key, bits | (15 - s))
    return key


@triton.jit(do_not_specialize=["NQ", "H", "W", "P", "Q", "rows_per_chunk", "chunks"])
def affine_act_maxpool_kernel(
    y,
    scale,
    shift,
    z,
    index,
    NQ,
    H,
    W,
    P,
    Q,
    K,
    rows_per_chunk,
    chunks,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = max over 3 x 3, stride 2, padding 1, of relu(y * scale + shift);  index = 3 * r + s of the first, 9 if z <= 0

    Shapes    y (N, H, W, K), z and index (N, P, Q, K) channels-last, index uint8; scale, shift (K,) fp32
    Tiles     one program per BLOCK_NPQ columns (n, q) x BLOCK_K channels x rows_per_chunk rows of z
    Traffic   reads y, writes z and index: NHWK * itemsize + NPQK * (itemsize + 1). Columns overlap in L1, a row's
              maximum is kept for the window below
    Numerics  fp32, rounded once; values are compared as stored
    Source    ops.affine_act_maxpool; docs/bn_act.md
    """
    n, q, there, first, k, _ = column(NQ, Q, K, rows_per_chunk, chunks, BLOCK_NPQ, BLOCK_K)
    scales = channels(scale, k, K)
    shifts = channels(shift, k, K)
    mask = there[:, None] & (k < K)[None, :]
    # What would stand in the padding is a copy of its neighbour in the image, whose key is larger.
    w = tl.maximum(2 * q - 1, 0)
    code = tl.where(q > 0, 15, 12)[:, None]
    y += k[None, :]
    left = y + ((n * H * W + w) * K)[:, None]
    centre = y + ((n * H * W + 2 * q) * K)[:, None]
    right = y + ((n * H * W + tl.minimum(2 * q + 1, W - 1)) * K)[:, None]
    pitch = W.to(tl.int64) * K
    row = tl.maximum(2 * first - 1, 0) * pitch
    above = row_maximum(left + row, centre + row, right + row, mask, code, scales, shifts)
    above = tl.where(first == 0, above - 12, above)
    out = (n * P * Q + q) * K
    out = out[:, None] + k[None, :]
    out_pitch = Q.to(tl.int64) * K
    for p in range(first, tl.minimum(first + rows_per_chunk, P)):
        row = 2 * p * pitch
        middle = row_maximum(left + row, centre + row, right + row, mask, code, scales, shifts)
        row = tl.minimum(2 * p + 1, H - 1) * pitch
        below = row_maximum(left + row, centre + row, right + row, mask, code, scales, shifts)
        key = tl.maximum(tl.maximum(above, middle - 3), below - 6)
        if y.dtype.element_ty == tl.float32:
            bits = (key >> 16).to(tl.int32)
        else:
            bits = key & -16
        winner = tl.where(bits == 0, 9, 15 - (key & 15))
        at = out + p * out_pitch
        tl.store(z + at, bits.to(tl.float32, bitcast=True).to(z.dtype.element_ty), mask=mask)
        tl.store(index + at, winner.to(tl.uint8), mask=mask)
        above = below


@triton.jit
def pooled_row(dz, index, at, K, inside, right):
    """dz and index at a column and at the one to its right; 0 and 9 outside."""
    return (
        tl.load(dz + at, mask=inside, other=0.0),
        tl.load(index + at, mask=inside, other=9),
        tl.load(dz + at + K, mask=right, other=0.0),
        tl.load(index + at + K, mask=right, other=9),
    )


@triton.jit
def at_winner(dz, index, winner: tl.constexpr):
    """The dz whose index is ``winner``, fp32; 0 elsewhere."""
    return tl.where(index == winner, dz.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["NQ", "H", "W", "P", "Q", "rows_per_chunk", "chunks", "parts"])
def maxpool_backward_sums_kernel(
    dz,
    index,
    y,
    mean,
    workspace,
    NQ,
    H,
    W,
    P,
    Q,
    K,
    rows_per_chunk,
    chunks,
    parts,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_g = sum(g);  sum_gy = sum(g * (y - mean));  g = sum of the dz whose index points there

    Shapes    dz, index (N, P, Q, K), y (N, H, W, K) channels-last, index uint8; mean (K,) fp32;
              workspace (2, parts, K) fp32
    Tiles     as affine_act_maxpool: (p, q) stands for the four values (2p, 2q), (2p, 2q + 1), (2p + 1, 2q), (2p + 1,
              2q + 1) of y, which only the windows (p, q), (p, q + 1), (p + 1, q), (p + 1, q + 1) can have chosen
    Traffic   reads y, dz, index: NHWK * itemsize + NPQK * (itemsize + 1)
    Numerics  fp32 sums per column of the tile, then over its columns by a fixed tree; parts merged in double, in order
    Source    ops.maxpool_backward_sums; docs/bn_act.md
    """
    n, q, there, first, k, part = column(NQ, Q, K, rows_per_chunk, chunks, BLOCK_NPQ, BLOCK_K)
    centre = channels(mean, k, K)
    sum_g = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    sum_gy = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    at = ((n * H * W + 2 * q) * K)[:, None] + k[None, :]  # of y (2p, 2q), int64
    pitch = W.to(tl.int64) * K
    at_z = ((n * P * Q + q) * K)[:, None] + k[None, :]
    pitch_z = Q.to(tl.int64) * K
    inside = there[:, None] & (k < K)[None, :]
    odd = inside & (2 * q + 1 < W)[:, None]
    right = inside & (q + 1 < Q)[:, None]
    d0, i0, d1, i1 = pooled_row(dz, index, at_z + first * pitch_z, K, inside, right)
    for p in range(first, tl.minimum(first + rows_per_chunk, P)):
        row = y + at + 2 * p * pitch
        below = 2 * p + 1 < H
        under, odd_under = tl.where(below, inside, False), tl.where(below, odd, False)
        y0 = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        y1 = tl.load(row + K, mask=odd, other=0.0).to(tl.float32)
        y2 = tl.load(row + pitch, mask=under, other=0.0).to(tl.float32)
        y3 = tl.load(row + pitch + K, mask=odd_under, other=0.0).to(tl.float32)
        more = p + 1 < P
        next_inside, next_right = tl.where(more, inside, False), tl.where(more, right, False)
        d2, i2, d3, i3 = pooled_row(dz, index, at_z + (p + 1) * pitch_z, K, next_inside, next_right)
        g = at_winner(d0, i0, 4)
        sum_g += g
        sum_gy = tl.fma(g, y0 - centre, sum_gy)
        g = at_winner(d0, i0, 5) + at_winner(d1, i1, 3)
        sum_g += g
        sum_gy = tl.fma(g, y1 - centre, sum_gy)
        g = at_winner(d0, i0, 7) + at_winner(d2, i2, 1)
        sum_g += g
        sum_gy = tl.fma(g, y2 - centre, sum_gy)
        g = at_winner(d0, i0, 8) + at_winner(d1, i1, 6) + at_winner(d2, i2, 2) + at_winner(d3, i3, 0)
        sum_g += g
        sum_gy = tl.fma(g, y3 - centre, sum_gy)
        d0, i0, d1, i1 = d2, i2, d3, i3
    out = workspace + part.to(tl.int64) * K + k
    tl.store(out, tl.sum(sum_g, axis=0), mask=k < K)
    tl.store(out + parts.to(tl.int64) * K, tl.sum(sum_gy, axis=0), mask=k < K)


@triton.jit
def store_lazy(pointer, g, value, mean, a, b, c, mask):
    """a * g + b * (value - mean) + c, rounded once."""
    result = tl.fma(g, a, tl.fma(value.to(tl.float32) - mean, b, c))
    tl.store(pointer, result.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["NQ", "H", "W", "P", "Q", "rows_per_chunk", "chunks"])
def maxpool_backward_apply_kernel(
    dz,
    index,
    y,
    mean,
    a,
    b,
    c,
    dy,
    NQ,
    H,
    W,
    P,
    Q,
    K,
    rows_per_chunk,
    chunks,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy = a * g + b * (y - mean) + c;  g = sum of the dz whose index points there

    Shapes    dz, index (N, P, Q, K), y, dy (N, H, W, K) channels-last, index uint8; mean, a, b, c (K,) fp32
    Tiles     as maxpool_backward_sums
    Traffic   reads y, dz, index, writes dy: 2 * NHWK * itemsize + NPQK * (itemsize + 1)
    Numerics  fp32 from load to store; one rounding, at the store
    Source    ops.maxpool_backward_apply; docs/bn_act.md
    """
    n, q, there, first, k, _ = column(NQ, Q, K, rows_per_chunk, chunks, BLOCK_NPQ, BLOCK_K)
    centre = channels(mean, k, K)
    factor = channels(a, k, K)
    slope = channels(b, k, K)
    constant = channels(c, k, K)
    at = ((n * H * W + 2 * q) * K)[:, None] + k[None, :]  # of y (2p, 2q), int64
    pitch = W.to(tl.int64) * K
    at_z = ((n * P * Q + q) * K)[:, None] + k[None, :]
    pitch_z = Q.to(tl.int64) * K
    inside = there[:, None] & (k < K)[None, :]
    odd = inside & (2 * q + 1 < W)[:, None]
    right = inside & (q + 1 < Q)[:, None]
    d0, i0, d1, i1 = pooled_row(dz, index, at_z + first * pitch_z, K, inside, right)
    for p in range(first, tl.minimum(first + rows_per_chunk, P)):
        row = y + at + 2 * p * pitch
        out = dy + at + 2 * p * pitch
        below = 2 * p + 1 < H
        under, odd_under = tl.where(below, inside, False), tl.where(below, odd, False)
        y0 = tl.load(row, mask=inside, other=0.0)
        y1 = tl.load(row + K, mask=odd, other=0.0)
        y2 = tl.load(row + pitch, mask=under, other=0.0)
        y3 = tl.load(row + pitch + K, mask=odd_under, other=0.0)
        more = p + 1 < P
        next_inside, next_right = tl.where(more, inside, False), tl.where(more, right, False)
        d2, i2, d3, i3 = pooled_row(dz, index, at_z + (p + 1) * pitch_z, K, next_inside, next_right)
        g = at_winner(d0, i0, 4)
        store_lazy(out, g, y0, centre, factor, slope, constant, inside)
        g = at_winner(d0, i0, 5) + at_winner(d1, i1, 3)
        store_lazy(out + K, g, y1, centre, factor, slope, constant, odd)
        g = at_winner(d0, i0, 7) + at_winner(d2, i2, 1)
        store_lazy(out + pitch, g, y2, centre, factor, slope, constant, under)
        g = at_winner(d0, i0, 8) + at_winner(d1, i1, 6) + at_winner(d2, i2, 2) + at_winner(d3, i3, 0)
        store_lazy(out + pitch + K, g, y3, centre, factor, slope, constant, odd_under)
        d0, i0, d1, i1 = d2, i2, d3, i3


# ---- launches


def _pooled_size(y: Tensor) -> tuple[int, int, int, int]:
    n, k, h, w = y.shape
    return n, k, (h + 1) // 2, (w + 1) // 2


def _grid(y: Tensor, programs: int) -> tuple[int, int, dict[str, Any]]:
    """(number of programs, of partial sums, and the arguments that say so), cut into at least ``programs``."""
    n, k, h, w = y.shape
    p, q = _pooled_size(y)[2:]
    blocks = _TILE.blocks(k, y.element_size())
    columns, channel_blocks = triton.cdiv(n * q, blocks["BLOCK_NPQ"]), triton.cdiv(k, blocks["BLOCK_K"])
    chunks = max(1, min(p, triton.cdiv(programs, max(columns * channel_blocks, 1))))
    rows = max(1, triton.cdiv(p, chunks))
    chunks = triton.cdiv(p, rows)
    sizes = {"NQ": n * q, "H": h, "W": w, "P": p, "Q": q, "K": k, "rows_per_chunk": rows, "chunks": chunks}
    return columns * chunks * channel_blocks, columns * chunks, {**sizes, **blocks, "num_warps": _TILE.warps}


def _pooled(dz: Tensor, index: Tensor, y: Tensor) -> dict[str, Tensor]:
    """dz and index (N, K, P, Q) behind ``y`` (N, K, H, W), as arguments."""
    size = _pooled_size(y)
    return {
        "dz": sized("dz", dz, size, y.dtype, y.device, CHANNELS_LAST),
        "index": sized("index", index, size, torch.uint8, y.device, CHANNELS_LAST),
    }


def affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    size = _pooled_size(y)
    z = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=CHANNELS_LAST)
    index = torch.empty(size, dtype=torch.uint8, device=y.device, memory_format=CHANNELS_LAST)
    programs, _, sizes = _grid(y, _PROGRAMS)
    launch(
        affine_act_maxpool_kernel,
        programs,
        y.device,
        y=y,
        scale=vector("scale", scale, y),
        shift=vector("shift", shift, y),
        z=z,
        index=index,
        **sizes,
    )
    return z, index


def maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    programs, parts, sizes = _grid(y, _PROGRAMS_OF_SUMS)
    workspace = y.new_empty((2, parts, y.shape[1]), dtype=torch.float32)
    launch(
        maxpool_backward_sums_kernel,
        programs,
        y.device,
        **_pooled(dz, index, y),
        y=y,
        mean=vector("mean", mean, y),
        workspace=workspace,
        parts=parts,
        **sizes,
    )
    sum_g, sum_gy = finish_sums(workspace)
    return sum_g, sum_gy


def maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    y = matrix("y", y)
    dy = empty_like(y)
    programs, _, sizes = _grid(y, _PROGRAMS)
    launch(
        maxpool_backward_apply_kernel,
        programs,
        y.device,
        **_pooled(dz, index, y),
        y=y,
        mean=vector("mean", mean, y),
        a=vector("a", a, y),
        b=vector("b", b, y),
        c=vector("c", c, y),
        dy=dy,
        **sizes,
    )
    return dy
