"""The checks of triton_memory.py fire; and the kernels compute the same with programs in the opposite order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from resnet_fast.backends import triton as backend
from resnet_fast.backends.triton import common
from resnet_fast.dispatch import OPS, use_backend
from tests.cases import TINY, VARIANTS, inputs
from tests.triton_memory import Fault, checked
from tests.twice import twice

NOT_HERE = common.unable(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(NOT_HERE is not None, reason=f"kernels run on CPU tensors: {NOT_HERE}")

FEW: tl.constexpr = tl.constexpr(8)


@triton.jit
def _copy(x, y, count, shift, whole: tl.constexpr):
    """Programs of 8 elements. ``whole``: without a mask."""
    at = tl.program_id(0) * FEW + tl.arange(0, FEW)
    if whole:
        tl.store(y + at, tl.load(x + at + shift))
    else:
        tl.store(y + at + shift, tl.load(x + at, mask=at < count), mask=at < count)


@triton.jit
def _to_one_place(x, y):
    tl.store(y, tl.program_id(0))


@triton.jit
def _twice(x, y):
    at = tl.program_id(0) * FEW + tl.arange(0, FEW)
    tl.store(y + at // 2 * 2, at)


@triton.jit
def _swap(x, y, distance, barrier: tl.constexpr):
    """Through y: each element's neighbour, or that of another program."""
    at = tl.program_id(0) * FEW + tl.arange(0, FEW)
    tl.store(y + at, at)
    if barrier:
        tl.debug_barrier()
    value = tl.load(y + (at + distance) % 16)
    if barrier:
        tl.debug_barrier()
    tl.store(y + at, value)


@triton.jit
def _count(x, y):
    tl.atomic_add(y, 1)


@triton.jit
def _write_input(x, y):
    tl.store(x, 1)


@triton.jit
def _pairs(x, y):
    wide = y.to(tl.pointer_type(tl.int64))
    tl.store(wide + tl.program_id(0), 1)


def ints(count: int = 16) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


#: A kernel, what it takes beside x and y of 16 integers, two programs of it; and what the fault says.
BROKEN = {
    "load_behind": (_copy, (16, 1, True), r"program 1 loads 4 bytes behind x \(16 elements of 4 bytes\)"),
    "load_before": (_copy, (16, -1, True), "program 0 loads 4 bytes before x"),
    "store_behind": (_copy, (16, 2, False), "program 1 stores 8 bytes behind y"),
    "store_before": (_copy, (16, -2, False), "program 0 stores 8 bytes before y"),
    "stores_of_two": (_to_one_place, (), "program 1 stores what another program of this launch stores, of y"),
    "stored_twice": (_twice, (), "program 0 stores an element twice in one store, of y"),
    "no_barrier": (_swap, (0, False), "program 0 loads what it has stored, with no barrier in between, of y"),
    "of_another": (_swap, (8, True), "program 1 stores what another program of this launch loads, of y"),
    "atomic": (_count, (), "program 0 has an atomic operation"),
    "input": (_write_input, (), "program 0 stores to the input x"),
    "width": (_pairs, (), "program 0 stores 8 bytes of y"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fault(name: str) -> None:
    kernel, more, message = BROKEN[name]
    x, y = ints(), ints()
    with pytest.raises(Fault, match=f"^{kernel.fn.__name__}: {message}"), checked([x]):
        kernel[(2,)](x, y, *more)


def test_what_may_be_done() -> None:
    x, y = ints() + 5, torch.zeros(20, dtype=torch.int32)
    with checked([x]):
        _copy[(2,)](x, y[2:18], 16, 0, False)
        assert torch.equal(y[2:18], x)
        _copy[(2,)](x, y, 16, 4, False)  # the launches of one op may write the same
        assert torch.equal(y[4:20], x)
        _swap[(2,)](x, y, 0, True)
    assert torch.equal(y[:16], ints())
    with pytest.raises(Fault, match="loads 4 bytes behind x"), checked([x]):
        _copy[(2,)](x[:15], y, 16, 0, True)  # what lies behind a view is not the kernel's


def test_backwards() -> None:
    x, y = ints(), ints()
    with pytest.raises(Fault, match=r"^_to_one_place: program 0 stores what another"), checked(backwards=True):
        _to_one_place[(2,)](x, y)


CASES = {"conv": ("stem_7x7_2", "1x1", "3x3_2", "threads"), "rest": ("1x1", "threads")}


@pytest.mark.parametrize(
    ("op", "variant"), [(op, v) for op in VARIANTS for v in VARIANTS[op] if hasattr(backend, op)], ids="-".join
)
def test_order_of_programs(op: str, variant: str) -> None:
    """The same bits from the last program to the first, and whatever fresh memory holds."""
    for name in CASES["conv" if op.startswith("conv") else "rest"]:
        case = next(case for case in TINY if case.name == name)
        kwargs = inputs(op, case, torch.float32, "cpu", variant=variant)

        def once(backwards: bool, kwargs: dict[str, object] = kwargs) -> object:
            with use_backend("triton"), checked(kwargs.values(), backwards=backwards):
                return OPS[op](**kwargs)

        twice(once, Fault)
