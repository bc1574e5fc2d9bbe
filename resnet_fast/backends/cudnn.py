"""GPU inference on cuDNN's fused convolutions: bias, residual and ReLU in one library call. Not yet run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

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
    x = x.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        w = (w.float() * scale.view(-1, 1, 1, 1)).to(w.dtype)
    w = w.contiguous(memory_format=torch.channels_last)
    shift = shift.to(x.dtype)
    if residual is None and relu:
        return torch.ops.aten.cudnn_convolution_relu(x, w, shift, stride, padding, dilation, groups)
    if residual is not None and relu:
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.ops.aten.cudnn_convolution_add_relu(x, w, residual, 1.0, shift, stride, padding, dilation, groups)
    z = torch.conv2d(x, w, shift, stride, padding, dilation, groups)
    return z if residual is None else z.add_(residual)
