"""The rule of tolerance, and the two things it compares with: the op in float64, and eager torch in the same dtype.

    max|ours - ref64| <= 2 max|torch - ref64| + 4 eps(dtype) max|ref64|

``ref64`` is the definition, run in float64 on the same (already rounded) inputs. ``torch`` is what plain eager torch
makes of them in their own dtype, by its own batch_norm, relu and convolution. NaN and infinities must stand in the same
places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.dispatch import BACKENDS, OPS, backend, reasons, use_backend
from tests import cuda_on_cpu, triton_memory
from tests.cases import VARIANTS
from tests.eager import Kwargs, eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


# ---- the op in float64


def to_float64(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value


def reference(op: str, kwargs: Kwargs) -> Any:
    """The definition in float64."""
    return OPS[op].definition(**{k: to_float64(v) for k, v in kwargs.items()})


# ---- running an op on one backend


def run(op: str, kwargs: Kwargs, backend_name: str) -> Any:
    """The op on that backend, and on no other."""
    if backend_name == "cuda_on_cpu":
        return cuda_on_cpu.run(op, kwargs)
    interpreted = backend_name == "triton" and not torch.cuda.is_available()
    with use_backend(backend_name), triton_memory.checked(kwargs.values()) if interpreted else nullcontext():
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
