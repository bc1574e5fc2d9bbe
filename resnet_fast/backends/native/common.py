"""What all files of this backend share: where its kernels run, checked arguments, new memory, launches.

The kernels see addresses. Everything they rely on (dtype, device, layout, number of elements) is brought about or
checked here, before each launch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast import _C, buffers
from resnet_fast.backends.own import CHANNELS_LAST as CHANNELS_LAST

#: Of this module's own ``_C``, which tests/cuda_on_cpu replaces.
DTYPES = {
    torch.float32: _C.DType.float32,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}


# ---- where these kernels run


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


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
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
    if runs_on(archs, capability):
        return None
    version = ".".join(map(str, capability))
    reason = f"built for {', '.join(archs)}, and {device} has compute capability {version}"
    if capability >= (8, 0):
        return f'{reason}; remedy: TORCH_CUDA_ARCH_LIST="{version}" pip install -e . --no-build-isolation --no-deps'
    return f"{reason} (supported: 8.0 and newer)"


def unable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel here can run on ``device`` in ``dtype``, or None."""
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: float32, bfloat16, float16)"
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _no_cuda() or _no_code(device)
    return f"device type {device.type} (supported: cpu, cuda)"


# ---- arguments


def matrix(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` (N, K, P, Q) laid out as the kernels read it: a dense (NPQ, K) matrix. Checked against ``like``."""
    if like is None:
        if t.dim() != 4:
            raise ValueError(f"{name}: found {t.dim()} dimensions, supported are 4 (N, C, H, W)")
    elif t.shape != like.shape or t.dtype != like.dtype or t.device != like.device:
        raise unlike(name, t, like.shape, like.dtype, like.device)
    return t.contiguous(memory_format=CHANNELS_LAST)


def unlike(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device) -> ValueError:
    types = ("", "") if dtype is None else (f" {t.dtype}", f" {dtype}")
    return ValueError(
        f"{name}: found {tuple(t.shape)}{types[0]} on {t.device}, expected {tuple(shape)}{types[1]} on {device}"
    )


def dense(y: Tensor, **vectors: Tensor | None) -> dict[str, Tensor | None]:
    """Vectors (K,) of the channels of ``y`` (N, K, P, Q) or (T, K) as dense float32; None stays None."""
    size, device = y.shape[1:2], y.device
    for name, v in vectors.items():
        if v is None:
            continue
        if v.shape != size or v.device != device:
            raise unlike(name, v, size, None, device)
        if v.dtype is not torch.float32 or not v.is_contiguous():
            vectors[name] = v.to(torch.float32).contiguous()
    return vectors


def matrix_size(y: Tensor) -> dict[str, Any]:
    n, k, p, q = y.shape
    return {"npq": n * p * q, "k": k, "dtype": DTYPES[y.dtype]}


def image_size(y: Tensor) -> dict[str, Any]:
    n, k, h, w = y.shape
    return {"n": n, "h": h, "w": w, "k": k, "dtype": DTYPES[y.dtype]}


def empty_image(size: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """An image of ``size``, in the dtype and on the device of ``like``, in kept memory where that pays."""
    if like.device.type == "cpu":
        return buffers.image(size, like.dtype)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def vectors(y: Tensor, count: int) -> list[Tensor]:
    """``count`` uninitialised (K,) float32 vectors, each an allocation of its own: ops may not return views."""
    k, device = y.shape[1], y.device
    return [torch.empty(k, dtype=torch.float32, device=device) for _ in range(count)]


def workspace(y: Tensor) -> Tensor:
    n, k, p, q = y.shape
    return torch.empty(kernels(y.device).bn_workspace(npq=n * p * q, k=k), dtype=torch.float32, device=y.device)


def on_16_bytes(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


def weight_like(name: str, w: Tensor, x: Tensor) -> Tensor:
    """``w`` (K, C, R, S) as the kernel reads it: (K, R, S, C) in memory, on 16 bytes."""
    if w.dtype != x.dtype or w.device != x.device:
        raise unlike(name, w, w.shape, x.dtype, x.device)
    return on_16_bytes(w.contiguous(memory_format=CHANNELS_LAST))


# ---- launches


def kernels(device: torch.device) -> Any:
    """The kernels for ``device``; None in a build without them. tests/cuda_on_cpu runs CUDA's on a CPU: they are asked
    for what they have, not the device for its type.
    """
    return _C.cpu if device.type == "cpu" else getattr(_C, "cuda", None)


@functools.cache
def _shared_limit_of_gpu(device: torch.device) -> int:
    with torch.cuda.device(device):
        return _C.cuda.shared_limit()


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may have, on a device with such kernels."""
    return _shared_limit_of_gpu(device) if device.type == "cuda" else kernels(device).shared_limit()


def launch(op: str, device: torch.device, **operands: Any) -> None:
    """Run a kernel, on a GPU on the device's current stream. Tensors go by address, None as 0."""
    if device.type == "cpu":
        getattr(_C.cpu, op)(**operands)
        return
    with torch.cuda.device(device):
        getattr(_C.cuda, op)(**operands, stream=torch.cuda.current_stream(device).cuda_stream)
