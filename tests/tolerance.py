"""The rule of tolerance, and the two things it compares with: the op in float64, and eager torch in the same dtype.

    max|ours - ref64| <= 2 max|torch - ref64| + 4 eps(dtype) max|ref64|

``ref64`` is the definition, run in float64 on the same (already rounded) inputs. ``torch`` is what plain eager torch
makes of them in their own dtype, by its own batch_norm, relu and convolution. NaN and infinities must stand in the same
places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.dispatch import BACKENDS, OPS, backend, reasons, use_backend
from resnet_fast.ops import stats_dtype
from tests import cuda_on_cpu
from tests.cases import VARIANTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Kwargs = dict[str, Any]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the rule


def assert_close(
    ours: Tensor | None,
    ref64: Tensor | None,
    torchs: Tensor | None,
    what: str = "result",
    again: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """The rule, for one tensor. A gradient may be None, if it is None in all three.

    ``again`` is a second run of torch, in another layout or order: one run is a single draw of its rounding errors,
    so the larger of the two counts. ``dtype``: that of the arithmetic, where autocast makes it another than ours.
    """
    if ours is None or ref64 is None or torchs is None:
        assert ours is None and ref64 is None and torchs is None, f"{what}: some are None, some are not"
        return
    assert ours.shape == ref64.shape == torchs.shape, f"{what}: {ours.shape}, {ref64.shape}, {torchs.shape}"
    if ours.numel() == 0:
        return
    eps = torch.finfo(dtype or ours.dtype).eps
    ours, ref64, torchs = (t.detach().to("cpu", torch.float64) for t in (ours, ref64, torchs))
    # What is finite in float64 may overflow in torch's own dtype: ours must do as torch does.
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = int((kind(ours) != kind(torchs)).sum())
        assert wrong == 0, f"{what}: {kind.__name__} differs from torch's in {wrong} places of {ours.numel()}"
    finite = ours.isfinite() & ref64.isfinite()
    if not finite.any():
        return
    error, torchs_error = ((t - ref64)[finite].abs().amax().item() for t in (ours, torchs))
    if again is not None:
        torchs_error = max(torchs_error, (again.detach().cpu() - ref64)[finite].abs().amax().item())
    largest = ref64[finite].abs().amax().item()
    bound = 2 * torchs_error + 4 * eps * largest
    assert error <= bound, (
        f"{what}: error {error:.3e}, torch's own {torchs_error:.3e}, bound {bound:.3e}, max|ref| {largest:.3e}"
    )


def assert_all_close(ours: Any, ref64: Any, torchs: Any, what: str = "output", again: Any = None) -> None:
    """The rule, for a tensor or a tuple of them."""
    runs = [(t,) if isinstance(t, Tensor) else t for t in (ours, ref64, torchs)]
    again = (again,) if isinstance(again, Tensor) else again or [None] * len(runs[0])
    for i, (a, b, c, d) in enumerate(zip(*runs, again, strict=True)):
        assert_close(a, b, c, f"{what} {i}", d)


def assert_same_bits(one: Any, other: Any) -> None:
    """Equal in every bit, NaN included."""
    if isinstance(one, Tensor):
        one, other = (one,), (other,)
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125)), f"output {i}"
        assert torch.equal(a.isnan(), b.isnan()), f"output {i}: NaN"


# ---- the op in float64, and as eager torch computes it


def to_float64(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def reference(op: str, kwargs: Kwargs) -> Any:
    """The definition in float64."""
    return OPS[op].definition(**{k: to_float64(v) for k, v in kwargs.items()})


def _affine(y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None = None) -> Tensor:
    """(y - mean) * scale + shift, by eager batch norm in eval mode."""
    mean = torch.zeros_like(scale) if mean is None else mean
    return F.batch_norm(y, mean, torch.ones_like(scale), scale, shift, eps=0)


def _eager_affine_act(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    z = _affine(y, scale, shift)
    if residual is not None:
        z = z + (residual if rscale is None or rshift is None else _affine(residual, rscale, rshift))
    return torch.relu(z) if relu else z


def _eager_normalise(
    mean: Tensor, var: Tensor, biased: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    rstd = (biased + eps).rsqrt()
    scale = rstd if gamma is None else gamma * rstd
    return mean, var, rstd, scale, (0 if beta is None else beta) - mean * scale


def _eager_bn_stats(
    y: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, ...]:
    one = torch.ones(y.shape[1], dtype=stats_dtype(y.dtype), device=y.device)
    _, mean, rstd = torch.native_batch_norm(y, one, 0 * one, None, None, True, 0.0, eps)
    n = y.numel() // max(y.shape[1], 1)
    biased = rstd**-2 - eps
    return _eager_normalise(mean, biased * n / max(n - 1, 1), biased, gamma, beta, eps)


def _eager_bn_finalize(
    n: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Over the moments E[y] and E[y^2], the other way to merge."""
    share = (n / n.sum()).unsqueeze(1)
    merged = (share * mean).sum(0)
    square = (share * mean.square() + var * (n - 1).clamp(min=0).unsqueeze(1) / n.sum()).sum(0)
    biased = square - merged.square()
    return _eager_normalise(merged, biased * n.sum() / (n.sum() - 1), biased, gamma, beta, eps)


def _eager_sums(g: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(mean)
    _, sum_gy, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, y, one, None, None, mean, one, True, 0.0, [True, True, True]
    )
    return sum_g, sum_gy


def _eager_affine_act_mask(y: Tensor, scale: Tensor, shift: Tensor, *residual: Tensor, **rest: Tensor) -> Any:
    z = _eager_affine_act(y, scale, shift, *residual, **rest)
    bits = F.pad(~(z <= 0).permute(0, 2, 3, 1), (0, -z.shape[1] % 8))
    mask = sum(bits[..., i::8].to(torch.uint8) << i for i in range(8))
    return z, mask


def _eager_mask(dz: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return dz
    return torch.ops.aten.threshold_backward(dz, _eager_affine_act(y, scale, shift), 0)


def _eager_affine_act_backward(
    dz: Tensor, z: Tensor, y: Tensor, mean: Tensor, residual: Tensor | None = None, rmean: Tensor | None = None
) -> tuple[Tensor, ...]:
    if z.dtype == torch.uint8:
        bits = torch.stack([(z >> i) & 1 for i in range(8)], -1).flatten(3)[..., : dz.shape[1]]
        z = bits.permute(0, 3, 1, 2).to(dz.dtype)
    g = torch.ops.aten.threshold_backward(dz, z, 0)
    if residual is None or rmean is None:
        return (g, *_eager_sums(g, y, mean), torch.zeros_like(mean))
    return (g, *_eager_sums(g, y, mean), _eager_sums(g, residual, rmean)[1])


def _eager_bn_backward_sums(
    dz: Tensor, y: Tensor, mean: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    return _eager_sums(_eager_mask(dz, y, scale, shift), y, mean)


def _eager_bn_backward_apply(
    dz: Tensor,
    y: Tensor,
    mean: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    g = _eager_mask(dz, y, scale, shift)
    return _affine(g, a, torch.zeros_like(a)) + _affine(y, b, c, mean)


def _eager_bn_backward_finalize(sum_g: Tensor, sum_gy: Tensor, rstd: Tensor, scale: Tensor, n: float) -> Any:
    dgamma = sum_gy * rstd
    if n == 0:
        return torch.zeros_like(scale), torch.zeros_like(scale), dgamma
    return -scale * rstd * dgamma / n, -scale * sum_g / n, dgamma


def _eager_affine_act_maxpool(y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The index by unfolding: which of nine comes first."""
    full = _eager_affine_act(y, scale, shift)
    n, k, h, w = full.shape
    p, q = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    windows = F.pad(full, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).reshape(n, k, p, q, 9)
    z, index = windows.max(-1)
    return z, index.masked_fill(z <= 0, 9).to(torch.uint8)


def _eager_unpool(dz: Tensor, index: Tensor, y: Tensor) -> Tensor:
    w, (p, q) = y.shape[3], dz.shape[2:]
    row = 2 * torch.arange(p, device=y.device).view(-1, 1) - 1 + index.long() // 3
    flat = row * w + 2 * torch.arange(q, device=y.device) - 1 + index.long() % 3
    blocked = index == 9
    flat, dz = flat.masked_fill(blocked, 0), dz.masked_fill(blocked, 0).contiguous()
    y = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # max_pool2d's backward looks at its size
    return torch.ops.aten.max_pool2d_with_indices_backward(
        dz, y, [3, 3], [2, 2], [1, 1], [1, 1], False, flat.contiguous()
    )


def _eager_maxpool_backward_sums(dz: Tensor, index: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
    return _eager_sums(_eager_unpool(dz, index, y), y, mean)


def _eager_maxpool_backward_apply(
    dz: Tensor, index: Tensor, y: Tensor, mean: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    return _eager_bn_backward_apply(_eager_unpool(dz, index, y), y, mean, a, b, c)


def _eager_activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if scale is None or shift is None else _eager_affine_act(x, scale, shift)


def _eager_conv_stats(
    x: Tensor, w: Tensor, *geometry: Any, scale: Tensor | None = None, shift: Tensor | None = None, **norm: Any
) -> tuple[Tensor, ...]:
    y = F.conv2d(_eager_activation(x, scale, shift), w, None, *geometry)
    return (y, *_eager_bn_stats(y, **norm))


def _eager_conv_dgrad(g: Tensor, w: Tensor, input_size: list[int], *geometry: Any, **lazy: Tensor) -> Tensor:
    dy = _eager_bn_backward_apply(g, **lazy) if lazy else g
    return torch.nn.grad.conv2d_input(input_size, w, dy, *geometry)


def _eager_conv_wgrad(
    g: Tensor,
    x: Tensor,
    weight_size: list[int],
    *geometry: Any,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **lazy: Tensor,
) -> Tensor:
    dy = _eager_bn_backward_apply(g, **lazy) if lazy else g
    return torch.nn.grad.conv2d_weight(_eager_activation(x, scale, shift), weight_size, dy, *geometry)


def _eager_conv_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    *geometry: Any,
    needs_x: bool,
    needs_w: bool,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gscale: Tensor | None = None,
    gshift: Tensor | None = None,
    residual: Tensor | None = None,
    **lazy: Tensor,
) -> tuple[Tensor, Tensor]:
    assert needs_x and needs_w
    dy = _eager_bn_backward_apply(g, **lazy, scale=gscale, shift=gshift) if lazy else g
    dx = torch.nn.grad.conv2d_input(x.shape, w, dy, *geometry)
    dx = dx if residual is None else dx + residual
    return dx, _eager_conv_wgrad(dy, x, list(w.shape), *geometry, scale=scale, shift=shift)


def _eager_conv_backward_sums(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    *geometry: Any,
    needs_w: bool,
    xmean: Tensor,
    scale: Tensor,
    shift: Tensor,
    **lazy: Tensor,
) -> tuple[Tensor, ...]:
    dx, dw = _eager_conv_backward(g, x, w, *geometry, needs_x=True, needs_w=needs_w, scale=scale, shift=shift, **lazy)
    dx = _eager_mask(dx, x, scale, shift)
    return (dx, dw, *_eager_sums(dx, x, xmean))


def _eager_conv_affine_act(
    x: Tensor,
    w: Tensor,
    shift: Tensor,
    *geometry: Any,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    y = F.conv2d(x, w, None, *geometry)
    return _eager_affine_act(y, torch.ones_like(shift) if scale is None else scale, shift, residual, relu=relu)


def _eager_bottleneck(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    w3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    rw: Tensor | None = None,
    rscale: Tensor | None = None,
    rshift: Tensor | None = None,
) -> Tensor:
    a1 = torch.relu(_affine(F.conv2d(x, w1), scale1, shift1))
    a2 = torch.relu(_affine(F.conv2d(a1, w2, padding=1), scale2, shift2))
    side = x if rw is None or rscale is None or rshift is None else _affine(F.conv2d(x, rw), rscale, rshift)
    return torch.relu(_affine(F.conv2d(a2, w3), scale3, shift3) + side)


def _eager_whole_stem(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.conv2d(x, w, None, 2, w.shape[2] // 2)
    return F.max_pool2d(torch.relu(_affine(y, scale, shift)), 3, 2, 1)


_EAGER: dict[str, Callable[..., Any]] = {
    "bn_stats": _eager_bn_stats,
    "bn_finalize": _eager_bn_finalize,
    "affine_act": _eager_affine_act,
    "affine_act_mask": _eager_affine_act_mask,
    "affine_act_backward": _eager_affine_act_backward,
    "bn_backward_sums": _eager_bn_backward_sums,
    "bn_backward_finalize": _eager_bn_backward_finalize,
    "bn_backward_apply": _eager_bn_backward_apply,
    "affine_act_maxpool": _eager_affine_act_maxpool,
    "maxpool_backward_sums": _eager_maxpool_backward_sums,
    "maxpool_backward_apply": _eager_maxpool_backward_apply,
    "conv_stats": _eager_conv_stats,
    "conv_dgrad": _eager_conv_dgrad,
    "conv_wgrad": _eager_conv_wgrad,
    "conv_backward": _eager_conv_backward,
    "conv_backward_sums": _eager_conv_backward_sums,
    "conv_affine_act": _eager_conv_affine_act,
    "bottleneck": _eager_bottleneck,
    "whole_stem": _eager_whole_stem,
}


def eager(op: str, kwargs: Kwargs) -> Any:
    """The op as plain torch computes it in the dtype of its inputs."""
    if "stride" not in kwargs:
        return _EAGER[op](**kwargs)
    names = list(kwargs)
    lead = names[: names.index("groups") + 1]  # what stands before the options is positional
    return _EAGER[op](*(kwargs[k] for k in lead), **{k: v for k, v in kwargs.items() if k not in lead})


# ---- running an op on one backend


def run(op: str, kwargs: Kwargs, backend_name: str) -> Any:
    """The op on that backend, and on no other."""
    if backend_name == "cuda_on_cpu":
        return cuda_on_cpu.run(op, kwargs)
    with use_backend(backend_name):
        return OPS[op](**kwargs)


def assert_same_bits_by_any_threads(op: str, kwargs: Kwargs, backend_name: str) -> None:
    """The op gives the same bits on one thread and on two, and twice on two."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(op, kwargs, backend_name)
        torch.set_num_threads(2)
        assert_same_bits(run(op, kwargs, backend_name), alone)
        assert_same_bits(run(op, kwargs, backend_name), alone)
    finally:
        torch.set_num_threads(threads)


def _check_mask(kwargs: Kwargs, z: Tensor, mask: Tensor) -> None:
    """The mask is that of the z beside it."""
    one = torch.ones(z.shape[1], device=z.device)
    assert_same_bits(mask, OPS["affine_act_mask"].definition(z, one, 0 * one)[1])
    assert mask.is_contiguous()


def _check_index(kwargs: Kwargs, z: Tensor, index: Tensor) -> None:
    """Each index points at a value that, rounded, is the z beside it; those before it in the window are less."""
    y, scale, shift = kwargs["y"], kwargs["scale"], kwargs["shift"]
    assert index.is_contiguous(memory_format=torch.channels_last) and index.shape == z.shape
    assert torch.equal(index == 9, z <= 0)
    exact = torch.relu(to_float64(y) * to_float64(scale).view(1, -1, 1, 1) + to_float64(shift).view(1, -1, 1, 1))
    size = F.pad(exact, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2)
    windows = size.reshape(*z.shape, 9)
    there = index.long() != 9
    chosen = windows.gather(-1, index.long().masked_fill(~there, 4).unsqueeze(-1))
    assert not chosen.isneginf().any(), "index: points into the padding"
    # The multiply-add may round once or twice, and the store once more.
    largest = (to_float64(y).abs() * to_float64(scale).abs().view(1, -1, 1, 1)).amax() + to_float64(shift).abs().amax()
    slack = torch.finfo(y.dtype).eps * chosen.abs() + 4 * torch.finfo(torch.float32).eps * largest
    best = windows.amax(-1, keepdim=True)
    assert ((best - chosen <= slack).squeeze(-1) | ~there).all(), "index: another value of the window is larger"
    earlier = torch.arange(9, device=y.device) < index.long().unsqueeze(-1)
    tied = (windows > chosen + slack) & earlier
    assert not (tied & there.unsqueeze(-1)).any()


#: Of ops with an integer beside z: what must hold between the two. z itself obeys the rule.
_BESIDES: dict[str, Callable[..., None]] = {"affine_act_mask": _check_mask, "affine_act_maxpool": _check_index}


def check(op: str, kwargs: Kwargs, backend_name: str) -> None:
    """The op's outputs on that backend obey the rule, and are channels-last."""
    ours, ref64 = run(op, kwargs, backend_name), reference(op, kwargs)
    first = ref64 if isinstance(ref64, Tensor) else ref64[0]
    if next(iter(kwargs.values())).numel() == 0:
        assert_empty(ours, ref64)
        return
    # A second way in which plain torch may round; the definitions themselves are judged by eager torch alone.
    again = None if backend_name == "torch" else OPS[op].definition(**kwargs)
    if op == "conv_backward_sums" and backend_name == "torch":
        # Its sums are of a rounded dx behind a mask, so that eager's one draw says little: here is another.
        again = eager(op, {k: _nudged(v) for k, v in kwargs.items()})
    torchs = eager(op, kwargs)
    if op in _BESIDES:
        _BESIDES[op](kwargs, *ours)
        ours, ref64, torchs, again = (t and t[0] for t in (ours, ref64, torchs, again))
    assert_all_close(ours, ref64, torchs, op, again)
    if first.dim() == 4:
        z = ours if isinstance(ours, Tensor) else ours[0]
        assert z.is_contiguous(memory_format=torch.channels_last), f"{op}: strides {z.stride()}"


def _nudged(value: Any) -> Any:
    """A gradient or activation with its last bit rounded elsewhere: what another order of additions might give."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    generator = torch.Generator(value.device).manual_seed(0)
    noise = torch.rand(value.shape, generator=generator, device=value.device) - 0.5
    return (value.double() * (1 + noise * torch.finfo(value.dtype).eps)).to(value.dtype)


def assert_empty(ours: Any, ref64: Any) -> None:
    """Of an empty batch: the right shapes, statistics of 0 and what follows from them, sums and gradients of 0."""
    ours, ref64 = ((t,) if isinstance(t, Tensor) else t for t in (ours, ref64))
    for a, b in zip(ours, ref64, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-6, atol=0)
        assert b.isfinite().all()


def backends(op: str, dtypes: Iterable[torch.dtype] = DTYPES) -> list[Any]:
    """Parameters (backend, device, dtype) for every backend that has the op; skipped, and why, where it cannot."""
    parameters = []
    for name in (*BACKENDS, "cuda_on_cpu", "torch"):
        for device in ("cpu", "cuda"):
            if _never(name, op, device):
                continue
            for dtype in dtypes:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                if (device == "cpu" or torch.cuda.is_available()) and (
                    reason := cuda_on_cpu.why_not()
                    if name == "cuda_on_cpu"
                    else reasons(op, torch.device(device), dtype)[name]
                ):
                    marks.append(pytest.mark.skip(reason=f"{name}: {reason}"))
                parameters.append(
                    pytest.param(name, device, dtype, marks=marks, id=f"{name}-{device}-{name_of(dtype)}")
                )
    return parameters


def _never(name: str, op: str, device: str) -> bool:
    """Whether that backend has no such op on any machine."""
    if name == "torch":
        return False
    if (name, device) in (("onednn", "cuda"), ("cudnn", "cpu"), ("cuda_on_cpu", "cuda")):
        return True
    if (name, device) == ("triton", "cpu") and torch.cuda.is_available():
        return True  # kernels are compiled or interpreted, not both in one process
    try:
        return not hasattr(backend("native" if name == "cuda_on_cpu" else name), op)
    except ImportError:  # reasons() says why
        return False


def variants(*ops: str, dtypes: Iterable[torch.dtype] = DTYPES) -> list[Any]:
    """pytest parameters (op, variant, backend, device, dtype)."""
    return [
        pytest.param(op, variant, *p.values, marks=p.marks, id=f"{op}-{variant}-{p.id}")
        for op in ops
        for variant in VARIANTS[op]
        for p in backends(op, dtypes)
    ]
