"""The stem behind its convolution: batch norm, ReLU and max-pooling in one pass, and the way back; for inference on
GPUs all of it in one kernel, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    CHANNELS_LAST,
    DTYPES,
    dense,
    empty_image,
    image_size,
    kernels,
    launch,
    matrix,
    shared_limit,
    unlike,
    vectors,
    weight_like,
    workspace,
)


def affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    n, k, h, w = y.shape
    size, device = (n, k, (h + 1) // 2, (w + 1) // 2), y.device
    z = empty_image(size, y)
    index = torch.empty(size, dtype=torch.uint8, device=device, memory_format=CHANNELS_LAST)
    launch(
        "affine_act_maxpool",
        device,
        y=y,
        **dense(y, scale=scale, shift=shift),
        z=z,
        index=index,
        **image_size(y),
    )
    return z, index


def _pooled(dz: Tensor, index: Tensor, y: Tensor) -> dict[str, Tensor]:
    """dz and index (N, K, P, Q) behind ``y`` (N, K, H, W), as arguments."""
    n, k, h, w = y.shape
    size = (n, k, (h + 1) // 2, (w + 1) // 2)
    for name, t, dtype in (("dz", dz, y.dtype), ("index", index, torch.uint8)):
        if t.shape != size or t.dtype != dtype or t.device != y.device:
            raise unlike(name, t, size, dtype, y.device)
    return {
        "dz": dz.contiguous(memory_format=CHANNELS_LAST),
        "index": index.contiguous(memory_format=CHANNELS_LAST),
    }


def maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    y = matrix("y", y)
    sum_g, sum_gy = vectors(y, 2)
    launch(
        "maxpool_backward_sums",
        y.device,
        **_pooled(dz, index, y),
        y=y,
        **dense(y, mean=mean),
        sum_g=sum_g,
        sum_gy=sum_gy,
        workspace=workspace(y),
        **image_size(y),
    )
    return sum_g, sum_gy


def maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    y = matrix("y", y)
    dy = empty_image(y.shape, y)
    launch(
        "maxpool_backward_apply",
        y.device,
        **_pooled(dz, index, y),
        y=y,
        **dense(y, mean=mean, a=a, b=b, c=c),
        dy=dy,
        **image_size(y),
    )
    return dy


def whole_stem_why_not(
    device: torch.device, dtype: torch.dtype, x_size: Sequence[int], w_size: Sequence[int]
) -> str | None:
    """None where one kernel can run the whole stem, else the reason."""
    module = kernels(device)
    if not hasattr(module, "whole_stem"):
        return f"no whole-stem kernel for {device.type} (supported: cuda)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: bfloat16, float16)"
    if [*w_size] != [64, 3, 7, 7] or x_size[1] != 3:
        return f"a filter {tuple(w_size)} on {x_size[1]} channels (supported: (64, 3, 7, 7) on 3)"
    limit = shared_limit(device)
    if module.whole_stem_shared() > limit:
        return f"the stem needs {module.whole_stem_shared()} bytes of shared memory, {device} has {limit}"
    n, _, h, w = x_size
    if n * -(-h // 32) * -(-w // 32) >= 2**31:
        return f"x {tuple(x_size)} (supported: below 2^31 tiles of 32 x 32 pixels)"
    return None


def whole_stem(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = matrix("x", x)
    if w.dim() != 4 or whole_stem_why_not(x.device, x.dtype, list(x.shape), list(w.shape)) is not None:
        y = F.conv2d(x, w, None, [2, 2], [w.shape[2] // 2] * 2)
        return affine_act_maxpool(y, scale, shift)[0]
    n, _, h, width = x.shape
    size = (n, w.shape[0], -(-h // 4), -(-width // 4))
    z = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    launch(
        "whole_stem",
        x.device,
        x=x,
        weight=weight_like("w", w, x),
        **dense(z, scale=scale, shift=shift),
        z=z,
        n=n,
        h=h,
        w=width,
        dtype=DTYPES[x.dtype],
    )
    return z
