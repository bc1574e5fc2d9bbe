"""A reduced table for compute-sanitizer: every op once on each of our GPU backends, small and awkward shapes.

``python -m benchmarks.reduced`` runs op by op, and waits for the device after each: a tool's report then stands behind
the op that it is about. It compares nothing: the tests do. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from resnet_fast.dispatch import OPS, reasons, use_backend
from tests.cases import NASTY, TINY, VARIANTS, inputs

BACKENDS = ("native", "triton")
#: Whole tiles; partial ones in every direction; more channels than a tile; nothing but padding around one pixel.
CASES = ("expand_1x1", "C3_K7", "3x3_2", "K70", "K600", "image_1x1_3x3", "NPQ_off_every_block", "stem_7x7_2", "K9")


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
    for name in CASES:
        for op, variants in VARIANTS.items():
            for variant in variants:
                for dtype in (torch.bfloat16, torch.float32):
                    for backend in BACKENDS:
                        if reasons(op, torch.device(args.device), dtype)[backend] is not None:
                            continue
                        if time.time() > end:
                            print(f"reduced: the time is over at {name}: {ran} calls, {failed} raised", flush=True)
                            return int(failed > 0)
                        kwargs = inputs(op, by_name[name], dtype, args.device, variant=variant)
                        print(f"{backend} {op} {variant} {name} {dtype}", flush=True)
                        try:
                            with use_backend(backend):
                                OPS[op](**kwargs)
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
