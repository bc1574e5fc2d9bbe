"""Bounds: the least bytes that an op must move and the arithmetic that it does, of any layer, as functions of its case.

Bytes count each operand read once and each result written once, through main memory: no cache is counted on, and
vectors of K values are left out. Arithmetic counts a multiply-add as two. ``python -m benchmarks.roofline`` prints both
for every layer of ResNet-50.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.cases import VARIANTS, Case, resnet50


class Ceilings(NamedTuple):
    """Bytes per second of a copy (read and written both counted) and FLOP per second of a matrix product."""

    bandwidth: float
    arithmetic: float


class Cost(NamedTuple):
    """Bytes moved and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: object) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time: the longer of moving and computing, if both overlap wholly."""
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.arithmetic)

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two that is: "memory" or "arithmetic"."""
        return "memory" if self.bytes / ceilings.bandwidth >= self.flops / ceilings.arithmetic else "arithmetic"


class Sizes(NamedTuple):
    """Bytes of a layer's tensors. ``x_read``: of x, what the convolution reads (a strided 1x1 skips pixels)."""

    x: int
    x_read: int
    w: int
    y: int
    mask: int
    pooled: int
    index: int


def sizes(case: Case, itemsize: int) -> Sizes:
    """Of ``case``, with ``itemsize`` bytes a value."""
    x = case.N * case.C * case.H * case.W * itemsize
    skips = case.R == 1 and case.stride > 1
    pooled = case.N * case.K * ((case.P - 1) // 2 + 1) * ((case.Q - 1) // 2 + 1)
    return Sizes(
        x,
        case.N * case.C * case.P * case.Q * itemsize if skips else x,
        case.K * case.C * case.R**2 * itemsize,
        case.NPQ * case.K * itemsize,
        case.NPQ * -(-case.K // 8),
        pooled * itemsize,
        pooled,
    )


def conv_flops(case: Case) -> int:
    """Of one convolution; each of its two gradients takes as many."""
    return 2 * case.NPQ * case.K * case.C * case.R**2


def op_cost(op: str, case: Case, itemsize: int, variant: str) -> Cost:
    """Of one call of ``op`` as ``tests.cases.inputs(op, case, variant=variant)`` makes it.

    Raises KeyError for an op that moves no activations.
    """
    s, options = sizes(case, itemsize), VARIANTS[op][variant]
    residual = s.y if "residual" in options else 0
    lazy = s.y if "y" in options else 0  # a gradient that is formed from g and y on its way
    z = s.mask if "mask" in options else s.y
    flops = conv_flops(case)
    if op == "bottleneck":  # C channels and K, the width, to C or, by a projection, 4 K
        out = 4 * case.K if options else case.C
        pixels = case.N * case.H * case.W
        weights = case.K * (case.C + 9 * case.K + out) + (case.C * out if options else 0)
        return Cost((pixels * (case.C + out) + weights) * itemsize, 2 * pixels * weights)
    if op == "whole_stem":  # of stride 2, whatever the case's
        case = case._replace(stride=2, padding=case.R // 2)
        return Cost(s.x + s.w + sizes(case, itemsize).pooled, conv_flops(case))
    costs = {
        "bn_stats": Cost(s.y, 0),
        "affine_act": Cost(2 * s.y + residual, 0),
        "affine_act_mask": Cost(2 * s.y + s.mask + residual, 0),
        "affine_act_backward": Cost(3 * s.y + z + residual, 0),
        "bn_backward_sums": Cost(2 * s.y, 0),
        "bn_backward_apply": Cost(3 * s.y, 0),
        "affine_act_maxpool": Cost(s.y + s.pooled + s.index, 0),
        "maxpool_backward_sums": Cost(s.y + s.pooled + s.index, 0),
        "maxpool_backward_apply": Cost(2 * s.y + s.pooled + s.index, 0),
        "conv_stats": Cost(s.x_read + s.w + s.y, flops),
        "conv_affine_act": Cost(s.x_read + s.w + s.y + residual, flops),
        "conv_dgrad": Cost(s.y + lazy + s.w + s.x, flops),
        "conv_wgrad": Cost(s.y + lazy + s.x_read + s.w, flops),
        "conv_backward": Cost(
            s.y + lazy + s.x_read + s.w + s.x + s.w + (s.x if "residual" in options else 0), 2 * flops
        ),
        "conv_backward_sums": Cost(s.y + lazy + s.x_read + s.w + s.x + s.w, 2 * flops),
    }
    return costs[op]


# ---- a whole network


class Layer(NamedTuple):
    """``count`` convolutions of one shape and one place: "stem", "conv1", "conv2", "conv3" or "projection"."""

    case: Case
    role: str
    count: int


#: How often, forward, a pass over y reads or writes all of it, besides the convolution: by scheme and role.
#: eager: statistics 1, batch norm 2, ReLU 2, and for the block's end an add of 3. compile: statistics 1, the rest one
#: pass. fused: statistics in the convolution's epilogue, batch norm and ReLU in the next one's prologue; a pass of 3,
#: y, residual and z, at the block's end, and none of its own for the projection, whose y is that residual.
PASSES = {
    "eager": {"conv1": 5, "conv2": 5, "conv3": 8, "projection": 3},
    "compile": {"conv1": 3, "conv2": 3, "conv3": 4, "projection": 1},
    "fused": {"conv1": 0, "conv2": 0, "conv3": 3, "projection": 0},
}
SCHEMES = tuple(PASSES)


def layers(batch: int) -> Iterator[Layer]:
    """ResNet-50's, from the table of cases; of its first stage the projection apart from the like-shaped conv3."""
    for case in resnet50(batch):
        if case.name.startswith("stem"):
            yield Layer(case, "stem", case.count)
        elif "shortcut" in case.name:
            yield Layer(case, "projection", case.count)
        elif "3x3" in case.name:
            yield Layer(case, "conv2", case.count)
        elif "expand" in case.name:
            sides = int(case.name.startswith("s1_"))
            yield Layer(case, "conv3", case.count - sides)
            if sides:
                yield Layer(case, "projection", sides)
        else:
            yield Layer(case, "conv1", case.count)


def convolution(case: Case, itemsize: int) -> Cost:
    """The convolution alone, forward."""
    return op_cost("conv_stats", case, itemsize, "bare")


def around(layer: Layer, scheme: str, itemsize: int) -> Cost:
    """Batch norm, ReLU, add, and in the stem the pooling, around one convolution, forward, in training."""
    s = sizes(layer.case, itemsize)
    if layer.role == "stem":
        index = {"eager": 8 * s.index, "compile": s.index, "fused": s.index}[scheme]
        passes = {"eager": 5, "compile": 3, "fused": 0}[scheme]
        return Cost(passes * s.y + s.y + s.pooled + index, 0)
    return Cost(PASSES[scheme][layer.role] * s.y, 0)


def forward_seconds(batch: int, scheme: str, itemsize: int, ceilings: Ceilings) -> float:
    """The least time of ResNet-50's convolutional part, forward in training, kernel after kernel."""
    total = 0.0
    for layer in layers(batch):
        conv, rest = convolution(layer.case, itemsize), around(layer, scheme, itemsize)
        total += layer.count * (conv.seconds(ceilings) + rest.seconds(ceilings))
    return total


def table(batch: int, itemsize: int, ceilings: Ceilings) -> str:
    """Every layer: its arithmetic, bytes, bound and least time, and what the passes around it take by scheme."""
    head = f"{'layer':20} {'role':10} {'xN':>3} {'GFLOP':>7} {'MB':>7} {'FLOP/B':>6} {'bound':>10} {'us':>7}"
    lines = [head + "".join(f"{scheme + ' +us':>13}" for scheme in SCHEMES)]
    for layer in layers(batch):
        conv = convolution(layer.case, itemsize)
        rest = [around(layer, scheme, itemsize).seconds(ceilings) * 1e6 for scheme in SCHEMES]
        lines.append(
            f"{layer.case.name:20} {layer.role:10} {layer.count:3d} {conv.flops / 1e9:7.1f} {conv.bytes / 1e6:7.1f} "
            f"{conv.flops / conv.bytes:6.0f} {conv.bound(ceilings):>10} {conv.seconds(ceilings) * 1e6:7.1f}"
            + "".join(f"{us:13.1f}" for us in rest)
        )
    totals = [forward_seconds(batch, scheme, itemsize, ceilings) * 1e3 for scheme in SCHEMES]
    words = ", ".join(f"{scheme} {ms:.2f} ms" for scheme, ms in zip(SCHEMES, totals, strict=True))
    return "\n".join([*lines, f"forward in training, batch {batch}: {words}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a value (default: %(default)s, bfloat16)")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s (default: %(default)s)")
    parser.add_argument("--arithmetic", type=float, default=790.0, help="TFLOP/s (default: %(default)s)")
    args = parser.parse_args(argv)
    print(table(args.batch, args.itemsize, Ceilings(args.bandwidth * 1e12, args.arithmetic * 1e12)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
