"""Inference on unfolded weights, for GPUs: batch norm, residual and ReLU in the epilogue of their convolution.

Scale and shift come straight from the batch norms at every call, in float32 and with four launches a block: nothing is
cached, so nothing can be stale, and a CUDA graph sees in-place changes of the weights. A block runs in one of two ways,
or as in training with given statistics (``functional.residual_block``): as a whole in one kernel (``ops.bottleneck``),
or by one ``ops.conv_affine_act`` for each convolution, where a backend fuses that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional as f
from . import ops
from .autograd import ConvBn, layer_tensors, scale_shift
from .dispatch import choose, forced_backend, hook

__all__ = ["MEASURED", "affines", "fused_block", "whole_block_why_not"]

#: Where one kernel for the whole block was measured to win: by the GPU's name, widths of the block (channels of its 3x3
#: convolution). Elsewhere it runs only under ``use_backend("native")``. Nothing has been measured yet.
MEASURED: dict[str, frozenset[int]] = {}

#: Backends whose ``conv_affine_act`` is one kernel. The others' is a convolution and a pass behind it, which
#: ``residual_block`` does with one pass less where there is a projection.
_FUSING = ("triton", "cudnn")


def affines(layers: Sequence[ConvBn]) -> list[tuple[Tensor, Tensor]]:
    """(scale, shift) of every layer by its running statistics, (K,) each; a convolution's bias is in shift."""
    tensors = [layer_tensors(layer) for layer in layers]
    _, gammas, betas, means, variances = zip(*tensors, strict=True)
    if any(t is None for vectors in (gammas, betas) for t in vectors):
        return [
            scale_shift(mean, var, gamma, beta, layer.eps)[1:]
            for layer, gamma, beta, mean, var in zip(layers, gammas, betas, means, variances, strict=True)
        ]
    scales = torch._foreach_add(list(variances), [layer.eps for layer in layers])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, list(gammas))
    shifts = torch._foreach_addcmul(list(betas), list(means), scales, value=-1)
    return list(zip(scales, shifts, strict=True))


def whole_block_why_not(
    x: Tensor, layers: Sequence[ConvBn], projection: ConvBn | None = None, identity: bool = False
) -> str | None:
    """None where one kernel can run the whole block on ``x``, else the reason."""
    every = [*layers, projection] if projection is not None else list(layers)
    if len(layers) != 3 or not (identity or projection is not None):
        return f"{len(layers)} layers and {'a' if identity or projection else 'no'} shortcut (supported: a bottleneck)"
    for layer, padding in zip(every, ((0, 0), (1, 1), (0, 0), (0, 0)), strict=False):
        found = (layer.stride, layer.padding, layer.dilation, layer.groups)
        if tuple(map(tuple, found[:3])) != ((1, 1), padding, (1, 1)) or layer.groups != 1:
            stride, pad, dilation, groups = found
            return (
                f"stride {stride}, padding {pad}, dilation {dilation}, groups {groups} (supported: 1, {padding}, 1, 1)"
            )
    if not all(layer.relu for layer in layers):
        return "a layer without its ReLU"
    ask = hook("bottleneck", "why_not", x.device, x.dtype)
    if ask is None:
        return f"no backend for {x.device} has it"
    sizes = [list(layer.weight.shape) for layer in every] + [None] * (4 - len(every))
    return ask(x.device, x.dtype, list(x.shape), sizes)


def _wants_whole_block(x: Tensor, layers: Sequence[ConvBn]) -> bool:
    """Whether the kernel for whole blocks is asked for, or was measured to win."""
    forced = forced_backend()
    if forced is not None or x.device.type != "cuda":
        return forced == "native"
    return layers[0].weight.shape[0] in MEASURED.get(torch.cuda.get_device_name(x.device), ())


def fused_block(
    x: Tensor,
    layers: Sequence[ConvBn],
    *,
    projection: ConvBn | None = None,
    residual: Tensor | None = None,
    identity: bool = False,
    pool: bool = False,
) -> Tensor | None:
    """``functional.residual_block`` of layers with given statistics, without gradients; None where that is faster.

    Arguments, result and errors are those of ``residual_block``. A stem's convolution (``pool``) is the library's, and
    all behind it one pass.
    """
    every = [*layers, projection] if projection is not None else list(layers)
    if isinstance(x, Tensor) and x.dim() == 4:
        x, residual, every = f._autocast(x, residual, every)
    f._check(x, every)
    layers = every[: len(layers)]
    side = every[-1] if projection is not None else None
    whole = _wants_whole_block(x, layers) and whole_block_why_not(x, layers, side, identity) is None
    if not whole and choose("conv_affine_act", x.device, x.dtype).backend not in _FUSING:
        return None
    x = f.to_channels_last(x)
    vectors = affines(every)
    if whole:
        operands = [t for layer, pair in zip(every, vectors, strict=True) for t in (layer.weight, *pair)]
        return ops.bottleneck(x, *operands)
    if side is not None:
        scale, shift = vectors[-1]
        residual = ops.conv_affine_act(x, side.weight, shift, *side.geometry, scale, relu=False)
    elif identity:
        residual = x
    for i, (layer, (scale, shift)) in enumerate(zip(layers, vectors, strict=False)):
        last = i == len(layers) - 1
        if last and pool:
            y = F.conv2d(x, layer.weight, None, *layer.geometry).contiguous(memory_format=torch.channels_last)
            return ops.affine_act_maxpool(y, scale, shift)[0]
        operands = [layer.weight, shift]
        x = ops.conv_affine_act(x, *operands, *layer.geometry, scale, residual if last else None, layer.relu)
    return x
