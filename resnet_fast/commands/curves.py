"""The losses of a few training steps, ours beside torch's and float64's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import adapters
from resnet_fast.plan import BlockPlan, find

from .equality import Fuse
from .judging import Check, name_of
from .steps import LOSS_SCALE, autocast, in_layout, loss, prepared, training

__all__ = ["Curves", "calmed", "curve_check", "loss_curves"]


class Curves(NamedTuple):
    """Losses step by step; ``nearby``: float64 runs from weights a rounding's worth off."""

    dtype: str
    ours: list[float]
    torch: list[float]
    torch_nchw: list[float]
    float64: list[float]
    nearby: list[list[float]]


def _losses(
    model: nn.Module,
    batches: Sequence[Tensor],
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> list[float]:
    """SGD with momentum over ``batches`` in turn; the loss before each step."""
    scale = LOSS_SCALE.get(dtype, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    held = next(model.parameters()).dtype
    found = []
    with training(model):
        for i in range(steps):
            x = batches[i % len(batches)].to(device=device, dtype=held).contiguous(memory_format=layout)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                output = model(x)
            value = loss(output)
            (value * scale).backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= scale
            optimizer.step()
            found.append(float(value.detach()))
    return found


def loss_curves(
    model: nn.Module,
    x: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    tell: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    fuse: Fuse = resnet_fast.fuse,
) -> Curves:
    """Ours, torch in two layouts, float64, and float64 from weights changed by one rounding; ``x`` (N, 3, H, W)."""
    last, first = torch.channels_last, torch.contiguous_format
    batches = list(x.chunk(2))
    base = prepared(model, device, torch.float32)
    wide = copy.deepcopy(base).double()
    name = name_of(dtype)

    def run(who: str, m: nn.Module, kind: torch.dtype, layout: torch.memory_format) -> list[float]:
        with tell(f"loss of {steps} steps in {name}: {who}"):
            return _losses(m, batches, steps, device, kind, layout)

    nearby = []
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        turned = copy.deepcopy(wide)
        with torch.no_grad():
            for p in turned.parameters():
                noise = 2 * torch.rand(p.shape, generator=random, dtype=torch.float64) - 1
                p.mul_(1 + torch.finfo(dtype).eps * noise.to(p.device))
        nearby.append(run("float64, weights rounded otherwise", turned, torch.float64, last))
    return Curves(
        name,
        run("ours", fuse(copy.deepcopy(base)), dtype, last),
        run("torch", copy.deepcopy(base), dtype, last),
        run("torch, NCHW", in_layout(copy.deepcopy(base), first), dtype, first),
        run("float64", copy.deepcopy(wide), torch.float64, last),
        nearby,
    )


def curve_check(curves: Curves) -> Check:
    """The rule over the whole curve: the farthest that each strays from float64's. NaN fails.

    Torch's own error is the largest of its two layouts' and of the float64 runs from nearby weights: training amplifies
    whatever a rounding changed first, and one run is a single draw of that.
    """

    def stray(losses: Sequence[float]) -> float:
        apart = [abs(a - b) for a, b in zip(losses, curves.float64, strict=True)]
        return float("inf") if any(a != a for a in apart) else max(apart)

    eps = torch.finfo(getattr(torch, curves.dtype)).eps
    mine = stray(curves.ours)
    own = max(stray(c) for c in (curves.torch, curves.torch_nchw, *curves.nearby))
    largest = max(abs(v) for v in curves.float64)
    bound = 2 * own + 4 * eps * largest
    ok = mine <= bound and mine < float("inf")
    steps = len(curves.ours)
    return Check("train", curves.dtype, "loss curve", f"{steps} steps", 1, mine, own, bound, largest, ok)


def calmed(model: nn.Module) -> nn.Module:
    """A copy whose blocks add a tenth of what they compute to their shortcut, as blocks start and trained ones end up.

    Random weights at full strength amplify a rounding by orders of magnitude a step, in torch as in ours, and curves
    would soon have nothing in common.
    """
    model = copy.deepcopy(model)
    for row in resnet_fast.explain(model):
        host = model.get_submodule(row.name)
        plan = adapters.look(host, type(host)) if row.block else None
        if isinstance(plan, BlockPlan) and plan.shortcut is not None:
            gamma = find(host, plan.layers[-1].bn).weight
            if gamma is not None:
                gamma.data *= 0.1
    return model
