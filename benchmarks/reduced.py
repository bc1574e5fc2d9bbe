"""A reduced table for compute-sanitizer: every op once on each of our GPU backends, small and awkward shapes; and the
ways to run it that only a table of measurements would choose, for some have kernels of their own.

``python -m benchmarks.reduced`` runs op by op, and waits for the device after each: a tool's report then stands behind
the op that it is about. It compares nothing: the tests do. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from resnet_fast.dispatch import OPS, backend, reasons, use_backend
from tests.cases import NASTY, TINY, VARIANTS, inputs

BACKENDS = ("native", "triton")
#: Whole tiles; partial ones in every direction; more channels than a tile; nothing but padding around one pixel.
CASES = ("expand_1x1", "C3_K7", "3x3_2", "K70", "K600", "image_1x1_3x3", "NPQ_off_every_block", "stem_7x7_2", "K9")


def table() -> list[tuple[str, str, str, torch.dtype, str]]:
    """(case, op, variant, dtype, backend), so ordered that every kernel has run once soon, should the time be short."""
    dtypes = torch.bfloat16, torch.float32
    rows = [
        (case, op, variant, dtype, name)
        for case in CASES
        for op, variants in VARIANTS.items()
        for variant in variants
        for dtype in dtypes
        for name in BACKENDS
    ]
    return sorted(rows, key=lambda row: row[0] != CASES[0] or row[2] != next(iter(VARIANTS[row[1]])))


def ways(name: str, op: str, kwargs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The op on that backend; then by each way to begin with, and by descriptors. Each with a few words."""

    def plain() -> Any:
        with use_backend(name):
            return OPS[op](**kwargs)

    yield "", plain
    module = backend(name)
    starts, axes = module.configurations(op, **kwargs) if hasattr(module, "configurations") else ([], {})
    found = [*starts[1:], *({axis: way} for axis, options in axes.items() for way in options if "descriptor" in way)]
    for way in found:
        yield f" {way}", partial(module.configured(op, way), **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 if an op raised, or none ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reduced", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="the last cases are left out (default: %(default)g)"
    )
    args = parser.parse_args(argv)
    end = time.time() + args.seconds
    by_name = {case.name: case for case in (*TINY, *NASTY)}
    ran = failed = 0
    for case, op, variant, dtype, name in table():
        if reasons(op, torch.device(args.device), dtype)[name] is not None:
            continue
        if time.time() > end:
            print(f"reduced: the time is over at {op} {variant} {case}: {ran} calls, {failed} raised", flush=True)
            return int(failed > 0)
        kwargs = inputs(op, by_name[case], dtype, args.device, variant=variant)
        for words, call in ways(name, op, kwargs):
            print(f"{name} {op} {variant} {case} {dtype}{words}", flush=True)
            try:
                call()
                if args.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                failed += 1
                print(f"  raised {type(error).__name__}: {error}", flush=True)
            ran += 1
    print(f"reduced: {ran} calls, {failed} raised", flush=True)
    return int(failed > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
