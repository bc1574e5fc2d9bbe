"""y = conv(x, w), of a plain or a lazy activation, with the statistics of y in the epilogue.

Not yet run on a GPU: the tiles below are chosen by reasoning and by what compiles without spills, none is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bn_stats import coarse, finish_stats
from .common import launch
from .conv_common import Config, Geometry, grouped, halves, image, load_activation, options_of, plain_tile, precision

# A program keeps one block of channels of y and walks over neighbouring blocks of pixels, so that a channel's
# statistics leave it once. Programs of the same pixels and other channels run side by side and share x through L2.
#
# 1x1 with few channels is bound by memory and has few steps of depth: two programs per multiprocessor hide each other's
# loads and epilogues, and a depth of 32 leaves a lazy operand its registers. 3x3, and 1x1 with many channels, are bound
# by the tensor cores: one large tile. The epilogue fills 255 registers at 128 x 128 with 8 warps; beside it, a lazy
# operand of depth 64 spills in Triton 3.6.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=256, columns=128, depth=16, warps=4, stages=1, per_sm=1),
    "ieee": Config(rows=64, columns=32, depth=16, warps=4, stages=3, per_sm=2),  # 64 columns spill
    "tf32": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "odd": Config(rows=64, columns=64, depth=32, warps=8, stages=3, per_sm=1),
    "narrow_1x1": Config(rows=128, columns=64, depth=32, warps=4, stages=4, per_sm=2),
    "narrow_3x3": Config(rows=128, columns=64, depth=64, warps=8, stages=4, per_sm=1),
    "wide": Config(rows=128, columns=128, depth=64, warps=8, stages=3, per_sm=1),
    "wide_lazy": Config(rows=128, columns=128, depth=32, warps=8, stages=4, per_sm=1),
}


def config(geometry: Geometry, dtype: torch.dtype, lazy: bool) -> Config:
    """The tile for this shape."""
    shape = f"narrow_{geometry.R}x{geometry.R}" if geometry.K <= 64 else "wide_lazy" if lazy else "wide"
    return CONFIGS[plain_tile(geometry, dtype) or shape]


def options(geometry: Geometry, dtype: torch.dtype, lazy: bool) -> list[Config]:
    """The tiles that may serve this shape, the usual one first."""
    names = ["narrow_1x1", "narrow_3x3", *(["wide_lazy", *([] if lazy else ["wide"])] if geometry.K > 64 else [])]
    return options_of(CONFIGS, names, geometry, dtype, config(geometry, dtype, lazy))


@triton.jit
def mainloop(
    x,
    w,
    scale,
    shift,
    start,
    k,
    NPQ,
    H,
    W,
    P,
    Q,
    C,
    K,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(BLOCK_NPQ, BLOCK_K) fp32 of conv(a, w), from pixel ``start`` on and for the channels ``k``.

    a = relu(x * scale + shift), 0 outside of the image, or x itself; x (N, H, W, C), w (K, R, R, C).
    """
    row = start + tl.arange(0, BLOCK_NPQ)
    row_inside = row < NPQ
    k_inside = k < K
    c_blocks = tl.cdiv(C, BLOCK_C)
    w_columns = k[None, :] * (R * R * C)  # (1, BLOCK_K); int32: no weight has 2^31 elements
    # Where the tile starts in memory is int64 and goes into the pointers; what lies within a tile is int32.
    if R == 1 and STRIDE == 1:
        first_pixel = tl.cast(start, tl.int64)
        rows = (row - start) * C
    else:
        n = row // (P * Q)
        p = row // Q % P
        q = row - (n * P + p) * Q
        n0 = start // (P * Q)
        p0 = start // Q % P
        q0 = start - (n0 * P + p0) * Q
        h = p * STRIDE - R // 2
        v = q * STRIDE - R // 2  # the column: w is the weight
        # Of the first tap: it may lie outside of the image.
        first_pixel = (tl.cast(n0, tl.int64) * H + p0 * STRIDE - R // 2) * W + q0 * STRIDE - R // 2
        rows = (((n - n0) * H + (p - p0) * STRIDE) * W + (q - q0) * STRIDE) * C
    x_tile = x + first_pixel * C

    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    # One loop over taps and channels, so that loads run ahead across taps.
    for step in range(0, R * R * c_blocks):
        tap = step // c_blocks
        c = (step - tap * c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        if R == 1:
            a = load_activation(x_tile, scale, shift, rows, c, row_inside, C)
        else:
            r = tap // R
            s = tap - r * R
            inside = row_inside & (h + r >= 0) & (h + r < H) & (v + s >= 0) & (v + s < W)
            a = load_activation(x_tile, scale, shift, rows + (r * W + s) * C, c, inside, C)
        mask = (c < C)[:, None] & k_inside[None, :]
        b = tl.load(w + ((tap * C + c)[:, None] + w_columns), mask=mask, other=0.0)  # (BLOCK_C, BLOCK_K)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_with_statistics(acc, y, slot, offset, row_inside, k_inside, plane, rows, is_first):
    """Store a tile of y; add it, as stored, to the program's pivot, sum and sum of squares at ``slot`` (3 planes).

    What the program knows of its channels stays in its own row of memory (L1): carried in registers, in the product's
    layout, it took a third of them.
    """
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + offset, rounded, mask=row_inside[:, None] & k_inside[None, :])
    value = rounded.to(tl.float32)  # 0 in rows behind the last: their operand was
    if is_first:
        tl.store(slot, coarse(tl.sum(value, 0) / rows), mask=k_inside)
        tl.debug_barrier()
    pivot = tl.load(slot, mask=k_inside, other=0.0)
    before = tl.where(is_first, False, k_inside)
    total = tl.load(slot + plane, mask=before, other=0.0)
    square = tl.load(slot + 2 * plane, mask=before, other=0.0)
    d = tl.where(row_inside[:, None], value - pivot[None, :], 0.0)
    tl.store(slot + plane, total + tl.sum(d, 0), mask=k_inside)
    tl.store(slot + 2 * plane, square + tl.sum(d * d, 0), mask=k_inside)


@triton.jit(do_not_specialize=["NPQ", "H", "W", "P", "Q", "tiles_per_group"])
def conv_fprop_kernel(
    x,
    w,
    scale,
    shift,
    y,
    workspace,
    NPQ,
    H,
    W,
    P,
    Q,
    C,
    K,
    tiles_per_group,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[npq, k] = sum over r, s, c of a[n, p*STRIDE + r - R//2, q*STRIDE + s - R//2, c] * w[k, r, s, c]

    a = relu(x * scale + shift), 0 outside of the image, or x itself; and what the statistics of y need.
    Shapes    x (N, H, W, C), w (K, R, R, C), y (NPQ, K); scale, shift (C,) fp32; workspace (3, groups, K) fp32
    Tiles     BLOCK_NPQ x BLOCK_K of y; one program per BLOCK_K channels and group of tiles_per_group tiles;
              grid cdiv(K, BLOCK_K) * groups, channels fastest
    Traffic   reads x (each of R*R taps, from L1 and L2 but for the first), w, writes y: the statistics cost no traffic
    Numerics  fp32 sums; the transform is rounded to the storage dtype, as if written; y is rounded once. Statistics of
              the rounded y: sums about the first tile's mean; in a group of t tiles that mean is off by at most
              sqrt(t) standard deviations, so that at most log2(t) bits cancel
    Source    ops.conv_stats; docs/conv.md, "Triton"; implicit GEMM as in CUTLASS, arXiv 1410.0759
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    group = program // k_blocks
    groups = tl.num_programs(0) // k_blocks
    k = program % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)

    first = group * tiles_per_group
    for tile in range(first, tl.minimum(first + tiles_per_group, tl.cdiv(NPQ, BLOCK_NPQ))):
        start = tile * BLOCK_NPQ
        row = start + tl.arange(0, BLOCK_NPQ)
        row_inside = row < NPQ
        acc = mainloop(
            x, w, scale, shift, start, k, NPQ, H, W, P, Q, C, K, R, STRIDE, PRECISION, BLOCK_NPQ, BLOCK_K, BLOCK_C
        )
        left, right = halves(acc, BLOCK_NPQ, BLOCK_K)
        for half in tl.static_range(2):
            column = program % k_blocks * BLOCK_K + half * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            store_with_statistics(
                left if half == 0 else right,
                y + tl.cast(start, tl.int64) * K,
                workspace + group * K + column,
                (row - start)[:, None] * K + column[None, :],
                row_inside,
                column < K,
                groups * K,
                tl.minimum(BLOCK_NPQ, NPQ - start),
                tile == first,
            )
            tl.debug_barrier()  # the next loads of the workspace are other threads'; and one half after the other


def conv_fprop(
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    scale: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    tile: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``conv_stats`` returns; operands are checked, channels-last and not empty."""
    tile = tile or config(geometry, x.dtype, scale is not None)
    k_blocks = triton.cdiv(geometry.K, tile.columns)
    tiles_per_group, groups = grouped(triton.cdiv(geometry.NPQ, tile.rows), k_blocks, tile, x.device)
    y = image(x, geometry.N, geometry.K, geometry.P, geometry.Q)
    workspace = x.new_empty((3, groups, geometry.K), dtype=torch.float32)
    launch(
        conv_fprop_kernel,
        k_blocks * groups,
        x.device,
        x=x,
        w=w,
        scale=scale,
        shift=shift,
        y=y,
        workspace=workspace,
        NPQ=geometry.NPQ,
        H=geometry.H,
        W=geometry.W,
        P=geometry.P,
        Q=geometry.Q,
        C=geometry.C,
        K=geometry.K,
        tiles_per_group=tiles_per_group,
        R=geometry.R,
        STRIDE=geometry.stride,
        PRECISION=precision(x.dtype),
        BLOCK_NPQ=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (y, *finish_stats(workspace, geometry.NPQ, tiles_per_group * tile.rows, gamma, beta, eps))
