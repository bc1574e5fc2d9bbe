"""What the tests of other people's tools share: a small ResNet, one training step, and how two models are compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.models import BasicBlock, Bottleneck
from tests.fusing import calibrated


class Small(nn.Module):
    """Every kind of part: a stem, a stage of basic blocks, a stage of bottlenecks with a projection, a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer2 = nn.Sequential(Bottleneck(8, 4, 2, down), Bottleneck(16, 4))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))


#: Rows of explain() that say "fused" for a Small.
FUSED = 5


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return calibrated(Small(), seed)


def pair(train: bool = True) -> tuple[nn.Module, nn.Module]:
    """The original, and a fused copy."""
    plain = small().train(train)
    return plain, resnet_fast.fuse(copy.deepcopy(plain))


def images(n: int = 4, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def fused_rows(model: nn.Module) -> int:
    """Rows of explain() that say "fused": of modules that, when last called, ran fused."""
    return sum(row.status == "fused" for row in resnet_fast.explain(model))


def loss_of(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def near(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """For float32 networks of a few layers."""
    scale = theirs.detach().abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(
        ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m: f"{what}: {m}"
    )


def assert_same_state(ours: nn.Module, theirs: nn.Module, grads: bool = True) -> None:
    """The same parameters, gradients and buffers, by name."""
    for name, p in theirs.named_parameters():
        mine = ours.get_parameter(name)
        near(mine, p, name)
        assert (mine.grad is None) == (p.grad is None), name
        if grads and p.grad is not None:
            near(mine.grad, p.grad, f"gradient of {name}")  # type: ignore[arg-type]
    for name, b in theirs.named_buffers():
        near(ours.get_buffer(name), b, name)


def steps(model: Any, count: int = 2, lr: float = 0.01) -> list[float]:
    """Losses of a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for i in range(count):
        optimizer.zero_grad()
        loss = loss_of(model, images() + i)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
