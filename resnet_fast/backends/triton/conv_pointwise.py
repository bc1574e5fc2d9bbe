"""dx and dw of a 1x1 convolution in one read of the gradient: where dw fits into the registers of one program.

Off until a GPU has measured it: the tiles below are candidates of ``configurations`` and run where a table says so.
Not yet run on a GPU: they are chosen by reasoning and by what compiles without spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, launch
from .conv_common import (
    Config,
    Geometry,
    Gradient,
    halves,
    hopper,
    image,
    load_activation,
    load_gradient,
    multiprocessors,
    precision,
    weight_gradient,
)
from .conv_dgrad import store_gradient
from .conv_wgrad import add_parts
from .reduce import finish_sums

# rows: pixels; columns: C and depth: K, each whole (rounded up to a power of two). dw takes columns * depth and dx
# rows * columns fp32 registers of a program at the same time.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=128, columns=0, depth=0, warps=4, stages=1, per_sm=1),
    "small": Config(rows=64, columns=0, depth=0, warps=8, stages=2, per_sm=1),
    "smaller": Config(rows=32, columns=0, depth=0, warps=8, stages=2, per_sm=1),
}
#: Values of dw that fit: 64 registers of each thread, with 8 warps. Stage 1 of ResNet-50 has 64 x 64 and 64 x 256.
_LARGEST = 16384


def options(geometry: Geometry, dtype: torch.dtype, device: torch.device, masked: bool = False) -> list[Config]:
    """The tiles that may serve this shape; none where dw does not fit. ``masked``: with a ReLU behind the gradient."""
    columns, depth = (max(16, triton.next_power_of_2(n)) for n in (geometry.C, geometry.K))
    if geometry.R != 1 or geometry.stride != 1 or columns * depth > _LARGEST or max(columns, depth) > 256:
        return []
    if INTERPRETED:
        names = ["interpreted"]
    else:
        names = [] if dtype == torch.float32 or geometry.C % 16 or geometry.K % 16 else ["smaller"]
        # Larger ones spill on sm_80 (8 to 168 bytes), and with a mask on sm_90.
        if names and (columns * depth <= 4096 or (hopper(device) and not masked)):
            names = ["small", "smaller"]
    return [CONFIGS[name]._replace(columns=columns, depth=depth) for name in names]


@triton.jit(do_not_specialize=["NPQ"])
def conv_pointwise_backward_kernel(
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
    by_tile,
    sums,
    dw,
    NPQ,
    C,
    K,
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[npq, c] = sum over k of dy[npq, k] * w[k, c] [+ residual];  dw[k, c] = sum over npq of dy[npq, k] * z[npq, c]

    dy = g or a * g + b * (y - mean) + c, as load_gradient has it; z = x or relu(x * scale + shift). With sums: dx is 0
    where x * scale + shift <= 0, and sum(dx), sum(dx * (x - xmean)) go there.
    Shapes    g, y (NPQ, K), w (K, C), residual, x, dx (NPQ, C), dw (programs, K, C) fp32; mean, a, b, c, gscale, gshift
              (K,) and xmean, scale, shift (C,) fp32; by_tile (2, tiles, C), sums (2, programs, C) fp32
    Tiles     BLOCK_NPQ pixels, all of C and K; every program takes every programs-th tile and keeps its dw to the end
    Traffic   reads g, y, x, residual once, writes dx, where dgrad and wgrad apart read g, y and x twice; and the parts
              of dw, 4 * programs * K * C
    Numerics  fp32 sums; dy and z are rounded to the storage dtype, as if written; dx is rounded once, then summed
    Source    ops.conv_backward, ops.conv_backward_sums; docs/conv.md, "Triton"
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    channel = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    both = (k < K)[:, None] & (channel < C)[None, :]
    weight = tl.load(w + (k[:, None] * C + channel[None, :]), mask=both, other=0.0)  # (BLOCK_K, BLOCK_C)
    row = tl.arange(0, BLOCK_NPQ)

    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    tiles = tl.cdiv(NPQ, BLOCK_NPQ)
    for tile in range(program, tiles, programs):
        start = tile * BLOCK_NPQ
        inside = row < NPQ - start
        # Where the tile starts in memory is int64 and goes into the pointers; what lies within it is int32.
        at_k = tl.cast(start, tl.int64) * K
        at_c = tl.cast(start, tl.int64) * C
        dy = load_gradient(g + at_k, y if y is None else y + at_k, mean, a, b, c, gscale, gshift, row * K, k, inside, K)
        z = load_activation(x + at_c, scale, shift, row * C, channel, inside, C)
        total = tl.dot(tl.trans(dy), z, total, input_precision=PRECISION)
        left, right = halves(tl.dot(dy, weight, input_precision=PRECISION), BLOCK_NPQ, BLOCK_C)
        for half in tl.static_range(2):
            column = half * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
            store_gradient(
                left if half == 0 else right,
                dx + at_c,
                residual if residual is None else residual + at_c,
                None if by_tile is None else x + at_c,
                xmean,
                scale,
                shift,
                by_tile if by_tile is None else by_tile + tl.cast(tile, tl.int64) * C + column,
                row[:, None] * C + column[None, :],
                inside[:, None] & (column < C)[None, :],
                column,
                C,
                tiles * C,
                True,
            )

    if by_tile is not None:
        # Each tile's sums were stored apart, and nothing waited for them: a barrier in the loop above would keep its
        # loads from running ahead. The program's own are added up here.
        tl.debug_barrier()
        sum_g = tl.zeros((BLOCK_C,), tl.float32)
        sum_gx = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(program, tiles, 8 * programs):
            own = first + tl.arange(0, 8) * programs
            slot = by_tile + (own.to(tl.int64)[:, None] * C + channel[None, :])
            mask = (own < tiles)[:, None] & (channel < C)[None, :]
            sum_g += tl.sum(tl.load(slot, mask=mask, other=0.0), 0)
            sum_gx += tl.sum(tl.load(slot + tl.cast(tiles, tl.int64) * C, mask=mask, other=0.0), 0)
        tl.store(sums + program * C + channel, sum_g, mask=channel < C)
        tl.store(sums + (programs + program) * C + channel, sum_gx, mask=channel < C)

    out = dw + tl.cast(program, tl.int64) * K * C + (k[:, None] * C + channel[None, :])
    tl.store(out, total, mask=both)


def conv_pointwise_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    lazy: Gradient,
    tile: Config,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None = None,
    xmean: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dx, dw), or (dx, dw, sum_g, sum_gx) where ``xmean`` is given; operands are checked, channels-last, not empty."""
    n, c, h, width, k, _, _ = geometry
    tiles = triton.cdiv(geometry.NPQ, tile.rows)
    programs = min(tiles, multiprocessors(x.device) * tile.per_sm)
    dx = image(x, n, c, h, width)
    parts = x.new_empty((programs, k, 1, 1, c), dtype=torch.float32)
    by_tile = sums = None
    if xmean is not None:
        by_tile, sums = (x.new_empty((2, rows, c), dtype=torch.float32) for rows in (tiles, programs))
    launch(
        conv_pointwise_backward_kernel,
        programs,
        x.device,
        g=g,
        **lazy._asdict(),
        w=w,
        residual=residual,
        x=x,
        xmean=xmean,
        scale=scale,
        shift=shift,
        dx=dx,
        by_tile=by_tile,
        sums=sums,
        dw=parts,
        NPQ=geometry.NPQ,
        C=c,
        K=k,
        PRECISION=precision(x.dtype),
        BLOCK_NPQ=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    dw = add_parts(parts, weight_gradient(x, k, c, 1))
    return (dx, dw) if sums is None else (dx, dw, *finish_sums(sums))
