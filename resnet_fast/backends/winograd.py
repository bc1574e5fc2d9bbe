"""Our own 3x3 convolutions of stride 1 on a CPU, after Winograd (csrc/cpu/winograd*.cpp), for the backends. No backend.

They multiply 2.25 times less than the library's, with errors of the same order (docs/conv.md), where ``why_not`` lets
them. A filter is transformed once, by ``weight``, into a tensor of five dimensions that ``conv`` reads. ``wgrad`` is
the gradient of the filters, where ``wgrad_why_not`` lets it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import buffers
from resnet_fast.backends.own import _C, CHANNELS_LAST, DTYPES, too_few, unable

#: Channels below which too little is multiplied to pay for the transforms.
_CHANNELS = 32
#: C * K from which on transformed filters leave the caches faster than they are used: 512 to 512 channels at 7 x 7 run
#: as fast as the library's, 256 to 256 at 14 x 14 1.4 times as fast (docs/conv.md, entry 15).
_FILTERS = 400 * 400
#: Outputs that are computed for each one that lies in the image, at most: 1.31 at 7 x 7.
_WASTE = 1.35


def _unfit(
    device: torch.device,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> str | None:
    """Why no kernel here is for this convolution, or None."""
    if reason := unable(device, dtype, "winograd"):
        return reason
    if w_size[2:] != [3, 3] or stride != [1, 1] or padding != [1, 1] or dilation != [1, 1] or groups != 1:
        return "not 3x3, stride 1, padding 1, without dilation and groups"
    h, wide = input_size[2:]
    if (h + h % 2) * (wide + wide % 2) > _WASTE * h * wide:
        return f"an image of {h} x {wide}: too few outputs of its tiles lie inside"
    if min(w_size[:2]) < _CHANNELS:
        return f"fewer than {_CHANNELS} channels"
    return None


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
    """None where ``conv`` runs this convolution and is the faster, else the reason. ``dtype``: of arithmetic."""
    if reason := _unfit(device, w_size, input_size, stride, padding, dilation, groups, dtype):
        return reason
    if w_size[0] * w_size[1] >= _FILTERS:
        return f"{w_size[1]} to {w_size[0]} channels: the filters leave the caches"
    return None


def wgrad_why_not(
    device: torch.device,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> str | None:
    """None where ``wgrad`` runs for this convolution and is the faster, else the reason. ``dtype``: of arithmetic."""
    if reason := _unfit(device, w_size, input_size, stride, padding, dilation, groups, dtype):
        return reason
    n, c, h, wide = input_size
    threads = torch.get_num_threads()
    units = _C.cpu.winograd_wgrad_units(n=n, h=h, w=wide, c=c, k=w_size[0], threads=threads)
    return too_few(units, 4 * n * h * wide * c * w_size[0])


def weight(w: Tensor, dtype: torch.dtype, flip: bool = False) -> Tensor:
    """The filters ``w`` (K, C, 3, 3) as ``conv`` reads them for an x of ``dtype``, float32, opaque to everyone else.

    ``flip``: of the convolution that takes dy to dx: K and C changed places, the taps in reverse order.
    """
    if w.dtype != torch.float32:
        w = w.float()
    k, c, _, _ = w.shape
    k_stride, c_stride, row_stride, tap_stride = w.stride()
    if row_stride != 3 * tap_stride:
        w = w.contiguous(memory_format=CHANNELS_LAST)
        k_stride, c_stride, _, tap_stride = w.stride()
    if flip:
        k, c, k_stride, c_stride = c, k, c_stride, k_stride
    u = torch.empty(weight_size(c, k), dtype=torch.float32)
    _C.cpu.winograd_weight(
        w=w,
        u=u,
        c=c,
        k=k,
        c_stride=c_stride,
        k_stride=k_stride,
        tap_stride=tap_stride,
        flip=flip,
        dtype=DTYPES[dtype],
    )
    return u.view(1, 1, 1, 1, -1)


def weight_size(c: int, k: int) -> int:
    """Values of a ``weight`` from ``c`` to ``k`` channels."""
    return _C.cpu.winograd_weight_size(c=c, k=k)


def is_weight(w: Tensor) -> bool:
    """Whether ``weight`` made it."""
    return w.dim() == 5


def conv(
    x: Tensor,
    u: Tensor,
    k: int,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    z: Tensor | None = None,
) -> Tensor:
    """act(conv(x, w) + shift + residual) (N, ``k``, H, W), channels-last, into ``z`` if given: it may be ``residual``.

    Nothing is checked. x, residual, z channels-last, in the dtype that ``u`` was made for; shift float32.
    """
    n, c, h, wide = x.shape
    if z is None:
        z = buffers.image((n, k, h, wide), x.dtype)
    threads = torch.get_num_threads()
    workspace = _C.cpu.winograd_workspace(n=n, h=h, w=wide, c=c, k=k, threads=threads)
    _C.cpu.winograd_conv(
        x=x,
        u=u,
        shift=shift,
        residual=residual,
        z=z,
        workspace=buffers.scratch(workspace),
        n=n,
        h=h,
        w=wide,
        c=c,
        k=k,
        threads=threads,
        dtype=DTYPES[x.dtype],
        relu=relu,
    )
    return z


def wgrad(dy: Tensor, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """dw (K, C, 3, 3), channels-last, float32, of dy (N, K, H, W) and x (N, C, H, W), or relu(x * scale + shift).

    Nothing is checked. dy and x channels-last, of one dtype; scale and shift (C,) float32.
    """
    n, c, h, wide = x.shape
    k = dy.shape[1]
    dw = torch.empty((k, c, 3, 3), dtype=torch.float32, memory_format=CHANNELS_LAST)
    threads = torch.get_num_threads()
    workspace = _C.cpu.winograd_wgrad_workspace(n=n, h=h, w=wide, c=c, k=k, threads=threads)
    _C.cpu.winograd_wgrad(
        dy=dy,
        x=x,
        scale=scale,
        shift=shift,
        dw=dw,
        workspace=buffers.scratch(workspace),
        n=n,
        h=h,
        w=wide,
        c=c,
        k=k,
        threads=threads,
        dtype=DTYPES[x.dtype],
    )
    return dw
