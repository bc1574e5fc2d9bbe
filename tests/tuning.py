"""What the tests of warmup() and of its tables share: a small model, one step of it, and a clock that runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.dispatch import PARTS
from resnet_fast.models import BasicBlock, Bottleneck

CPU = torch.device("cpu")
SHAPE = (2, 8, 6, 6)


def tiny(*, fused: bool = True) -> nn.Sequential:
    """A bottleneck with a projection, a basic block, and what makes a loss of them."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    plain = nn.Sequential(Bottleneck(8, 4, 2, down), BasicBlock(16, 16), nn.Flatten(), nn.Linear(144, 4))
    plain = plain.to(memory_format=torch.channels_last).train()
    return resnet_fast.fuse(plain) if fused else plain


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype, memory_format=torch.channels_last)


def clock(**seconds: float) -> Callable[..., float]:
    """A timer by what is timed: "native", "triton", "torch", "parts", "fused", "original"; each takes 1 s if not given.

    It runs nothing. With ``ways`` of Triton's, a configuration's time is looked up by its text.
    """

    def timer(function: Any, device: torch.device) -> float:
        inner = getattr(function, "func", function)
        names = {"in_parts": PARTS, "fused": "fused", "original": "original"}
        name = names.get(inner.__name__) or next(
            (n for n in ("native", "triton") if f"backends.{n}" in inner.__module__), "torch"
        )
        return seconds.get(name, 1.0)

    return timer


def step(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """One training step: the loss and every gradient."""
    model.zero_grad()
    loss = F.cross_entropy(model(image()), torch.arange(2))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
