"""Memory for large outputs that is kept from call to call.

glibc maps every block of 32 MB or more anew and gives it back when it is freed, so each call pays for thousands of page
faults: on the machine of docs/conv.md, entry 5, a quarter of the time of a batch of 16. Here such blocks are kept and
handed out again once nobody holds them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["empty", "release"]

#: From this size on, glibc maps a block by itself (DEFAULT_MMAP_THRESHOLD_MAX).
SMALLEST = 32 * 2**20
#: Idle memory beyond this is given back.
IDLE = 256 * 2**20

_lock = threading.Lock()
#: References to a storage from everywhere, given its address. None where this torch cannot tell: then nothing is kept.
_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """Kept memory. It is idle while it is referred to just as it was when it was new."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8)
        self._when_new = self._references()

    @property
    def nbytes(self) -> int:
        return self.memory.untyped_storage().nbytes()

    def _references(self) -> tuple[int, int]:
        """To the storage from C++ (tensors, views, arrays, saved tensors), and to its one Python object."""
        storage = self.memory.untyped_storage()
        return 0 if _count is None else _count(storage._cdata), sys.getrefcount(storage)

    def is_idle(self) -> bool:
        return self._references() == self._when_new


_kept: list[_Block] = []


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """An uninitialised channels-last CPU tensor (N, C, H, W) in kept memory; None where an ordinary one is as good.

    The memory belongs to the tensor and its views for as long as any of them lives.
    """
    n, c, h, w = shape
    nbytes = n * c * h * w * dtype.itemsize
    if nbytes < SMALLEST or _count is None:
        return None
    strides = (h * w * c, 1, w * c, c)
    with _lock:
        # What went into shared memory may be held by another process, where nobody counts.
        _kept[:] = [b for b in _kept if not b.memory.is_shared() and b.nbytes == b.memory.nbytes]
        fitting = [b for b in _kept if nbytes <= b.nbytes <= 2 * nbytes and b.is_idle()]
        if fitting:
            block = min(fitting, key=lambda b: b.nbytes)
        else:
            _trim(IDLE - nbytes)
            block = _Block(nbytes)
            _kept.append(block)
        return torch.empty(0, dtype=dtype).set_(block.memory.untyped_storage(), 0, (n, c, h, w), strides)


def release() -> None:
    """Give back all memory that nobody holds."""
    with _lock:
        _trim(0)


def _trim(limit: int) -> None:
    """Give back idle blocks, the oldest first, until at most ``limit`` bytes of them are kept."""
    idle = [b for b in _kept if b.is_idle()]
    total = sum(b.nbytes for b in idle)
    for block in idle:
        if total <= limit:
            break
        total -= block.nbytes
        _kept.remove(block)
