"""Our own C++ and CUDA kernels (csrc/, built into ``resnet_fast._C``) for the memory-bound row; one path for both.

Convolutions inside ``conv_stats``, ``conv_dgrad``, ``conv_wgrad`` and ``conv_affine_act`` are the library's (oneDNN on
a CPU, cuDNN on a GPU), with our kernels around them: lazy operands are written out first.

The kernels see addresses. Everything they rely on (dtype, device, layout, number of elements) is brought about or
checked in this file, before each launch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import _C

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


def _module(device: torch.device) -> Any:
    return _C.cpu if device.type == "cpu" else _C.cuda


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream


def _call(function: Any, device: torch.device, **arguments: Any) -> None:
    """Launch on the device's current stream. Tensors are passed by address, None as 0."""
    addresses = {k: v.data_ptr() if isinstance(v, Tensor) else 0 if v is None else v for k, v in arguments.items()}
    if device.type == "cpu":
        function(**addresses, stream=0)
        return
    with torch.cuda.device(device):
        function(**addresses, stream=_stream(device))


def _matrix(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` (N, K, P, Q) laid out as the kernels read it: a dense (NPQ, K) matrix. Checked against ``like``."""
    if t.dim() != 4:
        raise ValueError(f"{name}: found {t.dim()} dimensions, supported are 4 (N, C, H, W)")
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype or t.device != like.device):
        raise ValueError(
            f"{name}: found {tuple(t.shape)} {t.dtype} on {t.device}, expected "
            f"{tuple(like.shape)} {like.dtype} on {like.device}"
        )
    return t.contiguous(memory_format=CHANNELS_LAST)


def _vector(name: str, v: Tensor | None, y: Tensor) -> Tensor | None:
    """``v`` (K,) as dense float32 on the device of ``y``, or None."""
    if v is None:
        return None
    if v.shape != (y.shape[1],) or v.device != y.device:
        raise ValueError(f"{name}: found {tuple(v.shape)} on {v.device}, expected ({y.shape[1]},) on {y.device}")
    return v.to(torch.float32).contiguous()


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, prefix: str = "") -> dict[str, Tensor | None]:
    """An optional affine's vectors as arguments: both or, as in the definitions, neither."""
    if scale is None or shift is None:
        scale = shift = None
    return {f"{prefix}{name}": _vector(f"{prefix}{name}", v, y) for name, v in (("scale", scale), ("shift", shift))}


def _size(y: Tensor) -> dict[str, Any]:
    n, k, p, q = y.shape
    return {"npq": n * p * q, "k": k, "dtype": _DTYPES[y.dtype]}


def _empty_like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=CHANNELS_LAST)


def _vectors(y: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` uninitialised (K,) float32 vectors, each an allocation of its own: ops may not return views."""
    return tuple(y.new_empty(y.shape[1], dtype=torch.float32) for _ in range(count))


def _workspace(y: Tensor) -> Tensor:
    size = _size(y)
    return y.new_empty(_module(y.device).bn_workspace(npq=size["npq"], k=size["k"]), dtype=torch.float32)


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
    small = [(t.data_ptr(), t.nbytes) for t in dense if t.nbytes <= _WHOLE]
    large = [(t.data_ptr(), t.nbytes) for t in dense if t.nbytes > _WHOLE]
    parts: list[dict[str, Any]] = [
        {"addresses": [a for a, _ in part], "nbytes": [n for _, n in part], "stride": stride}
        for part, stride in ((small, 0), (large, _SAMPLE))
    ]

    def now() -> int:
        hashes = [_C.cpu.fingerprint(**part) for part in parts]
        return hash((*hashes, fingerprint([t.contiguous() for t in other]) if other else 0))

    return now


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """64-bit hash of CPU tensors' memory: see :func:`fingerprinter`."""
    return fingerprinter(tensors)()


# ---- row bn_act -------------------------------------------------------------------------------------------------


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    y = _matrix("y", y)
    mean, var = _vectors(y, 2)
    _call(_module(y.device).bn_stats, y.device, y=y, mean=mean, var=var, workspace=_workspace(y), **_size(y))
    return mean, var


def affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    y = _matrix("y", y)
    z = _empty_like(y)
    _call(
        _module(y.device).affine_act,
        y.device,
        y=y,
        scale=_vector("scale", scale, y),
        shift=_vector("shift", shift, y),
        residual=None if residual is None else _matrix("residual", residual, y),
        **_affine(y, rscale, rshift, "r"),
        z=z,
        relu=relu,
        **_size(y),
    )
    return z


def affine_act_backward(
    dz: Tensor,
    z: Tensor,
    y: Tensor,
    mean: Tensor,
    residual: Tensor | None = None,
    rmean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _matrix("y", y)
    g = _empty_like(y)
    sum_g, sum_gy, sum_gr = _vectors(y, 3)
    if residual is None or rmean is None:
        residual = rmean = None
        sum_gr.zero_()
    _call(
        _module(y.device).affine_act_backward,
        y.device,
        dz=_matrix("dz", dz, y),
        z=_matrix("z", z, y),
        y=y,
        mean=_vector("mean", mean, y),
        ry=None if residual is None else _matrix("residual", residual, y),
        rmean=_vector("rmean", rmean, y),
        g=g,
        sum_g=sum_g,
        sum_gy=sum_gy,
        sum_gry=sum_gr,
        workspace=_workspace(y),
        **_size(y),
    )
    return g, sum_g, sum_gy, sum_gr


def bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = _matrix("y", y)
    sum_g, sum_gy = _vectors(y, 2)
    _call(
        _module(y.device).bn_backward_sums,
        y.device,
        dz=_matrix("dz", dz, y),
        y=y,
        mean=_vector("mean", mean, y),
        **_affine(y, scale, shift),
        sum_g=sum_g,
        sum_gy=sum_gy,
        workspace=_workspace(y),
        **_size(y),
    )
    return sum_g, sum_gy


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
    y = _matrix("y", y)
    dy = _empty_like(y)
    _call(
        _module(y.device).bn_backward_apply,
        y.device,
        dz=_matrix("dz", dz, y),
        y=y,
        mean=_vector("mean", mean, y),
        a=_vector("a", a, y),
        b=_vector("b", b, y),
        c=_vector("c", c, y),
        **_affine(y, scale, shift),
        dy=dy,
        **_size(y),
    )
    return dy


# ---- row conv: the library's convolution, our kernels around it -------------------------------------------------


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if scale is None or shift is None else affine_act(x, scale, shift)


def _gradient(
    g: Tensor, y: Tensor | None, mean: Tensor | None, a: Tensor | None, b: Tensor | None, c: Tensor | None
) -> Tensor:
    if y is None or mean is None or a is None or b is None or c is None:
        return g
    return bn_backward_apply(g, y, mean, a, b, c)


def conv_stats(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.conv2d(_activation(x, scale, shift), w, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=CHANNELS_LAST)
    return (y, *bn_stats(y))


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
    dy = _gradient(g, y, mean, a, b, c)
    # The library looks at the input's size and layout alone; it must be channels-last for dx to be.
    x = torch.empty(input_size, dtype=dy.dtype, device=dy.device, memory_format=CHANNELS_LAST)
    dx = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    return dx.contiguous(memory_format=CHANNELS_LAST)


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
    dy = _gradient(g, y, mean, a, b, c)
    x = _activation(x, scale, shift)
    w = torch.empty(weight_size, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
    dw = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return dw.contiguous(memory_format=CHANNELS_LAST)


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
