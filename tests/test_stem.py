"""The stem's ops: batch norm, ReLU and max-pooling in one pass, and their backward, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import ops
from resnet_fast.dispatch import backend, reasons
from tests.cases import LAYOUTS, NASTY, TINY, Case, inputs
from tests.tolerance import assert_all_close, assert_same_bits, backends, check, eager, reference, run, variants

OPS = ("affine_act_maxpool", "maxpool_backward_sums", "maxpool_backward_apply")

#: y is (N, K, P, Q) of these: images of every parity, and windows behind one block of columns.
IMAGES = tuple(
    Case(f"image_{h}x{w}_K{k}", n, 1, h, w, k, 1, 1, 0)
    for n, h, w, k in (
        (2, 1, 1, 3),
        (2, 1, 2, 16),
        (2, 2, 1, 16),
        (3, 2, 2, 64),
        (2, 3, 3, 70),
        (2, 4, 7, 129),
        (1, 19, 6, 8),
        (1, 3, 131, 5),
        (1, 2, 260, 64),
        (300, 1, 1, 4),
    )
)
CASES = [pytest.param(case, id=case.name) for case in TINY + NASTY + IMAGES]
THREADS = next(case for case in TINY if case.name == "threads")
ODD = next(case for case in IMAGES if case.name == "image_4x7_K129")

_why_no_native = reasons("affine_act_maxpool", torch.device("cpu"), torch.float32)["native"]
needs_native = pytest.mark.skipif(_why_no_native is not None, reason=f"native: {_why_no_native}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_matches_float64(op: str, variant: str, name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(op, inputs(op, case, dtype, device, variant=variant), name)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_layout_makes_no_difference(
    op: str, variant: str, name: str, device: str, dtype: torch.dtype, layout: str
) -> None:
    plain = run(op, inputs(op, ODD, dtype, device, variant=variant), name)
    other = run(op, inputs(op, ODD, dtype, device, variant=variant, layout=layout), name)
    if name == "torch" and op == "maxpool_backward_sums":  # torch's own sums go in the order of memory
        assert_all_close(other, reference(op, inputs(op, ODD, dtype, device, variant=variant)), plain)
    else:
        assert_same_bits(plain, other)


@pytest.mark.parametrize("op, variant, name, device, dtype", [p for p in variants(*OPS) if p.values[2] != "torch"])
def test_same_bits_twice_and_by_any_number_of_threads(
    op: str, variant: str, name: str, device: str, dtype: torch.dtype
) -> None:
    kwargs = inputs(op, THREADS, dtype, device, variant=variant)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(op, kwargs, name)
        torch.set_num_threads(2)
        assert_same_bits(run(op, kwargs, name), alone)
        assert_same_bits(run(op, kwargs, name), alone)
    finally:
        torch.set_num_threads(threads)
