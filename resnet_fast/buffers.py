"""Memory for large outputs that is kept from call to call.

glibc maps every block of 32 MB or more anew and gives it back when it is freed, and shrinks its heap whenever enough of
its end is free, so calls pay for thousands of page faults: on the machine of docs/conv.md, entry 5, a quarter of the
time of a batch of 16 in inference; in training it comes and goes with the state of the heap (entry 14).
Here such blocks are kept and handed out again once nobody holds them.

What is kept, in use and idle together, never exceeds the most that was ever in use at once, or ``IDLE`` more than is in
use now. ``release()`` gives all that is idle back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from . import switches

__all__ = ["empty", "image", "release", "scratch"]

#: From this size on, glibc maps a block by itself (DEFAULT_MMAP_THRESHOLD_MAX).
SMALLEST = 32 * 2**20
#: From this size on, what training writes is kept: where nothing has to be cleared first, less is worth it.
TRAINING = 4 * 2**20
#: Idle memory beyond this is given back, unless as much was once in use.
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


#: By size.
_kept: dict[int, list[_Block]] = {}
_most_in_use = 0


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, smallest: int | None = None) -> Tensor | None:
    """An uninitialised channels-last CPU tensor (N, C, H, W) in kept memory; None where an ordinary one is as good.

    That is below ``smallest`` bytes (``SMALLEST`` by default). The memory belongs to the tensor and its views for as
    long as any of them lives.
    """
    n, c, h, w = shape
    nbytes = n * c * h * w * dtype.itemsize
    wanted = nbytes >= (SMALLEST if smallest is None else smallest) and nbytes > 0
    if not wanted or _count is None or not switches.on("memory"):
        return None
    strides = (h * w * c, 1, w * c, c)
    with _lock:
        block = _find(nbytes)
        return torch.empty(0, dtype=dtype).set_(block.memory.untyped_storage(), 0, (n, c, h, w), strides)


def image(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised channels-last CPU tensor (N, C, H, W), in kept memory where that pays in training."""
    kept = empty(shape, dtype, TRAINING)
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last) if kept is None else kept


def _find(nbytes: int) -> _Block:
    """An idle block of at least ``nbytes`` and at most twice that, the smallest; or a new one."""
    for size in sorted(size for size in _kept if nbytes <= size <= 2 * nbytes):
        # What went into shared memory may be held by another process, where nobody counts.
        usable = [b for b in _kept[size] if not b.memory.is_shared() and b.nbytes == b.memory.nbytes]
        if len(usable) < len(_kept[size]):
            _kept[size] = usable
        for block in usable:
            if block.is_idle():
                return block
    global _most_in_use
    in_use = sum(b.nbytes for blocks in _kept.values() for b in blocks if not b.is_idle())
    _most_in_use = max(_most_in_use, in_use + nbytes)
    _trim(max(IDLE, _most_in_use - in_use) - nbytes)
    block = _Block(nbytes)
    _kept.setdefault(nbytes, []).append(block)
    return block


class _Scratch(threading.local):
    """Each thread has its own: nobody else can be using it."""

    memory: Tensor | None = None


_scratch = _Scratch()


def scratch(count: int) -> Tensor:
    """``count`` uninitialised floats on the CPU, the same at every call from this thread: valid until the next one."""
    memory = _scratch.memory
    if memory is None or memory.numel() < count:
        memory = _scratch.memory = torch.empty(count, dtype=torch.float32)
    return memory


def release() -> None:
    """Give back all memory that nobody holds, and this thread's scratch."""
    global _most_in_use
    _scratch.memory = None
    with _lock:
        _trim(0)
        _most_in_use = 0


def _trim(limit: int) -> None:
    """Give back idle blocks, the largest first, until at most ``limit`` bytes of them are kept."""
    idle = sorted((b for blocks in _kept.values() for b in blocks if b.is_idle()), key=lambda b: -b.nbytes)
    total = sum(b.nbytes for b in idle)
    for block in idle:
        if total <= limit:
            break
        total -= block.nbytes
        _kept[block.memory.nbytes].remove(block)
    for size in [size for size, blocks in _kept.items() if not blocks]:
        del _kept[size]
