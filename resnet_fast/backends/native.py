"""Our own C++ and CUDA kernels (csrc/, built into ``resnet_fast._C``) for the memory-bound row; one path for both.

Convolutions inside ``conv_stats``, ``conv_dgrad``, ``conv_wgrad`` and ``conv_affine_act`` are the library's (oneDNN on
a CPU, cuDNN on a GPU), with our kernels around them: lazy operands are written out first.

The kernels see addresses. Everything they rely on (dtype, device, layout, number of elements) is brought about or
checked in this file, before each launch.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import _C, buffers
from resnet_fast.backends import library

_DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}
CHANNELS_LAST = torch.channels_last


@functools.cache
def _no_cuda() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None. Looked at once, and said once."""
    record = _C.build_info()
    if not record["cuda"]:
        reason = (
            f"resnet_fast was built without CUDA kernels ({record['reason']}); remedy: install nvcc (CUDA 12.4 or "
            "newer), then `RESNET_FAST_CUDA=1 pip install -e . --no-build-isolation --no-deps`"
        )
    else:
        reason = _C.cuda.driver_ok()
    if reason:
        warnings.warn(f"CUDA tensors run without resnet_fast's own kernels: {reason}", stacklevel=2)
    return reason or None


def _runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build for ``archs`` ("sm_80", "compute_90") has code for a GPU of this compute capability.

    Machine code runs on its own major version from its minor version on; PTX on everything newer.
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")  # sm_90a, sm_100f: for exactly that GPU, or its family
        version = int(digits[:-1]), int(digits[-1])
        if digits != number:
            if version == capability:
                return True
        elif version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


@functools.cache
def _no_code(device: torch.device) -> str | None:
    """Why this GPU has no kernels in this build, or None."""
    archs, capability = _C.build_info()["cuda_archs"], torch.cuda.get_device_capability(device)
    if _runs_on(archs, capability):
        return None
    version = ".".join(map(str, capability))
    reason = f"built for {', '.join(archs)}, and {device} has compute capability {version}"
    if capability >= (8, 0):
        return f'{reason}; remedy: TORCH_CUDA_ARCH_LIST="{version}" pip install -e . --no-build-isolation --no-deps'
    return f"{reason} (supported: 8.0 and newer)"


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run ``op``, else the reason."""
    if dtype not in _DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: float32, bfloat16, float16)"
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _no_cuda() or _no_code(device)
    return f"device type {device.type} (supported: cpu, cuda)"


def _launch(op: str, device: torch.device, **operands: Any) -> None:
    """Run a kernel, on a GPU on the device's current stream. Tensors go by address, None as 0."""
    if device.type == "cpu":
        getattr(_C.cpu, op)(**operands)
        return
    with torch.cuda.device(device):
        getattr(_C.cuda, op)(**operands, stream=torch.cuda.current_stream(device).cuda_stream)


def _matrix(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` (N, K, P, Q) laid out as the kernels read it: a dense (NPQ, K) matrix. Checked against ``like``."""
    if like is None:
        if t.dim() != 4:
            raise ValueError(f"{name}: found {t.dim()} dimensions, supported are 4 (N, C, H, W)")
    elif t.shape != like.shape or t.dtype != like.dtype or t.device != like.device:
        raise _unlike(name, t, like.shape, like.dtype, like.device)
    return t.contiguous(memory_format=CHANNELS_LAST)


def _unlike(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> ValueError:
    types = ("", "") if dtype is None else (f" {t.dtype}", f" {dtype}")
    return ValueError(
        f"{name}: found {tuple(t.shape)}{types[0]} on {t.device}, expected {tuple(shape)}{types[1]} on {device}"
    )


def _dense(y: Tensor, **vectors: Tensor | None) -> dict[str, Tensor | None]:
    """Vectors (K,) of the channels of ``y`` (N, K, P, Q) or (T, K) as dense float32; None stays None."""
    size, device = y.shape[1:2], y.device
    for name, v in vectors.items():
        if v is None:
            continue
        if v.shape != size or v.device != device:
            raise _unlike(name, v, size, None, device)
        if v.dtype is not torch.float32 or not v.is_contiguous():
            vectors[name] = v.to(torch.float32).contiguous()
    return vectors


def _size(y: Tensor) -> dict[str, Any]:
    n, k, p, q = y.shape
    return {"npq": n * p * q, "k": k, "dtype": _DTYPES[y.dtype]}


def _image_size(y: Tensor) -> dict[str, Any]:
    n, k, h, w = y.shape
    return {"n": n, "h": h, "w": w, "k": k, "dtype": _DTYPES[y.dtype]}


def _empty(size: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """An image of ``size``, in the dtype and on the device of ``like``, in kept memory where that pays."""
    kept = buffers.empty(size, like.dtype, buffers.TRAINING) if like.device.type == "cpu" else None
    if kept is not None:
        return kept
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def _vectors(y: Tensor, count: int) -> list[Tensor]:
    """``count`` uninitialised (K,) float32 vectors, each an allocation of its own: ops may not return views."""
    k, device = y.shape[1], y.device
    return [torch.empty(k, dtype=torch.float32, device=device) for _ in range(count)]


def _workspace(y: Tensor) -> Tensor:
    n, k, p, q = y.shape
    module = _C.cpu if y.device.type == "cpu" else _C.cuda
    return torch.empty(module.bn_workspace(npq=n * p * q, k=k), dtype=torch.float32, device=y.device)


#: Bytes between two sampled words of a weight: every word sampled is a page missed by the TLB (docs/conv.md, entry 3).
_SAMPLE = 16384
#: Up to this many bytes (batch norm's vectors), every byte counts.
_WHOLE = 16384


def fingerprinter(tensors: Sequence[Tensor]) -> Callable[[], int]:
    """A function that hashes these CPU tensors' memory as it is: all of the small ones, samples of the large ones.

    Valid as long as the tensors keep their addresses and sizes.
    """
    dense = [t for t in tensors if t.is_contiguous() or t.is_contiguous(memory_format=CHANNELS_LAST)]
    # The values of others (expanded, sliced) do not fill the bytes behind their address: a copy's do.
    other = [t for t in tensors if not any(t is d for d in dense)]
    spans = [(t.data_ptr(), t.nbytes) for t in dense]
    value = _C.cpu.Fingerprint(spans=spans, whole=_WHOLE, stride=_SAMPLE).value
    return (lambda: hash((value(), fingerprint([t.contiguous() for t in other])))) if other else value


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """64-bit hash of CPU tensors' memory: see :func:`fingerprinter`."""
    return fingerprinter(tensors)()


class Memory:
    """CPU tensors as they are now: addresses, version counters, and :func:`fingerprinter`'s hash of what is there.

    The counters of those alone of which the hash reads samples; tensors made in inference mode have none.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        states = (
            (
                t.data_ptr(),
                -1 if t.is_inference() or t.nbytes <= _WHOLE else t._version,
                t._cdata,
                t.untyped_storage()._cdata,
            )
            for t in tensors
        )
        self._then = array("q", itertools.chain.from_iterable(states)).tobytes()
        self._hash = fingerprinter(tensors)
        self._value = self._hash()

    def holds(self) -> bool:
        """Whether no tensor has moved, or been written to: by what counts writes, or where the hash looks."""
        # In this order: what has moved may have been freed.
        return _C.cpu.in_place(self._tensors, self._then, *_DESCRIPTORS) and self._hash() == self._value


#: Called past the lookup of attributes: there are hundreds of tensors.
_DESCRIPTORS = Tensor.data_ptr, Tensor._version


def unchanged(*lists: Any) -> bool:
    """Whether dictionaries hold what they held: what watch.py asks at every forward, and of what it says there."""
    return _C.cpu.unchanged(*lists)


# ---- row bn_act -------------------------------------------------------------------------------------------------


def bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = _matrix("y", y)
    mean, var, rstd, scale, shift = _vectors(y, 5)
    _launch(
        "bn_stats",
        y.device,
        y=y,
        **_dense(y, gamma=gamma, beta=beta),
        mean=mean,
        var=var,
        rstd=rstd,
        scale=scale,
        shift=shift,
        workspace=_workspace(y),
        eps=eps,
        **_size(y),
    )
    return mean, var, rstd, scale, shift


def bn_stats_update(buffers: list[Tensor], values: list[Tensor], factor: float, counters: list[Tensor]) -> bool:
    """Each of ``buffers`` moves by ``factor`` towards its value in ``values``, and ``counters`` go up by one, in place.

    False, and nothing is done, where that is not for these kernels: all on the CPU, dense, float32, counters int64.
    """
    if not all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in values):
        return False
    if not all(b.dtype is torch.float32 and b.is_cpu and b.is_contiguous() and not b.is_inference() for b in buffers):
        return False
    if not all(c.dtype is torch.int64 and c.is_cpu and c.numel() == 1 and not c.is_inference() for c in counters):
        return False
    sizes = [b.numel() for b in buffers]
    if sizes != [v.numel() for v in values]:
        return False
    _C.cpu.bn_stats_update(buffers=buffers, values=values, sizes=sizes, factor=factor, counters=counters)
    torch.autograd.graph.increment_version([*buffers, *counters])
    return True


def bn_finalize(
    n: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if mean.dim() != 2:
        raise ValueError(f"mean: found {mean.dim()} dimensions, supported are 2 (T, K)")
    for name, t, size in (("n", n, mean.shape[:1]), ("var", var, mean.shape)):
        if t.shape != size or t.device != mean.device:
            raise _unlike(name, t, size, None, mean.device)
    means = mean.to(torch.float32).contiguous()
    mean, variance, rstd, scale, shift = _vectors(means, 5)
    _launch(
        "bn_finalize",
        n.device,
        n=n.to(torch.float32).contiguous(),
        means=means,
        vars=var.to(torch.float32).contiguous(),
        **_dense(means, gamma=gamma, beta=beta),
        mean=mean,
        var=variance,
        rstd=rstd,
        scale=scale,
        shift=shift,
        parts=means.shape[0],
        k=means.shape[1],
        eps=eps,
    )
    return mean, variance, rstd, scale, shift


def _affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    rscale: Tensor | None,
    rshift: Tensor | None,
    relu: bool,
    mask: Tensor | None,
) -> Tensor:
    """``affine_act``; ``y`` is channels-last already."""
    if rscale is None or rshift is None:  # one alone is as none, as in the definition
        rscale = rshift = None
    z = _empty(y.shape, y)
    _launch(
        "affine_act",
        y.device,
        y=y,
        **_dense(y, scale=scale, shift=shift, rscale=rscale, rshift=rshift),
        residual=None if residual is None else _matrix("residual", residual, y),
        z=z,
        mask=mask,
        relu=relu,
        **_size(y),
    )
    return z


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    return _affine_act(_matrix("y", y), scale, shift, residual, rscale, rshift, relu, None)


def affine_act_mask(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = _matrix("y", y)
    n, k, p, q = y.shape
    mask = torch.empty((n, p, q, -(-k // 8)), dtype=torch.uint8, device=y.device)
    return _affine_act(y, scale, shift, residual, rscale, rshift, True, mask), mask


def _gate(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """z as an argument: the activation, or its mask."""
    if z.dtype != torch.uint8:
        return {"z": _matrix("z", z, y)}
    n, k, p, q = y.shape
    if z.shape != (n, p, q, -(-k // 8)) or z.device != y.device:
        raise _unlike("z", z, (n, p, q, -(-k // 8)), torch.uint8, y.device)
    return {"mask": z.contiguous()}


def affine_act_backward(
    dz: Tensor,
    z: Tensor,
    y: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    rmean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _matrix("y", y)
    g = _empty(y.shape, y)
    sum_g, sum_gy, sum_gr = _vectors(y, 3)
    if residual is None or rmean is None:
        residual = rmean = None
        sum_gr.zero_()
    _launch(
        "affine_act_backward",
        y.device,
        dz=_matrix("dz", dz, y),
        **_gate(z, y),
        y=y,
        **_dense(y, mean=mean, rmean=rmean),
        ry=None if residual is None else _matrix("residual", residual, y),
        g=g,
        sum_g=sum_g,
        sum_gy=sum_gy,
        sum_gry=None if rmean is None else sum_gr,
        workspace=_workspace(y),
        **_size(y),
    )
    return g, sum_g, sum_gy, sum_gr


def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if scale is None or shift is None:
        scale = shift = None
    y = _matrix("y", y)
    sum_g, sum_gy = _vectors(y, 2)
    _launch(
        "bn_backward_sums",
        y.device,
        dz=_matrix("dz", dz, y),
        y=y,
        **_dense(y, mean=mean, scale=scale, shift=shift),
        sum_g=sum_g,
        sum_gy=sum_gy,
        workspace=_workspace(y),
        **_size(y),
    )
    return sum_g, sum_gy


def bn_backward_finalize(
    sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float
) -> tuple[Tensor, Tensor, Tensor]:
    if sum_g.dim() != 1:
        raise ValueError(f"sum_g: found {sum_g.dim()} dimensions, supported is 1")
    channels = sum_g.unsqueeze(0)
    b, c, dgamma = _vectors(channels, 3)
    _launch(
        "bn_backward_finalize",
        sum_g.device,
        **_dense(channels, sum_g=sum_g, sum_gy=sum_gy, rstd=rstd, scale=scale),
        b=b,
        c=c,
        dgamma=dgamma,
        n=n,
        k=sum_g.shape[0],
    )
    return b, c, dgamma


def _bn_backward_apply(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    overwrite: bool,
) -> Tensor:
    """``bn_backward_apply``, with ``overwrite`` over ``dz``: memory that is in the caches already."""
    if scale is None or shift is None:
        scale = shift = None
    y = _matrix("y", y)
    dz = _matrix("dz", dz, y)
    dy = dz if overwrite else _empty(y.shape, y)
    _launch(
        "bn_backward_apply",
        y.device,
        dz=dz,
        y=y,
        **_dense(y, mean=mean, a=a, b=b, c=c, scale=scale, shift=shift),
        dy=dy,
        **_size(y),
    )
    return dy


def bn_backward_apply(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    return _bn_backward_apply(dz, y, mean, a, b, c, scale, shift, False)


# ---- row stem ---------------------------------------------------------------------------------------------------


def affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    y = _matrix("y", y)
    n, k, h, w = y.shape
    size, device = (n, k, (h + 1) // 2, (w + 1) // 2), y.device
    z = _empty(size, y)
    index = torch.empty(size, dtype=torch.uint8, device=device, memory_format=CHANNELS_LAST)
    _launch(
        "affine_act_maxpool",
        device,
        y=y,
        **_dense(y, scale=scale, shift=shift),
        z=z,
        index=index,
        **_image_size(y),
    )
    return z, index


def _pooled(dz: Tensor, index: Tensor, y: Tensor) -> dict[str, Tensor]:
    """dz and index (N, K, P, Q) behind ``y`` (N, K, H, W), as arguments."""
    n, k, h, w = y.shape
    size = (n, k, (h + 1) // 2, (w + 1) // 2)
    for name, t, dtype in (("dz", dz, y.dtype), ("index", index, torch.uint8)):
        if t.shape != size or t.dtype != dtype or t.device != y.device:
            raise _unlike(name, t, size, dtype, y.device)
    return {
        "dz": dz.contiguous(memory_format=CHANNELS_LAST),
        "index": index.contiguous(memory_format=CHANNELS_LAST),
    }


def maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    y = _matrix("y", y)
    sum_g, sum_gy = _vectors(y, 2)
    _launch(
        "maxpool_backward_sums",
        y.device,
        **_pooled(dz, index, y),
        y=y,
        **_dense(y, mean=mean),
        sum_g=sum_g,
        sum_gy=sum_gy,
        workspace=_workspace(y),
        **_image_size(y),
    )
    return sum_g, sum_gy


def maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    y = _matrix("y", y)
    dy = _empty(y.shape, y)
    _launch(
        "maxpool_backward_apply",
        y.device,
        **_pooled(dz, index, y),
        y=y,
        **_dense(y, mean=mean, a=a, b=b, c=c),
        dy=dy,
        **_image_size(y),
    )
    return dy


# ---- row conv: the library's convolution, our kernels around it -------------------------------------------------


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An activation, lazy or not, written out channels-last in ``dtype``."""
    if scale is None or shift is None:
        return x.to(dtype, memory_format=CHANNELS_LAST)
    return affine_act(x, scale, shift).to(dtype)


def _gradient(
    dtype: torch.dtype,
    overwrite: bool,
    g: Tensor,
    y: Tensor | None,
    mean: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
) -> Tensor:
    """A gradient, lazy or not, written out channels-last in ``dtype``; with ``overwrite`` a lazy one over ``g``."""
    if y is None or mean is None or a is None or b is None or c is None:
        return g.to(dtype, memory_format=CHANNELS_LAST)
    return _bn_backward_apply(g, y, mean, a, b, c, gscale, gshift, overwrite).to(dtype)


def conv_stats(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = library.arithmetic(x.device, x.dtype)
    if library.widens(x, w, stride, padding, dilation, groups):
        wide = x.dtype
    y = library.conv(_activation(x, scale, shift, wide), w.to(wide), stride, padding, dilation, groups).to(x.dtype)
    return (y, *bn_stats(y, gamma, beta, eps))


def conv_dgrad(
    g: Tensor,
    w: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    wide = library.arithmetic(g.device, g.dtype)
    dy = _gradient(wide, False, g, y, mean, a, b, c)
    return library.conv_dgrad(dy, w.to(wide), list(input_size), stride, padding, dilation, groups).to(g.dtype)


def conv_wgrad(
    g: Tensor,
    x: Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    wide = library.arithmetic(g.device, g.dtype)
    dy = _gradient(wide, False, g, y, mean, a, b, c)
    operand = _activation(x, scale, shift, wide)
    return library.conv_wgrad(dy, operand, list(weight_size), stride, padding, dilation, groups).to(x.dtype)


def _conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    geometry: tuple[list[int], list[int], list[int], int],
    needs: tuple[bool, bool],
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """``conv_backward`` from dy. ``needs``: dx and dw; ``affine``: scale and shift of a lazy x."""
    dx, dw = x.new_empty(0), x.new_empty(0)
    wide = dy.dtype
    if needs[0]:
        residual = None if residual is None else _matrix("residual", residual, x)
        if residual is not None and residual.dtype != wide:
            residual, overwrite = residual.to(wide, memory_format=CHANNELS_LAST), True
        dx = library.conv_dgrad(dy, w.to(wide), list(x.shape), *geometry, residual, overwrite).to(x.dtype)
    if needs[1]:
        dw = library.conv_wgrad(dy, _activation(x, *affine, wide), list(w.shape), *geometry).to(x.dtype)
    return dx, dw


def conv_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_x: bool,
    needs_w: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dy = _gradient(library.arithmetic(g.device, g.dtype), False, g, y, mean, a, b, c, gscale, gshift)
    geometry = (stride, padding, dilation, groups)
    return _conv_backward(dy, x, w, geometry, (needs_x, needs_w), (scale, shift), residual, False)


def conv_backward_into(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs_x: bool,
    needs_w: bool,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    disposable: bool,
    **lazy: Tensor,
) -> tuple[Tensor, Tensor]:
    """``conv_backward`` that may write over ``residual``, which nobody else needs, and over ``g`` if ``disposable``.

    ``lazy``: y, mean, a, b, c, gscale, gshift, or none of them.
    """
    keys = ("y", "mean", "a", "b", "c", "gscale", "gshift")
    wide = library.arithmetic(g.device, g.dtype)
    dy = _gradient(wide, disposable and g is not residual, g, *map(lazy.get, keys))
    geometry = (stride, padding, dilation, groups)
    # Not where dy is that memory: dw is still to be read from it.
    overwrite = residual is not None and dy.data_ptr() != residual.data_ptr()
    return _conv_backward(dy, x, w, geometry, (needs_x, needs_w), (scale, shift), residual, overwrite)


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
    y = F.conv2d(x, w, None, stride, padding, dilation, groups)
    one = y.new_ones(y.shape[1], dtype=torch.float32) if scale is None else scale
    return affine_act(y, one, shift, residual, relu=relu)


# ---- row bottleneck: a whole block in one kernel, for GPUs -------------------------------------------------------


@functools.cache
def _shared_limit_of_gpu(device: torch.device) -> int:
    with torch.cuda.device(device):
        return _C.cuda.shared_limit()


def bottleneck_why_not(
    device: torch.device, dtype: torch.dtype, x_size: Sequence[int], w_sizes: Sequence[Sequence[int] | None]
) -> str | None:
    """None where one kernel can run the whole block, else the reason. ``w_sizes``: of w1, w2, w3, and rw or None."""
    # On a CPU tests/cuda_on_cpu runs them.
    module: Any = _C.cpu if device.type == "cpu" else getattr(_C, "cuda", None)
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
    limit = _shared_limit_of_gpu(device) if device.type == "cuda" else module.shared_limit()
    if shared > limit:
        return f"width {width} needs {shared} bytes of shared memory, {device} has {limit}"
    if max(n * -(-h // 8) * -(-w // 16), c * k, k * width) >= 2**31:
        return f"x {tuple(x_size)} (supported: below 2^31 tiles of 8 x 16 pixels)"
    return None


def _on_16_bytes(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


def _weight_like(name: str, w: Tensor, x: Tensor) -> Tensor:
    """``w`` (K, C, R, S) as the kernel reads it: (K, R, S, C) in memory, on 16 bytes."""
    if w.dtype != x.dtype or w.device != x.device:
        raise _unlike(name, w, w.shape, x.dtype, x.device)
    return _on_16_bytes(w.contiguous(memory_format=CHANNELS_LAST))


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
    x = _matrix("x", x)
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
    _launch(
        "bottleneck",
        x.device,
        x=_on_16_bytes(x),
        **{name: None if w is None else _weight_like(name, w, x) for name, w in weights.items()},
        **_dense(x.new_empty(1).expand(1, inner), scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2),
        **_dense(z, scale3=scale3, shift3=shift3, rscale=rscale, rshift=rshift),
        z=z,
        n=n,
        h=h,
        w=width,
        c=c,
        width=inner,
        k=k,
        dtype=_DTYPES[x.dtype],
    )
    return z


def whole_stem_why_not(
    device: torch.device, dtype: torch.dtype, x_size: Sequence[int], w_size: Sequence[int]
) -> str | None:
    """None where one kernel can run the whole stem, else the reason."""
    module: Any = _C.cpu if device.type == "cpu" else getattr(_C, "cuda", None)
    if not hasattr(module, "whole_stem"):
        return f"no whole-stem kernel for {device.type} (supported: cuda)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: bfloat16, float16)"
    if [*w_size] != [64, 3, 7, 7] or x_size[1] != 3:
        return f"a filter {tuple(w_size)} on {x_size[1]} channels (supported: (64, 3, 7, 7) on 3)"
    limit = _shared_limit_of_gpu(device) if device.type == "cuda" else module.shared_limit()
    if module.whole_stem_shared() > limit:
        return f"the stem needs {module.whole_stem_shared()} bytes of shared memory, {device} has {limit}"
    n, _, h, w = x_size
    if n * -(-h // 32) * -(-w // 32) >= 2**31:
        return f"x {tuple(x_size)} (supported: below 2^31 tiles of 32 x 32 pixels)"
    return None


def whole_stem(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = _matrix("x", x)
    if w.dim() != 4 or whole_stem_why_not(x.device, x.dtype, list(x.shape), list(w.shape)) is not None:
        y = F.conv2d(x, w, None, [2, 2], [w.shape[2] // 2] * 2)
        return affine_act_maxpool(y, scale, shift)[0]
    n, _, h, width = x.shape
    size = (n, w.shape[0], -(-h // 4), -(-width // 4))
    z = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    _launch(
        "whole_stem",
        x.device,
        x=x,
        weight=_weight_like("w", w, x),
        **_dense(z, scale=scale, shift=shift),
        z=z,
        n=n,
        h=h,
        w=width,
        dtype=_DTYPES[x.dtype],
    )
    return z
