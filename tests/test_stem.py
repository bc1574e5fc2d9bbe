"""The stem's ops: batch norm, ReLU and max-pooling in one pass, and their backward, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import ops
from resnet_fast.dispatch import OPS as OPS_ALL
from resnet_fast.dispatch import backend
from tests import cuda_on_cpu
from tests.able import needs_machine, needs_native
from tests.cases import LAYOUTS, NASTY, TINY, WHOLE_STEM, Case, inputs
from tests.eager import eager
from tests.tolerance import (
    assert_all_close,
    assert_same_bits,
    assert_same_bits_by_any_threads,
    backends,
    check,
    name_of,
    reference,
    run,
    variants,
)

LOW = (torch.bfloat16, torch.float16)
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


@pytest.mark.parametrize("op, variant, name, device, dtype", [p for p in variants(*OPS) if p.values[2] == "native"])
def test_same_bits_twice_and_by_any_number_of_threads(
    op: str, variant: str, name: str, device: str, dtype: torch.dtype
) -> None:
    assert_same_bits_by_any_threads(op, inputs(op, THREADS, dtype, device, variant=variant), name)


# ---- what wins a window


def _pool(y: torch.Tensor, name: str, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.ones(y.shape[1], device=y.device)
    return run("affine_act_maxpool", {"y": y, "scale": one, "shift": one * shift}, name)


@pytest.mark.parametrize("name, device, dtype", backends("affine_act_maxpool"))
def test_window_first_of_equal_values_wins(name: str, device: str, dtype: torch.dtype) -> None:
    """A window at (1, 1) in which two values are the largest: the first one has it, in the order of r, s."""
    for first in range(9):
        for second in range(first + 1, 9):
            y = torch.full((1, 9, 3, 3), 0.5, dtype=dtype, device=device)
            y.view(1, 9, 9)[..., [first, second]] = 2.0
            z, index = _pool(y.repeat(1, 5, 1, 1), name)
            expected = F.max_pool2d(y.float(), 3, 2, 1).to(dtype).repeat(1, 5, 1, 1)
            assert_same_bits(z, expected)
            # Window (p, q) covers rows 2p - 1 to 2p + 1: (0, 0) has the upper left 2 x 2 of it, and so on.
            for p in range(2):
                for q in range(2):
                    inside = [
                        3 * (r - 2 * p + 1) + s - 2 * q + 1
                        for r, s in (divmod(place, 3) for place in (first, second))
                        if 2 * p - 1 <= r <= 2 * p + 1 and 2 * q - 1 <= s <= 2 * q + 1
                    ]
                    rest = 4 if (p, q) == (0, 0) else {(0, 1): 3, (1, 0): 1, (1, 1): 0}[p, q]
                    assert (index[..., p, q] == (inside[0] if inside else rest)).all()


@pytest.mark.parametrize("name, device, dtype", backends("affine_act_maxpool", dtypes=[torch.bfloat16, torch.float16]))
def test_window_compares_values_as_stored(name: str, device: str, dtype: torch.dtype) -> None:
    """y + shift differs in float32 and is the same number as stored: the first wins, though the last is larger."""
    eps = torch.finfo(dtype).eps
    y = torch.zeros(1, 40, 2, 2, dtype=dtype, device=device)
    y[..., 1, 1] = eps / 4  # 1 + eps / 4 is stored as 1
    z, index = _pool(y, name, shift=1.0)
    assert (z == 1).all() and (index == 4).all()
    y[..., 1, 1] = eps
    z, index = _pool(y, name, shift=1.0)
    assert (z == 1 + eps).all() and (index == 8).all()


@pytest.mark.parametrize("name, device, dtype", backends("affine_act_maxpool"))
def test_window_with_nan_and_infinities(name: str, device: str, dtype: torch.dtype) -> None:
    """NaN of either sign wins over all, infinity over all numbers; where nothing is > 0 the index is 9."""
    inf, nan, tiny = torch.inf, torch.nan, torch.finfo(dtype).smallest_normal
    values = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, tiny, -tiny, 1, -1], dtype=dtype, device=device)
    for place in range(9):
        for rest in (-1.0, 0.0, -0.0, 0.25, inf):
            y = torch.full((1, len(values), 3, 3), rest, dtype=dtype, device=device)
            y.view(1, len(values), 9)[..., place] = values
            z, index = _pool(y[..., :2, :2], name)  # one window, whose upper row and left column lie outside
            expected = F.max_pool2d(torch.relu(y[..., :2, :2].float()), 3, 2, 1)
            assert_same_bits(z, expected.to(dtype).abs() if not expected.isnan().any() else expected.to(dtype))
            assert torch.equal(index == 9, z <= 0)
            if place in (0, 1, 3, 4):
                row, column = divmod(place, 3)
                wins = values.isnan() | (values > max(rest, 0.0))
                assert (index[0, wins, 0, 0] == 3 * (row + 1) + column + 1).all()


@pytest.mark.parametrize("name, device, dtype", backends("affine_act_maxpool"))
def test_window_with_scales_of_either_sign_and_zero(name: str, device: str, dtype: torch.dtype) -> None:
    """Values whose products and sums are exact, many of them equal once stored: z and index are the definition's."""
    scale = torch.tensor([1.0, -1.0, 0.0, -0.0, 0.25, -0.25, 2.0**-7, -(2.0**-7)], device=device)
    shift = torch.tensor([0.0, -0.0, 1.0, -1.0, 3.0], device=device)
    scale, shift = (t.flatten() for t in torch.meshgrid(scale, shift, indexing="ij"))
    some = torch.tensor([0.0, -0.0, 0.5, 1.0, 1.0, -1.0, 1.5, -2.0, 2.0, 3.0, -torch.inf, torch.inf, torch.nan])
    for count in (10, 11, 12, 13):  # without infinities and NaN, then with one after the other
        pick = torch.randint(count, (2, 40, 9, 10), generator=torch.Generator().manual_seed(count))
        y = some[pick].to(dtype).to(device).contiguous(memory_format=torch.channels_last)
        z, index = run("affine_act_maxpool", {"y": y, "scale": scale, "shift": shift}, name)
        expected, places = ops.affine_act_maxpool.definition(y, scale, shift)
        torch.testing.assert_close(z, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index[~z.isnan()], places[~z.isnan()])  # of several NaN any wins


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS[1:]))
def test_backward_is_finite_where_torchs_is(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    """An infinity in each tensor in turn: in a y of which a gradient depends, too, and in one of which none does."""
    for key, value in inputs(op, ODD, dtype, device, variant=variant).items():
        if value.dtype == torch.uint8:
            continue
        for at in range(3 if key in ("y", "dz") else 1):
            for sign in (1, -1):
                kwargs = inputs(op, ODD, dtype, device, variant=variant)
                kwargs[key][(0,) * (value.dim() - 1) + (at,)] = sign * torch.inf
                ours, torchs = run(op, kwargs, name), eager(op, kwargs)
                for a, b in zip(_tuple(ours), _tuple(torchs), strict=True):
                    assert torch.equal(a.isfinite(), b.isfinite()), f"{op}: {sign * torch.inf} in {key}"
                    if key in ("y", "dz"):
                        assert torch.equal(a.isnan(), b.isnan()), f"{op}: {sign * torch.inf} in {key}"


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_nan_goes_where_torchs_goes(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    """One NaN, with bits that rounding would turn into a number, in each tensor in turn."""
    for key, value in inputs(op, ODD, dtype, device, variant=variant).items():
        if value.dtype == torch.uint8:
            continue
        kwargs = inputs(op, ODD, dtype, device, variant=variant)
        bits = torch.int32 if value.dtype == torch.float32 else torch.int16
        kwargs[key].view(bits)[(0,) * value.dim()] = torch.iinfo(bits).max
        assert kwargs[key].isnan().sum() == 1
        ours, torchs = run(op, kwargs, name), eager(op, kwargs)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (ours, torchs)), strict=True):
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan()), f"{op}: NaN in {key}"


def test_inputs_are_not_written() -> None:
    for op in OPS:
        kwargs = inputs(op, ODD)
        getattr(ops, op)(**kwargs)
        for key, value in inputs(op, ODD).items():
            assert torch.equal(kwargs[key], value), f"{op}: {key}"


# ---- what the native kernels refuse


def _wrong(value: torch.Tensor) -> list[torch.Tensor]:
    """The same argument with a shape, dtype or device that it must not have."""
    if value.dim() == 1:
        return [value.repeat(2), value[:1], value[0], value[None], value.to("meta")]
    return [value[:, :, 1:], value[0], value[:1, :, :1, :1], value.double(), value.to("meta")]


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_native_names_the_argument_that_is_wrong(op: str) -> None:
    """Called as dispatch calls them: a kernel sees addresses, so nothing wrong may come through."""
    function = getattr(backend("native"), op)
    kwargs = inputs(op, ODD)
    for name, value in kwargs.items():
        for wrong in _wrong(value) if name != "y" else []:  # y says what the others must be
            with pytest.raises(ValueError, match=rf"^{name}: found .*expected"):
                function(**{**kwargs, name: wrong})
                pytest.fail(f"{op}: {name} accepted as {tuple(wrong.shape)} {wrong.dtype}")


# ---- the definitions, and all three together


def _whole(y: torch.Tensor, dz: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, definitions: bool) -> Any:
    """z, dy, dgamma, dbeta of the stem behind its convolution, by the ops."""
    run = {op: OPS_ALL[op].definition if definitions else OPS_ALL[op] for op in OPS_ALL}
    mean, _, rstd, scale, shift = run["bn_stats"](y, gamma, beta)
    z, index = run["affine_act_maxpool"](y, scale, shift)
    sum_g, sum_gy = run["maxpool_backward_sums"](dz, index, y, mean)
    b, c, dgamma = run["bn_backward_finalize"](sum_g, sum_gy, rstd, scale, float(y.numel() // y.shape[1]))
    return z, run["maxpool_backward_apply"](dz, index, y, mean, scale, b, c), dgamma, sum_g


def _autograd(y: torch.Tensor, dz: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in (y, gamma, beta)]
    z = F.max_pool2d(F.relu(F.batch_norm(leaves[0], None, None, *leaves[1:], training=True)), 3, 2, 1)
    return z, *torch.autograd.grad(z, leaves, dz)


@pytest.mark.parametrize("case", CASES[:3] + CASES[-len(IMAGES) + 3 :])
def test_definitions_are_the_gradient(case: Case) -> None:
    """All of the stem against autograd through F.max_pool2d(F.relu(F.batch_norm(y))), in float64."""
    kwargs = inputs("bn_stats", case, torch.float64)
    dz = inputs("maxpool_backward_sums", case, torch.float64)["dz"]
    if case.NPQ == 1:
        pytest.skip("eager batch norm refuses a single value per channel")
    operands = (kwargs["y"], dz, kwargs["gamma"], kwargs["beta"])
    for ours, theirs in zip(_whole(*operands, definitions=True), _autograd(*operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [THREADS, IMAGES[4], IMAGES[7]], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_ops_together_are_the_gradient(dtype: torch.dtype, case: Case) -> None:
    """The ops as dispatch runs them, against float64 and beside eager torch in the same dtype.

    Few values, all apart: rounding leaves no doubt of which wins its window.
    """
    kwargs = inputs("bn_stats", case, dtype)
    n, k, p, q = case.y_size
    order = torch.stack([torch.randperm(n * p * q, generator=torch.Generator().manual_seed(i)) for i in range(k)])
    y = (order.view(k, n, p, q).transpose(0, 1) % 97 - 40).to(dtype).contiguous(memory_format=torch.channels_last)
    dz = inputs("maxpool_backward_sums", case, dtype)["dz"]
    gamma, beta = kwargs["gamma"].abs() + 0.5, kwargs["beta"]
    wide = [t.double() for t in (y, dz, gamma, beta)]
    ours, torchs = _whole(y, dz, gamma, beta, definitions=False), _autograd(y, dz, gamma, beta)
    again = _whole(y, dz, gamma, beta, definitions=True)
    assert_all_close(ours, _whole(*wide, definitions=True), torchs, again=again)


def test_eager_and_definition_are_one_function() -> None:
    """The rule's two legs agree in float64."""
    for op in OPS:
        kwargs = inputs(op, ODD, torch.float64)
        for ours, theirs in zip(*(_tuple(f(op, kwargs)) for f in (eager, reference)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else value


# ---- a whole stem in one kernel

#: Every tail of a tile of 8 x 8 pixels of z, 32 x 32 of x; one pixel; more than one image.
STEMS = ((1, 35, 37), (2, 1, 1), (1, 4, 33), (3, 6, 3), (1, 32, 64), (1, 61, 8))
WHOLE = [p for p in backends("whole_stem", LOW) if p.values[:2] in (("cuda_on_cpu", "cpu"), ("native", "cuda"))]


def _has_kernel(name: str, kwargs: dict[str, Any]) -> bool:
    module = cuda_on_cpu.native() if name == "cuda_on_cpu" else backend("native")
    x, w = kwargs["x"], kwargs["w"]
    return module.whole_stem_why_not(x.device, x.dtype, list(x.shape), list(w.shape)) is None


@pytest.mark.parametrize("case", ["1x1", "threads", "K9", "N1", "image_1x1", "C3_K7"])
@pytest.mark.parametrize("op, variant, name, device, dtype", variants("whole_stem"))
def test_stem_of_any_shape(op: str, variant: str, name: str, device: str, dtype: torch.dtype, case: str) -> None:
    """Without a kernel it is made of a convolution and one pass."""
    check(op, inputs(op, next(c for c in TINY + NASTY if c.name == case), dtype, device, variant=variant), name)


@pytest.mark.parametrize("n, h, w", STEMS)
@pytest.mark.parametrize("name, device, dtype", WHOLE)
def test_whole_stem(name: str, device: str, dtype: torch.dtype, n: int, h: int, w: int) -> None:
    kwargs = inputs("whole_stem", WHOLE_STEM._replace(N=n, H=h, W=w), dtype, device)
    assert _has_kernel(name, kwargs)
    check("whole_stem", kwargs, name)


@pytest.mark.parametrize("name, device, dtype", WHOLE)
def test_whole_stem_with_nan(name: str, device: str, dtype: torch.dtype) -> None:
    """It goes where torch's goes, in each operand in turn; infinities in x, too."""
    case = WHOLE_STEM._replace(H=21, W=22)
    for key in ("x", "w", "scale", "shift"):
        kwargs = inputs("whole_stem", case, dtype, device)
        kwargs[key][(0, 1, 9, 10)[: kwargs[key].dim()] if key == "x" else (0,) * kwargs[key].dim()] = torch.nan
        ours, torchs = run("whole_stem", kwargs, name), eager("whole_stem", kwargs)
        assert torchs.isnan().any()
        if key == "w":  # a matrix product multiplies the padding by it, too
            assert (ours.isnan() >= torchs.isnan()).all()
        else:
            assert torch.equal(ours.isnan(), torchs.isnan()), f"NaN in {key}"
    kwargs = inputs("whole_stem", case, dtype, device)
    kwargs["x"][0, 2, 8, 13] = torch.inf
    assert torch.equal(run("whole_stem", kwargs, name).isnan(), eager("whole_stem", kwargs).isnan())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name, device, dtype", [p for p in WHOLE if p.values[2] == torch.bfloat16])
def test_whole_stem_in_any_layout(name: str, device: str, dtype: torch.dtype, layout: str) -> None:
    case = WHOLE_STEM._replace(H=9, W=11)
    check("whole_stem", inputs("whole_stem", case, dtype, device, layout=layout), name)


@needs_machine
def test_whole_stem_has_reasons() -> None:
    native, cpu = cuda_on_cpu.native(), torch.device("cpu")
    assert cuda_on_cpu.kernels().whole_stem_shared() == 78144  # two blocks on a multiprocessor of sm_80 and sm_90
    for dtype, x, w, reason in (
        (torch.float32, [1, 3, 9, 9], [64, 3, 7, 7], "dtype float32"),
        (torch.float16, [1, 4, 9, 9], [64, 3, 7, 7], "on 4 channels"),
        (torch.float16, [1, 3, 9, 9], [32, 3, 7, 7], r"a filter (32, 3, 7, 7)"),
        (torch.float16, [2**22, 3, 999, 999], [64, 3, 7, 7], "below 2^31 tiles"),
    ):
        assert reason in (native.whole_stem_why_not(cpu, dtype, x, w) or ""), reason
    with cuda_on_cpu.shared_memory(64 << 10):
        assert "needs 78144 bytes" in native.whole_stem_why_not(cpu, torch.float16, [1, 3, 9, 9], [64, 3, 7, 7])
    assert "supported: cuda" in backend("native").whole_stem_why_not(cpu, torch.float16, [1, 3, 9, 9], [64, 3, 7, 7])
    kwargs = inputs("whole_stem", WHOLE_STEM, torch.float16)
    for key in ("w", "scale"):
        with pytest.raises(ValueError, match=f"{key}: found "):
            native.whole_stem(**{**kwargs, key: kwargs[key].float() if key == "w" else kwargs[key][:-1]})
