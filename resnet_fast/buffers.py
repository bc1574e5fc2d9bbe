"""Memory for large outputs that is kept from call to call.

glibc maps every block of 32 MB or more anew and gives it back when it is freed, so each call pays for thousands of page
faults: on the machine of docs/conv.md, entry 5, a quarter of the time of a batch of 16. Here such blocks are kept and
handed out again once nobody holds them.
"""

from __future__ import annotations

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
_kept: list[torch.UntypedStorage] = []
#: References to a storage, from Python and C++ together: 1 is ours alone. None where this torch cannot tell.
_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def _is_idle(storage: torch.UntypedStorage) -> bool:
    return _count is not None and _count(storage._cdata) == 1


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
        _kept[:] = [s for s in _kept if not s.is_shared() and s.nbytes() >= SMALLEST]
        fitting = [s for s in _kept if nbytes <= s.nbytes() <= 2 * nbytes and _is_idle(s)]
        if fitting:
            storage = min(fitting, key=lambda s: s.nbytes())
        else:
            _trim(IDLE - nbytes)
            storage = torch.UntypedStorage(nbytes)
            _kept.append(storage)
        return torch.empty(0, dtype=dtype).set_(storage, 0, (n, c, h, w), strides)


def release() -> None:
    """Give back all memory that nobody holds."""
    with _lock:
        _trim(0)


def _trim(limit: int) -> None:
    """Give back idle blocks, the oldest first, until at most ``limit`` bytes of them are kept."""
    idle = [s for s in _kept if _is_idle(s)]
    total = sum(s.nbytes() for s in idle)
    for storage in idle:
        if total <= limit:
            break
        total -= storage.nbytes()
        _kept[:] = [s for s in _kept if s is not storage]
