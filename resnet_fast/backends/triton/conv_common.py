"""What the three directions of a convolution share: tile configurations, geometry, and operands formed on load."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import CHANNELS_LAST, INTERPRETED, affine, relu, where_active


class Config(NamedTuple):
    """One tile: ``rows`` x ``columns`` of the result, ``depth`` of the sum at a time; and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_sm: int  # programs that one multiprocessor is given


class Geometry(NamedTuple):
    """A convolution that these kernels have: square filter of 1 (padding 0) or 3 (padding 1), stride 1 or 2."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    stride: int

    @property
    def P(self) -> int:
        """Height of y."""
        return (self.H - 1) // self.stride + 1

    @property
    def Q(self) -> int:
        """Width of y."""
        return (self.W - 1) // self.stride + 1

    @property
    def NPQ(self) -> int:
        """Values per channel of y."""
        return self.N * self.P * self.Q


class Gradient(NamedTuple):
    """What makes a gradient lazy, beside g: y to c or nothing; and the mask of the ReLU behind it, or none."""

    y: Tensor | None = None
    mean: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    gscale: Tensor | None = None
    gshift: Tensor | None = None


def unsupported(
    x_size: list[int], w_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> str | None:
    """Why these kernels have no convolution of ``x_size`` with ``w_size`` of this geometry, or None where they do."""
    r, s = w_size[2:]
    if groups != 1:
        return f"groups {groups} (supported: 1)"
    if list(dilation) != [1, 1]:
        return f"dilation {tuple(dilation)} (supported: 1)"
    if r != s or r not in (1, 3):
        return f"a {r} x {s} filter (supported: 1 x 1, 3 x 3)"
    if list(padding) != [r // 2, r // 2]:
        return f"padding {tuple(padding)} (supported: {r // 2} for {r} x {r})"
    if list(stride) not in ([1, 1], [2, 2]):
        return f"stride {tuple(stride)} (supported: 1 and 2, the same in both directions)"
    n, c, h, w = x_size
    if c != w_size[1]:
        return f"{c} channels for a weight of {w_size[1]}"
    if n * h * w >= 2**31 - 2**16:
        return f"{n * h * w} pixels (supported: below 2^31 - 2^16)"
    if max(c, w_size[0]) * r * max(w, 256) >= 2**22 or c * w_size[0] * r * r >= 2**31:
        return f"{c} to {w_size[0]} channels (supported: offsets within a tile below 2^31)"
    return None


def geometry_of(
    x_size: list[int], w_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Geometry | None:
    """The geometry if our kernels have it and there is something to compute; None for the library."""
    if len(x_size) != 4 or len(w_size) != 4 or unsupported(x_size, w_size, stride, padding, dilation, groups):
        return None
    n, c, h, width = x_size
    geometry = Geometry(n, c, h, width, w_size[0], w_size[2], stride[0])
    return None if geometry.NPQ * geometry.C * geometry.K == 0 else geometry


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time; few for the interpreter, so that each gets several tiles, as on a GPU."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.0 or newer: more shared memory, wgmma, TMA; so is the interpreter."""
    return INTERPRETED if device.type == "cpu" else torch.cuda.get_device_capability(device) >= (9, 0)


def precision(dtype: torch.dtype) -> str:
    """How a product of float32 is formed: as torch's convolutions do, which TF32 is allowed to by default."""
    cudnn: Any = torch.backends.cudnn
    allowed = not INTERPRETED and dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def plain_tile(geometry: Geometry, dtype: torch.dtype) -> str | None:
    """The name of the one tile that serves all shapes of a kind, or None: shapes of 16-bit ResNets have their own.

    "interpreted"; "ieee" and "tf32" for float32; "odd" where rows are not aligned, so that loads are narrow.
    """
    if INTERPRETED:
        return "interpreted"
    if dtype == torch.float32:
        return precision(dtype)
    return "odd" if geometry.C % 16 or geometry.K % 16 else None


def options_of(
    configs: dict[str, Config], names: list[str], geometry: Geometry, dtype: torch.dtype, usual: Config
) -> list[Config]:
    """Tiles to choose from by measuring: ``usual``, then those of ``names`` where shapes have tiles of their own."""
    others = [] if plain_tile(geometry, dtype) else [configs[name] for name in names]
    return [usual, *(tile for tile in others if tile != usual)]


def grouped(tiles: int, blocks: int, tile: Config, device: torch.device) -> tuple[int, int]:
    """(tiles of a group, groups), so that ``blocks`` programs per group fill the device about once."""
    groups = max(1, multiprocessors(device) * tile.per_sm // blocks)
    tiles_per_group = triton.cdiv(tiles, groups)
    return tiles_per_group, triton.cdiv(tiles, tiles_per_group)


def image(like: Tensor, *size: int) -> Tensor:
    """An uninitialised channels-last tensor of dtype and device of ``like``."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def weight_gradient(like: Tensor, k: int, c: int, r: int) -> Tensor:
    """An uninitialised (K, C, R, R), channels-last; of one tap with nn.Conv2d's own strides, the same memory.

    DistributedDataParallel compares strides, and warns.
    """
    return like.new_empty((k, c, 1, 1)) if r == 1 else image(like, k, c, r, r)


@triton.jit
def load_activation(x, scale, shift, rows, channel, inside, C):
    """x or relu(x * scale + shift) at (rows, channel), in the storage dtype as if written; 0 where not ``inside``.

    ``rows`` (BLOCK,) int32 are offsets of pixels from x, ``inside`` (BLOCK,) says which of them are in the image.
    """
    # Vectors are loaded here and not by ``channels``: to the interpreter a call of another function is a millisecond.
    present = channel < C
    mask = inside[:, None] & present[None, :]
    tile = tl.load(x + (rows[:, None] + channel[None, :]), mask=mask, other=0.0)
    if scale is not None:
        scales = tl.load(scale + channel, mask=present, other=0.0)[None, :]
        shifts = tl.load(shift + channel, mask=present, other=0.0)[None, :]
        value = relu(affine(tile.to(tl.float32), scales, shifts))
        tile = tl.where(mask, value, 0.0).to(tile.dtype)  # the padding is 0 after the transform
    return tile


@triton.jit
def load_gradient(g, y, mean, a, b, c, gscale, gshift, rows, k, inside, K):
    """g or a * g + b * (y - mean) + c at (rows, k), in the storage dtype as if written; 0 where not ``inside``.

    With gscale, g is 0 where y * gscale + gshift <= 0.
    """
    present = k < K
    mask = inside[:, None] & present[None, :]
    tile = tl.load(g + (rows[:, None] + k[None, :]), mask=mask, other=0.0)
    if y is not None:
        value = tl.load(y + (rows[:, None] + k[None, :]), mask=mask, other=0.0).to(tl.float32)
        dz = tile.to(tl.float32)
        if gscale is not None:
            scales = tl.load(gscale + k, mask=present, other=0.0)[None, :]
            shifts = tl.load(gshift + k, mask=present, other=0.0)[None, :]
            dz = where_active(affine(value, scales, shifts), dz)
        centre = tl.load(mean + k, mask=present, other=0.0)[None, :]
        of_y = tl.load(b + k, mask=present, other=0.0)[None, :]
        constant = tl.load(c + k, mask=present, other=0.0)[None, :]
        of_g = tl.load(a + k, mask=present, other=0.0)[None, :]
        # In the order of bn_backward_apply_kernel, so that both round alike.
        dy = tl.fma(dz, of_g, tl.fma(value - centre, of_y, constant))
        tile = tl.where(mask, dy, 0.0).to(tile.dtype)
    return tile


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns of a product: an epilogue that takes one after the other needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
