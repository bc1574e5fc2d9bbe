"""Does the fused model equal torch's? The project's one rule of tolerance, on a whole network.

max|ours - ref64| <= 2 max|torch_same_dtype - ref64| + 4 eps(dtype) max|ref64|, where ref64 is the same network, weights
and photographs in float64, and torch_same_dtype is torch's eager channels_last network in the dtype that is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast

__all__ = ["LOSS_SCALE", "Check", "autocast", "eval_checks", "in_layout", "loss", "tensors", "train_checks"]

#: What the loss is multiplied by in training, so that float16's small gradients do not vanish.
LOSS_SCALE = {torch.float16: 1024.0}


class Check(NamedTuple):
    """One kind of number compared, of all its tensors the one nearest to its bound (or farthest beyond it).

    ``ours`` and ``torch``: max|difference to ref64|; ``bound``: what ours may be at most; ``largest``: max|ref64|.
    """

    mode: str
    dtype: str
    what: str
    tensor: str
    tensors: int
    ours: float
    torch: float
    bound: float
    largest: float
    ok: bool


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a network's output, whatever holds them, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for item in output for t in tensors(item)]
    return []


def loss(output: Any) -> Tensor:
    """A scalar: cross-entropy of logits (N, classes) against made-up labels; of other outputs, the mean square."""
    total: Tensor | None = None
    for t in tensors(output):
        if t.dim() == 2 and t.shape[1] > 1:
            labels = (torch.arange(t.shape[0], device=t.device) * 7 + 1) % t.shape[1]
            part = F.cross_entropy(t if t.dtype == torch.float64 else t.float(), labels)
        else:
            part = (t if t.dtype == torch.float64 else t.float()).square().mean()
        total = part if total is None else total + part
    if total is None:
        raise TypeError("the network's output holds no floating-point tensor")
    return total


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Training in a low dtype is autocast over float32 parameters; in float32 and float64 it is nothing."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype) if low else contextlib.nullcontext()


def _error(a: Tensor, reference: Tensor) -> float:
    """max|a - reference|; infinite where one has a NaN or an infinity that the other does not have there."""
    if a.shape != reference.shape:
        return float("inf")
    a, reference = a.detach().double(), reference.detach().double()
    same = (a == reference) | (a.isnan() & reference.isnan())
    difference = (a - reference).abs().masked_fill(same, 0.0)
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def _judge(
    mode: str,
    dtype: torch.dtype,
    what: str,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> Check:
    """Judge every tensor by the rule, and report the one nearest to its bound. ``same``: torch's ways."""
    found: list[tuple[float, Check]] = []
    for name in reference if all(t.keys() == reference.keys() for t in (ours, *same)) else ():
        largest = _largest(reference[name])
        mine = _error(ours[name], reference[name])
        theirs = max(_error(t[name], reference[name]) for t in same)
        bound = 2 * theirs + 4 * torch.finfo(dtype).eps * largest
        ok = mine <= bound and mine < float("inf")
        rank = mine / bound if bound else float(mine > 0)
        check = Check(mode, _name(dtype), what, name, len(reference), mine, theirs, bound, largest, ok)
        found.append((rank, check))
    if not found:
        nan = float("nan")
        return Check(mode, _name(dtype), what, "not the same tensors", 0, nan, nan, nan, nan, False)
    return max(found, key=lambda pair: (not pair[1].ok, pair[0]))[1]


def _judge_gradients(
    dtype: torch.dtype,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> list[Check]:
    """All parameters together, by each one's error relative to its own max|ref64|: the worst and the median one.

    One by one they cannot be judged: rounding turns a few ReLUs over, in ours at other places than in torch's, and a
    gradient behind one jumps. Parameters whose gradient all but vanishes (a bias that batch norm cancels) weigh little.
    """
    if not all(t.keys() == reference.keys() for t in (ours, *same)):
        return [_judge("train", dtype, "gradients", ours, same, reference)]
    least = 1e-3 * max(_largest(t) for t in reference.values())
    sizes = {n: max(_largest(t), least) or 1.0 for n, t in reference.items()}

    def relative(gradients: Mapping[str, Tensor]) -> dict[str, float]:
        return {n: _error(gradients[n], t) / sizes[n] for n, t in reference.items()}

    mine, theirs = relative(ours), [relative(t) for t in same]
    found = []
    for what, position in (("gradients, worst", -1), ("gradients, median", len(mine) // 2)):
        name, error = sorted(mine.items(), key=lambda item: item[1])[position]
        own = max(sorted(t.values())[position] for t in theirs)
        bound = 2 * own + 4 * torch.finfo(dtype).eps
        ok = error <= bound and error < float("inf")
        found.append(Check("train", _name(dtype), what, name, len(mine), error, own, bound, 1.0, ok))
    return found


def _largest(t: Tensor) -> float:
    return float(torch.nan_to_num(t.detach().abs()).max()) if t.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(output: Any, suffix: str = "") -> dict[str, Tensor]:
    return {f"output {i}{suffix}": t for i, t in enumerate(tensors(output))}


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``model.to(memory_format=layout)``, which torch's annotations do not know."""
    change: Any = model.to
    return change(memory_format=layout)


def _prepared(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` on ``device``, channels-last."""
    return in_layout(copy.deepcopy(model).to(device=device, dtype=dtype), torch.channels_last)


Fuse = Callable[[nn.Module], nn.Module]


def eval_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """Outputs in eval mode, weights and images (N, 3, H, W) rounded to ``dtype`` first."""
    same = _prepared(model, device, dtype).eval()
    x = x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        ours = fuse(copy.deepcopy(same))
        # Twice: the second call runs on folded weights that were kept.
        mine = _named(ours(x)) | _named(ours(x), " again")
        theirs = _named(same(x)) | _named(same(x), " again")
        once = copy.deepcopy(same).double()(x.double())
        reference = _named(once) | _named(once, " again")
    return [_judge("eval", dtype, "outputs", mine, [theirs], reference)]


class _Step(NamedTuple):
    """What one training step leaves: everything that an optimizer, or the next step, would see."""

    outputs: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]
    running: dict[str, Tensor]


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, but without dropout: it draws other numbers in other dtypes."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    yield
    model.eval()


def _step(model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype) -> _Step:
    scale = LOSS_SCALE.get(dtype, 1.0)
    with _training(model):
        torch.manual_seed(0)
        with autocast(device, dtype):
            output = model(x)
        value = loss(output)
        (value * scale).backward()
    gradients = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    running = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return _Step(_named(output), {"loss": value.detach()}, gradients, running)


_TURNED = 3  # float64 runs on photographs that are a rounding's worth off


def _turned(wide: nn.Module, x: Tensor, device: torch.device, reference: _Step, bound: float) -> list[_Step]:
    """float64 steps on photographs changed so slightly that the outputs stay within ``bound``, their own tolerance.

    That is what rounding does to everything behind the outputs: above all it turns some ReLUs over.
    """
    steps: list[_Step] = []
    random = torch.Generator().manual_seed(0)
    factor = 1.0
    for _ in range(_TURNED + 1):
        noise = (2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1).to(device)
        changed = x.double() * (1 + factor * torch.finfo(torch.float32).eps * noise)
        steps.append(_step(copy.deepcopy(wide), changed, device, torch.float64))
        if len(steps) == 1:  # the first one only measures how far the outputs move
            moved = max(_error(steps[0].outputs[n], t) for n, t in reference.outputs.items())
            factor = min(max(bound / moved, 1.0), 1e3) if moved else 1.0
    return steps


def train_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """One forward and backward in training mode: outputs, loss, every parameter's gradient, every running statistic.

    ``x`` (N, 3, H, W) float32. A low ``dtype``: autocast over float32 parameters; ref64 has none. Dropout is off.
    Torch's own error in loss, gradients and statistics is, in float32, the largest of its own and of what changes of
    the photographs do in float64 that move the outputs within their tolerance: else one turned ReLU decides.
    """
    same = _prepared(model, device, torch.float32)
    wide = copy.deepcopy(same).double()
    ours = fuse(copy.deepcopy(same))
    x = x.to(device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    mine, theirs = _step(ours, x, device, dtype), _step(same, x, device, dtype)
    reference = _step(copy.deepcopy(wide), x.double(), device, torch.float64)
    outputs = _judge("train", dtype, "outputs", mine.outputs, [theirs.outputs], reference.outputs)
    ways = [theirs]
    if dtype == torch.float32:
        ways += _turned(wide, x, device, reference, outputs.bound)
    found = [outputs, _judge("train", dtype, "loss", mine.loss, [w.loss for w in ways], reference.loss)]
    if reference.gradients:
        found += _judge_gradients(dtype, mine.gradients, [w.gradients for w in ways], reference.gradients)
    if reference.running:
        found.append(
            _judge("train", dtype, "running statistics", mine.running, [w.running for w in ways], reference.running)
        )
    return found
