"""The convolution ops on every backend: against float64, with lazy operands, at borders, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import ops
from resnet_fast.backends import library
from resnet_fast.dispatch import backend, prepare, use_backend
from tests import cuda_on_cpu
from tests.cases import LAYOUTS, NASTY, TINY, VARIANTS, Case, inputs
from tests.eager import eager
from tests.tolerance import (
    assert_all_close,
    assert_close,
    assert_same_bits,
    backends,
    check,
    reference,
    run,
    variants,
)

OPS = ("conv_stats", "conv_dgrad", "conv_wgrad", "conv_backward", "conv_backward_sums", "conv_affine_act")
CASES = [pytest.param(case, id=case.name) for case in TINY + NASTY]
BY_NAME = {case.name: case for case in TINY + NASTY}
ODD = BY_NAME["odd_stride_2"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_matches_float64(op: str, variant: str, name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    check(op, inputs(op, case, dtype, device, variant=variant), name)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS, dtypes=[torch.float32]))
def test_layouts(op: str, variant: str, name: str, device: str, dtype: torch.dtype, layout: str) -> None:
    check(op, inputs(op, ODD, dtype, device, variant=variant, layout=layout), name)


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_same_bits_twice(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    kwargs = inputs(op, BY_NAME["threads"], dtype, device, variant=variant)
    assert_same_bits(run(op, kwargs, name), run(op, kwargs, name))


LAZY = ("mean", "a", "b", "c", "scale", "shift")


@pytest.mark.parametrize("case", [ODD, BY_NAME["3x3"], BY_NAME["image_1x1_3x3"]], ids=lambda case: case.name)
@pytest.mark.parametrize("name, device, dtype", backends("conv_wgrad"))
def test_lazy_operands_are_the_written_ones(name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    """Within the backend, to the bit: a convolution of what its affine_act and bn_backward_apply write."""
    forward = inputs("conv_stats", case, dtype, device, variant="lazy")
    written = {k: v for k, v in forward.items() if k not in LAZY}
    written["x"] = run("affine_act", {"y": forward["x"], **{k: forward[k] for k in ("scale", "shift")}}, name)
    assert_same_bits(run("conv_stats", forward, name), run("conv_stats", written, name))

    for op in ("conv_dgrad", "conv_wgrad"):
        kwargs = inputs(op, case, dtype, device, variant="lazy")
        plain = {k: v for k, v in kwargs.items() if k not in (*LAZY, "y")}
        lazy = {k: kwargs[k] for k in ("y", "mean", "a", "b", "c")}
        plain["g"] = run("bn_backward_apply", {"dz": kwargs["g"], **lazy}, name)
        if op == "conv_wgrad":
            plain["x"] = run("affine_act", {"y": kwargs["x"], **{k: kwargs[k] for k in ("scale", "shift")}}, name)
        assert_same_bits(run(op, kwargs, name), run(op, plain, name))


@pytest.mark.parametrize("name, device, dtype", backends("conv_stats"))
def test_padding_is_zero_after_the_activation(name: str, device: str, dtype: torch.dtype) -> None:
    """relu(0 * scale + shift) is not 0. A filter of ones counts the pixels below it."""
    x = torch.zeros(1, 2, 4, 4, dtype=dtype, device=device)
    w = torch.ones(1, 2, 3, 3, dtype=dtype, device=device)
    vectors = {"scale": torch.ones(2, device=device), "shift": torch.full((2,), 100.0, device=device)}
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    y, *_ = run("conv_stats", {"x": x, "w": w, **geometry, **vectors}, name)
    expected = F.conv2d(torch.full_like(x, 100.0), w, padding=1)
    assert expected[0, 0, 0, 0] == 800 and expected[0, 0, 1, 1] == 1800
    assert_same_bits(y, expected)
    wgrad = {"g": torch.ones_like(y), "x": x, "weight_size": [1, 2, 3, 3], **geometry, **vectors}
    dw = run("conv_wgrad", wgrad, name)
    assert dw[0, 0, 0, 0] == 900 and dw[0, 0, 1, 1] == 1600
    # A constant c in the lazy gradient lies inside the image alone, too.
    zero = torch.zeros(1, device=device)
    lazy = {"y": torch.zeros_like(y), "mean": zero, "a": zero, "b": zero, "c": zero + 100}
    dgrad = {"g": torch.zeros_like(y), "w": w, "input_size": [1, 2, 4, 4], **geometry, **lazy}
    dx = run("conv_dgrad", dgrad, name)
    assert dx[0, 0, 0, 0] == 400 and dx[0, 0, 1, 1] == 900


@pytest.mark.parametrize("case", [BY_NAME["3x3"], ODD, BY_NAME["padding_2"]], ids=lambda case: case.name)
@pytest.mark.parametrize("name, device, dtype", backends("conv_stats"))
def test_large_beta_at_borders(name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    for op in ("conv_stats", "conv_wgrad"):
        kwargs = inputs(op, case, dtype, device, variant="lazy")
        kwargs["shift"] = kwargs["shift"] + 50
        check(op, kwargs, name)


@pytest.mark.parametrize("name, device, dtype", backends("conv_stats"))
def test_statistics_are_of_the_rounded_output(name: str, device: str, dtype: torch.dtype) -> None:
    kwargs = inputs("conv_stats", BY_NAME["3x3"], dtype, device)
    y, *statistics = run("conv_stats", kwargs, name)
    norm = {"y": y, **{k: kwargs[k] for k in ("gamma", "beta", "eps")}}
    assert_all_close(statistics, reference("bn_stats", norm), eager("bn_stats", norm))


GEOMETRIES = {
    "dilation": {"stride": [1, 1], "padding": [2, 2], "dilation": [2, 2], "groups": 1},
    "groups": {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 4},
    "oblong": {"stride": [2, 1], "padding": [0, 1], "dilation": [1, 1], "groups": 1},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_geometries(
    op: str, variant: str, name: str, device: str, dtype: torch.dtype, geometry: dict[str, Any]
) -> None:
    base = Case("geometry", 2, 8, 7, 6, 12, 3, 1, 1)
    y = F.conv2d(
        torch.empty(base.x_size),
        torch.empty(12, 8 // geometry["groups"], 3, 3),
        None,
        *(geometry[k] for k in ("stride", "padding", "dilation", "groups")),
    )
    # A 1x1 case of y's size makes what has y's shape; the rest comes from the real one.
    shaped = inputs(op, base._replace(H=y.shape[2], W=y.shape[3], R=1, padding=0), dtype, device, variant=variant)
    kwargs = {**inputs(op, base, dtype, device, variant=variant), **geometry}
    like_y = ("g", "y", "residual") if op == "conv_affine_act" else ("g", "y")
    kwargs.update({k: shaped[k] for k in like_y if k in shaped})
    if "w" in kwargs:
        kwargs["w"] = kwargs["w"][:, : 8 // geometry["groups"]].contiguous(memory_format=torch.channels_last)
    if "weight_size" in kwargs:
        kwargs["weight_size"] = [12, 8 // geometry["groups"], 3, 3]
    check(op, kwargs, name)


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS, dtypes=[torch.float32]))
def test_nan_goes_where_torchs_goes(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    """One NaN in each tensor in turn; oneDNN's ReLU, which drops it, is guarded by functional.folded_block."""
    if name in ("onednn", "cudnn"):
        pytest.skip("the library's ReLU drops NaN; functional.folded_block keeps them away from it")
    for key, value in inputs(op, ODD, dtype, device, variant=variant).items():
        if isinstance(value, torch.Tensor):
            kwargs = inputs(op, ODD, dtype, device, variant=variant)
            kwargs[key][(0,) * value.dim()] = torch.nan
            ours, torchs = run(op, kwargs, name), eager(op, kwargs)
            for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (ours, torchs)), strict=True):
                if name == "triton" and key == "w":  # an implicit matrix product multiplies the padding by it, too
                    assert (a.isnan() >= b.isnan()).all(), f"{op}: NaN in {key}"
                else:
                    assert torch.equal(a.isnan(), b.isnan()), f"{op}: NaN in {key}"


@pytest.mark.parametrize(
    "name, device, dtype", [p for p in backends("conv_affine_act") if p.values[0] != "cuda_on_cpu"]
)
@pytest.mark.parametrize("case", [BY_NAME["3x3"], BY_NAME["1x1"], ODD], ids=lambda case: case.name)
def test_prepared_weight(name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    kwargs = inputs("conv_affine_act", case, dtype, device)
    geometry = [kwargs[k] for k in ("stride", "padding", "dilation", "groups")]
    with use_backend(name):
        prepared = prepare("conv_affine_act", kwargs["w"], kwargs["x"], *geometry)
        ours = ops.conv_affine_act(**{**kwargs, "w": prepared})
    assert_close(ours, reference("conv_affine_act", kwargs), eager("conv_affine_act", kwargs))


# ---- what the ops refuse


def _wrong(t: torch.Tensor, operand: bool) -> list[torch.Tensor]:
    """The argument with shapes and dtypes that it must not have."""
    if t.dim() == 1:
        return [t.repeat(2), t[:1], t[None]]
    if operand:
        return [t[:, :2], t[0, 0]]
    return [t.bfloat16(), t[:, :, 1:], t[:, :1], t[:1, :, :1, :1]]


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS, dtypes=[torch.float32]))
def test_wrong_arguments(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    """Called as dispatch calls it. What is read by address is refused by name, before it is read."""
    if name == "torch":
        pytest.skip("the definitions leave it to torch's own functions")
    function = getattr(cuda_on_cpu.native() if name == "cuda_on_cpu" else backend(name), op)
    accepted, nameless = [], []
    for key, value in inputs(op, BY_NAME["K9"], dtype, device, variant=variant).items():
        if not isinstance(value, torch.Tensor):
            continue
        # The convolution's own operands, which torch refuses in its own words.
        operand = key in ("x", "w") or (key == "g" and "y" not in VARIANTS[op][variant])
        for wrong in _wrong(value, operand):
            what = f"{key} {tuple(wrong.shape)} {wrong.dtype}"
            try:
                function(**{**inputs(op, BY_NAME["K9"], dtype, device, variant=variant), key: wrong})
                accepted.append(what)
            except (ValueError, RuntimeError) as error:
                # y and g (there called dz) are held against each other; gscale may be bn_backward_apply's scale.
                names = ("dz: found", "y: found") if key in ("g", "y") else (f"{key}: found", f"{key[1:]}: found")
                if not operand and not str(error).startswith(names):
                    nameless.append(f"{what}: {error}")
    assert not accepted
    assert not nameless


# ---- the definitions


@pytest.mark.parametrize("case", [BY_NAME["3x3"], ODD, BY_NAME["1x1"]], ids=lambda case: case.name)
def test_backward_definitions_are_the_gradient(case: Case) -> None:
    """conv_dgrad and conv_wgrad, lazy operands and all, against autograd in float64."""
    kwargs = inputs("conv_wgrad", case, torch.float64, variant="lazy")
    w = inputs("conv_dgrad", case, torch.float64)["w"].requires_grad_()
    geometry = [kwargs[k] for k in ("stride", "padding", "dilation", "groups")]
    activation = ops.affine_act.definition(kwargs["x"], kwargs["scale"], kwargs["shift"]).requires_grad_()
    y, *_ = ops.conv_stats.definition(activation, w, *geometry)
    lazy = {k: kwargs[k] for k in ("y", "mean", "a", "b", "c")}
    dy = ops.bn_backward_apply.definition(kwargs["g"], **lazy)
    dx, dw = torch.autograd.grad(y, (activation, w), dy)
    with torch.no_grad():
        dgrad = ops.conv_dgrad.definition(kwargs["g"], w, case.x_size, *geometry, **lazy)
        wgrad = ops.conv_wgrad.definition(**kwargs)
    torch.testing.assert_close(dgrad, dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wgrad, dw, rtol=1e-12, atol=1e-12)


def test_eager_and_definition_are_one_function() -> None:
    """The rule's two legs agree in float64 (to what 1 / sqrt(var + eps) leaves of the statistics)."""
    for op in OPS:
        for variant in VARIANTS[op]:
            kwargs = inputs(op, ODD, torch.float64, variant=variant)
            torch.testing.assert_close(eager(op, kwargs), reference(op, kwargs), rtol=1e-9, atol=1e-9)


def test_bfloat16_gradients_over_an_image_one_wide() -> None:
    """oneDNN leaves unwritten what taps gather that meet the padding alone: those gradients are 0."""
    x, dy = (torch.randn(2, 16, h, 1).bfloat16().to(memory_format=torch.channels_last) for h in (9, 5))
    for _ in range(5):
        for n in (*range(1, 3000, 7), 4096, 10000):
            torch.full((n,), float("nan"))  # what memory that comes next may hold
        dw = library.conv_wgrad(dy, x, [16, 16, 3, 3], [2, 2], [1, 1], [1, 1], 1)
        assert dw.isfinite().all() and (dw[..., 0] == 0).all() and (dw[..., 2] == 0).all()


@pytest.mark.parametrize("case", [c for c in TINY + NASTY if c.R == 1][:4], ids=lambda case: case.name)
@pytest.mark.parametrize("name, device, dtype", backends("conv_wgrad", dtypes=[torch.float32]))
def test_one_taps_gradient_has_the_weights_strides(name: str, device: str, dtype: torch.dtype, case: Case) -> None:
    """DistributedDataParallel compares them, those of sizes of 1 too, and warns of slowness where they differ."""
    kwargs = inputs("conv_wgrad", case, dtype, device)
    dw = run("conv_wgrad", kwargs, name)
    assert isinstance(dw, torch.Tensor) and dw.stride() == torch.empty(dw.shape).stride()
