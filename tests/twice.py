"""An op run twice, with other bytes in fresh memory and in the opposite order: outputs must be equal in every bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: What fresh memory holds in the first run and in the second: NaN, and a small finite number.
POISON = (0xFF, 0x3B)


class _Poisoned(TorchDispatchMode):
    """Fills what torch.empty and its kind return."""

    def __init__(self, byte: int) -> None:
        super().__init__()
        self.byte = byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in func.__name__:
            result.untyped_storage().fill_(self.byte)
        return result


def _tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def twice(function: Callable[[bool], Any], fault: type[Exception]) -> Any:
    """What ``function`` returns, forwards (False) and backwards (True), or the fault that it is not the same."""
    results = []
    for backwards, byte in enumerate(POISON):
        with _Poisoned(byte):
            results.append(function(bool(backwards)))
    for i, (one, other) in enumerate(zip(*map(_tensors, results), strict=True)):
        different = (_bytes(one) != _bytes(other)).nonzero().flatten().tolist()
        if different:
            places = sorted({place // one.element_size() for place in different})
            raise fault(
                f"output {i}, of shape {tuple(one.shape)}: {len(places)} elements, the first of them number {places[0]}"
                ", were not written, or depend on unwritten memory or on the order of threads"
            )
    return results[0]
