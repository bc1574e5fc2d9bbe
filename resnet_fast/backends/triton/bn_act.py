"""z = act(y * scale + shift + residual), and one bit per value: the twin of csrc/cuda/bn_act.cu, less its statistics.

Arithmetic is fp32 whatever the storage. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, affine, affine_of, channels, empty_like, launch, matrix, place, relu, vector, where_active

#: By the number of operands read, in the backward too. Chosen by bytes in flight, not yet measured on a GPU. At the 42
#: to 80 registers that these compile to, 800 to 1400 threads fit on a multiprocessor, each with 48 to 128 bytes under
#: way: about 60 KB, where 25 KB cover the latency of an H200's memory. Of 2-byte types at 64 channels, a vector is 16
#: rows of a tile.
ELEMENTWISE = {1: Tile(vectors=4, warps=4), 2: Tile(vectors=2, warps=4)}


@triton.jit
def pack_bits(passes, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_NPQ, BLOCK_K) of 0 and 1 to (BLOCK_NPQ, BLOCK_K // 8) bytes: bit i of byte j is channel 8 * j + i."""
    bits = tl.reshape(passes.to(tl.int32), (BLOCK_NPQ, BLOCK_K // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


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
    tile = ELEMENTWISE[1 if residual is None else 2]
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
