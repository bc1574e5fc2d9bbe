"""What sums over pixels share: tiles of the first stage, and the second stage, which adds up its row blocks.

Every reduction has two stages, row blocks into a workspace and then the row blocks in a fixed order; tiles follow from
the shape alone, and there are no atomics: results are bitwise equal from run to run. Not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, Tile, launch, vectors

# As in bn_act.py, not yet measured on a GPU.
REDUCTION = Tile(vectors=1, warps=4)
# The second stage: 8 channels are one 32-byte sector of the workspace.
FINISH_CHANNELS = 64 if INTERPRETED else 8
FINISH_BLOCKS = 2 if INTERPRETED else 256
VECTOR = 128  # channels of a program that works on per-channel vectors alone


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
    Tiles     one program per BLOCK_K channels, in tiles of BLOCK_ROWS row blocks
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


def finish_sums(workspace: Tensor) -> tuple[Tensor, ...]:
    """The sums over the row blocks of ``workspace`` (2 or 3, row blocks, K) float32: as many (K,) vectors."""
    sums, blocks, k = workspace.shape
    out = vectors(workspace, k, sums)
    launch(
        finish_sums_kernel,
        triton.cdiv(k, FINISH_CHANNELS),
        workspace.device,
        workspace=workspace,
        sum_g=out[0],
        sum_gy=out[1],
        sum_gr=out[2] if sums == 3 else None,
        K=k,
        row_blocks=blocks,
        BLOCK_ROWS=FINISH_BLOCKS,
        BLOCK_K=FINISH_CHANNELS,
        num_warps=8,
    )
    return out
