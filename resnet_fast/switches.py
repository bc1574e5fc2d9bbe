"""What can be left out, to measure what it is worth: benchmarks switch the kinds of fusion on one after the other.

Everything is on for users, who need none of this. Off means off for the whole process, as a backward may run in a
thread of its own. Weights are laid out and folded under the switches of that moment: fuse a model of its own for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["NAMES", "on", "without"]

#: folding: batch norm inside the convolution's weights. winograd: our own 3x3 convolutions. products: convolutions
#: as matrix products. memory: large outputs in memory that is kept, large weights in large pages. programs: the blocks
#: of a stage as one program. All of them are of the CPU.
NAMES = ("folding", "winograd", "products", "memory", "programs")

_off: frozenset[str] = frozenset()


def on(name: str) -> bool:
    """Whether ``name``, of ``NAMES``, is to be used."""
    return name not in _off


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside, ``names`` are off. Raises ValueError for a name that is none."""
    global _off
    unknown = set(names) - set(NAMES)
    if unknown:
        raise ValueError(f"names: found {', '.join(sorted(unknown))}; supported are {', '.join(NAMES)}")
    before, _off = _off, _off | set(names)
    try:
        yield
    finally:
        _off = before
