"""What Triton's interpreter lets kernels do and a GPU would not forgive, as a ``Fault``.

The interpreter runs a launch's programs one after the other, on any address. Under ``checked()`` every load, store and
atomic operation is looked at: it must be aligned and within the tensors that the kernel was given, and must not write
the op's inputs; what a program stores, no other program of the launch may load or store, and it itself may load it only
behind a ``tl.debug_barrier()``, since the element may be another thread's; and no store may have an element twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


class Fault(RuntimeError):
    """An access that a kernel must not do."""


_NOBODY, _SEVERAL = -1, -2


class _Operand:
    """A tensor that a kernel was given, and which program of this launch accessed each element last."""

    def __init__(self, name: str, t: Tensor, writable: bool) -> None:
        self.name, self.writable, self.itemsize = name, writable, t.element_size()
        self.begin = t.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        self.count = last + 1 if t.numel() else 0
        self.end = self.begin + self.count * self.itemsize
        tracked = self.count if writable else 0
        self.writer, self.barrier, self.reader = (np.full(tracked, _NOBODY, np.int32) for _ in range(3))

    def __str__(self) -> str:
        return f"{self.name} ({self.count} elements of {self.itemsize} bytes)"


class _Launch:
    """The accesses of one launch."""

    def __init__(self, kernel: str, tensors: Iterable[tuple[str, Tensor]], inputs: set[int]) -> None:
        self.kernel, self.program, self.barriers = kernel, 0, 0
        self.operands = [_Operand(name, t, t.untyped_storage().data_ptr() not in inputs) for name, t in tensors]

    def fail(self, what: str) -> None:
        raise Fault(f"{self.kernel}: program {self.program} {what}")

    def _operand(self, verb: str, first: int, last: int, itemsize: int) -> _Operand:
        for operand in self.operands:
            if operand.begin <= first and last + itemsize <= operand.end:
                return operand
        nearest = min(self.operands, key=lambda o: max(o.begin - first, last + itemsize - o.end))
        before, behind = nearest.begin - first, last + itemsize - nearest.end
        places = [f"{n} bytes {word}" for n, word in ((before, "before"), (behind, "behind")) if n > 0]
        self.fail(f"{verb} {' and '.join(places)} {nearest}")
        raise AssertionError

    def access(self, addresses: np.ndarray, itemsize: int, *, stores: bool) -> None:
        """One load or store of these addresses."""
        if not addresses.size:
            return
        verb = "stores" if stores else "loads"
        operand = self._operand(verb, int(addresses.min()), int(addresses.max()), itemsize)
        offsets = addresses.astype(np.int64) - operand.begin
        if (addresses.astype(np.int64) % itemsize).any():
            self.fail(f"{verb} {itemsize} bytes of {operand} at a misaligned address")
        if stores and not operand.writable:
            self.fail(f"stores to the input {operand.name}")
        if not operand.writable:
            return
        if itemsize != operand.itemsize:
            self.fail(f"{verb} {itemsize} bytes of {operand}")
        self._order(verb, operand, offsets // itemsize, stores)

    def _order(self, verb: str, operand: _Operand, at: np.ndarray, stores: bool) -> None:
        """Nothing orders the accesses of two programs of a launch."""
        writer, reader = operand.writer[at], operand.reader[at]
        if ((writer != _NOBODY) & (writer != self.program)).any():
            self.fail(f"{verb} what another program of this launch stores, of {operand}")
        if not stores:
            if ((writer == self.program) & (operand.barrier[at] == self.barriers)).any():
                self.fail(f"loads what it has stored, with no barrier in between, of {operand}")
            alone = (reader == _NOBODY) | (reader == self.program)
            operand.reader[at] = np.where(alone, self.program, _SEVERAL)
            return
        if ((reader != _NOBODY) & (reader != self.program)).any():
            self.fail(f"stores what another program of this launch loads, of {operand}")
        number = np.arange(at.size, dtype=np.int32)
        operand.writer[at] = number
        if (operand.writer[at] != number).any():
            self.fail(f"stores an element twice in one store, of {operand}")
        operand.writer[at], operand.barrier[at] = self.program, self.barriers


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a kernel's argument."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _named(f"{name}[{i}]", item)
    elif isinstance(getattr(value, "base", None), Tensor):  # a descriptor
        yield name, value.base


def _itemsize(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


@contextlib.contextmanager
def checked(inputs: Iterable[Any] = (), *, backwards: bool = False) -> Iterator[None]:
    """Every launch in Triton's interpreter is checked. ``inputs``: tensors that no kernel may write.

    ``backwards``: the programs of a launch run from the last to the first.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    protected = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    launches: list[_Launch] = []
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
    index, grid = builder.set_grid_idx, interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        tensors = [found for name, value in arguments for found in _named(name, value)]
        launches.append(_Launch(self.fn.__name__, tensors, protected))
        try:
            return grid(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, Fault):
                raise error.__cause__ from None
            raise
        finally:
            launches.pop()

    def set_index(self: Any, x: int, y: int, z: int) -> None:
        if backwards:
            x, y, z = (size - 1 - i for size, i in zip(self.grid_dim, (x, y, z), strict=True))
        launches[-1].program = (z * self.grid_dim[1] + y) * self.grid_dim[0] + x
        launches[-1].barriers += 1
        index(self, x, y, z)

    def accessed(function: Callable[..., Any], mask_at: int, stores: bool) -> Callable[..., Any]:
        def wrapper(self: Any, pointers: Any, *args: Any) -> Any:
            mask = args[mask_at].data
            addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
            launches[-1].access(addresses, _itemsize(pointers), stores=stores)
            return function(self, pointers, *args)

        return wrapper

    def wait(self: Any) -> Any:
        launches[-1].barriers += 1
        return barrier(self)

    def atomic(self: Any, *args: Any) -> None:
        launches[-1].fail("has an atomic operation: results must not depend on the order of programs")

    with contextlib.ExitStack() as patches:
        for target, name, function in (
            (builder, "create_masked_load", accessed(load, 0, stores=False)),
            (builder, "create_masked_store", accessed(store, 1, stores=True)),
            (builder, "create_barrier", wait),
            (builder, "set_grid_idx", set_index),
            (builder, "create_atomic_rmw", atomic),
            (builder, "create_atomic_cas", atomic),
            (interpreter.GridExecutor, "__call__", launch),
        ):
            patches.enter_context(mock.patch.object(target, name, function))
        yield
