"""Our own convolutions as matrix products on a CPU, in float32 (csrc/cpu/direct.cpp), for the backends. No backend.

They gather patches as they go, ask for filters ahead of their use, and finish with shift, residual and ReLU. They run
where ``why_not`` lets them (docs/conv.md). Filters are laid out once, by ``weight``, in a tensor of six dimensions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from resnet_fast import buffers
from resnet_fast.backends.own import _C, unable

#: Channels below which patches fall into pieces too small to gather fast: a stem of 3 takes 1.7 times as long as the
#: library's.
_CHANNELS = 16
#: Pixels of the output, at most: with more, the library's own calls, 30 us each, no longer weigh and its blocking is
#: as good. The third stage at batch 16 (3136 pixels) is within: its 1024 to 256 channels take 1.26 times as long as the
#: library's, the network as long as with it (docs/conv.md, entry 36).
_PIXELS = 3200
#: The same with fewer than 32 output channels: sums of one vector, and as many patches to gather for them
#: (docs/conv.md, entry 42).
_NARROW_PIXELS = 1200


@functools.cache
def _has_registers() -> bool:
    """Whether the kernels' instruction set keeps a tile of sums in registers: 28 vectors and what is multiplied."""
    return _C.cpu.isa() == "avx512"


def why_not(
    device: torch.device,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> str | None:
    """None where ``conv`` runs this convolution and is the faster, else the reason."""
    if reason := unable(device, dtype, "products"):
        return reason
    if not _has_registers():
        return f"{_C.cpu.isa()}: the library is the faster without AVX-512"
    if groups != 1 or any(taps > 1 and d > 1 for taps, d in zip(w_size[2:], dilation, strict=True)):
        return "groups or dilation"
    if w_size[1] < _CHANNELS:
        return f"fewer than {_CHANNELS} channels"
    sizes = zip(input_size[2:], w_size[2:], stride, padding, strict=True)
    pixels = input_size[0] * math.prod((size + 2 * pad - taps) // step + 1 for size, taps, step, pad in sizes)
    most = _PIXELS if w_size[0] >= _C.cpu.direct_panel() else _NARROW_PIXELS
    if pixels > most:
        return f"more than {most} pixels"
    return None


def weight(w: Tensor) -> Tensor:
    """The filters ``w`` (K, C, R, S) float32 as ``conv`` reads them: (1, panels, R, S, C, panel), opaque to others."""
    panel = _C.cpu.direct_panel()
    k, c, r, s = w.shape
    panels = -(-k // panel)
    u = torch.zeros(panels, r, s, c, panel)
    for i in range(panels):
        part = w[i * panel : (i + 1) * panel]
        u[i, ..., : part.shape[0]] = part.permute(2, 3, 1, 0)
    return u[None]


def is_weight(w: Tensor) -> bool:
    """Whether ``weight`` made it."""
    return w.dim() == 6


def weight_size(c: int, k: int, r: int, s: int) -> int:
    """Values of a ``weight`` of ``r`` x ``s`` taps from ``c`` to ``k`` channels."""
    panel = _C.cpu.direct_panel()
    return -(-k // panel) * panel * r * s * c


def taps(u: Tensor) -> tuple[int, int]:
    """R and S of what ``weight`` made."""
    return u.shape[2], u.shape[3]


def conv(
    x: Tensor,
    u: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    residual: Tensor | None = None,
    relu: bool = False,
    z: Tensor | None = None,
) -> Tensor:
    """act(conv(x, w) + shift + residual) (N, K, P, Q), channels-last, into ``z`` if given: it may be ``residual``.

    Nothing is checked. x, residual, z channels-last; all float32; u = weight(w), shift (K,).
    """
    n, c, h, wide = x.shape
    _, _, r, s, _, _ = u.shape
    k = shift.shape[0]
    stride_h, stride_w = stride
    padding_h, padding_w = padding
    if z is None:
        p, q = (h + 2 * padding_h - r) // stride_h + 1, (wide + 2 * padding_w - s) // stride_w + 1
        z = buffers.image((n, k, p, q), x.dtype)
    else:
        p, q = z.shape[2:]
    threads = torch.get_num_threads()
    shape = (n, h, wide, c, k, r, s, p, q, stride_h, stride_w, padding_h, padding_w, threads)
    workspace = buffers.scratch(_C.cpu.direct_workspace(shape))
    _C.cpu.direct_conv(x=x, weights=u, shift=shift, residual=residual, z=z, workspace=workspace, shape=shape, relu=relu)
    return z
