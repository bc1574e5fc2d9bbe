"""The backward of our own 1x1 convolutions on a CPU (csrc/cpu/pointwise_backward.cpp), for the backends. No backend.

One pass forms dy and the activation as it reads, block by block, and leaves dx and dw: neither is written to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import buffers
from resnet_fast.backends.own import _C, DTYPES, too_few, unable

#: Input or output channels, at most: a thread keeps their vectors in L1.
_CHANNELS = 1024
#: C * K, at most: the filters and the sums of their gradient stay in the level-2 cache. Above the first, only where x
#: does, too.
_FILTERS, _MORE_FILTERS, _FEW = 256 * 512, 256 * 1024, 256


def why_not(
    device: torch.device,
    w_size: list[int],
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> str | None:
    """None where ``backward`` runs this convolution's and is the faster, else the reason.

    ``dtype``: of arithmetic; ``stored``: of x and g.
    """
    if reason := unable(device, dtype, "products"):
        return reason
    if w_size[2:] != [1, 1] or stride != [1, 1] or padding != [0, 0] or groups != 1:
        return "not 1x1, stride 1, without padding and groups"
    k, c = w_size[:2]
    if max(k, c) > _CHANNELS or k * c > (_FILTERS if c > _FEW else _MORE_FILTERS):
        return f"{c} to {k} channels: the filters leave the caches"
    isa = _C.cpu.isa()
    if isa == "baseline":
        return "baseline: the library is as fast without AVX2"
    if stored == torch.float32 and c >= 4 * k and (c > _FEW or isa != "avx512"):
        return f"{c} to {k} channels in float32: dy is the least that is read"
    threads = torch.get_num_threads()
    npq = input_size[0] * input_size[2] * input_size[3]
    units = _C.cpu.pointwise_backward_units(npq=npq, channels=c, k=k, threads=threads)
    return too_few(units, 2 * npq * c * k)


def backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool],
    residual: Tensor | None,
    overwrite: bool,
    **vectors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx (N, C, H, W) = dy x w + residual, channels-last, and dw (K, C, 1, 1), in the dtype of x.

    What ``needs`` leaves out has no elements; what is in it has the same bits whatever it leaves out.
    Nothing is checked. g (N, K, H, W), x, residual channels-last, of one dtype; dx is written over ``residual`` with
    ``overwrite``. ``vectors``: scale and shift (C,) of a lazy x; y, as g, and mean, a, b, c, gscale, gshift (K,) of a
    lazy g; all float32 but y.
    """
    n, c, h, wide = x.shape
    k = w.shape[0]
    dx = dw = None
    if needs[0]:
        dx = residual if overwrite and residual is not None else buffers.image((n, c, h, wide), x.dtype)
    if needs[1]:
        dw = torch.empty((k, c, 1, 1), dtype=torch.float32)
    threads = torch.get_num_threads()
    size = {"npq": n * h * wide, "channels": c, "k": k, "threads": threads}
    workspace = buffers.scratch(_C.cpu.pointwise_backward_workspace(**size))
    _C.cpu.pointwise_backward(
        g=g,
        x=x,
        w=w.reshape(k, c).to(torch.float32).contiguous(),
        residual=residual,
        dx=dx,
        dw=dw,
        workspace=workspace,
        dtype=DTYPES[x.dtype],
        **size,
        **vectors,  # type: ignore[arg-type]
    )
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dw is None else dw.to(x.dtype)
