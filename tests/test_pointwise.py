"""The backward of 1x1 convolutions in one pass, on the CPU: against float64 by the one tolerance, and where it runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fast import _C, models, switches
from resnet_fast.backends import pointwise
from resnet_fast.backends.native import conv
from resnet_fast.fuse import fuse
from tests.able import needs_native
from tests.eager import eager
from tests.isa import every_isa, run_again
from tests.tolerance import DTYPES, assert_all_close, assert_same_bits, name_of, reference

pytestmark = needs_native

CL = torch.channels_last
GEOMETRY: dict[str, Any] = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


class Shape(NamedTuple):
    n: int
    c: int
    k: int
    h: int
    w: int


#: ResNet-50's layers; tails of channels, of blocks and of row blocks; one pixel.
SHAPES = (
    Shape(1, 64, 256, 56, 28),
    Shape(1, 256, 64, 28, 28),
    Shape(1, 128, 512, 28, 14),
    Shape(1, 256, 1024, 7, 14),
    Shape(3, 5, 7, 3, 4),
    Shape(2, 33, 65, 5, 9),
    Shape(1, 1, 1, 1, 1),
    Shape(1, 70, 16, 10, 14),
    Shape(37, 16, 100, 2, 3),
)


def operands(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    gradient: str = "masked",
    lazy: bool = True,
    residual: bool = True,
) -> dict[str, Any]:
    """The arguments of conv_backward. ``gradient``: written, lazy, or masked, as behind a ReLU. ``lazy``: x."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, c, k, h, w = shape

    def image(channels: int) -> Tensor:
        return torch.randn(n, channels, h, w, generator=generator).to(dtype).contiguous(memory_format=CL)

    def vectors(channels: int, *names: str) -> dict[str, Tensor]:
        return {name: torch.randn(channels, generator=generator) for name in names}

    weight = (torch.randn(k, c, 1, 1, generator=generator) * c**-0.5).to(dtype)
    out = {"g": image(k), "x": image(c), "w": weight, **GEOMETRY, "needs_x": True, "needs_w": True}
    if gradient != "written":
        out |= {"y": image(k), **vectors(k, "mean", "a", "b", "c")}
    if gradient == "masked":
        out |= vectors(k, "gscale", "gshift")
    if lazy:
        out |= vectors(c, "scale", "shift")
    return out | ({"residual": image(c)} if residual else {})


def ours(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Whether or not it would be chosen."""
    names = ("y", "mean", "a", "b", "c", "gscale", "gshift")
    affine = kwargs.get("scale"), kwargs.get("shift")
    lazy = [kwargs.get(name) for name in names]
    return conv._pointwise(
        kwargs["g"], kwargs["x"], kwargs["w"], (True, True), affine, lazy, kwargs.get("residual"), False
    )


@pytest.mark.parametrize(
    "gradient, lazy, residual",
    [("written", False, False), ("lazy", False, True), ("lazy", True, False), ("masked", True, True)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: Shape, dtype: torch.dtype, gradient: str, lazy: bool, residual: bool) -> None:
    kwargs = operands(shape, dtype, gradient, lazy, residual)
    kept = {key: t.clone() for key, t in kwargs.items() if isinstance(t, Tensor)}
    out = ours(kwargs)
    assert all(t.dtype == dtype for t in out) and out[0].is_contiguous(memory_format=CL)
    assert_all_close(out, reference("conv_backward", kwargs), eager("conv_backward", kwargs))
    assert all(torch.equal(kwargs[key], t) for key, t in kept.items())


@pytest.mark.parametrize("kind", ["large mean", "uneven channels", "one large pixel"])
def test_hard_values(kind: str) -> None:
    kwargs = operands(Shape(2, 64, 100, 30, 20), gradient="written", lazy=False)
    if kind == "large mean":
        kwargs["x"] += 1000
    elif kind == "uneven channels":
        kwargs["x"] *= torch.logspace(-3, 3, 64).view(1, -1, 1, 1)
    else:
        kwargs["g"][:, :, 1, 2] *= 1e4
    assert_all_close(ours(kwargs), reference("conv_backward", kwargs), eager("conv_backward", kwargs))


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_same_bits_by_any_threads(shape: Shape) -> None:
    kwargs = operands(shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ours(kwargs)
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            for _ in range(2):
                assert_same_bits(ours(kwargs), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["g", "x", "w", "residual"])
def test_nan_goes_where_torchs_goes(where: str, value: float) -> None:
    kwargs = operands(Shape(1, 40, 36, 9, 9), gradient="written", lazy=False)
    kwargs[where][0, 3, 0 if where == "w" else 5, 0 if where == "w" else 2] = value
    for found, torchs in zip(ours(kwargs), eager("conv_backward", kwargs), strict=True):
        assert torch.equal(found.isnan(), torchs.isnan()) and torch.equal(found.isinf(), torchs.isinf())


def test_empty_batch() -> None:
    dx, dw = ours(operands(Shape(0, 40, 36, 4, 4)))
    assert dx.shape == (0, 40, 4, 4) and dw.shape == (36, 40, 1, 1) and not dw.any()


# ---- where it is used


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of the filters of every call from now on."""
    seen, backward = [], pointwise.backward

    def spy(g: Tensor, x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(w.shape[:2]))
        return backward(g, x, w, *args, **kwargs)

    monkeypatch.setattr(pointwise, "backward", spy)
    return seen


PLAIN: dict[str, Any] = {
    "device": torch.device("cpu"),
    "w_size": [256, 64, 1, 1],
    "input_size": [1, 64, 56, 56],
    "stride": [1, 1],
    "padding": [0, 0],
    "groups": 1,
    "dtype": torch.float32,
    "stored": torch.float32,
}


@pytest.mark.skipif(_C.cpu.isa() == "baseline", reason="not used without AVX2")
@pytest.mark.parametrize(
    "change",
    [
        {"stride": [2, 2]},
        {"padding": [1, 1]},
        {"groups": 2},
        {"w_size": [64, 64, 3, 3]},
        {"w_size": [64, 64, 1, 3]},
        {"w_size": [512, 512, 1, 1]},
        {"w_size": [2048, 16, 1, 1]},
        {"w_size": [128, 512, 1, 1]},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
    ],
    ids=lambda change: "-".join(change),
)
def test_why_not(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pointwise.why_not(**PLAIN) is None
    assert pointwise.why_not(**{**PLAIN, **change})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 128)
        assert pointwise.why_not(**{**PLAIN, "input_size": [1, 64, 7, 7]}) is None
        assert pointwise.why_not(**{**PLAIN, "input_size": [8, 64, 56, 56]}) == "64 units of work for 128 threads"
    with switches.without("products"):
        assert pointwise.why_not(**PLAIN) == "switched off"
    # In float32 dy is then the least that is read; the casts of the others pay for it.
    assert pointwise.why_not(**{**PLAIN, "w_size": [128, 512, 1, 1], "stored": torch.bfloat16}) is None


@pytest.mark.skipif(_C.cpu.isa() == "baseline", reason="not used without AVX2")
@pytest.mark.parametrize("overwrite", [False, True])
def test_both_gradients_run_it(overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = operands(Shape(2, 64, 64, 7, 6))
    seen = _calls(monkeypatch)
    alone = conv.conv_backward(**kwargs)
    assert seen == [(64, 64)]
    if overwrite:
        residual = kwargs["residual"].clone(memory_format=CL)
        found = conv.conv_backward_into(**{**kwargs, "residual": residual}, disposable=False)
        assert found[0] is residual
        # dx over g itself: it is an identity's gradient, and x's as well.
        shared = {**kwargs, "residual": kwargs["g"]}
        assert_same_bits(conv.conv_backward_into(**shared, disposable=True), conv.conv_backward(**shared))
        assert_same_bits(found, alone)
    for needs in ((True, False), (False, True), (False, False)):
        part = conv.conv_backward(**{**kwargs, "needs_x": needs[0], "needs_w": needs[1]})
        for found, whole, needed in zip(part, alone, needs, strict=True):
            assert_same_bits(found, whole if needed else whole.new_empty(0))
    assert set(seen) == {(64, 64)} and len(seen) == (6 if overwrite else 3)


@pytest.mark.skipif(_C.cpu.isa() == "baseline", reason="not used without AVX2")
def test_training_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients beside eager's: each within what rounding makes of them in a bottleneck."""
    torch.manual_seed(0)
    model = models.resnet50().to(memory_format=CL).layer1.train()
    exact = models.resnet50().layer1.double().train()
    exact.load_state_dict(model.state_dict())
    fused = fuse(models.resnet50().to(memory_format=CL).layer1.train())
    fused.load_state_dict(model.state_dict())
    seen = _calls(monkeypatch)
    x = torch.randn(4, 64, 32, 32).contiguous(memory_format=CL)
    target = torch.randn(4, 256, 32, 32)
    monkeypatch.setattr("resnet_fast.guards._worth", 0.0)
    for m in (fused, exact, model):
        out = m(x.to(next(m.parameters()).dtype))
        (out * target.to(out.dtype)).mean().backward()
    wide = [(64, 256)] * 2 if _C.cpu.isa() == "avx512" else []
    assert sorted(seen) == [(64, 64), *wide, *[(256, 64)] * 4]
    for (key, p), q, r in zip(fused.named_parameters(), exact.parameters(), model.parameters(), strict=True):
        error, torchs_error = ((t.grad - q.grad).norm() / q.grad.norm() for t in (p, r))
        assert error <= 3 * torchs_error + 1e-6, f"{key}: {error} beside torch's {torchs_error}"


@every_isa
def test_instruction_set(isa: str) -> None:
    run_again(isa, "float64 or hard or threads or nan or empty", 120, __file__)
