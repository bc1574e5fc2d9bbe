"""Convolutions as matrix products, on the CPU: against float64 under the one tolerance, and where they are used."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import dispatch, models
from resnet_fast.backends import direct, onednn
from resnet_fast.dispatch import reasons, use_backend
from resnet_fast.fuse import fuse
from tests.able import needs_native
from tests.isa import every_isa, run_again
from tests.tolerance import assert_close, assert_same_bits

pytestmark = needs_native

CL = torch.channels_last


class Shape(NamedTuple):
    n: int
    c: int
    k: int
    h: int
    w: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


#: ResNet-50's kinds of layers; tails of channels, of outputs and of row blocks; filters larger than the image.
SHAPES = (
    Shape(1, 64, 256, 56, 56),
    Shape(1, 256, 512, 56, 56, stride=(2, 2)),
    Shape(1, 128, 128, 56, 56, 3, 3, (2, 2), (1, 1)),
    Shape(1, 1024, 256, 14, 14),
    Shape(1, 2048, 512, 7, 7),
    Shape(1, 512, 512, 7, 7, 3, 3, padding=(1, 1)),
    Shape(1, 3, 64, 61, 45, 7, 7, (2, 2), (3, 3)),
    *(Shape(2, c, 33, 5, 3, 3, 3, padding=(1, 1)) for c in (1, 3, 32, 37)),
    *(Shape(1, 32, k, 3, w) for k in (1, 31, 65) for w in (1, 4, 5, 14)),
    Shape(2, 64, 40, 9, 8, 3, 2, (2, 3), (0, 2)),
    Shape(1, 32, 16, 1, 1, 5, 5, padding=(2, 2)),
    Shape(3, 5, 7, 2, 3, 4, 6, (1, 2), (3, 5)),
    Shape(1, 150, 16, 6, 5, 1, 3, padding=(0, 1)),
    Shape(37, 16, 16, 2, 2),
    Shape(1, 32, 16, 4, 4, 3, 3, (3, 3), (3, 3)),  # some patches lie outside as a whole
)


class Operands(NamedTuple):
    x: Tensor
    w: Tensor
    shift: Tensor
    residual: Tensor
    stride: list[int]
    padding: list[int]


def operands(shape: Shape, mean: float = 0.0) -> Operands:
    generator = torch.Generator().manual_seed(sum(shape[:7]))

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    n, c, k, h, w, r, s, stride, padding = shape
    p, q = ((a + 2 * b - t) // d + 1 for a, b, t, d in zip((h, w), padding, (r, s), stride, strict=True))
    return Operands(
        (random(n, c, h, w) + mean).contiguous(memory_format=CL),
        random(k, c, r, s) * (2 / (r * s * c)) ** 0.5,
        random(k),
        random(n, k, p, q).contiguous(memory_format=CL),
        list(stride),
        list(padding),
    )


def torchs(o: Operands, relu: bool = True, residual: bool = True) -> Tensor:
    z = F.conv2d(o.x, o.w, o.shift, o.stride, o.padding)
    z = z + o.residual if residual else z
    return F.relu(z) if relu else z


def ours(o: Operands) -> Tensor:
    return direct.conv(o.x, direct.weight(o.w), o.shift, o.stride, o.padding, o.residual, True)


def in_float64(o: Operands) -> Operands:
    return Operands(*(t.double() for t in o[:4]), *o[4:])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:7])))
def test_matches_float64(shape: Shape) -> None:
    o = operands(shape)
    z = ours(o)
    assert z.is_contiguous(memory_format=CL)
    assert_close(z, torchs(in_float64(o)), torchs(o))
    assert_same_bits(ours(o), z)


@pytest.mark.parametrize("kind", ["large mean", "uneven channels"])
def test_hard_values(kind: str) -> None:
    o = operands(Shape(1, 200, 48, 7, 6, 3, 3, (2, 1), (1, 1)), mean=1000.0 if kind == "large mean" else 0.0)
    if kind == "uneven channels":
        o.x.mul_(torch.logspace(-3, 3, 200).view(1, -1, 1, 1))
    assert_close(ours(o), torchs(in_float64(o)), torchs(o))


@pytest.mark.parametrize("relu, residual", [(False, False), (True, False), (False, True)])
def test_epilogues(relu: bool, residual: bool) -> None:
    o = operands(Shape(2, 140, 65, 9, 30))
    u, geometry = direct.weight(o.w), (o.stride, o.padding)
    z = direct.conv(o.x, u, o.shift, *geometry, o.residual if residual else None, relu)
    assert_close(z, torchs(in_float64(o), relu, residual), torchs(o, relu, residual))
    if residual:
        over = o.residual.clone(memory_format=CL)
        assert direct.conv(o.x, u, o.shift, *geometry, over, relu, over) is over
        assert_same_bits(over, z)


def test_nothing_is_read_or_written_outside() -> None:
    """Operands at the ends of pages' worth of NaN: none comes in, none is written over."""
    for shape in (Shape(1, 3, 5, 4, 5, 3, 3, padding=(1, 1)), Shape(1, 32, 40, 3, 5), Shape(2, 20, 33, 4, 4, 2, 2)):
        o = operands(shape)

        def amid_nan(t: Tensor) -> tuple[Tensor, Tensor]:
            memory = torch.full((t.numel() + 2048,), torch.nan)
            n, c, h, w = t.shape
            view = memory[1024 : 1024 + t.numel()].view(n, h, w, c).permute(0, 3, 1, 2)
            return view.copy_(t), memory

        x, _ = amid_nan(o.x)
        z, memory = amid_nan(o.residual)
        direct.conv(x, direct.weight(o.w), o.shift, o.stride, o.padding, o.residual, True, z)
        assert_same_bits(z, ours(o))
        assert memory.isnan().sum() == 2048


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_filters_in_any_layout(layout: str) -> None:
    o = operands(Shape(1, 40, 33, 4, 4, 3, 3))
    w = {
        "contiguous": o.w,
        "channels_last": o.w.contiguous(memory_format=CL),
        "sliced": torch.cat([o.w, o.w], 1)[:, :40],
        "transposed": o.w.mT.contiguous().mT,
    }[layout]
    assert_same_bits(direct.weight(w), direct.weight(o.w))


@pytest.mark.parametrize(
    "shape", [*SHAPES[:6], Shape(2, 31, 65, 9, 30)], ids=lambda shape: "-".join(map(str, shape[:7]))
)
def test_same_bits_by_any_threads(shape: Shape) -> None:
    o = operands(shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ours(o)
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            for _ in range(3):
                assert_same_bits(ours(o), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_what_torchs_reach(value: float) -> None:
    o = operands(Shape(1, 32, 32, 8, 8, 3, 3, padding=(1, 1)))
    o.x[0, 3, 5, 2] = value
    assert_same_bits(ours(o).isnan(), torchs(o).isnan())
    assert_same_bits(ours(o).isinf(), torchs(o).isinf())


def test_empty_batch() -> None:
    w = direct.weight(torch.randn(5, 32, 1, 1))
    assert direct.conv(torch.empty(0, 32, 4, 4), w, torch.zeros(5), [1, 1], [0, 0]).shape == (0, 5, 4, 4)


# ---- where it is used


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shape alone, whatever instruction set there is."""
    monkeypatch.setattr(direct, "_has_registers", lambda: True)


GEOMETRY: dict[str, object] = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
PLAIN: dict[str, object] = {
    "device": torch.device("cpu"),
    "w_size": [64, 256, 1, 1],
    "input_size": [1, 256, 14, 14],
    "dtype": torch.float32,
    **GEOMETRY,
}


@pytest.mark.parametrize(
    "change",
    [
        {"dilation": [2, 2], "w_size": [64, 256, 3, 3]},
        {"groups": 2},
        {"w_size": [64, 3, 7, 7]},
        {"input_size": [1, 256, 57, 57]},
        {"w_size": [16, 256, 1, 1], "input_size": [1, 256, 35, 35]},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
    ],
    ids=lambda change: "-".join(change),
)
@pytest.mark.usefixtures("anywhere")
def test_why_not(change: dict[str, object]) -> None:
    assert direct.why_not(**PLAIN) is None
    assert direct.why_not(**{**PLAIN, **change})


@pytest.mark.usefixtures("anywhere")
def test_dilation_means_nothing_to_one_tap() -> None:
    assert direct.why_not(**{**PLAIN, "dilation": [2, 2]}) is None


def test_not_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_has_registers", lambda: False)
    assert "AVX-512" in (direct.why_not(**PLAIN) or "")


def _skip_without_onednn() -> None:
    reason = reasons("conv_affine_act", torch.device("cpu"), torch.float32)["onednn"]
    if reason:
        pytest.skip(reason)


@pytest.mark.usefixtures("anywhere")
def test_a_prepared_weight_is_checked() -> None:
    _skip_without_onednn()
    o = operands(Shape(1, 256, 64, 6, 6))
    geometry = tuple(GEOMETRY.values())
    with use_backend("onednn"):
        u = dispatch.prepare("conv_affine_act", o.w, o.x, *geometry)
    assert direct.is_weight(u)
    z = onednn.conv_affine_act(o.x, u, o.shift, *geometry, residual=o.residual)
    assert_close(z, torchs(in_float64(o)), torchs(o))
    for x, shift, options, name in (
        (o.x[:, :32], o.shift, {}, "w: found"),
        (o.x, o.shift[:32], {}, "w: found"),
        (o.x.double(), o.shift, {}, "w: found"),
        (o.x, o.shift, {"scale": o.shift}, "scale: found"),
        (o.x, o.shift, {"residual": o.residual[:, :, 1:]}, "residual: found"),
    ):
        with pytest.raises(ValueError, match=name):
            onednn.conv_affine_act(x, u, shift, *geometry, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fused_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference at 96 px against float64, beside eager torch, at two input sizes."""
    _skip_without_onednn()
    torch.manual_seed(0)
    model = getattr(models, name)().to(memory_format=CL).eval()
    exact = getattr(models, name)().double().eval()
    exact.load_state_dict(model.state_dict())
    fused = fuse(getattr(models, name)().to(memory_format=CL)).eval()
    fused.load_state_dict(model.state_dict())
    seen, conv = [], direct.conv

    def spy(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(tuple(x.shape))
        return conv(x, *args, **kwargs)

    monkeypatch.setattr(direct, "conv", spy)
    for size in ((2, 3, 96, 96), (1, 3, 65, 80)):
        x = torch.randn(size).contiguous(memory_format=CL)
        with torch.no_grad():
            for _ in range(3):  # block by block, and as programs
                z = fused(x)
            assert_close(z, exact(x.double()), model(x))
        assert seen
        seen.clear()


@every_isa
def test_instruction_set(isa: str) -> None:
    run_again(isa, "float64 or hard or epilogues or outside or layout or threads or nan or empty", 40, __file__)
