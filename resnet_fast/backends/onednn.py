"""CPU inference on oneDNN's fused convolutions: bias, residual and ReLU in the epilogue, weights reordered once.

The library's convolution with post-ops, reached through ``torch.ops.mkldnn`` (what torch.compile's CPU backend calls
too). Training convolutions need no entry here: torch's own already run on oneDNN (see ``native.conv_stats``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_OPS = ("conv_affine_act",)


@functools.cache
def _unavailable(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_convolution_pointwise") and hasattr(ops, "_reorder_convolution_weight")):
        return "this torch has no fused oneDNN convolution (torch.ops.mkldnn._convolution_pointwise)"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 convolution for this processor (it needs AVX-512)"
    return None


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where oneDNN can run ``op``, else the reason."""
    if op not in _OPS:
        return f"has no {op}"
    if device.type != "cpu":
        return f"device type {device.type} (supported: cpu)"
    if dtype == torch.float16:
        return "float16: its range is small, and oneDNN's ReLU turns the NaN that follows an overflow into 0"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: float32, bfloat16)"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    return _unavailable(dtype)


def conv_affine_act_prepare(
    w: Tensor, input_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """``w`` in the blocked layout that oneDNN's convolution wants for this input size; opaque to everyone else.

    The size matters: a weight laid out for another one is laid out anew at every call (docs/conv.md, entry 2).
    """
    return torch.ops.mkldnn._reorder_convolution_weight(w.contiguous(), padding, stride, dilation, groups, input_size)


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
    shift = shift.to(x.dtype)
    geometry = (padding, stride, dilation, groups)
    if residual is None:
        z = torch.ops.mkldnn._convolution_pointwise(x, w, shift, *geometry, "relu" if relu else "none", [], "")
    else:
        act = "relu" if relu else None
        residual = residual.contiguous(memory_format=torch.channels_last)
        z = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, w, shift, *geometry, "add", 1.0, act, [], None)
    return z.contiguous(memory_format=torch.channels_last)


def conv_affine_act_into(
    residual: Tensor,
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """``conv_affine_act`` that writes z over ``residual``, which nobody else may need: no new memory."""
    act = "relu" if relu else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        residual, x, w, shift, padding, stride, dilation, groups, "add", 1.0, act, [], None
    )
