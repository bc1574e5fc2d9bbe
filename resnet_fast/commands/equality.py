"""Does the fused model equal torch's? The project's one rule of tolerance, on a whole network.

max|ours - ref64| <= 2 max|torch_same_dtype - ref64| + 4 eps(dtype) max|ref64|, where ref64 is the same network, weights
and photographs in float64, and torch_same_dtype is torch's eager channels_last network in the dtype that is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import resnet_fast

from .judging import Check, different, judge, judge_gradients, max_error, name_of
from .steps import AGAIN, Step, named, prepared, step

__all__ = ["Fuse", "determinism_checks", "eval_checks", "train_checks"]

#: What fuses a copy of a network.
Fuse = Callable[[nn.Module], nn.Module]


def eval_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """Outputs in eval mode, weights and images (N, 3, H, W) rounded to ``dtype`` first."""
    same = prepared(model, device, dtype).eval()
    x = x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        ours = fuse(copy.deepcopy(same))
        mine = named(ours(x)) | named(ours(x), AGAIN)
        theirs = named(same(x)) | named(same(x), AGAIN)
        once = copy.deepcopy(same).double()(x.double())
        reference = named(once) | named(once, AGAIN)
    return [judge("eval", dtype, "outputs", mine, [theirs], reference)]


_TURNED = 3  # float64 runs on photographs that are a rounding's worth off


def _turned(wide: nn.Module, x: Tensor, device: torch.device, reference: Step, bound: float) -> list[Step]:
    """float64 steps on photographs changed so slightly that the outputs stay within ``bound``, their own tolerance.

    That is what rounding does to everything behind the outputs: above all it turns some ReLUs over.
    """
    steps: list[Step] = []
    random = torch.Generator().manual_seed(0)
    factor = 1.0
    for _ in range(_TURNED + 1):
        noise = (2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1).to(device)
        changed = x.double() * (1 + factor * torch.finfo(torch.float32).eps * noise)
        steps.append(step(copy.deepcopy(wide), changed, device, torch.float64))
        if len(steps) == 1:  # the first one only measures how far the outputs move
            moved = max(max_error(steps[0].outputs[n], t) for n, t in reference.outputs.items())
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
    same = prepared(model, device, torch.float32)
    wide = copy.deepcopy(same).double()
    ours = fuse(copy.deepcopy(same))
    x = x.to(device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    mine, theirs = step(ours, x, device, dtype), step(same, x, device, dtype)
    reference = step(copy.deepcopy(wide), x.double(), device, torch.float64)
    outputs = judge("train", dtype, "outputs", mine.outputs, [theirs.outputs], reference.outputs)
    ways = [theirs]
    if dtype == torch.float32:
        ways += _turned(wide, x, device, reference, outputs.bound)
    found = [outputs, judge("train", dtype, "loss", mine.loss, [w.loss for w in ways], reference.loss)]
    if reference.gradients:
        found += judge_gradients(dtype, mine.gradients, [w.gradients for w in ways], reference.gradients)
    if reference.running:
        found.append(
            judge("train", dtype, "running statistics", mine.running, [w.running for w in ways], reference.running)
        )
    return found


# ---- the same bits twice


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Of cuDNN only algorithms that add in a fixed order: what it is asked here is our order of additions."""
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept


def determinism_checks(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype, fuse: Fuse = resnet_fast.fuse
) -> list[Check]:
    """Two forwards in eval mode and two training steps from the same state: how many tensors differ in some bit."""
    found = []
    with _deterministic():
        frozen = prepared(model, device, dtype).eval()
        low = x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            outputs = [named(fuse(copy.deepcopy(frozen))(low)) for _ in range(2)]
        same = prepared(model, device, torch.float32)
        x = x.to(device=device, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        steps = [step(fuse(copy.deepcopy(same)), x, device, dtype) for _ in range(2)]
    every = [{f"{kind} {n}": t for kind, part in s._asdict().items() for n, t in part.items()} for s in steps]
    for mode, (one, other) in (("eval", outputs), ("train", every)):
        names = different(one, other)
        what = "two runs, tensors that differ"
        first = names[0] if names else "none"
        found.append(
            Check(mode, name_of(dtype), what, first, len(one), float(len(names)), 0.0, 0.0, float(len(one)), not names)
        )
    return found
