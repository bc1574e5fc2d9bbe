"""One forward or training step of a network, as ``bench`` times it and ``verify`` compares it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AGAIN",
    "LOSS_SCALE",
    "Step",
    "autocast",
    "in_layout",
    "loss",
    "named",
    "prepared",
    "step",
    "tensors",
    "training",
]

#: What the loss is multiplied by in training, so that float16's small gradients do not vanish.
LOSS_SCALE = {torch.float16: 1024.0}


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


#: What is behind an output's name of the second call, which runs on folded weights that were kept.
AGAIN = " again"


def named(output: Any, suffix: str = "") -> dict[str, Tensor]:
    """``tensors`` of a network's output by name."""
    return {f"output {i}{suffix}": t for i, t in enumerate(tensors(output))}


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """``model.to(memory_format=layout)``, which torch's annotations do not know."""
    change: Any = model.to
    return change(memory_format=layout)


def prepared(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` on ``device``, channels-last."""
    return in_layout(copy.deepcopy(model).to(device=device, dtype=dtype), torch.channels_last)


class Step(NamedTuple):
    """What one training step leaves: everything that an optimizer, or the next step, would see."""

    outputs: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradients: dict[str, Tensor]
    running: dict[str, Tensor]


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode, but without dropout: it draws other numbers in other dtypes."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    yield
    model.eval()


def step(model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype) -> Step:
    """One forward, loss and backward in training mode; a low ``dtype`` is autocast."""
    scale = LOSS_SCALE.get(dtype, 1.0)
    with training(model):
        torch.manual_seed(0)
        with autocast(device, dtype):
            output = model(x)
        value = loss(output)
        (value * scale).backward()
    gradients = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    running = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return Step(named(output), {"loss": value.detach()}, gradients, running)
