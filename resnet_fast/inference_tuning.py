"""What warmup() measures of a model in eval mode: each distinct block's forward, in every way that can run it.

The ways are those of inference.py. Not yet run on a GPU: the proofs run them on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import schedule
from .functional import ConvBn
from .fuse import blocks, undisturbed
from .inference import WAYS, Request, Way, run_way, unable
from .tables import Candidate, Row, Signature

__all__ = ["measure", "work"]

Functions = Mapping[str, Callable[[], Tensor]]


class Tuner(Protocol):
    """What this needs of tuning.py."""

    device: torch.device

    def race(self, functions: Functions) -> dict[str, float]:
        """Seconds of each, in turns."""

    def right(self, functions: Functions, expected: Tensor, what: str) -> Functions:
        """Those that run and give ``expected``."""


def work(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None
) -> tuple[dict[Signature, Request], torch.device | None]:
    """Every distinct block of ``model`` that is free in its backend; and their device."""
    with undisturbed(model):
        seen = schedule.inputs(model, input_shape, dtype)
    found: dict[Signature, Request] = {}
    for _, module, plan, pinned in blocks(model):
        if pinned is None:
            for request in schedule.requests(module, plan, seen):
                found.setdefault(request.signature, request)
    return found, next((request.x.device for request in found.values()), None)


def measure(request: Request, tuner: Tuner, what: str) -> Row | None:
    """The seconds of every way that runs and gives torch's numbers; None where not even torch's runs.

    cuDNN's is measured and shown, and never chosen: see ``inference.unable``.
    """
    with torch.no_grad(), torch.autocast(tuner.device.type, enabled=False):
        block, residual = _random(request, tuner.device)
        found = {name: Way(name) for name in WAYS if name != "mixed" and unable(name, block, asked=True) is None}
        if "triton" in found:
            fastest = _fastest_convolutions(block, residual, tuner)
            if len(set(fastest)) > 1:
                found["mixed"] = Way("mixed", fastest)
        expected = run_way(found["unfused"], block, residual)
        functions = {name: functools.partial(run_way, way, block, residual) for name, way in found.items()}
        times = tuner.race(tuner.right(functions, expected, what))
    if not times:
        return None
    configs: dict[str, Any] = {
        name: {"convolutions": list(way.convolutions)} if way.convolutions else None for name, way in found.items()
    }
    candidates = [Candidate(name, configs[name], seconds) for name, seconds in times.items()]
    return Row(request.signature, tuple(sorted(candidates, key=lambda c: c.seconds)), "warmup")


def _random(request: Request, device: torch.device) -> tuple[Request, Tensor | None]:
    """The same block on random numbers, and its summand from elsewhere, if it has one."""
    dtype = request.x.dtype

    def image(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)

    def layer(la: ConvBn) -> ConvBn:
        w = la.weight
        fan = w.shape[1] * w.shape[2] * w.shape[3]
        vectors: dict[str, Any] = {
            name: 1 + 0.1 * torch.randn(w.shape[0], device=device, dtype=torch.float32).to(t.dtype)
            for name in ("gamma", "beta", "running_mean", "running_var", "bias")
            if (t := getattr(la, name)) is not None
        }
        return la._replace(weight=image(*w.shape) / fan**0.5, num_batches_tracked=None, **vectors)

    layers = [layer(la) for la in request.layers]
    projection = None if request.projection is None else layer(request.projection)
    block = request._replace(x=image(*request.x.shape), layers=layers, projection=projection)
    if not request.residual:
        return block, None
    z = run_way(Way("library"), block)
    return block, image(*z.shape)


def _fastest_convolutions(block: Request, residual: Tensor | None, tuner: Tuner) -> tuple[str, ...]:
    """For each layer, the projection last, what runs its convolution and all behind it fastest."""
    x, fastest = block.x, []
    for i, la in enumerate(block.every):
        side = block.projection is not None and i == len(block.layers)
        last = i == len(block.layers) - 1
        z: Any = block.x if side else x
        single = Request(z, [la._replace(relu=la.relu and not side)])
        y = F.conv2d(z, la.weight, None, *la.geometry)
        summand = None
        if last and (block.identity or block.projection is not None or residual is not None):
            summand = torch.randn_like(y)
            single = single._replace(residual=True)
        functions = {name: functools.partial(run_way, Way(name), single, summand) for name in ("triton", "library")}
        expected = run_way(Way("unfused"), single, summand)
        times = tuner.race(tuner.right(functions, expected, f"one convolution of {tuple(la.weight.shape)}"))
        fastest.append(min(times, key=lambda name: times[name], default="library"))
        x = y
    return tuple(fastest)
