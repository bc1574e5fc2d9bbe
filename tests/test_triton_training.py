"""Networks that train on Triton's kernels alone, in its interpreter: losses, mixed precision, torch.compile.

Several ranks: test_sync.py and test_tools_distributed.py. On a GPU: test_gpu_training.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import resnet_fast
from resnet_fast import use_backend
from resnet_fast.backends import triton as backend
from resnet_fast.backends.triton import common
from resnet_fast.dispatch import OPS
from resnet_fast.models import BasicBlock, Bottleneck
from resnet_fast.models.blocks import make_stage
from tests.cases import TINY, VARIANTS, inputs

NOT_HERE = common.unable(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(NOT_HERE is not None, reason=f"kernels run on CPU tensors: {NOT_HERE}")


class Tiny(nn.Module):
    """A whole ResNet: 7x7 stem with its pooling, a stage without and one with a stride, average pool, classifier."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = make_stage(block, 8, 8, 1, 1, "B", "v1.5", nn.BatchNorm2d)
        self.layer2 = make_stage(block, 8 * block.expansion, 16, 1, 2, "B", "v1.5", nn.BatchNorm2d)
        self.fc = nn.Linear(16 * block.expansion, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def pair(block: type[BasicBlock] | type[Bottleneck]) -> tuple[nn.Module, nn.Module]:
    """Plain, and a copy that runs on Triton alone."""
    torch.manual_seed(0)
    plain = Tiny(block).to(memory_format=torch.channels_last)
    return plain, resnet_fast.fuse(copy.deepcopy(plain), backend="triton")


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, 13, 13, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last), torch.arange(4)


def statuses(model: nn.Module) -> set[str]:
    return {row.status for row in resnet_fast.explain(model) if row.block}


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_ten_steps_of_a_tiny_resnet(block: type[BasicBlock] | type[Bottleneck]) -> None:
    """Plain PyTorch's losses, and its running statistics after them."""
    losses, models = [], pair(block)
    x, target = batch()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] / 10
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)
    plain, ours = models
    for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert statuses(ours) == {"fused"}


@pytest.mark.slow
def test_grad_scaler_in_float16() -> None:
    """Under autocast: a step whose gradients overflow is left out, by both models alike; then the loss falls."""
    histories, models = [], pair(Bottleneck)
    x, target = batch()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-14)
        losses, scales = [], []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        histories.append((losses, scales))
    (theirs, their_scales), (mine, my_scales) = histories
    assert my_scales == their_scales and my_scales[0] < 2.0**24 and my_scales[-1] == my_scales[0]
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.01)
    assert statuses(models[1]) == {"fused"}


def test_compiles_as_one_graph() -> None:
    """fullgraph=True: the ops are nodes of the graph, forward and backward, and run on Triton."""
    from resnet_fast.functional import ConvBn, residual_block

    torch.manual_seed(0)
    leaves = [torch.randn(8, 8, r, r).div_(3 * r).requires_grad_() for r in (1, 3)]
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()

    def block(x: Tensor, *weights: Tensor) -> Tensor:
        layers = [ConvBn(w, padding=(w.shape[2] // 2, w.shape[2] // 2)) for w in weights]
        return residual_block(x, layers, identity=True)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = []
    for function in (block, compiled):
        with use_backend("triton"):
            z = function(x, *leaves)
            found.append((z, *torch.autograd.grad(z.sin().sum(), (x, *leaves))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    expected = block(x, *leaves)
    torch.testing.assert_close(found[1][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [op for op in VARIANTS if hasattr(backend, op)])
def test_no_value_is_read_on_the_host(op: str) -> None:
    """What CUDA graphs need: on tensors without values an op launches all that it launches."""
    case = next(case for case in TINY if case.name == "3x3_2")
    for variant in VARIANTS[op]:
        kwargs = inputs(op, case, variant=variant)
        with common.recorded() as real:
            getattr(backend, op)(**kwargs)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode, common.recorded() as fake:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            out: Any = getattr(backend, op)(**fakes)
        assert [launch.kernel for launch in fake] == [launch.kernel for launch in real] and real
        assert [tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,))] == [
            tuple(t.shape) for t in _tuple(OPS[op].definition(**kwargs))
        ]


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
