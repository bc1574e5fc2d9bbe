"""What training has to show on a GPU: real layers, CUDA graphs, equal bits, a loss curve among those of plain torch.

What can be is run on the CPU too, in small, so that it is known to run. Not yet run on a GPU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.dispatch import reasons
from resnet_fast.models import BasicBlock, Bottleneck, cifar_resnet20, resnet50
from tests.cases import RESNET50, inputs
from tests.cases import resnet50 as layers_of_resnet50
from tests.tolerance import DTYPES, assert_same_bits, check, name_of, reference, run

BACKENDS = ("native", "triton")
#: As a training step calls them: the first layer of a block, those behind it, the last, and the gradient of each.
CALLS = (
    ("conv_stats", "plain"),
    ("conv_stats", "lazy"),
    ("conv_backward", "masked"),
    ("conv_backward", "residual"),
    ("conv_backward_sums", "lazy"),
    ("conv_affine_act", "scaled"),
)


def needs(name: str, dtype: torch.dtype = torch.float32) -> None:
    reason = reasons("conv_stats", torch.device("cuda"), dtype)[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


# ---- real layers


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", layers_of_resnet50(2), ids=lambda case: case.name)
def test_layers_of_resnet50(case: Any, dtype: torch.dtype, name: str) -> None:
    """By the house's tolerance, at the sizes of 224 px; float32 without TF32 (tests/conftest.py)."""
    needs(name, dtype)
    for op, variant in CALLS:
        check(op, inputs(op, case, dtype, "cuda", variant=variant), name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", RESNET50, ids=lambda case: case.name)
def test_tf32_where_torch_allows_it(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are rounded to 10 bits, and nothing else is."""
    needs("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for op, variant in CALLS[:3]:
        kwargs = inputs(op, case, torch.float32, "cuda", variant=variant)
        for ours, exact in zip(run(op, kwargs, "triton"), reference(op, kwargs), strict=True):
            if ours.dim() == 4:
                error = ((ours.double() - exact).norm() / exact.norm()).item()
                assert error <= 2.0**-10, f"{op} {variant}: {error:.2g} of the norm"


# ---- equal bits, and CUDA graphs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    blocks = BasicBlock(64, 64), Bottleneck(64, 32, 2, down), Bottleneck(128, 32)
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def gradients(model: nn.Module, device: str, dtype: torch.dtype, size: int) -> list[Tensor]:
    """Of one step: the output, every gradient, and the running statistics behind it."""
    x = torch.randn(4, 64, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        z = model(x)
    wanted = [x, *model.parameters()]
    grads = torch.autograd.grad(z, wanted, torch.ones_like(z))
    return [z.detach(), *grads, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize(
    "device, name, dtype, size",
    [
        pytest.param("cpu", "native", torch.float32, 6, id="native-cpu"),
        *(
            pytest.param("cuda", name, dtype, 56, id=f"{name}-cuda-{name_of(dtype)}", marks=pytest.mark.gpu)
            for name in BACKENDS
            for dtype in DTYPES
        ),
    ],
)
def test_a_step_gives_equal_bits(
    device: str, name: str, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run twice, of two copies; what native leaves to cuDNN is asked for by its deterministic algorithms."""
    if reasons("bn_stats", torch.device(device), dtype)[name] is not None:
        pytest.skip(f"{name} cannot run here")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = resnet_fast.fuse(network(), backend=name).to(device)
    first, second = (gradients(copy.deepcopy(model), device, dtype, size) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_training_step_can_be_recorded(dtype: torch.dtype, name: str) -> None:
    """torch.cuda.make_graphed_callables: nothing waits for the GPU, and a replay trains as a step that is not."""
    needs(name, dtype)
    model = resnet_fast.fuse(network(), backend=name).cuda().to(dtype)
    plain = copy.deepcopy(model)

    def image(seed: int) -> Tensor:
        x = torch.randn(4, 64, 28, 28, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)
        return x.to(memory_format=torch.channels_last).requires_grad_()

    graphed: Any = torch.cuda.make_graphed_callables(copy.deepcopy(model), (image(0),))
    # The warm-up of the capture has moved the running statistics.
    graphed.load_state_dict(plain.state_dict())
    for seed in (1, 2):
        found = []
        for net in (graphed, plain):
            x = image(seed)
            net.zero_grad(set_to_none=True)
            net(x).float().square().mean().backward()
            found.append([x.grad, *(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())])
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for ours, theirs in zip(*found, strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


# ---- the loss curve


class Run(NamedTuple):
    """How a network is trained: ``classes`` of smooth images under noise, ``size`` px, SGD under autocast."""

    make: Callable[[], nn.Module]
    device: str
    dtype: torch.dtype
    classes: int
    batch: int
    size: int
    steps: int
    lr: float
    window: int  # steps over which a curve is averaged


#: 200 steps of ResNet-50 with a warm-up of the learning rate; and the same in small.
ON_GPU = Run(
    lambda: resnet50(num_classes=10, zero_init_residual=True), "cuda", torch.bfloat16, 10, 64, 96, 200, 0.01, 20
)
IN_SMALL = Run(lambda: cifar_resnet20(num_classes=4), "cpu", torch.float32, 4, 16, 16, 16, 0.05, 4)


def curve(how: Run, seed: int, backend: str | None, fused: bool) -> Tensor:
    """Losses, averaged over windows. ``seed`` draws the images; weights begin as in every other run."""
    torch.manual_seed(0)
    model = how.make().to(how.device, memory_format=torch.channels_last)
    if fused:
        resnet_fast.fuse(model, backend=backend)
    coarse = torch.randn(how.classes, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    prototypes = F.interpolate(coarse, size=how.size, mode="bilinear").to(how.device)
    optimizer = torch.optim.SGD(model.parameters(), how.lr, momentum=0.9, weight_decay=1e-4)
    generator, losses = torch.Generator().manual_seed(100 + seed), []
    for i in range(how.steps):
        optimizer.param_groups[0]["lr"] = how.lr * min(1.0, (i + 1) / (0.2 * how.steps))
        target = torch.randint(how.classes, (how.batch,), generator=generator).to(how.device)
        noise = torch.randn(how.batch, 3, how.size, how.size, generator=generator).to(how.device)
        x = (prototypes[target] + noise).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(how.device, how.dtype, enabled=how.dtype != torch.float32):
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if fused:
        assert {row.status for row in resnet_fast.explain(model) if row.block} <= {"fused", "partly"}
    return torch.stack(losses).cpu().view(-1, how.window).mean(1)


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def within_the_spread(how: Run, backends: list[str | None], seeds: int) -> None:
    """Between fused and plain at one seed lies no more than between plain curves of different seeds."""
    plain = [curve(how, seed, None, fused=False) for seed in range(seeds)]
    assert all(c.isfinite().all() and c[-1] < 0.9 * c[0] for c in plain), "plain torch learns nothing: the test is void"
    spread = max(distance(a, b) for a, b in itertools.combinations(plain, 2))
    for backend in backends:
        ours = [curve(how, seed, backend, fused=True) for seed in range(2)]
        assert all(c.isfinite().all() for c in ours)
        apart = sum(distance(a, b) for a, b in zip(ours, plain, strict=False)) / len(ours)
        assert apart <= spread, f"{backend}: {apart:.4f} from plain torch, whose seeds are {spread:.4f} apart"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "triton"])
def test_200_steps_of_resnet50(name: str | None) -> None:
    needs(name or "native", torch.bfloat16)
    within_the_spread(ON_GPU, [name], seeds=4)


@pytest.mark.slow
def test_a_few_steps_in_small() -> None:
    within_the_spread(IN_SMALL, [None], seeds=3)
