"""dx = the gradient of a convolution's input, from a plain or a lazy gradient.

The epilogue can add the identity's gradient, and put the mask of the ReLU before the convolution on dx while it takes
the two sums that the batch norm before it needs.

Not yet run on a GPU: the tiles below are chosen by reasoning and by what compiles without spills, none is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import affine, channels, launch, where_active
from .conv_common import (
    Config,
    Geometry,
    Gradient,
    grouped,
    halves,
    image,
    load_gradient,
    options_of,
    plain_tile,
    precision,
)
from .reduce import finish_sums

# rows: pixels of dx; columns: channels of dx (C); depth: channels of dy (K). A lazy gradient has two tiles to load per
# step where a plain one has one, and both in fp32 at once: half the depth, for the same registers.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=256, columns=128, depth=128, warps=4, stages=1, per_sm=1),
    "ieee": Config(rows=64, columns=64, depth=16, warps=8, stages=2, per_sm=2),
    "tf32": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "odd": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "narrow_1x1": Config(rows=128, columns=64, depth=32, warps=4, stages=4, per_sm=2),
    "narrow_3x3": Config(rows=128, columns=64, depth=64, warps=8, stages=3, per_sm=1),
    "wide": Config(rows=128, columns=128, depth=64, warps=8, stages=3, per_sm=1),
    "wide_lazy": Config(rows=128, columns=128, depth=32, warps=8, stages=4, per_sm=1),
}


def config(geometry: Geometry, dtype: torch.dtype, lazy: bool) -> Config:
    """The tile for this shape."""
    if geometry.C <= 64:
        return CONFIGS[plain_tile(geometry, dtype) or f"narrow_{geometry.R}x{geometry.R}"]
    return CONFIGS[plain_tile(geometry, dtype) or ("wide_lazy" if lazy else "wide")]


def options(geometry: Geometry, dtype: torch.dtype, lazy: bool, crowded: bool = False) -> list[Config]:
    """The tiles that may serve this shape, the usual one first. ``crowded``: with a mask before and a sum behind."""
    names = ["narrow_1x1", "narrow_3x3", *(["wide_lazy", *([] if lazy else ["wide"])] if geometry.C > 64 else [])]
    if crowded and geometry.R == 3:
        names.remove("narrow_1x1")  # 16 bytes of spills on sm_90
    return options_of(CONFIGS, names, geometry, dtype, config(geometry, dtype, lazy))


@triton.jit
def store_gradient(value, dx, residual, x, xmean, scale, shift, slot, offset, inside, channel, C, plane, is_first):
    """Store a tile of dx, with the residual added; with x masked, and its two sums added to the program's at ``slot``.

    The sums stay in the program's own row of memory (L1): in registers, in the product's layout, they took too many.
    """
    if residual is not None:
        value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        before = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        value = where_active(affine(before, channels(scale, channel, C), channels(shift, channel, C)), value)
    rounded = value.to(dx.dtype.element_ty)
    tl.store(dx + offset, rounded, mask=inside)
    if x is not None:
        value = tl.where(inside, rounded.to(tl.float32), 0.0)
        present = channel < C
        earlier = tl.where(is_first, False, present)
        sum_g = tl.load(slot, mask=earlier, other=0.0)
        sum_gx = tl.load(slot + plane, mask=earlier, other=0.0)
        tl.store(slot, sum_g + tl.sum(value, 0), mask=present)
        tl.store(slot + plane, sum_gx + tl.sum(value * (before - channels(xmean, channel, C)), 0), mask=present)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv_dgrad_kernel(
    g,
    y,
    mean,
    a,
    b,
    c,
    gscale,
    gshift,
    w,
    residual,
    x,
    xmean,
    scale,
    shift,
    dx,
    workspace,
    N,
    H,
    W,
    P,
    Q,
    C,
    K,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_NHW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c] [+ residual], h = p*STRIDE + r - R//2

    w likewise; dy = g or a * g + b * (y - mean) + c, as load_gradient has it. With x: dx is 0 where x * scale + shift
    <= 0, and sum(dx), sum(dx * (x - xmean)) go to the workspace.
    Shapes    g, y (N, P, Q, K), w (K, R, R, C), residual, x, dx (N, H, W, C); mean, a, b, c, gscale, gshift (K,) and
              xmean, scale, shift (C,) fp32; workspace (2, groups, C) fp32
    Tiles     BLOCK_NHW x BLOCK_C of dx; one program per BLOCK_C channels and every groups-th tile of pixels;
              grid cdiv(C, BLOCK_C) * groups, channels fastest
    Traffic   reads g, y (each of R*R taps, from L1 and L2 but for the first), w, residual, x, writes dx
    Numerics  fp32 sums; dy is rounded to the storage dtype, as if written; dx is rounded once; sums of the rounded dx
    Source    ops.conv_dgrad, ops.conv_dgrad_sums; docs/conv.md, "Triton"; parity classes as in CUTLASS's strided dgrad
    """
    c_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    group = program // c_blocks
    groups = tl.num_programs(0) // c_blocks
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = channel < C
    k_blocks = tl.cdiv(K, BLOCK_K)

    if R == 3 and STRIDE == 2:
        # Pixels of one parity (of h, of w) meet the same taps: 4, 2, 2 or 1 of the nine. Four products without a zero,
        # the longest first; programs take every groups-th tile, so that all get their share of each.
        odd_h = H // 2
        odd_w = W // 2
        end_oo = tl.cdiv(N * odd_h * odd_w, BLOCK_NHW)
        end_oe = end_oo + tl.cdiv(N * odd_h * (W - odd_w), BLOCK_NHW)
        end_eo = end_oe + tl.cdiv(N * (H - odd_h) * odd_w, BLOCK_NHW)
        tiles = end_eo + tl.cdiv(N * (H - odd_h) * (W - odd_w), BLOCK_NHW)
    else:
        tiles = tl.cdiv(N * P * Q, BLOCK_NHW)

    for tile in range(group, tiles, groups):
        if R == 3 and STRIDE == 2:
            by_row = tl.where(tile < end_oe, 1, 0)  # 1: odd h
            by_column = tl.where((tile < end_oo) | ((tile >= end_oe) & (tile < end_eo)), 1, 0)
            begin = tl.where(tile < end_oo, 0, tl.where(tile < end_oe, end_oo, tl.where(tile < end_eo, end_oe, end_eo)))
            height = tl.where(by_row == 1, odd_h, H - odd_h)
            width = tl.where(by_column == 1, odd_w, W - odd_w)
            start = (tile - begin) * BLOCK_NHW
            taps = (1 + by_row) * (1 + by_column)
        else:
            height = P
            width = Q
            start = tile * BLOCK_NHW
            taps = R * R
        row = start + tl.arange(0, BLOCK_NHW)
        row_inside = row < N * height * width
        # Where the tile starts in memory is int64 and goes into the pointers; what lies within a tile is int32.
        first_dy = tl.cast(start, tl.int64)
        rows = row - start
        first_dx = first_dy
        pixels = rows
        if R == 3 or STRIDE == 2:
            n = row // (height * width)
            p = row // width % height
            q = row - (n * height + p) * width
            n0 = start // (height * width)
            p0 = start // width % height
            q0 = start - (n0 * height + p0) * width
            if R == 3 and STRIDE == 2:
                first_dy = (tl.cast(n0, tl.int64) * P + p0) * Q + q0
                rows = ((n - n0) * P + p - p0) * Q + q - q0
                first_dx = (tl.cast(n0, tl.int64) * H + 2 * p0 + by_row) * W + 2 * q0 + by_column
            elif STRIDE == 2:
                first_dx = (tl.cast(n0, tl.int64) * H + 2 * p0) * W + 2 * q0
            if STRIDE == 2:
                pixels = ((n - n0) * H + 2 * (p - p0)) * W + 2 * (q - q0)
        g_tile = g + first_dy * K
        y_tile = y if y is None else y + first_dy * K

        acc = tl.zeros((BLOCK_NHW, BLOCK_C), tl.float32)
        for step in range(0, taps * k_blocks):
            tap = step // k_blocks
            k = (step - tap * k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            if R == 1:
                dy = load_gradient(g_tile, y_tile, mean, a, b, c, gscale, gshift, rows * K, k, row_inside, K)
            else:
                if STRIDE == 1:
                    i = tap // 3
                    j = tap - i * 3
                    down = 1 - i
                    right = 1 - j
                else:
                    # h = 2p - 1 + r: an even h meets r = 1 at p = h / 2; an odd one r = 0 at the next p, r = 2 at this.
                    i = tap // (1 + by_column)
                    j = tap - i * (1 + by_column)
                    down = by_row - i
                    right = by_column - j
                    tap = (1 - by_row + 2 * i) * 3 + 1 - by_column + 2 * j
                inside = row_inside & (p + down >= 0) & (p + down < P) & (q + right >= 0) & (q + right < Q)
                at = (rows + down * Q + right) * K
                dy = load_gradient(g_tile, y_tile, mean, a, b, c, gscale, gshift, at, k, inside, K)
            weight = tl.load(
                w + ((k * (R * R * C) + tap * C)[:, None] + channel[None, :]),
                mask=(k < K)[:, None] & channel_inside[None, :],
                other=0.0,
            )  # (BLOCK_K, BLOCK_C)
            acc = tl.dot(dy, weight, acc, input_precision=PRECISION)

        left, right = halves(acc, BLOCK_NHW, BLOCK_C)
        for half in tl.static_range(2):
            column = program % c_blocks * BLOCK_C + half * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
            # A strided 1x1 reaches one pixel in four: each tile writes the other three as well.
            for part in tl.static_range(4 if R == 1 and STRIDE == 2 else 1):
                inside = row_inside
                at = pixels
                if R == 1 and STRIDE == 2:
                    inside = row_inside & (2 * p + part // 2 < H) & (2 * q + part % 2 < W)
                    at = pixels + (part // 2) * W + part % 2
                value = left if half == 0 else right
                store_gradient(
                    value if part == 0 else tl.zeros_like(value),
                    dx + first_dx * C,
                    residual if residual is None else residual + first_dx * C,
                    x if x is None else x + first_dx * C,
                    xmean,
                    scale,
                    shift,
                    workspace if workspace is None else workspace + group * C + column,
                    at[:, None] * C + column[None, :],
                    inside[:, None] & (column < C)[None, :],
                    column,
                    C,
                    groups * C,
                    (tile == group) & (part == 0),
                )
                tl.debug_barrier()  # the next loads of the workspace are other threads'; and one part after the other


def conv_dgrad(
    g: Tensor,
    w: Tensor,
    geometry: Geometry,
    lazy: Gradient,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    xmean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    tile: Config | None = None,
) -> tuple[Tensor, ...]:
    """(dx,), or (dx, sum_g, sum_gx) where ``x`` is given; operands are checked, channels-last and not empty."""
    tile = tile or config(geometry, g.dtype, lazy.y is not None)
    n, c, h, width, k, r, stride = geometry
    if r == 3 and stride == 2:
        sizes = [n * i * j for i in (h // 2, h - h // 2) for j in (width // 2, width - width // 2)]
    else:
        sizes = [geometry.NPQ]
    c_blocks = triton.cdiv(c, tile.columns)
    _, groups = grouped(sum(triton.cdiv(size, tile.rows) for size in sizes), c_blocks, tile, g.device)
    dx = image(g, n, c, h, width)
    workspace = None if x is None else g.new_empty((2, groups, c), dtype=torch.float32)
    launch(
        conv_dgrad_kernel,
        c_blocks * groups,
        g.device,
        g=g,
        **lazy._asdict(),
        w=w,
        residual=residual,
        x=x,
        xmean=xmean,
        scale=scale,
        shift=shift,
        dx=dx,
        workspace=workspace,
        N=n,
        H=h,
        W=width,
        P=geometry.P,
        Q=geometry.Q,
        C=c,
        K=k,
        R=r,
        STRIDE=stride,
        PRECISION=precision(g.dtype),
        BLOCK_NHW=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (dx,) if workspace is None else (dx, *finish_sums(workspace))
