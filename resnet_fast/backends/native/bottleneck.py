"""A whole block in one kernel, for GPUs. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import CHANNELS_LAST, DTYPES, dense, kernels, launch, matrix, on_16_bytes, shared_limit, weight_like
from .conv import conv_affine_act


def bottleneck_why_not(
    device: torch.device, dtype: torch.dtype, x_size: Sequence[int], w_sizes: Sequence[Sequence[int] | None]
) -> str | None:
    """None where one kernel can run the whole block, else the reason. ``w_sizes``: of w1, w2, w3, and rw or None."""
    module = kernels(device)
    if not hasattr(module, "bottleneck"):
        return f"no whole-block kernel for {device.type} (supported: cuda)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: bfloat16, float16)"
    n, c, h, w = x_size
    w1, w2, w3, rw = w_sizes
    assert w1 is not None and w2 is not None and w3 is not None
    width, k = w1[0], w3[0]
    if [*w1] != [width, c, 1, 1] or [*w2] != [width, width, 3, 3] or [*w3] != [k, width, 1, 1]:
        return f"weights {tuple(w1)}, {tuple(w2)}, {tuple(w3)} on {c} channels (supported: 1x1, 3x3, 1x1 of one width)"
    if rw is None and k != c:
        return f"an identity shortcut from {c} to {k} channels"
    if rw is not None and ([*rw] != [k, c, 1, 1] or c != 64):
        return f"a projection {tuple(rw)} on {c} channels (supported: 1x1 on 64)"
    shared = module.bottleneck_shared(c=c, width=width, k=k, projection=rw is not None, resident=False)
    if shared < 0:
        return f"width {width} (supported: 64, 128)"
    if c % 64 or k % 64:
        return f"{c} to {k} channels (supported: multiples of 64)"
    limit = shared_limit(device)
    if shared > limit:
        return f"width {width} needs {shared} bytes of shared memory, {device} has {limit}"
    if max(n * -(-h // 8) * -(-w // 16), c * k, k * width) >= 2**31:
        return f"x {tuple(x_size)} (supported: below 2^31 tiles of 8 x 16 pixels)"
    return None


def bottleneck(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    w3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    rw: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> Tensor:
    if rw is None or rscale is None or rshift is None:  # as in the definition
        rw = rscale = rshift = None
    x = matrix("x", x)
    weights = {"w1": w1, "w2": w2, "w3": w3, "rw": rw}
    sizes = [None if w is None else list(w.shape) for w in weights.values()]
    if bottleneck_why_not(x.device, x.dtype, list(x.shape), sizes) is not None:
        one, none = [1, 1], [0, 0]
        a1 = conv_affine_act(x, w1, shift1, one, none, one, 1, scale1)
        a2 = conv_affine_act(a1, w2, shift2, one, one, one, 1, scale2)
        residual: Tensor = x
        if rw is not None and rscale is not None and rshift is not None:
            residual = conv_affine_act(x, rw, rshift, one, none, one, 1, rscale, relu=False)
        return conv_affine_act(a2, w3, shift3, one, none, one, 1, scale3, residual)
    n, c, h, width = x.shape
    inner, k = w1.shape[0], w3.shape[0]
    z = torch.empty((n, k, h, width), dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    launch(
        "bottleneck",
        x.device,
        x=on_16_bytes(x),
        **{name: None if w is None else weight_like(name, w, x) for name, w in weights.items()},
        **dense(x.new_empty(1).expand(1, inner), scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2),
        **dense(z, scale3=scale3, shift3=shift3, rscale=rscale, rshift=rshift),
        z=z,
        n=n,
        h=h,
        w=width,
        c=c,
        width=inner,
        k=k,
        dtype=DTYPES[x.dtype],
    )
    return z
