"""Convolutions and their gradients, as the backends put them between their own kernels. No backend.

The library's; on a CPU those 3x3 of stride 1 that winograd.py runs faster are ours.

Operands are written out, channels-last, of one dtype: nothing is lazy here but the x of our own ``conv_wgrad``. A 1x1
convolution is a matrix product of the (NPQ, C) matrix that channels-last memory is: on a CPU its gradients run as one,
which beats the library's own convolutions there and can add to what is already in memory (docs/conv.md, entries 10
and 11).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast import buffers, switches
from resnet_fast.backends import winograd
from resnet_fast.backends.own import _C, CHANNELS_LAST


@functools.cache
def arithmetic(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the library convolves operands of ``dtype`` fastest: on a CPU without AMX tiles float32.

    AVX-512's bfloat16 dot product is slower than its float32, and what lacks it emulates it (docs/conv.md, entry 4).
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    supported = "_is_amx_tile_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    return dtype if getattr(torch.cpu, supported, lambda: False)() else torch.float32


def huge_pages(t: Tensor) -> int:
    """Ask for pages of 2 MB where ``t`` lies, a CPU tensor that is read again and again.

    Returns the bytes that got them: 0 where no such page fits inside, or the system has none. Values stay as they are.

    Folded weights leave the caches from one forward to the next, and each small page costs a miss of the TLB, too
    (docs/conv.md, entry 25).
    """
    if _C is None or t.device.type != "cpu" or not switches.on("memory"):
        return 0
    if not t.is_mkldnn:
        return _C.cpu.huge_pages(address=t.data_ptr(), nbytes=t.nbytes)
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "data_ptr") and hasattr(ops, "_nbytes")):
        return 0
    return _C.cpu.huge_pages(address=ops.data_ptr(t), nbytes=ops._nbytes(t))


def _is_pointwise(w_size: list[int], padding: list[int], groups: int) -> bool:
    return w_size[2:] == [1, 1] and padding == [0, 0] and groups == 1 and switches.on("products")


def _rows(t: Tensor) -> Tensor:
    """(N, C, H, W) as the (NHW, C) matrix that it is in memory."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _strided(t: Tensor, stride: list[int]) -> Tensor:
    """The pixels (N, P, Q, C) of ``t`` (N, C, H, W) that a strided 1x1 convolution reads; a view."""
    return t.permute(0, 2, 3, 1)[:, :: stride[0], :: stride[1]]


def _product(a: Tensor, b: Tensor, size: list[int]) -> Tensor:
    """The matrix product (NHW, C) as an image of ``size``, in kept memory where that pays."""
    out = buffers.image(tuple(size), a.dtype)
    torch.mm(a, b, out=_rows(out))
    return out


def widens(x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether ``conv`` of x and w is ours, which reads and writes any dtype while it computes in float32."""
    wide = arithmetic(x.device, x.dtype)
    return winograd.why_not(x.device, list(w.shape), list(x.shape), stride, padding, dilation, groups, wide) is None


def dgrad_widens(
    dy: Tensor,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether ``conv_dgrad`` of dy is ours, as ``widens``."""
    wide = arithmetic(dy.device, dy.dtype)
    return winograd.why_not(dy.device, w_size, input_size, stride, padding, dilation, groups, wide) is None


def wgrad_widens(
    dy: Tensor,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether ``conv_wgrad`` of dy is ours, as ``dgrad_widens``. Then it takes a lazy x, too."""
    wide = arithmetic(dy.device, dy.dtype)
    return winograd.wgrad_why_not(dy.device, w_size, input_size, stride, padding, dilation, groups, wide) is None


def conv(x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    """y (N, K, P, Q), channels-last."""
    if x.device.type == "cpu" and _is_pointwise(list(w.shape), padding, groups) and stride == [1, 1]:
        n, _, h, wide = x.shape
        return _product(_rows(x), w.reshape(w.shape[:2]).t(), [n, w.shape[0], h, wide])
    if widens(x, w, stride, padding, dilation, groups):
        return winograd.conv(x.contiguous(memory_format=CHANNELS_LAST), winograd.weight(w, x.dtype), w.shape[0])
    y = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, groups)
    return y.contiguous(memory_format=CHANNELS_LAST)


def conv_dgrad(
    dy: Tensor,
    w: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """dx (N, C, H, W) = ``input_size``, channels-last, plus ``residual``, which may be written over."""
    if residual is not None and not overwrite:
        residual = residual.clone(memory_format=CHANNELS_LAST)
    if dy.device.type == "cpu" and _is_pointwise(list(w.shape), padding, groups):
        matrix = w.reshape(w.shape[:2])
        if stride == [1, 1]:
            if residual is not None:
                _rows(residual).addmm_(_rows(dy), matrix)
                return residual
            return _product(_rows(dy), matrix, input_size)
        if residual is None:
            residual = dy.new_zeros(input_size).contiguous(memory_format=CHANNELS_LAST)
        pixels = _strided(residual, stride)
        pixels += (_rows(dy) @ matrix).view(pixels.shape)
        return residual
    if dgrad_widens(dy, list(w.shape), input_size, stride, padding, dilation, groups):
        u = winograd.weight(w, dy.dtype, flip=True)
        return winograd.conv(dy, u, w.shape[1], residual=residual, z=residual)
    # The library looks at the input's size and layout alone; it must be channels-last for dx to be.
    x = torch.empty(input_size, dtype=dy.dtype, device=dy.device, memory_format=CHANNELS_LAST)
    dx = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0].contiguous(memory_format=CHANNELS_LAST)
    return dx if residual is None else dx.add_(residual)


def _idle_taps(
    x: Tensor, dy: Tensor, weight_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Whether there are taps that meet the padding alone."""
    return any(
        not any(0 <= tap * dilation[i] - padding[i] + stride[i] * o < x.shape[i + 2] for o in range(dy.shape[i + 2]))
        for i in (0, 1)
        for tap in range(weight_size[i + 2])
    )


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """dw (K, C // groups, R, S) = ``weight_size``, channels-last.

    Where ``wgrad_widens``, x may be lazy, with ``scale`` and ``shift``.
    """
    if wgrad_widens(dy, weight_size, list(x.shape), stride, padding, dilation, groups):
        return winograd.wgrad(dy, x, scale, shift).to(x.dtype)
    if dy.device.type == "cpu" and _is_pointwise(weight_size, padding, groups):
        operand = _rows(x) if stride == [1, 1] else _strided(x, stride).reshape(-1, x.shape[1])
        return (_rows(dy).t() @ operand).view(weight_size)
    if (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and _idle_taps(x, dy, weight_size, stride, padding, dilation)
    ):
        # oneDNN 3.12 may leave their gradients unwritten.
        return conv_wgrad(dy.float(), x.float(), weight_size, stride, padding, dilation, groups).to(x.dtype)
    w = torch.empty(weight_size, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    dw = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    dw = dw.contiguous(memory_format=CHANNELS_LAST)
    return dw.flatten(1).view(weight_size) if weight_size[2:] == [1, 1] else dw  # the strides of the definition
