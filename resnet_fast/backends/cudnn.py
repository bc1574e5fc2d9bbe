"""GPU inference on cuDNN's fused convolutions: bias, residual and ReLU in one library call. Not yet run on a GPU.

Three things to know of ``aten::cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``. They hand addresses on and
compare no shapes: all is checked here. Their ReLU is cuDNN's default, which makes NaN 0 where torch keeps it: so this
backend is asked last, or by name. And they know no scale: it is multiplied into the weight, at every call, and rounded
with it to the storage dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last
_OPS = ("conv_affine_act",)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where cuDNN can run ``op``, else the reason."""
    if op not in _OPS:
        return f"has no {op}"
    if device.type != "cuda":
        return f"device type {device.type} (supported: cuda)"
    if torch.version.hip is not None:
        return "this torch is built for ROCm (supported: CUDA)"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "cuDNN is not available, or torch.backends.cudnn.enabled is False"
    if dtype not in (torch.float32, torch.float16):
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: float32, float16)"
    return None


def _check(name: str, t: Tensor, size: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None) -> None:
    if t.shape != size or t.device != x.device or (dtype is not None and t.dtype != dtype):
        types = ("", "") if dtype is None else (f" {t.dtype}", f" {dtype}")
        raise ValueError(
            f"{name}: found {tuple(t.shape)}{types[0]} on {t.device}, expected {size}{types[1]} on {x.device}"
        )


def _size(
    x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[int, int, int, int]:
    """The output's; ValueError where ``w`` does not fit ``x``."""
    if x.dim() != 4 or w.dim() != 4:
        raise ValueError(f"x, w: found {x.dim()} and {w.dim()} dimensions, supported are 4 (N, C, H, W)")
    k, c, *kernel = w.shape
    _check("w", w, (k, x.shape[1] // groups, *kernel), x, x.dtype)
    if c * groups != x.shape[1] or k % groups:
        raise ValueError(f"groups: found {groups} for {x.shape[1]} to {k} channels, supported are divisors of both")
    p, q = (
        (size + 2 * pad - dilate * (r - 1) - 1) // step + 1
        for size, r, step, pad, dilate in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    if p < 1 or q < 1:
        raise ValueError(f"x: found {tuple(x.shape)}, smaller than a filter of {tuple(kernel)}")
    return x.shape[0], k, p, q


def conv_affine_act(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    size = _size(x, w, stride, padding, dilation, groups)
    for name, v in (("shift", shift), ("scale", scale)):
        if v is not None:
            _check(name, v, size[1:2], x)
    if residual is not None:
        _check("residual", residual, size, x, x.dtype)
        residual = residual.contiguous(memory_format=CHANNELS_LAST)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    if scale is not None:
        w = (w.float() * scale.view(-1, 1, 1, 1)).to(w.dtype)
    w = w.contiguous(memory_format=CHANNELS_LAST)
    shift = shift.to(x.dtype)
    geometry = (stride, padding, dilation, groups)
    if not relu:
        z = torch.conv2d(x, w, shift, *geometry)
        z = z if residual is None else z.add_(residual)
    elif residual is None:
        z = torch.ops.aten.cudnn_convolution_relu(x, w, shift, *geometry)
    else:
        z = torch.ops.aten.cudnn_convolution_add_relu(x, w, residual, 1.0, shift, *geometry)
    return z.contiguous(memory_format=CHANNELS_LAST)  # of one channel or one pixel, strides may say either
