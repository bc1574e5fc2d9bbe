"""z = relu(conv(x, w) * scale + shift + residual): a convolution of inference, with its batch norm in the epilogue.

Not yet run on a GPU: the tiles below are chosen by reasoning and by what compiles without spills, none is measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import affine, launch, relu
from .conv_common import Config, Geometry, halves, image, plain_tile, precision
from .conv_fprop import mainloop

# One program per tile, K fastest: those that read the same pixels run side by side and share x through L2. Beside the
# sums the epilogue holds a tile of the residual, in halves. A 1x1 with few channels is bound by memory: small tiles,
# two or three programs per multiprocessor, that hide each other's loads and stores.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=256, columns=128, depth=16, warps=4, stages=1, per_sm=1),
    "ieee": Config(rows=64, columns=64, depth=16, warps=8, stages=3, per_sm=2),
    "tf32": Config(rows=64, columns=64, depth=32, warps=4, stages=3, per_sm=2),
    "odd": Config(rows=64, columns=64, depth=32, warps=8, stages=3, per_sm=1),
    "narrow_1x1": Config(rows=128, columns=64, depth=64, warps=4, stages=3, per_sm=2),
    "narrow_3x3": Config(rows=128, columns=64, depth=64, warps=8, stages=4, per_sm=1),
    "wide": Config(rows=128, columns=128, depth=64, warps=8, stages=3, per_sm=1),
}


def config(geometry: Geometry, dtype: torch.dtype) -> Config:
    """The tile for this shape."""
    shape = f"narrow_{geometry.R}x{geometry.R}" if geometry.K <= 64 else "wide"
    return CONFIGS[plain_tile(geometry, dtype) or shape]


@triton.jit
def finish(acc, scale, shift, residual, z, offset, mask, k, K, RELU: tl.constexpr):
    """Store act(acc * scale + shift + residual) of a tile at ``offset``, where ``mask``."""
    present = k < K
    shifts = tl.load(shift + k, mask=present, other=0.0)[None, :]
    if scale is not None:
        value = affine(acc, tl.load(scale + k, mask=present, other=0.0)[None, :], shifts)
    else:
        value = acc + shifts
    if residual is not None:
        value += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(z + offset, value.to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["NPQ", "H", "W", "P", "Q"])
def conv_affine_act_kernel(
    x,
    w,
    scale,
    shift,
    residual,
    z,
    NPQ,
    H,
    W,
    P,
    Q,
    C,
    K,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z[npq, k] = act(scale[k] * sum over r, s, c of x[n, p*STRIDE + r - R//2, q*STRIDE + s - R//2, c] * w[k, r, s, c]
                       + shift[k] + residual[npq, k])

    x is 0 outside of the image; scale and residual may be absent; act is ReLU, which keeps NaN, or nothing.
    Shapes    x (N, H, W, C), w (K, R, R, C), residual, z (NPQ, K); scale, shift (K,) fp32
    Tiles     one program per BLOCK_NPQ x BLOCK_K of z; grid cdiv(K, BLOCK_K) * cdiv(NPQ, BLOCK_NPQ), channels fastest
    Traffic   reads x (each of R*R taps, from L1 and L2 but for the first), w, the residual, writes z
    Numerics  fp32 from the first product to the store; one rounding, at the store
    Source    ops.conv_affine_act; docs/conv.md, "Triton"; implicit GEMM as in CUTLASS, arXiv 1410.0759
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    k = program % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    start = program // k_blocks * BLOCK_NPQ
    row = start + tl.arange(0, BLOCK_NPQ)
    row_inside = row < NPQ
    acc = mainloop(x, w, None, None, start, k, NPQ, H, W, P, Q, C, K, R, STRIDE, PRECISION, BLOCK_NPQ, BLOCK_K, BLOCK_C)

    z_tile = z + tl.cast(start, tl.int64) * K
    r_tile = residual
    if residual is not None:
        r_tile = residual + tl.cast(start, tl.int64) * K
    left, right = halves(acc, BLOCK_NPQ, BLOCK_K)
    for half in tl.static_range(2):
        column = program % k_blocks * BLOCK_K + half * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        offset = (row - start)[:, None] * K + column[None, :]
        mask = row_inside[:, None] & (column < K)[None, :]
        finish(left if half == 0 else right, scale, shift, r_tile, z_tile, offset, mask, column, K, RELU)


def conv_affine_act(
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """What the op returns; operands are checked, channels-last and not empty."""
    tile = config(geometry, x.dtype)
    z = image(x, geometry.N, geometry.K, geometry.P, geometry.Q)
    launch(
        conv_affine_act_kernel,
        triton.cdiv(geometry.K, tile.columns) * triton.cdiv(geometry.NPQ, tile.rows),
        x.device,
        x=x,
        w=w,
        scale=scale,
        shift=shift,
        residual=residual,
        z=z,
        NPQ=geometry.NPQ,
        H=geometry.H,
        W=geometry.W,
        P=geometry.P,
        Q=geometry.Q,
        C=geometry.C,
        K=geometry.K,
        R=geometry.R,
        STRIDE=geometry.stride,
        RELU=relu,
        PRECISION=precision(x.dtype),
        BLOCK_NPQ=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return z
