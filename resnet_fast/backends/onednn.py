"""CPU inference on oneDNN's fused convolutions: bias, residual and ReLU in the epilogue, weights reordered once.

The library's convolution with post-ops, reached through ``torch.ops.mkldnn`` (what torch.compile's CPU backend calls
too). Training convolutions need no entry here: torch's own already run on oneDNN (see ``native.conv_stats``).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.backends import direct, library, winograd

_OPS = ("conv_affine_act",)
# What says that a convolution has no sum with a ReLU to offer: oneDNN hands some of bfloat16 back to torch, which has
# none; and that of torch 2.11 has none of one pixel.
_NO_SUM = ("Unsupported datatype", "could not create a memory")


@functools.cache
def _unavailable() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_convolution_pointwise") and hasattr(ops, "_reorder_convolution_weight")):
        return "this torch has no fused oneDNN convolution (torch.ops.mkldnn._convolution_pointwise)"
    return None


class _Overloads(NamedTuple):
    """oneDNN's fused convolutions, each overload by name: resolving it costs 7 us a call."""

    plain: Any
    binary: Any
    binary_into: Any


@functools.cache
def _convolution() -> _Overloads:
    ops = torch.ops.mkldnn
    fused = ops._convolution_pointwise
    return _Overloads(fused.default, fused.binary, ops._convolution_pointwise_.binary)


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
    return _unavailable()


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN convolves bfloat16 on this processor at all; it needs AVX-512 or AVX-NE-CONVERT."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def conv_affine_act_arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that convolves fastest on inputs of ``dtype``."""
    return library.arithmetic(torch.device("cpu"), dtype)


def conv_affine_act_prepare(
    w: Tensor, input_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """``w`` in the blocked layout that oneDNN's convolution wants for this input size; opaque to everyone else.

    The size matters: a weight laid out for another one is laid out anew at every call (docs/conv.md, entry 2).
    Where a convolution of our own is the faster, the weight is laid out for it, and run by it.
    """
    geometry = (stride, padding, dilation, groups)
    if winograd.why_not(w.device, list(w.shape), input_size, *geometry, w.dtype) is None:
        prepared = winograd.weight(w, w.dtype)
    elif direct.why_not(w.device, list(w.shape), input_size, *geometry, w.dtype) is None:
        prepared = direct.weight(w)
    else:
        prepared = torch.ops.mkldnn._reorder_convolution_weight(
            w.contiguous(), padding, stride, dilation, groups, input_size
        )
    library.huge_pages(prepared)
    return prepared


def _is_ours(w: Tensor) -> bool:
    """Whether ``conv_affine_act_prepare`` laid ``w`` out for a convolution of our own."""
    return w.dim() > 4


def _own(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    residual: Tensor | None,
    relu: bool,
    z: Tensor | None = None,
) -> Tensor:
    if winograd.is_weight(w):
        return winograd.conv(x, w, shift.shape[0], shift, residual, relu, z)
    return direct.conv(x, w, shift, stride, padding, residual, relu, z)


def _check(
    x: Tensor, w: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None, geometry: tuple[list[int], ...]
) -> None:
    """oneDNN itself reads whatever lies there. ``geometry``: stride, padding, dilation."""
    for name, t in (("x", x), ("w", w)):
        if t.dim() != 4 and not (t is w and _is_ours(w)):
            raise ValueError(f"{name}: found {t.dim()} dimensions, supported are 4")
    k = shift.numel() if _is_ours(w) else w.shape[0]
    kernel = direct.taps(w) if direct.is_weight(w) else (3, 3) if _is_ours(w) else (w.shape[2], w.shape[3])
    if _is_ours(w):
        c = x.shape[1]
        expected = direct.weight_size(c, k, *kernel) if direct.is_weight(w) else winograd.weight_size(c, k)
        if w.numel() != expected:
            raise ValueError(f"w: found {w.numel()} values, prepared for other channels than {c} and {k}")
    if w.dtype != x.dtype and w.layout == torch.strided:
        raise ValueError(f"w: found {w.dtype}, expected {x.dtype}, the dtype of x")
    for name, vector in (("shift", shift), ("scale", scale)):
        if vector is not None and vector.shape != (k,):
            raise ValueError(f"{name}: found {tuple(vector.shape)}, expected ({k},)")
    if residual is None:
        return
    stride, padding, dilation = geometry
    size = [(x.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    if residual.shape != (x.shape[0], k, *size) or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: found {tuple(residual.shape)} {residual.dtype}, expected {(x.shape[0], k, *size)} {x.dtype}"
        )


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
    _check(x, w, shift, scale, residual, (stride, padding, dilation))
    if _is_ours(w):
        if scale is not None:
            raise ValueError("scale: found one beside a prepared weight; fold it into the weight first")
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        return _own(x, w, shift.float(), stride, padding, residual, relu)
    # On a filter one tap wide dilation means nothing, but oneDNN 3.12 crashes on a grouped 1x1 with one.
    dilation = [1 if taps == 1 else d for taps, d in zip(w.shape[2:], dilation, strict=True)]
    if x.dtype == torch.bfloat16 and not _has_bfloat16():
        z = conv_affine_act(
            x.float(),
            w.to_dense().float(),
            shift,
            stride,
            padding,
            dilation,
            groups,
            scale,
            None if residual is None else residual.float(),
            relu,
        )
        return z.to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        w = (w.float() * scale.view(-1, 1, 1, 1)).to(x.dtype)
    shift = shift.to(x.dtype)
    geometry = (padding, stride, dilation, groups)
    act = "relu" if relu else "none"
    if residual is None:
        z = _convolution().plain(x, w, shift, *geometry, act, [], "")
    else:
        residual = residual.contiguous(memory_format=torch.channels_last)
        try:
            z = _convolution().binary(x, residual, w, shift, *geometry, "add", 1.0, "relu" if relu else None, [], None)
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_SUM):
                raise
            z = _convolution().plain(x, w, shift, *geometry, "none", [], "").add_(residual)
            z = z.relu_() if relu else z
    return z.contiguous(memory_format=torch.channels_last)


def conv_affine_act_plain(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """``conv_affine_act`` without a residual and without checks: all in one dtype, x channels-last, w prepared."""
    if _is_ours(w):
        return _own(x, w, shift, stride, padding, None, relu)
    return _convolution().plain(x, w, shift, padding, stride, dilation, groups, "relu" if relu else "none", [], "")


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
    """``conv_affine_act`` that writes z over ``residual``, which nobody else may need: no new memory.

    Nothing is checked. All in one dtype, x and residual channels-last, the residual in the shape of z.
    """
    if _is_ours(w):
        return _own(x, w, shift, stride, padding, residual, relu, residual)
    act = "relu" if relu else None
    try:
        return _convolution().binary_into(
            residual, x, w, shift, padding, stride, dilation, groups, "add", 1.0, act, [], None
        )
    except RuntimeError as error:
        if "Unsupported datatype" not in str(error):
            raise
        return conv_affine_act(x, w, shift, stride, padding, dilation, groups, None, residual, relu)
