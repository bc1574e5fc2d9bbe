"""What all Triton kernel files share: where they run, checked arguments, tiles, launches, and the arithmetic of a ReLU.

Kernels read (NPQ, K) channels-last matrices. Everything they rely on (dtype, device, layout, number of elements) is
brought about or checked here, before each launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Whether kernels run as Python on the CPU. Triton decides it when a kernel is defined, so it is read here, once.
INTERPRETED: bool = triton.knobs.runtime.interpret


# ---- where these kernels run


def unable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel here can run on ``device`` in ``dtype``, or None."""
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} (supported: float32, bfloat16, float16)"
    if device.type not in ("cpu", "cuda"):
        return f"device type {device.type} (supported: cuda; cpu under TRITON_INTERPRET=1)"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if INTERPRETED and dtype == torch.bfloat16:
        # Triton's interpreter rounds to bfloat16 by cutting bits off, and multiplies its matrices as integers.
        return "dtype bfloat16 under TRITON_INTERPRET=1 (supported: float32, float16)"
    if INTERPRETED:
        return _no_interpreter()
    if device.type == "cpu":
        return (
            "device type cpu (supported: cuda); remedy, to test without a GPU: set TRITON_INTERPRET=1 in the "
            "environment before the first operation"
        )
    return _no_driver() or _too_old(device)


@functools.cache
def _no_interpreter() -> str | None:
    """Why Triton's interpreter, which computes by numpy, cannot run kernels with the one that is there; or None."""
    numpy = importlib.metadata.version("numpy")
    older, newer = (tuple(map(int, found.split(".")[:2])) for found in (triton.__version__, numpy))
    if older < (3, 7) and newer >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} cannot work with numpy {numpy}; remedy: "
            "pip install 'numpy<2.4', or Triton 3.7"
        )
    return None


@functools.cache
def _no_driver() -> str | None:
    """Why Triton cannot use this process's GPUs, or None. Asked once: Triton compiles a small C file to find out."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm (supported: CUDA)"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no C compiler, no Python.h, no driver: each is another type of exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"Triton cannot use the GPU ({reason}); remedy: install a C compiler and Python's headers"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return f"{device} has compute capability {'.'.join(map(str, capability))} (supported: 8.0 and newer)"


# ---- arguments


def matrix(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` (N, K, P, Q) laid out as the kernels read it: a dense (NPQ, K) matrix. Checked against ``like``."""
    if t.dim() != 4:
        raise ValueError(f"{name}: found {t.dim()} dimensions, supported are 4 (N, C, H, W)")
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype or t.device != like.device):
        raise ValueError(
            f"{name}: found {tuple(t.shape)} {t.dtype} on {t.device}, expected "
            f"{tuple(like.shape)} {like.dtype} on {like.device}"
        )
    return t.contiguous(memory_format=CHANNELS_LAST)


def sized(
    name: str,
    t: Tensor,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """``t`` in ``layout``, checked against what it must be."""
    if t.shape != size or t.dtype != dtype or t.device != device:
        raise ValueError(f"{name}: found {tuple(t.shape)} {t.dtype} on {t.device}, expected {size} {dtype} on {device}")
    return t.contiguous(memory_format=layout)


def vector(name: str, v: Tensor | None, y: Tensor) -> Tensor | None:
    """``v`` (K,) as dense float32 on the device of ``y`` (N, K, P, Q), or None."""
    if v is None:
        return None
    if v.shape != (y.shape[1],) or v.device != y.device:
        raise ValueError(f"{name}: found {tuple(v.shape)} on {v.device}, expected ({y.shape[1]},) on {y.device}")
    return v.to(torch.float32).contiguous()


def affine_of(y: Tensor, scale: Tensor | None, shift: Tensor | None, prefix: str = "") -> dict[str, Tensor | None]:
    """An optional affine's vectors as arguments: both or, as in the definitions, neither."""
    if scale is None or shift is None:
        scale = shift = None
    return {f"{prefix}{name}": vector(f"{prefix}{name}", v, y) for name, v in (("scale", scale), ("shift", shift))}


def empty_like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=CHANNELS_LAST)


def vectors(like: Tensor, k: int, count: int) -> tuple[Tensor, ...]:
    """``count`` uninitialised (K,) float32 vectors, each an allocation of its own: ops may not return views."""
    return tuple(like.new_empty(k, dtype=torch.float32) for _ in range(count))


# ---- tiles


class Tile(NamedTuple):
    """What one program moves at a time: ``vectors`` accesses of 16 bytes per thread of each operand.

    Where K is not a multiple of 16, Triton cannot know that rows are aligned: 4 accesses of one element each.
    """

    vectors: int
    warps: int

    def blocks(self, k: int, itemsize: int) -> dict[str, int]:
        """BLOCK_NPQ and BLOCK_K of a matrix with ``k`` channels."""
        block_k, per_thread = channel_block(k), self.vectors * 16 // itemsize if k % 16 == 0 else 4
        return {
            "BLOCK_NPQ": (4 if INTERPRETED else 1) * self.warps * 32 * per_thread // block_k,
            "BLOCK_K": block_k,
        }


@functools.cache
def channel_block(k: int) -> int:
    """The widest block of channels of which at most a quarter is idle; if there is none, the one with the least idle.

    64 channels of 2 bytes are a cache line, and few enough that a thread loads its own per-channel values: from blocks
    of as many channels as threads on, Triton sends these through shared memory.
    """
    widths = (64, 32, 16)
    idle = {width: (-k % width) / (k + -k % width) for width in widths} if k else {16: 0.0}
    return next((width for width in idle if idle[width] <= 0.25), min(idle, key=lambda width: idle[width]))


# Reductions: row blocks times channels, which bounds the workspace, and the loop of the second stage. The interpreter's
# time goes by operations, not by elements: there tiles are larger (above) and row blocks few, so that the small cases
# of the tests still go round every loop.
PARTIALS = 262144
MAX_ROW_BLOCKS = 3 if INTERPRETED else 1024
MIN_ROWS = 1 if INTERPRETED else 64


def row_blocks(npq: int, k: int, block_npq: int) -> tuple[int, int]:
    """(rows of a row block, number of row blocks): whole tiles of BLOCK_NPQ rows. They follow from the shape alone."""
    limit = max(1, min(PARTIALS // max(k, 1), MAX_ROW_BLOCKS))
    rows = triton.cdiv(max(triton.cdiv(npq, limit), MIN_ROWS), block_npq) * block_npq
    return rows, triton.cdiv(npq, rows)


# ---- launches


class Launch(NamedTuple):
    """One launch: a kernel with its arguments by name, Triton's options among them."""

    kernel: Any
    arguments: dict[str, Any]


_recording: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are listed and not made, on tensors of any device: to compile them for a GPU that is not here."""
    global _recording
    launches: list[Launch] = []
    _recording = launches
    try:
        yield launches
    finally:
        _recording = None


def launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    """Launch on the device's current stream; ``arguments`` are the kernel's and ``num_warps``, ``num_stages``."""
    if programs == 0:
        return
    if _recording is not None:
        _recording.append(Launch(kernel, arguments))
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments)


# ---- arithmetic that forward and backward share
# A block of predicates and a scalar one meet in tl.where, not in &: that is a block of integers to the interpreter of
# Triton 3.9, which takes none as a mask.


@triton.jit
def affine(y, scale, shift):
    """y * scale + shift, rounded once: forward and backward agree bit for bit on which side of zero it lies."""
    return tl.fma(y, scale, shift)


@triton.jit
def relu(value):
    """max(value, 0), NaN kept: one instruction."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where_active(gate, value):
    """Value where gate > 0 or gate is NaN, else 0: torch's threshold_backward."""
    return tl.where(gate <= 0, 0.0, value)


@triton.jit
def place(K, BLOCK_K: tl.constexpr):
    """(row block, channels) of this program. Channel blocks vary fastest: neighbours read neighbouring memory."""
    channel_blocks = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    k = program % channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    return (program // channel_blocks).to(tl.int64), k  # int64: what is multiplied with it may pass 2^31


@triton.jit
def channels(vector, k, K):
    """Per-channel values as a row, (1, BLOCK_K), fp32."""
    return tl.load(vector + k, mask=k < K, other=0.0)[None, :]
