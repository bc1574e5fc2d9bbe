"""Triton's conv_affine_act: what it launches, every tile, and what it compiles to. Its results: test_conv.py."""

from __future__ import annotations

import importlib
import json
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from resnet_fast import ops
from resnet_fast.backends.triton import common, conv
from resnet_fast.backends.triton.conv_common import Geometry
from tests.cases import NASTY, RESNET50, TINY, inputs
from tests.test_triton_compile import SHARED, Record, start
from tests.tolerance import assert_same_bits

BY_NAME = {case.name: case for case in TINY + NASTY}
# The package holds a function of its name.
MODULE = importlib.import_module("resnet_fast.backends.triton.conv_affine_act")

NOT_HERE = common.unable(torch.device("cpu"), torch.float32)
interpreted = pytest.mark.skipif(NOT_HERE is not None, reason=f"kernels run on CPU tensors: {NOT_HERE}")


def kernels(**change: Any) -> list[str]:
    with common.recorded() as launches:
        conv.conv_affine_act(**{**inputs("conv_affine_act", BY_NAME["3x3"], variant="scaled"), **change})
    return [launch.kernel.fn.__name__ for launch in launches]


def test_what_is_launched() -> None:
    """One kernel where the geometry is ours; else the library's convolution and one pass."""
    assert kernels() == ["conv_affine_act_kernel"]
    assert kernels(padding=[2, 2], residual=None) == ["affine_act_kernel"]


@pytest.mark.parametrize(
    "key, wrong", [("residual", torch.zeros(2, 16, 8, 7)), ("scale", torch.ones(15)), ("shift", torch.ones(17))]
)
def test_wrong_arguments(key: str, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"{key}: found "):
        kernels(**{key: wrong})


def test_every_layer_of_resnet_50_has_a_tile_and_every_tile_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("resnet_fast.backends.triton.conv_common"), "INTERPRETED", False)
    geometries = [Geometry(c.N, c.C, c.H, c.W, c.K, c.R, c.stride) for c in RESNET50 if c.R != 7]
    used = {MODULE.config(geometry, torch.bfloat16) for geometry in geometries}
    special = ("interpreted", "ieee", "tf32", "odd")
    assert used == {tile for key, tile in MODULE.CONFIGS.items() if key not in special}


@interpreted
@pytest.mark.parametrize("r, stride", [*product((1, 3), (1, 2))])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 3), (5, 5)], ids=str)
def test_every_pixel_of_small_images(size: tuple[int, int], r: int, stride: int) -> None:
    """In small integers, in which every sum is exact: equal to the definition's, and no pixel left unwritten."""
    h, w = size
    p, q = (h - 1) // stride + 1, (w - 1) // stride + 1

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape).float()

    x, weight, residual = integers(2, 3, h, w), integers(5, 3, r, r), integers(2, 5, p, q)
    vectors = {"shift": integers(5), "scale": integers(5)}
    geometry = {"stride": [stride] * 2, "padding": [r // 2] * 2, "dilation": [1, 1], "groups": 1}
    kwargs = {"x": x, "w": weight, **geometry, **vectors, "residual": residual}
    for relu in (True, False):
        ours = conv.conv_affine_act(**kwargs, relu=relu)
        assert_same_bits(ours, ops.conv_affine_act.definition(**kwargs, relu=relu))


@interpreted
def test_results_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = inputs("conv_affine_act", BY_NAME["NPQ_off_every_block"], torch.float16, variant="scaled")
    one = conv.conv_affine_act(**kwargs)
    monkeypatch.setitem(MODULE.CONFIGS, "interpreted", MODULE.CONFIGS["interpreted"]._replace(rows=32, columns=32))
    assert_same_bits(conv.conv_affine_act(**kwargs), one)


# ---- compiled for GPUs that are not here

#: A shape for each tile.
SHAPES = [part for shape in ("1x1", "3x3", "3x3_2", "odd") for part in ("--shape", shape)]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    found: list[Record] = []
    op = "conv_affine_act"
    for process in [*(start(arch, *SHAPES, op) for arch in SHARED), start(90, "--ieee", "--shape", "1x1", op)]:
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]
        found += map(json.loads, out.splitlines())
    return [r for r in found if r["kernel"] == "conv_affine_act_kernel"]


@pytest.mark.slow
def test_every_tile_compiles_without_spills_and_fits(records: list[Record]) -> None:
    for arch in SHARED:
        tiles = {
            (*(v for k, v in r["constants"].items() if k.startswith("BLOCK_")), *map(r["options"].get, OPTIONS))
            for r in records
            if r["arch"] == arch
        }
        absent = ("interpreted",) if arch == 90 else ("interpreted", "ieee")
        assert tiles == {tile[:5] for key, tile in MODULE.CONFIGS.items() if key not in absent}
    assert {tuple(r["absent"]) for r in records} == {(), ("scale",), ("scale", "residual")}
    for r in records:
        what = f"{r['shape']} {r['dtype']} sm_{r['arch']} {r['constants']}"
        assert r["stack"] == 0 and r["local"] == 0, what
        assert r["shared"] <= SHARED[r["arch"]], what
        if r["dtype"] != "float32":
            assert ("wgmma.mma_async" if r["arch"] == 90 else "mma.sync") in " ".join(r["ptx"]), what
            assert "cp.async" in " ".join(r["ptx"]) or r["shape"] == "odd", what
        if r["constants"]["RELU"]:
            assert "max.NaN.f32" in r["ptx"], what
        if r["shape"] != "odd":  # wide stores of z, and loads of all that is aligned
            assert 128 in {int(bits) for bits in r["stores"]}, what


OPTIONS = ("num_warps", "num_stages")
