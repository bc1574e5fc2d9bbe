"""benchmarks/roofline.py against layers counted by hand, and against the tensors that an op really has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.roofline import Ceilings, Cost
from resnet_fast.dispatch import OPS
from tests.cases import RESNET50, TINY, VARIANTS, Case, inputs, resnet50

PER_CHANNEL = {"bn_finalize", "bn_backward_finalize"}
CONVOLUTIONS = {op for op in OPS if op.startswith("conv")}


def _activations(values: Any) -> int:
    return sum(t.nbytes for t in values if isinstance(t, Tensor) and t.dim() == 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "variant"), [(op, v) for op in OPS if op not in PER_CHANNEL for v in VARIANTS[op]])
def test_bytes_are_those_of_the_tensors(op: str, variant: str, dtype: torch.dtype) -> None:
    """Every activation, weight and mask among the arguments and outputs once."""
    for case in (TINY[0], TINY[2], TINY[3]):
        kwargs = inputs(op, case, dtype, variant=variant)
        outputs = OPS[op].definition(**kwargs)
        moved = _activations([*kwargs.values(), *((outputs,) if isinstance(outputs, Tensor) else outputs)])
        assert roofline.op_cost(op, case, dtype.itemsize, variant).bytes == moved


@pytest.mark.parametrize("op", sorted(PER_CHANNEL))
def test_ops_on_vectors_have_no_cost(op: str) -> None:
    with pytest.raises(KeyError):
        roofline.op_cost(op, TINY[0], 2, "plain")


def test_a_layer_by_hand() -> None:
    """Batch 128, bfloat16: 3x3, 64 channels at 56 x 56; and a strided 1x1, which reads a quarter of x."""
    by_name = {case.name: case for case in resnet50(128)}
    plane = 128 * 56 * 56 * 64 * 2  # 51.4 MB
    layer = roofline.convolution(by_name["s1_3x3"], 2)
    assert layer == Cost(2 * plane + 9 * 64 * 64 * 2, 2 * 128 * 56 * 56 * 64 * 64 * 9)
    assert f"{layer.flops / 1e9:.1f} {layer.bytes / 1e6:.1f}" == "29.6 102.8"
    side = roofline.convolution(by_name["s2_shortcut_1x1_2"], 2)
    assert side.bytes == 128 * 28 * 28 * (256 + 512) * 2 + 256 * 512 * 2
    assert f"{side.flops / 1e9:.1f} {side.bytes / 1e6:.1f}" == "26.3 154.4"
    # All of dx is written, zeros too.
    assert roofline.op_cost("conv_dgrad", by_name["s2_shortcut_1x1_2"], 2, "plain").bytes == (
        128 * 28 * 28 * 512 * 2 + 128 * 56 * 56 * 256 * 2 + 256 * 512 * 2
    )
    assert roofline.op_cost("affine_act_mask", by_name["s1_3x3"], 2, "residual").bytes == 3 * plane + plane // 16


def test_the_bound() -> None:
    ceilings = Ceilings(bandwidth=4e12, arithmetic=800e12)
    assert Cost(4_000_000, 0).seconds(ceilings) == pytest.approx(1e-6)
    assert Cost(4_000_000, 1_600_000_000).seconds(ceilings) == pytest.approx(2e-6)
    assert Cost(4_000_000, 1_600_000_000).bound(ceilings) == "arithmetic"
    assert Cost(8_000_001, 1_600_000_000).bound(ceilings) == "memory"
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_layers_are_the_table() -> None:
    """53 convolutions; a projection in each stage; 4.09 G multiply-adds a picture."""
    found = list(roofline.layers(1))
    assert sum(layer.count for layer in found) == sum(case.count for case in RESNET50) == 53
    by_role = {role: sum(la.count for la in found if la.role == role) for role in {la.role for la in found}}
    assert by_role == {"stem": 1, "conv1": 16, "conv2": 16, "conv3": 16, "projection": 4}
    assert round(sum(la.count * roofline.conv_flops(la.case) for la in found) / 2e9, 2) == 4.09


def test_a_whole_forward() -> None:
    """The least times that the design was made by: batch 128, bfloat16, 4.3 TB/s, 790 TFLOP/s."""
    ceilings = Ceilings(4.3e12, 790e12)
    times = [round(roofline.forward_seconds(128, scheme, 2, ceilings) * 1e3, 2) for scheme in roofline.SCHEMES]
    assert times == [5.98, 3.96, 2.81]


def test_around_a_layer() -> None:
    """Stage 1's conv3 at batch 128: eager 8, compiled 4, fused 3 passes of 205.5 MB."""
    layer = next(la for la in roofline.layers(128) if la.role == "conv3")
    y = 128 * 56 * 56 * 256 * 2
    assert [roofline.around(layer, s, 2).bytes // y for s in roofline.SCHEMES] == [8, 4, 3]


def test_the_table_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--batch", "128"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + len(list(roofline.layers(128))) + 1
    (line,) = [line for line in out.splitlines() if line.startswith("s3_3x3 ")]
    assert line.split() == ["s3_3x3", "conv2", "5", "29.6", "26.9", "1101", "arithmetic", "37.5", "14.9", "9.0", "0.0"]


def test_strided_pixels() -> None:
    case = Case("x", 2, 8, 5, 5, 4, 1, 2, 0)
    s = roofline.sizes(case, 4)
    assert (s.x, s.x_read, s.y, s.mask) == (2 * 8 * 25 * 4, 2 * 8 * 9 * 4, 2 * 4 * 9 * 4, 2 * 9)
