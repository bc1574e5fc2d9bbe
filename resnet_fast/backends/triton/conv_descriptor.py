"""y = conv(x, w) for 1x1 with stride 1, as conv_fprop.py, with operands loaded through tensor descriptors (TMA).

One thread asks for a whole tile, bounds included: no addresses, no masks, and few instructions beside the products.
GPUs have it from compute capability 9.0 on. Off until a GPU has measured it: the tiles below are candidates of
``configurations`` and run where a table says so. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .bn_stats import finish_stats
from .common import INTERPRETED, affine, launch, relu
from .conv_common import Config, Geometry, grouped, halves, hopper, image, precision
from .conv_fprop import store_with_statistics

# rows: pixels; columns: K; depth: C.
CONFIGS: dict[str, Config] = {
    "interpreted": Config(rows=256, columns=128, depth=16, warps=4, stages=1, per_sm=1),
    "narrow": Config(rows=128, columns=64, depth=64, warps=4, stages=4, per_sm=2),
    "wide": Config(rows=128, columns=128, depth=64, warps=8, stages=4, per_sm=1),
}


def options(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> list[Config]:
    """The tiles that may serve this shape; none where descriptors cannot: rows must be multiples of 16 bytes."""
    if geometry.R != 1 or geometry.stride != 1 or geometry.C * dtype.itemsize % 16 or not hopper(device):
        return []
    if INTERPRETED:
        return [CONFIGS["interpreted"]]
    if dtype == torch.float32:
        return []
    return [CONFIGS["narrow"], *([CONFIGS["wide"]] if geometry.K > 64 else [])]


@triton.jit(do_not_specialize=["NPQ", "tiles_per_group"])
def conv_descriptor_kernel(
    x,
    w,
    scale,
    shift,
    y,
    workspace,
    NPQ,
    C,
    K,
    tiles_per_group,
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[npq, k] = sum over c of a[npq, c] * w[k, c]; a = relu(x * scale + shift), or x itself; and the statistics of y

    Shapes    x (NPQ, C), w (K, C) descriptors of BLOCK_NPQ x BLOCK_C and BLOCK_K x BLOCK_C; y (NPQ, K);
              scale, shift (C,) fp32; workspace (3, groups, K) fp32
    Tiles     as conv_fprop
    Traffic   as conv_fprop
    Numerics  as conv_fprop
    Source    ops.conv_stats; docs/conv.md, "Triton"
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    group = program // k_blocks
    groups = tl.num_programs(0) // k_blocks
    first_k = program % k_blocks * BLOCK_K

    first = group * tiles_per_group
    for tile in range(first, tl.minimum(first + tiles_per_group, tl.cdiv(NPQ, BLOCK_NPQ))):
        start = tile * BLOCK_NPQ
        row = tl.arange(0, BLOCK_NPQ)
        row_inside = row < NPQ - start
        acc = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
        for first_c in range(0, C, BLOCK_C):
            a = x.load([start, first_c])  # 0 outside
            if scale is not None:
                channel = first_c + tl.arange(0, BLOCK_C)
                scales = tl.load(scale + channel, mask=channel < C, other=0.0)[None, :]
                shifts = tl.load(shift + channel, mask=channel < C, other=0.0)[None, :]
                value = relu(affine(a.to(tl.float32), scales, shifts))
                a = tl.where(row_inside[:, None], value, 0.0).to(a.dtype)  # rows behind the last count in no sum
            acc = tl.dot(a, tl.trans(w.load([first_k, first_c])), acc, input_precision=PRECISION)

        left, right = halves(acc, BLOCK_NPQ, BLOCK_K)
        for half in tl.static_range(2):
            column = first_k + half * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            store_with_statistics(
                left if half == 0 else right,
                y + tl.cast(start, tl.int64) * K,
                workspace + group * K + column,
                row[:, None] * K + column[None, :],
                row_inside,
                column < K,
                groups * K,
                tl.minimum(BLOCK_NPQ, NPQ - start),
                tile == first,
            )
            tl.debug_barrier()  # the next loads of the workspace are other threads'; and one half after the other


def conv_descriptor(
    x: Tensor,
    w: Tensor,
    geometry: Geometry,
    scale: Tensor | None,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    tile: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``conv_stats`` returns; operands are checked, channels-last, not empty, at multiples of 16 bytes."""
    npq, c, k = geometry.NPQ, geometry.C, geometry.K
    k_blocks = triton.cdiv(k, tile.columns)
    tiles_per_group, groups = grouped(triton.cdiv(npq, tile.rows), k_blocks, tile, x.device)
    y = image(x, geometry.N, k, geometry.P, geometry.Q)
    workspace = x.new_empty((3, groups, k), dtype=torch.float32)
    launch(
        conv_descriptor_kernel,
        k_blocks * groups,
        x.device,
        x=TensorDescriptor(x, [npq, c], [c, 1], [tile.rows, tile.depth]),
        w=TensorDescriptor(w, [k, c], [c, 1], [tile.columns, tile.depth]),
        scale=scale,
        shift=shift,
        y=y,
        workspace=workspace,
        NPQ=npq,
        C=c,
        K=k,
        tiles_per_group=tiles_per_group,
        PRECISION=precision(x.dtype),
        BLOCK_NPQ=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_C=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (y, *finish_stats(workspace, npq, tiles_per_group * tile.rows, gamma, beta, eps))
