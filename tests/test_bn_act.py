"""The memory-bound ops, bn_stats to bn_backward_apply, on every backend: against float64, and bit against bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import ops
from resnet_fast.dispatch import BackendError, backend, reasons, use_backend
from tests.able import needs_native, why_no_native
from tests.cases import LAYOUTS, NASTY, TINY, VARIANTS, Case, inputs
from tests.eager import eager
from tests.isa import every_isa, run_again
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

OPS = (
    "bn_stats",
    "bn_finalize",
    "affine_act",
    "affine_act_mask",
    "affine_act_backward",
    "bn_backward_sums",
    "bn_backward_finalize",
    "bn_backward_apply",
)
#: No sums over N, P and Q.
ELEMENTWISE = ("bn_finalize", "affine_act", "affine_act_mask", "bn_backward_finalize", "bn_backward_apply")
CASES = [pytest.param(case, id=case.name) for case in TINY + NASTY]
BY_NAME = {case.name: case for case in TINY + NASTY}
THREADS, ODD = BY_NAME["threads"], BY_NAME["K9"]


def _has(name: str, op: str) -> bool:
    return name == "torch" or reasons(op, torch.device("cpu"), torch.float32)[name] is None


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
    if name == "torch" and op not in ELEMENTWISE:  # torch's own sums go in the order of memory
        assert_all_close(other, reference(op, inputs(op, ODD, dtype, device, variant=variant)), plain)
    else:
        assert_same_bits(plain, other)


@pytest.mark.parametrize("op, variant, name, device, dtype", [p for p in variants(*OPS) if p.values[2] == "native"])
def test_same_bits_twice_and_by_any_number_of_threads(
    op: str, variant: str, name: str, device: str, dtype: torch.dtype
) -> None:
    assert_same_bits_by_any_threads(op, inputs(op, THREADS, dtype, device, variant=variant), name)


@pytest.mark.parametrize("rows, k", [(7, 520), (35, 520), (7, 2100), (35, 2100)])
@pytest.mark.parametrize(
    "op, variant, name, device, dtype", [p for p in variants("affine_act_backward") if p.values[2] == "native"]
)
def test_wide_threads(op: str, variant: str, name: str, device: str, dtype: torch.dtype, rows: int, k: int) -> None:
    """Rows of more than one block of channels; 7 of them are one tile of whole rows, or several for two threads."""
    kwargs = inputs(op, Case(f"{rows}x{k}", 1, 1, rows, 1, k, 1, 1, 0), dtype, device, variant=variant)
    check(op, kwargs, name)
    assert_same_bits_by_any_threads(op, kwargs, name)


@pytest.mark.parametrize("name, device, dtype", backends("affine_act"))
def test_relu_keeps_nan_and_infinities(name: str, device: str, dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    tiny = torch.finfo(dtype).smallest_normal
    values = [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, 1, -1]
    y = torch.tensor(values, dtype=dtype, device=device).repeat(19).view(1, 11, 19, 1)
    one, zero = torch.ones(11, device=device), torch.zeros(11, device=device)
    for relu, expected in ((True, torch.relu(y)), (False, y)):
        assert_same_bits(run("affine_act", {"y": y, "scale": one, "shift": zero, "relu": relu}, name), expected)
    # inf - inf, 0 * inf
    residual = y.flip(1)
    kwargs = {"y": y, "scale": one, "shift": zero, "residual": residual}
    assert_same_bits(run("affine_act", kwargs, name), torch.relu(y + residual))
    kwargs = {"y": y, "scale": zero, "shift": one}
    assert_same_bits(run("affine_act", kwargs, name), torch.relu(y * 0 + 1))


@pytest.mark.parametrize("name, device, dtype", backends("affine_act_backward"))
def test_gradient_passes_where_torchs_does(name: str, device: str, dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1, -1], dtype=dtype, device=device)
    z, dz = (t.reshape(1, 7, 7, 1) for t in torch.meshgrid(values, values, indexing="ij"))
    zero, one = torch.zeros(7, device=device), torch.ones(7, device=device)
    expected = torch.ops.aten.threshold_backward(dz, z, 0)
    g, sum_g, _, sum_gr = run("affine_act_backward", {"dz": dz, "z": z, "y": torch.ones_like(z), "mean": zero}, name)
    assert_same_bits(g, expected)
    assert_same_bits(sum_g, expected.float().sum((0, 2, 3)))
    assert not sum_gr.any()
    masked = {"dz": dz, "y": z, "mean": zero, "scale": one, "shift": zero}
    sums = run("bn_backward_sums", masked, name)
    assert_same_bits(sums[0], expected.float().sum((0, 2, 3)))
    dy = run("bn_backward_apply", {**masked, "a": one, "b": zero, "c": zero}, name)
    assert_same_bits(dy, expected + (z - z))  # 0 * inf is NaN


@pytest.mark.parametrize("name, device, dtype", backends("bn_stats"))
def test_mean_of_a_thousand_deviations(name: str, device: str, dtype: torch.dtype) -> None:
    """E[y^2] - E[y]^2 would leave nothing of the variance. (No ReLU: rounding chooses where its border lies.)"""
    for op, variant in (("bn_stats", "plain"), ("bn_backward_sums", "linear"), ("bn_backward_apply", "linear")):
        kwargs = inputs(op, THREADS, torch.float32, device, variant=variant)
        kwargs["y"] = (kwargs["y"] + 1000).to(dtype)
        if "mean" in kwargs:
            kwargs["mean"] = kwargs["y"].double().mean((0, 2, 3)).float()
            kwargs["dz"] = kwargs["dz"].to(dtype)
        check(op, kwargs, name)


# ---- masks


@pytest.mark.parametrize("k", [1, 7, 8, 9, 31, 33, 70])
@pytest.mark.parametrize("name, device, dtype", backends("affine_act_mask"))
def test_mask_is_of_z_as_stored(name: str, device: str, dtype: torch.dtype, k: int) -> None:
    """NaN passes; what rounds to 0 does not; the bits behind the last channel are 0."""
    inf, nan, tiny = torch.inf, torch.nan, torch.finfo(dtype).smallest_normal
    values = [nan, -nan, inf, -inf, 0.0, -0.0, tiny, -tiny, 1, -1, nan, 2, -2]
    y = torch.tensor(values, dtype=dtype, device=device).repeat(k).view(1, 13, k, 1).transpose(1, 2)
    # A product below the smallest number of the dtype, but not of float32: z is 0 as it is stored.
    scale = torch.full((k,), torch.finfo(dtype).eps / 8 if dtype == torch.float16 else 1.0, device=device)
    z, mask = run("affine_act_mask", {"y": y, "scale": scale, "shift": torch.zeros(k, device=device)}, name)
    assert_same_bits(z, torch.relu(y * scale.to(dtype).view(-1, 1, 1)))
    bits = (mask.unsqueeze(-1) >> torch.arange(8, device=device)).flatten(3) & 1
    assert torch.equal(bits[..., :k].bool(), ~(z <= 0).permute(0, 2, 3, 1))
    assert not bits[..., k:].any() and mask.dtype == torch.uint8 and mask.is_contiguous()


@pytest.mark.parametrize("case", [ODD, THREADS, BY_NAME["K70"], BY_NAME["K600"]], ids=lambda case: case.name)
@pytest.mark.parametrize("variant", ["plain", "projection"])
@pytest.mark.parametrize("name, device, dtype", backends("affine_act_backward"))
def test_mask_stands_for_z(name: str, device: str, dtype: torch.dtype, variant: str, case: Case) -> None:
    """The backward is the same bit for bit from z and from its mask."""
    kwargs = inputs("affine_act_backward", case, dtype, device, variant=variant)
    one = torch.ones(case.K, device=device)
    z, mask = run("affine_act_mask", {"y": kwargs["z"], "scale": one, "shift": 0 * one}, name)
    by_z, by_mask = (run("affine_act_backward", {**kwargs, "z": gate}, name) for gate in (z, mask))
    assert_same_bits(by_z, by_mask)


# ---- statistics


@pytest.mark.parametrize("name, device, dtype", backends("bn_finalize", dtypes=[torch.float32]))
def test_statistics_of_parts_are_those_of_the_whole(name: str, device: str, dtype: torch.dtype) -> None:
    """Parts of all sizes, empty ones and single values among them, at mean / std = 1000 too."""
    for offset in (0.0, 1000.0):
        y = offset + inputs("bn_stats", THREADS, dtype, device)["y"]
        norm = {k: v for k, v in inputs("bn_stats", THREADS, dtype, device).items() if k != "y"}
        whole = run("bn_stats", {"y": y, **norm}, name)
        pixels = y.permute(1, 0, 2, 3).flatten(1)
        parts = [
            t.t().reshape(-1, y.shape[1], 1, 1) for t in pixels.split([0, 1, 499, 0, 300, pixels.shape[1] - 800], 1)
        ]
        found = [ops.bn_stats.definition(part) for part in parts]
        n = torch.tensor([float(len(part)) for part in parts], device=device)
        mean, var = (torch.stack([t[i] for t in found]) for i in range(2))
        merged = run("bn_finalize", {"n": n, "mean": mean, "var": var, **norm}, name)
        for ours, theirs in zip(merged, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * offset + 1e-6)


@pytest.mark.parametrize("name, device, dtype", backends("bn_finalize", dtypes=[torch.float32]))
def test_parts_that_are_all_empty(name: str, device: str, dtype: torch.dtype) -> None:
    kwargs = inputs("bn_finalize", ODD, dtype, device)
    kwargs.update(n=torch.zeros(3, device=device), mean=0 * kwargs["mean"], var=0 * kwargs["var"])
    expected = run("bn_stats", {**inputs("bn_stats", BY_NAME["empty"]._replace(K=ODD.K), device=device)}, "torch")
    mean, var, rstd, scale, shift = run("bn_finalize", kwargs, name)
    assert not mean.any() and not var.any()
    torch.testing.assert_close((rstd, scale, shift), expected[2:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name, device, dtype", backends("bn_stats"))
def test_nan_and_infinities_stay_in_their_channel(name: str, device: str, dtype: torch.dtype) -> None:
    kwargs = inputs("bn_stats", BY_NAME["K70"], dtype, device)
    clean = run("bn_stats", kwargs, name)
    for channel, value in ((0, torch.nan), (33, torch.inf), (69, -torch.inf)):
        kwargs["y"][1, channel, 2, 3] = value
    found = run("bn_stats", kwargs, name)
    spoilt = torch.zeros(70, dtype=torch.bool, device=device)
    spoilt[[0, 33, 69]] = True
    for ours, before in zip(found, clean, strict=True):
        assert not ours[spoilt].isfinite().any()
        assert_same_bits(ours[~spoilt], before[~spoilt])


@pytest.mark.parametrize("op, variant, name, device, dtype", variants(*OPS))
def test_nan_goes_where_torchs_goes(op: str, variant: str, name: str, device: str, dtype: torch.dtype) -> None:
    """One NaN, with bits that rounding would turn into a number, in each tensor in turn."""
    for key, value in inputs(op, ODD, dtype, device, variant=variant).items():
        if not isinstance(value, torch.Tensor) or value.dtype == torch.uint8:
            continue
        kwargs = inputs(op, ODD, dtype, device, variant=variant)
        bits = torch.int32 if value.dtype == torch.float32 else torch.int16
        kwargs[key].view(bits)[(0,) * value.dim()] = torch.iinfo(bits).max
        ours, torchs = run(op, kwargs, name), eager(op, kwargs)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (ours, torchs)), strict=True):
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan()), f"{op}: NaN in {key}"


@pytest.mark.parametrize("name, device, dtype", backends("bn_backward_finalize", dtypes=[torch.float32]))
def test_finalize_of_an_empty_batch(name: str, device: str, dtype: torch.dtype) -> None:
    kwargs = {**inputs("bn_backward_finalize", ODD, dtype, device), "n": 0.0}
    b, c, dgamma = run("bn_backward_finalize", kwargs, name)
    assert not b.any() and not c.any()
    torch.testing.assert_close(dgamma, kwargs["rstd"] * kwargs["sum_gy"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, device, dtype", backends("bn_stats"))
def test_finalize_makes_the_gradient_of_eager_batch_norm(name: str, device: str, dtype: torch.dtype) -> None:
    """bn_stats, affine_act, then sums, finalize and apply, all on one backend, against autograd in float64."""
    case = BY_NAME["NPQ_off_every_block"]
    kwargs = inputs("bn_stats", case, dtype, device)
    dz = inputs("bn_backward_sums", case, dtype, device)["dz"]

    if name == "cuda_on_cpu" or not all(_has(name, op) for op in OPS):
        pytest.skip(f"{name} has not all of these ops as dispatch calls them")

    def whole() -> tuple[torch.Tensor, ...]:
        with use_backend(name):
            mean, var, rstd, scale, shift = ops.bn_stats(**kwargs)
            z = ops.affine_act(kwargs["y"], scale, shift)
            sums = ops.bn_backward_sums(dz, kwargs["y"], mean, scale, shift)
            b, c, dgamma = ops.bn_backward_finalize(*sums, rstd, scale, float(case.NPQ))
            dy = ops.bn_backward_apply(dz, kwargs["y"], mean, scale, b, c, scale, shift)
        return z, dy, dgamma, sums[0], mean, var

    def autograd(wide: torch.dtype, statistics: torch.dtype) -> tuple[torch.Tensor, ...]:
        y = kwargs["y"].to(wide).requires_grad_()
        gamma, beta = (kwargs[k].to(statistics).requires_grad_() for k in ("gamma", "beta"))
        mean, var = torch.zeros_like(gamma), torch.zeros_like(gamma)
        norm = F.batch_norm(y, mean.detach(), var.detach(), gamma, beta, True, 1.0, kwargs["eps"])
        z = torch.relu(norm)
        dy, dgamma, dbeta = torch.autograd.grad(z, (y, gamma, beta), dz.to(wide))
        wide_y = kwargs["y"].double()
        return z, dy, dgamma, dbeta, wide_y.mean((0, 2, 3)).to(statistics), wide_y.var((0, 2, 3)).to(statistics)

    assert_all_close(whole(), autograd(torch.float64, torch.float64), autograd(dtype, torch.float32))


def test_expanded_gradient() -> None:
    """z.sum().backward() sends a gradient of one element, expanded."""
    kwargs = inputs("affine_act_backward", ODD)
    kwargs["dz"] = torch.ones(()).expand_as(kwargs["dz"])
    for name in ("native", "torch") if why_no_native is None else ("torch",):
        check("affine_act_backward", kwargs, name)


def test_inputs_are_not_written() -> None:
    for op in OPS:
        for variant in VARIANTS[op]:
            kwargs = inputs(op, ODD, variant=variant)
            getattr(ops, op)(**kwargs)
            for key, value in inputs(op, ODD, variant=variant).items():
                assert torch.equal(torch.as_tensor(kwargs[key]), torch.as_tensor(value)), f"{op}: {key}"


# ---- what the native kernels refuse


def _wrong(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same argument with a shape, dtype or device that it must not have."""
    if value.dim() == 1:
        return {
            "longer": value.repeat(2),
            "shorter": value[:1],
            "scalar": value[0],
            "matrix": value[None],
            "device": value.to("meta"),
        }
    if value.dim() == 2:
        return {"fewer": value[1:], "shorter": value[:, 1:], "3d": value[None], "1d": value[0]}
    return {
        "smaller": value[:, :, 1:],
        "3d": value[0],
        "broadcast": value[:1, :, :1, :1],
        "dtype": value.double(),
        "device": value.to("meta"),
    }


#: The argument that says what the others must be, where it is not y.
MEASURE = {"bn_finalize": "mean", "bn_backward_finalize": "sum_g"}


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_native_names_the_argument_that_is_wrong(op: str) -> None:
    """Called as dispatch calls them: a kernel sees addresses, so nothing wrong may come through."""
    function = getattr(backend("native"), op)
    for variant in VARIANTS[op]:
        kwargs = inputs(op, ODD, variant=variant)
        for name, value in kwargs.items():
            if not isinstance(value, torch.Tensor) or name == MEASURE.get(op, "y"):
                continue
            for what, wrong in _wrong(value).items():
                with pytest.raises(ValueError, match=rf"^{name}: found .*(expected|supported)"):
                    function(**{**kwargs, name: wrong})
                    pytest.fail(f"{op}: {name} accepted with wrong {what}")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_native_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with use_backend("native"), pytest.raises(BackendError, match=rf"dtype {name_of(dtype)} \(supported: float32"):
        ops.bn_stats(torch.ones(1, 2, 3, 3, dtype=dtype))


@needs_native
def test_native_takes_vectors_of_any_dtype_and_stride() -> None:
    kwargs = inputs("affine_act", ODD)
    expected = run("affine_act", kwargs, "native")
    kwargs["scale"] = torch.stack([kwargs["scale"], kwargs["shift"]], 1)[:, 0]
    kwargs["shift"] = kwargs["shift"].double()
    assert_same_bits(run("affine_act", kwargs, "native"), expected)


@needs_native
@pytest.mark.parametrize("op, names", [("affine_act", ("rscale", "rshift")), ("bn_backward_apply", ("scale", "shift"))])
def test_native_needs_both_vectors_of_an_affine(op: str, names: tuple[str, str]) -> None:
    """One without the other is as none, as in the definitions: a kernel would read the other at address 0."""
    kwargs = inputs(op, ODD, variant="projection" if op == "affine_act" else "masked")
    neither = run(op, {**kwargs, **dict.fromkeys(names)}, "native")
    for name in names:
        assert_same_bits(run(op, {**kwargs, name: None}, "native"), neither)


# ---- the fingerprint of memory


@needs_native
@pytest.mark.parametrize("size", [(5,), (4099,), (64, 64, 3, 3)], ids=str)
def test_fingerprint_sees_values_and_order(size: tuple[int, ...]) -> None:
    fingerprint = backend("native").fingerprint
    a, b = torch.randn(size), torch.randn(size)
    before = fingerprint([a, b])
    assert before == fingerprint((a, b)) == fingerprint([a.clone(), b.clone()])
    assert len({before, fingerprint([b, a]), fingerprint([a]), fingerprint([])}) == 4
    a.data.mul_(2)
    assert fingerprint([a, b]) != before


@needs_native
def test_fingerprint_reads_a_tensors_own_values_alone() -> None:
    """Memory between the values of a view, or behind those of an expanded tensor, is not the tensor's."""
    fingerprint = backend("native").fingerprint
    channels_last = torch.randn(6, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    whole = torch.randn(40, 8)
    views = [whole[:, 1], whole.t()[2:4], whole[:1, :1].expand(30, 50), whole[0].expand(4, 8)]
    for t in (channels_last, *views):
        before = fingerprint([t])
        assert fingerprint([t]) == before
        copy = t.clone(memory_format=torch.preserve_format if t is channels_last else torch.contiguous_format)
        unchanged = fingerprint([copy])
        copy += 1
        assert fingerprint([copy]) != unchanged
    before = fingerprint(views)
    whole[20:, 4:] += 1
    assert fingerprint(views) == before
    whole[0, 0] += 1
    assert fingerprint(views) != before


# ---- every instruction set


@needs_native
@every_isa
def test_instruction_set(isa: str) -> None:
    tests = "relu or gradient_passes or thousand or mask or window or nan or finite or K8 or K9 or K70 or threads"
    files = __file__, str(Path(__file__).with_name("test_stem.py"))
    run_again(isa, f"native and cpu and ({tests} or image)", 100, *files, options=("-m", "not gpu"))


@needs_native
def test_unknown_instruction_set_is_refused() -> None:
    probe = "import torch\nfrom resnet_fast import _C\n_C.cpu.isa()"
    env = {**os.environ, "RESNET_FAST_ISA": "mmx"}
    found = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode != 0 and "RESNET_FAST_ISA=mmx: not built" in found.stderr


# ---- the definitions


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_backward_definitions_are_the_gradient(relu: bool) -> None:
    """bn_backward_sums and bn_backward_apply against autograd through bn_stats and affine_act, in float64."""
    y = torch.randn(3, 5, 4, 6, dtype=torch.float64).requires_grad_()
    gamma, beta = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    mean, _, rstd, scale, shift = ops.bn_stats.definition(y, gamma, beta)
    z = ops.affine_act.definition(y, scale, shift, relu=relu)
    dz = torch.randn_like(z)
    expected = torch.autograd.grad(z, (y, gamma, beta), dz)

    with torch.no_grad():
        mask = (scale, shift) if relu else ()
        sum_g, sum_gy = ops.bn_backward_sums.definition(dz, y, mean, *mask)
        b, c, dgamma = ops.bn_backward_finalize.definition(sum_g, sum_gy, rstd, scale, y.numel() / y.shape[1])
        dy = ops.bn_backward_apply.definition(dz, y, mean, scale, b, c, *mask)
    for found, wanted in zip((dy, dgamma, sum_g), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_end_of_block_definition_is_the_gradient() -> None:
    """affine_act_backward against autograd through an affine_act with a residual of its own batch norm."""
    case = Case("end", 2, 4, 5, 3, 6, 1, 1, 0)
    kwargs = inputs("affine_act", case, torch.float64, variant="projection")
    leaves = [kwargs[k].requires_grad_() for k in ("y", "scale", "shift", "residual", "rscale", "rshift")]
    z = ops.affine_act.definition(**kwargs)
    dz = torch.randn_like(z)
    dy, dscale, dshift, dr, drscale, drshift = torch.autograd.grad(z, leaves, dz)
    zero = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        y, scale, _, residual, rscale, _ = leaves
        g, sum_g, sum_gy, sum_gr = ops.affine_act_backward.definition(dz, z, y, zero, residual, zero)
    for found, wanted in (
        (g * scale.view(-1, 1, 1), dy),
        (g * rscale.view(-1, 1, 1), dr),
        (sum_g, dshift),
        (sum_g, drshift),
        (sum_gy, dscale),
        (sum_gr, drscale),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_lazy_and_eager_agree_on_what_a_gradient_is() -> None:
    """The rule's own second leg: eager's composition and the definition are the same function in float64."""
    for op in OPS:
        for variant in VARIANTS[op]:
            kwargs = inputs(op, ODD, torch.float64, variant=variant)
            if op == "bn_stats":  # eager's goes through 1 / sqrt(var + eps)
                torch.testing.assert_close(eager(op, kwargs), reference(op, kwargs), rtol=1e-6, atol=1e-6)
            else:
                torch.testing.assert_close(eager(op, kwargs), reference(op, kwargs), rtol=1e-12, atol=1e-12)
