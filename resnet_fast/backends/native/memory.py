"""Noticing that tensors or dictionaries have changed, for folded weights and watch.py: nothing here computes an op."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from resnet_fast import _C

from .common import CHANNELS_LAST

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
