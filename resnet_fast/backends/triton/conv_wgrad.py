"""dw = the gradient of a convolution's weight, from a plain or a lazy gradient and a plain or a lazy activation.

Not yet run on a GPU: the tiles below are chosen by reasoning and by what compiles without spills, none is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch
from .conv_common import (
    Config,
    Geometry,
    Gradient,
    load_activation,
    load_gradient,
    multiprocessors,
    options_of,
    plain_tile,
    precision,
    weight_gradient,
)

# rows: K; columns: C of one tap; depth: pixels. dw is small and the sum long, so that pixels are split over programs;
# the fp32 parts are added in the order of the pixels by a second kernel. A lazy operand halves the depth, as in dgrad.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=128, columns=32, depth=256, warps=4, stages=1, per_sm=1),
    "ieee": Config(rows=64, columns=64, depth=16, warps=8, stages=3, per_sm=2),
    "tf32": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "odd": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "narrow": Config(rows=64, columns=64, depth=64, warps=4, stages=3, per_sm=2),
    "narrow_lazy": Config(rows=64, columns=64, depth=32, warps=4, stages=4, per_sm=2),
    "wide": Config(rows=128, columns=128, depth=64, warps=8, stages=3, per_sm=1),
    "wide_lazy": Config(rows=128, columns=128, depth=32, warps=8, stages=4, per_sm=1),
}
#: Elements of dw that a program of the second kernel adds up.
_BLOCK = 512


def config(geometry: Geometry, dtype: torch.dtype, lazy: bool) -> Config:
    """The tile for this shape."""
    width = "narrow" if min(geometry.C, geometry.K) <= 64 else "wide"
    return CONFIGS[plain_tile(geometry, dtype) or (f"{width}_lazy" if lazy else width)]


def options(geometry: Geometry, dtype: torch.dtype, lazy: bool) -> list[Config]:
    """The tiles that may serve this shape, the usual one first."""
    names = [n for n in CONFIGS if n.startswith(("narrow", "wide")) and (n.endswith("_lazy") or not lazy)]
    return options_of(CONFIGS, names, geometry, dtype, config(geometry, dtype, lazy))


@triton.jit(do_not_specialize=["NPQ", "H", "W", "P", "Q", "blocks_per_split"])
def conv_wgrad_kernel(
    g,
    y,
    mean,
    a,
    b,
    c,
    gscale,
    gshift,
    x,
    scale,
    shift,
    dw,
    NPQ,
    H,
    W,
    P,
    Q,
    C,
    K,
    blocks_per_split,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
):
    """dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] * z[n, p*STRIDE + r - R//2, q*STRIDE + s - R//2, c]

    dy = g or a * g + b * (y - mean) + c, as load_gradient has it; z = x or relu(x * scale + shift), 0 in the padding.
    Shapes    g, y (NPQ, K), x (N, H, W, C), dw (splits, K, R, R, C) fp32 or, of one split, in the storage dtype;
              mean, a, b, c, gscale, gshift (K,) and scale, shift (C,) fp32
    Tiles     one program per BLOCK_K x BLOCK_C of one tap and split of blocks_per_split * BLOCK_NPQ pixels;
              grid splits * R*R * cdiv(C, BLOCK_C) * cdiv(K, BLOCK_K), the programs of the same pixels side by side
    Traffic   reads g, y, x once from memory, R*R * cdiv(C, BLOCK_C) and R*R * cdiv(K, BLOCK_K) times from L2; writes dw
    Numerics  fp32 sums; dy and z are rounded to the storage dtype, as if written
    Source    ops.conv_wgrad; docs/conv.md, "Triton"; split-K as in CUTLASS
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    c_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    tiles = k_blocks * c_blocks * R * R
    split = program // tiles
    tile = program - split * tiles
    k = tile % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tile // k_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tile // (k_blocks * c_blocks)
    r = tap // R
    s = tap - r * R

    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    start = split * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, tl.cdiv(NPQ, BLOCK_NPQ))):
        start = block * BLOCK_NPQ
        row = start + tl.arange(0, BLOCK_NPQ)
        inside = row < NPQ
        # Where the block starts in memory is int64 and goes into the pointers; what lies within it is int32.
        first_row = tl.cast(start, tl.int64)
        if R == 1 and STRIDE == 1:
            first_pixel = first_row
            pixel = row - start
        else:
            n = row // (P * Q)
            p = row // Q % P
            q = row - (n * P + p) * Q
            n0 = start // (P * Q)
            p0 = start // Q % P
            q0 = start - (n0 * P + p0) * Q
            h = p * STRIDE + r - R // 2
            v = q * STRIDE + s - R // 2  # the column: w is the weight
            first_pixel = (tl.cast(n0, tl.int64) * H + p0 * STRIDE + r - R // 2) * W + q0 * STRIDE + s - R // 2
            pixel = ((n - n0) * H + (p - p0) * STRIDE) * W + (q - q0) * STRIDE
            # Also of dy: a NaN in it that meets nothing but padding stays out of dw.
            inside = inside & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        # (BLOCK_NPQ, BLOCK_K) and (BLOCK_NPQ, BLOCK_C)
        at = first_row * K
        dy = load_gradient(
            g + at, y if y is None else y + at, mean, a, b, c, gscale, gshift, (row - start) * K, k, inside, K
        )
        z = load_activation(x + first_pixel * C, scale, shift, pixel * C, channel, inside, C)
        acc = tl.dot(tl.trans(dy), z, acc, input_precision=PRECISION)

    out = dw + tl.cast(split, tl.int64) * K * (R * R * C) + (k[:, None] * (R * R * C) + tap * C + channel[None, :])
    tl.store(out, acc.to(dw.dtype.element_ty), mask=(k < K)[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["splits"])
def conv_wgrad_finish_kernel(workspace, dw, elements, splits, BLOCK: tl.constexpr):
    """dw = sum of the splits' parts

    Shapes    workspace (splits, elements) fp32, dw (elements,)
    Tiles     one program per BLOCK elements
    Traffic   reads workspace, 4 * splits * elements, mostly from L2; writes dw
    Numerics  fp32, in the order of the splits; one rounding, at the store
    Source    ops.conv_wgrad; docs/conv.md, "Triton"
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        total += tl.load(workspace + at, mask=inside, other=0.0)
        workspace += elements
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=inside)


def _splits(blocks: int, tiles: int, slots: int) -> tuple[int, int]:
    """(blocks of a split, splits): all slots busy about once; of more tiles than slots, the last round well filled."""
    wanted = max(1, slots // tiles)
    if tiles > slots:
        # Rounds of a split's length: ceil(tiles * s / slots) / s falls with s, and the parts' traffic grows with it.
        wanted = min(range(1, 5), key=lambda s: triton.cdiv(tiles * s, slots) / s * (1 + 0.05 * (s - 1)))
    blocks_per_split = triton.cdiv(blocks, min(wanted, blocks))
    return blocks_per_split, triton.cdiv(blocks, blocks_per_split)


def conv_wgrad(
    g: Tensor,
    x: Tensor,
    geometry: Geometry,
    lazy: Gradient,
    scale: Tensor | None,
    shift: Tensor | None,
    tile: Config | None = None,
) -> Tensor:
    """What ``conv_wgrad`` returns; operands are checked, channels-last and not empty."""
    tile = tile or config(geometry, x.dtype, lazy.y is not None or scale is not None)
    _, c, h, width, k, r, stride = geometry
    tiles = triton.cdiv(k, tile.rows) * triton.cdiv(c, tile.columns) * r * r
    slots = multiprocessors(x.device) * tile.per_sm
    blocks_per_split, splits = _splits(triton.cdiv(geometry.NPQ, tile.depth), tiles, slots)
    dw = weight_gradient(x, k, c, r)
    parts = dw if splits == 1 else x.new_empty((splits, k, r, r, c), dtype=torch.float32)
    launch(
        conv_wgrad_kernel,
        splits * tiles,
        x.device,
        g=g,
        **lazy._asdict(),
        x=x,
        scale=scale,
        shift=shift,
        dw=parts,
        NPQ=geometry.NPQ,
        H=h,
        W=width,
        P=geometry.P,
        Q=geometry.Q,
        C=c,
        K=k,
        blocks_per_split=blocks_per_split,
        R=r,
        STRIDE=stride,
        PRECISION=precision(x.dtype),
        BLOCK_K=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_NPQ=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dw if splits == 1 else add_parts(parts, dw)


def add_parts(parts: Tensor, dw: Tensor) -> Tensor:
    """``dw`` (K, C, R, R), channels-last, made the sum of fp32 ``parts`` (splits, K, R, R, C), in their order."""
    launch(
        conv_wgrad_finish_kernel,
        triton.cdiv(dw.numel(), _BLOCK),
        dw.device,
        workspace=parts,
        dw=dw,
        elements=dw.numel(),
        splits=parts.shape[0],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return dw
