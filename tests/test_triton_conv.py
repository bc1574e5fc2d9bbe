"""What is special to Triton's convolutions: which geometries are theirs, tiles, statistics, and what they compile to.

That their results are right is tested beside all other backends' in test_conv.py.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from resnet_fast import ops
from resnet_fast.backends.triton import common, conv, conv_ways
from resnet_fast.backends.triton.conv_common import Geometry, unsupported
from tests.cases import NASTY, RESNET50, TINY, VARIANTS, inputs
from tests.eager import eager
from tests.test_triton_compile import SHARED, Record, start
from tests.tolerance import assert_all_close, assert_same_bits, reference

BY_NAME = {case.name: case for case in TINY + NASTY}
# The package holds functions of the names of two of its modules.
FPROP, DGRAD, WGRAD, POINTWISE, DESCRIPTOR = (
    importlib.import_module(f"resnet_fast.backends.triton.conv_{d}")
    for d in ("fprop", "dgrad", "wgrad", "pointwise", "descriptor")
)
OPS = ("conv_stats", "conv_backward_sums", "conv_backward")

NOT_HERE = common.unable(torch.device("cpu"), torch.float32)
interpreted = pytest.mark.skipif(NOT_HERE is not None, reason=f"kernels run on CPU tensors: {NOT_HERE}")


# ---- which convolutions are ours


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"stride": [2, 2]}, None),
        ({"w": [16, 8, 1, 1], "padding": [0, 0]}, None),
        ({"groups": 2}, "groups 2"),
        ({"dilation": [2, 2]}, "dilation (2, 2)"),
        ({"w": [16, 8, 7, 7], "padding": [3, 3]}, "a 7 x 7 filter"),
        ({"w": [16, 8, 3, 1]}, "a 3 x 1 filter"),
        ({"padding": [0, 0]}, "padding (0, 0)"),
        ({"w": [16, 8, 1, 1]}, "padding (1, 1)"),
        ({"stride": [2, 1]}, "stride (2, 1)"),
        ({"stride": [3, 3]}, "stride (3, 3)"),
        ({"x": [2, 4, 5, 5]}, "4 channels for a weight of 8"),
        ({"x": [2**20, 8, 64, 64]}, "4294967296 pixels"),
        ({"x": [1, 2**15, 5, 5], "w": [16, 2**15, 3, 3]}, "32768 to 16 channels"),
    ],
)
def test_unsupported_geometries_have_a_reason(change: dict[str, Any], reason: str | None) -> None:
    usual = {
        "x": [2, 8, 5, 5],
        "w": [16, 8, 3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    found = unsupported(*{**usual, **change}.values())  # type: ignore[arg-type]
    assert (found is None) == (reason is None) and (found or "").startswith(reason or "")


def test_resnets_convolutions_are_ours_but_for_the_stem() -> None:
    """Every layer of the table has a tile of its kind, and no tile is without a layer."""
    used: dict[str, set[Any]] = {"fprop": set(), "dgrad": set(), "wgrad": set()}
    for case in RESNET50:
        reason = unsupported(case.x_size, case.w_size, [case.stride] * 2, [case.padding] * 2, [1, 1], 1)
        assert (reason is None) == (case.R != 7)
        if reason is None:
            geometry = Geometry(case.N, case.C, case.H, case.W, case.K, case.R, case.stride)
            assert (geometry.P, geometry.Q, geometry.NPQ) == (case.P, case.Q, case.NPQ)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(importlib.import_module("resnet_fast.backends.triton.conv_common"), "INTERPRETED", False)
                for lazy in (False, True):
                    used["fprop"].add(FPROP.config(geometry, torch.bfloat16, lazy))
                    used["dgrad"].add(DGRAD.config(geometry, torch.bfloat16, lazy))
                    used["wgrad"].add(WGRAD.config(geometry, torch.bfloat16, lazy))
    for module, name in ((FPROP, "fprop"), (DGRAD, "dgrad"), (WGRAD, "wgrad")):
        special = ("interpreted", "ieee", "tf32", "odd")
        assert used[name] == {tile for key, tile in module.CONFIGS.items() if key not in special}


def kernels(op: str, **change: Any) -> list[str]:
    """What the op launches on the small 3x3 layer."""
    with common.recorded() as launches:
        getattr(conv, op)(**{**inputs(op, BY_NAME["3x3"]), **change})
    return [launch.kernel.fn.__name__ for launch in launches]


def test_what_is_launched() -> None:
    """Our convolution where the geometry is ours; else the library's, with our kernels around it."""
    assert kernels("conv_stats") == ["conv_fprop_kernel", "finish_stats_kernel"]
    assert kernels("conv_backward_sums")[:2] == ["conv_dgrad_kernel", "finish_sums_kernel"]
    assert kernels("conv_backward", needs_w=False) == ["conv_dgrad_kernel"]
    assert set(kernels("conv_backward", needs_x=False)) <= {"conv_wgrad_kernel", "conv_wgrad_finish_kernel"}
    assert kernels("conv_stats", padding=[2, 2]) == ["bn_stats_kernel", "finish_stats_kernel"]


def test_weights_are_not_copied() -> None:
    """In training they stay channels-last, which is the kernels' own layout."""
    kwargs = inputs("conv_stats", BY_NAME["3x3"])
    with common.recorded() as launches:
        conv.conv_stats(**kwargs)
    assert launches[0].arguments["w"].data_ptr() == kwargs["w"].data_ptr()


# ---- tiles


def programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make the device one of so many multiprocessors."""
    for module in (importlib.import_module("resnet_fast.backends.triton.conv_common"), WGRAD):
        monkeypatch.setattr(module, "multiprocessors", lambda device: count)


@interpreted
@pytest.mark.parametrize("name", ["K70", "N1", "3x3_2", "shortcut_1x1_2"])
def test_results_do_not_depend_on_the_number_of_programs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """y and dx to the bit; sums, which are then added in another order, to their last digits."""
    for tiles in (FPROP, DGRAD, WGRAD):
        monkeypatch.setitem(tiles.CONFIGS, "interpreted", tiles.CONFIGS["interpreted"]._replace(rows=32, columns=32))
    found = []
    for count in (1, 3):
        programs(monkeypatch, count)
        forward = conv.conv_stats(**inputs("conv_stats", BY_NAME[name], variant="lazy"))
        found.append((*forward, *conv.conv_backward_sums(**inputs("conv_backward_sums", BY_NAME[name]))))
    for one, other in zip(*found, strict=True):
        if one.dim() == 4 and one.shape != inputs("conv_stats", BY_NAME[name])["w"].shape:
            assert_same_bits(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@interpreted
@pytest.mark.parametrize("r, stride", [*product((1, 3), (1, 2))])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 3), (3, 4), (5, 5)], ids=str)
def test_every_pixel_of_small_images(size: tuple[int, int], r: int, stride: int) -> None:
    """In small integers, in which every sum is exact: equal to the definition's, and no pixel left unwritten."""
    h, w = size
    p, q = (h - 1) // stride + 1, (w - 1) // stride + 1

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape).float().contiguous(memory_format=torch.channels_last)

    x, weight, g, residual = integers(2, 3, h, w), integers(5, 3, r, r), integers(2, 5, p, q), integers(2, 3, h, w)
    geometry = [stride] * 2, [r // 2] * 2, [1, 1], 1
    assert_same_bits(conv.conv_stats(x, weight, *geometry)[0], ops.conv_stats.definition(x, weight, *geometry)[0])
    arguments = (g, x, weight, *geometry)
    ours = conv.conv_backward(*arguments, True, True, residual=residual)
    assert_same_bits(ours, ops.conv_backward.definition(*arguments, True, True, residual=residual))
    vectors = torch.ones(3), torch.ones(3), torch.full((3,), -1.0)
    ours = conv.conv_backward_sums(*arguments, False, *vectors)
    assert_same_bits(ours, ops.conv_backward_sums.definition(*arguments, False, *vectors))


# ---- the ways that a table may choose


def ways(op: str, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every beginning, and every option of every direction beside the usual ones."""
    starts, axes = conv_ways.configurations(op, **kwargs)
    found = list(starts)
    for direction, options in axes.items():
        found += [{**starts[0], direction: option} for option in options]
    return [way for i, way in enumerate(found) if way not in found[:i]]


@interpreted
@pytest.mark.parametrize(
    "name, dtype", [("1x1", torch.float32), ("3x3_2", torch.float32), ("K70", torch.float16)], ids=str
)
@pytest.mark.parametrize("op, variant", [(op, variant) for op in OPS for variant in VARIANTS[op]])
def test_every_way_matches_float64(op: str, variant: str, name: str, dtype: torch.dtype) -> None:
    """Fused, written out first, the library's, mixed, and both gradients in one kernel: one tolerance, equal bits."""
    kwargs = inputs(op, BY_NAME[name], dtype, variant=variant)
    found = ways(op, kwargs)
    assert len(found) >= 2 and any("shared" in way for way in found) == (op != "conv_stats" and name != "3x3_2")
    for way in found:
        function = conv.configured(op, way)
        ours = function(**kwargs)
        assert_all_close(ours, reference(op, kwargs), eager(op, kwargs), f"{op} as {way}: output")
        assert_same_bits(ours, function(**kwargs))


@pytest.mark.parametrize(
    "op, config, reason",
    [
        ("conv_stats", {"fprop": [1, 2, 3]}, "fprop: found"),
        ("conv_stats", {"fprop": "fast"}, "fprop: found 'fast'"),
        ("conv_stats", {"fprop": None}, "fprop: found None"),
        ("conv_stats", {"fprop": [128, 128, 64, 8, 3, 2]}, "fprop: found"),
        ("conv_stats", {"dgrad": "library"}, "no directions"),
        ("conv_backward", {"shared": "library"}, "shared: found"),
        ("conv_affine_act", {"fprop": "library"}, "no directions"),
    ],
)
def test_unknown_ways_are_refused(op: str, config: dict[str, Any], reason: str) -> None:
    """A table may come from anywhere: nothing but tiles of this version reaches the compiler."""
    with pytest.raises(ValueError, match=reason):
        conv.configured(op, config)


def test_a_way_is_in_force_for_its_call_alone() -> None:
    """And for its thread; a shape that cannot be shared is not."""
    kwargs = inputs("conv_backward", BY_NAME["3x3"])
    tile = list(POINTWISE.CONFIGS["interpreted"]._replace(columns=16, depth=16))
    function = conv.configured("conv_backward", {"dgrad": "library", "wgrad": "library", "shared": tile})
    with common.recorded() as launches:
        function(**kwargs)
    assert [launch.kernel.fn.__name__ for launch in launches] == []
    assert conv_ways.way("dgrad") == conv_ways.USUAL
    with pytest.raises(ValueError, match="g: found"):
        function(**{**kwargs, "g": kwargs["g"][:1]})
    assert conv_ways.way("dgrad") == conv_ways.USUAL
    assert kernels("conv_backward", needs_w=False) == ["conv_dgrad_kernel"]


def test_gradients_are_shared_where_dw_fits() -> None:
    """Stage 1 of ResNet-50 has room for it; larger layers, 3x3 and strides have none."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (POINTWISE, importlib.import_module("resnet_fast.backends.triton.conv_common")):
            patch.setattr(module, "INTERPRETED", False)
        fits = set()
        for case in RESNET50:
            geometry = Geometry(case.N, case.C, case.H, case.W, case.K, case.R, case.stride)
            if POINTWISE.options(geometry, torch.bfloat16, torch.device("cpu")):
                fits.add(case.name)
            assert POINTWISE.options(geometry, torch.float32, torch.device("cpu")) == []
    assert fits == {"s1_first_1x1", "s1_reduce_1x1", "s1_expand_1x1"}


# ---- statistics


@interpreted
def test_variance_beside_a_large_mean() -> None:
    """Mean / std = 1000, with a first tile that is nothing like the rest."""
    x = 1 + 1e-3 * torch.randn(8, 4, 16, 16)
    x[0] = 0  # NPQ = 2048: eight tiles, of which this is the first
    x = x.contiguous(memory_format=torch.channels_last)
    kwargs = {"x": x, "w": torch.eye(4)[:, :, None, None], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    y, mean, var, *_ = conv.conv_stats(**kwargs, groups=1)
    assert_same_bits(y, x)
    exact = reference("bn_stats", {"y": x})
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact[1], rtol=1e-5, atol=0)
    x[0] = x[1]
    _, mean, var, *_ = conv.conv_stats(**kwargs, groups=1)
    exact = reference("bn_stats", {"y": x})
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact[1], rtol=1e-5, atol=0)


# ---- compiled for GPUs that are not here


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Every kernel in every configuration of the tables, for every architecture."""
    found: list[Record] = []
    # Without TF32 there are no tensor cores, and long programs: of the older GPU one shape.
    ieee = [start(90, "--ieee", *OPS), start(80, "--ieee", "--shape", "1x1", *OPS)]
    for process in [*(start(arch, *OPS) for arch in SHARED), *ieee]:
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-2000:]
        found += map(json.loads, out.splitlines())
    return [r for r in found if re.match(r"conv_\w+(?<!finish)_kernel", r["kernel"])]


def name_of(record: Record) -> str:
    return f"{record['kernel']} {record['shape']} {record['dtype']} sm_{record['arch']} {record['constants']}"


def tile_of(record: Record) -> tuple[int, ...]:
    blocks = {k: v for k, v in record["constants"].items() if k.startswith("BLOCK_")}
    return (*blocks.values(), record["options"]["num_warps"], record["options"]["num_stages"])


@pytest.mark.slow
def test_every_tile_is_compiled(records: list[Record]) -> None:
    modules: dict[str, ModuleType] = {"fprop": FPROP, "dgrad": DGRAD, "wgrad": WGRAD}
    for arch, (name, module) in product(SHARED, modules.items()):
        found = {tile_of(r) for r in records if r["kernel"] == f"conv_{name}_kernel" and r["arch"] == arch}
        wanted = {key: tile[:5] for key, tile in module.CONFIGS.items() if key != "interpreted"}
        assert found == set(wanted.values()), f"{name}, sm_{arch}"
    kinds = {(r["kernel"], r["arch"], r["constants"]["R"], r["constants"]["STRIDE"]) for r in records}
    assert len(kinds) == len(modules) * len(SHARED) * 4


@pytest.mark.slow
def test_nothing_spills_and_everything_fits(records: list[Record]) -> None:
    for r in records:
        assert r["stack"] == 0 and r["local"] == 0, f"{name_of(r)}: {r['stack']} bytes of stack, {r['local']} local"
        assert r["shared"] <= SHARED[r["arch"]], f"{name_of(r)}: {r['shared']} bytes of shared memory"


@pytest.mark.slow
def test_tensor_cores_are_fed_asynchronously(records: list[Record]) -> None:
    """wgmma on sm_90, mma.sync on sm_80, from loads that run ahead; float32 in TF32, as torch's default has it."""
    for r in (r for r in records if r["dtype"] != "float32" or r["constants"]["PRECISION"] == "tf32"):
        ptx = " ".join(r["ptx"])
        assert ("wgmma.mma_async" if r["arch"] == 90 else "mma.sync") in ptx, name_of(r)
        assert ("tf32" in ptx) == (r["dtype"] == "float32"), name_of(r)
        assert "cp.async" in ptx or r["shape"] == "odd", name_of(r)


#: "all": compile whatever a table may choose, for every kind of layer: a quarter of an hour. Else what has most ways.
EVERYTHING = os.environ.get("RESNET_FAST_AOT") == "all"


@pytest.fixture(scope="module")
def candidates() -> list[Record]:
    """What a table may choose: on sm_90 for an expanding 1x1 of stage 1, the layer with the most to choose from."""
    if EVERYTHING:
        processes = [start(arch, "--ways", *OPS) for arch in SHARED]
    else:
        processes = [start(90, "--ways", "--shape", "1x1_expand", "conv_stats", "conv_backward_sums")]
    found: list[Record] = []
    for process in processes:
        out, errors = process.communicate(timeout=7200 if EVERYTHING else 900)
        assert process.returncode == 0, errors[-2000:]
        found += map(json.loads, out.splitlines())
    return found


@pytest.mark.slow
def test_candidates_neither_spill_nor_wait(candidates: list[Record]) -> None:
    """Both gradients in one kernel, and descriptors (TMA), beside the tiles that are not the usual ones."""
    test_nothing_spills_and_everything_fits(candidates)
    test_tensor_cores_are_fed_asynchronously(candidates)
    hopper = [r for r in candidates if r["arch"] == 90]
    found = {r["kernel"]: " ".join(r["ptx"]) for r in hopper}
    assert found.keys() > {"conv_pointwise_backward_kernel", "conv_descriptor_kernel"}
    assert "cp.async.bulk.tensor" in found["conv_descriptor_kernel"]
    tiles = {tile_of(r) for r in hopper if r["kernel"] == "conv_descriptor_kernel"}
    assert tiles == {tile[:5] for key, tile in DESCRIPTOR.CONFIGS.items() if key != "interpreted"}
    rows = {r["constants"]["BLOCK_NPQ"] for r in hopper if r["kernel"] == "conv_pointwise_backward_kernel"}
    assert rows == {32, 64}
    if EVERYTHING:
        kinds = {
            (r["kernel"], r["arch"], r["constants"]["R"], r["constants"]["STRIDE"])
            for r in candidates
            if "R" in r["constants"]
        }
        assert len(kinds) == 3 * len(SHARED) * 4


def test_candidates_that_spill_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """dgrad of 3x3, masked and added to: one tile is left out there, and only there."""
    for module in (POINTWISE, DESCRIPTOR, importlib.import_module("resnet_fast.backends.triton.conv_common")):
        monkeypatch.setattr(module, "INTERPRETED", False)
    tile = list(DGRAD.CONFIGS["narrow_1x1"])
    for name in ("s1_3x3", "s1_expand_1x1", "s2_3x3"):
        case = next(case for case in RESNET50 if case.name == name)
        for variant in ("masked", "residual", "masked_residual"):
            kwargs = inputs("conv_backward", case, torch.bfloat16, variant=variant)
            found = conv_ways.configurations("conv_backward", **kwargs)[1]["dgrad"]
            assert (tile in found) == (case.R == 1 or variant != "masked_residual") and ["written", *tile] in found
