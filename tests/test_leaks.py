"""Memory over 200 steps is flat, whatever a step does."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from tests.fuzzing import BARE, PLAIN, RELU, Block, Example
from tests.tools import small


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Tensors that Python knows of."""
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects())


def train_step(model: nn.Module, x: Tensor, i: int) -> None:
    model.train()
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
            p.grad = None


def infer(model: nn.Module, x: Tensor, i: int) -> None:
    with torch.no_grad():
        model.eval()(x)


def by_turns(model: nn.Module, x: Tensor, i: int) -> None:
    """What changes is folded anew; sizes vary more than are remembered."""
    train_step(model, x, i)
    infer(model, x[: 1 + i % 7, :, : 16 + i % 11], i)


def fused_and_unfused(model: nn.Module, x: Tensor, i: int) -> None:
    resnet_fast.unfuse(model)
    infer(resnet_fast.fuse(model, generic=True), x, i)
    copy.deepcopy(model)


def with_mistakes(model: nn.Module, x: Tensor, i: int) -> None:
    """Errors, and graphs that nobody runs backward."""
    model.train()
    model(x)
    with pytest.raises(RuntimeError):
        model(x[:, :2])


def norms_first() -> nn.Module:
    """A stem, a dense layer, a pre-activation block and a transition: norms with no convolution before them."""
    kinds = Block("stem", (PLAIN,)), Block("dense", (RELU, PLAIN, BARE))
    wide = dataclasses.replace(RELU, c=16), dataclasses.replace(PLAIN, c=16), dataclasses.replace(BARE, k=16)
    network = Example((*kinds, Block("pre-activation", wide), Block("chain", wide[:2]))).network()
    return nn.Sequential(nn.Conv2d(3, 8, 1), *network)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize(
    ("make", "step"),
    [
        *((small, step) for step in (train_step, infer, by_turns, fused_and_unfused, with_mistakes)),
        *((norms_first, step) for step in (train_step, infer, by_turns)),
    ],
    ids=lambda f: f.__name__,
)
def test_memory_is_flat_over_200_steps(
    make: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor, int], None]
) -> None:
    """No tensor more than after the first ones; and less growth than if a step kept one input, or one activation."""
    model = resnet_fast.fuse(make(), generic=True)
    x = torch.randn(8, 3, 32, 32)
    first = 7 * 11  # of by_turns, every size once: libraries keep something of each, and we of the last ones
    for i in range(first):
        step(model, x, i)
    tensors, memory = live_tensors(), resident()
    for i in range(first, 4 * first):
        step(model, x, i)
    assert live_tensors() <= tensors
    assert resident() - memory < 200 * x.nbytes
