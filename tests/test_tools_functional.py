"""After fuse(): torch.func, activation checkpointing, saved-tensor hooks, graph-wide gradient tools."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import resnet_fast
from tests.fusing import calibrated
from tests.tools import FUSED, assert_same_state, fused_rows, images, loss_of, near, pair, small


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_functional_call(train: bool) -> None:
    """Other parameters for one call; the model's own, and its folded weights, are as before."""
    plain, ours = pair(train)
    with torch.no_grad():
        before = ours(images()) if not train else None
    other = {n: t * 1.5 if t.is_floating_point() else t for n, t in state(plain).items()}
    results = []
    for model in (ours, plain):
        leaves = {n: t.clone().requires_grad_(t.is_floating_point() and "running" not in n) for n, t in other.items()}
        loss = (functional_call(model, leaves, (images(),)) * torch.arange(5.0)).sum()
        loss.backward()
        results.append((loss.detach(), {n: t if t.grad is None else t.grad for n, t in leaves.items()}))
    near(results[0][0], results[1][0])
    for name, value in results[1][1].items():
        near(results[0][1][name], value, name)
    assert all(p.grad is None for p in ours.parameters())
    if before is not None:
        with torch.no_grad():
            assert torch.equal(ours(images()), before)


def test_grad_and_vmap() -> None:
    """Gradients of every sample: torch.func sees the original's ops."""
    plain, ours = pair(train=False)
    parameters = {n: p.detach() for n, p in plain.named_parameters()}

    def per_sample(model: nn.Module) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, p, (x[None],)).square().sum()

        return vmap(grad(loss), (None, 0))(parameters, images())

    mine, theirs = per_sample(ours), per_sample(plain)
    for name, g in theirs.items():
        near(mine[name], g, name)
    with torch.no_grad():
        ours(images())
    assert fused_rows(ours) == FUSED, "only inside the transform"


def test_jvp_and_vjp() -> None:
    plain, ours = pair(train=False)
    x, v = images(), torch.ones(4, 3, 12, 12)
    for mine, theirs in zip(jvp(ours, (x,), (v,)), jvp(plain, (x,), (v,)), strict=True):
        near(mine, theirs)
    (mine,), (theirs,) = (vjp(m, x)[1](torch.ones(4, 5)) for m in (ours, plain))
    near(mine, theirs)
    with torch.autograd.forward_ad.dual_level():
        tangents = [
            torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(x, v))).tangent
            for m in (ours, plain)
        ]
    near(*tangents)


class Checkpointed(nn.Module):
    """A Small whose stages are checkpointed."""

    def __init__(self, model: Any, way: str) -> None:
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x: Tensor) -> Tensor:
        m, reentrant = self.model, self.way != "not reentrant"
        x = m.stem(x)
        if self.way == "sequential":
            x = checkpoint_sequential(m.layer1, 2, x, use_reentrant=True)
        elif self.way == "blocks":
            for block in m.layer1:
                x = checkpoint(block, x, use_reentrant=True)
        else:
            x = checkpoint(m.layer1, x, use_reentrant=reentrant)
        x = checkpoint(m.layer2, x, use_reentrant=reentrant)
        return m.head(x.mean((2, 3)))


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "blocks", "sequential"])
def test_checkpointing(way: str) -> None:
    """Gradients; and statistics, which the second forward moves again, in torch as here."""
    plain, ours = pair()
    for model in (plain, ours):
        loss_of(Checkpointed(model, way), images()).backward()
    assert_same_state(ours, plain)
    assert ours.layer1[0].bn1.num_batches_tracked == 2
    assert fused_rows(ours) == FUSED


def test_selective_checkpointing() -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    plain, ours = pair()
    keep = [torch.ops.aten.convolution.default]
    for model in (plain, ours):
        x = model.stem(images())
        x = checkpoint(
            model.layer1, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
        )
        x.square().sum().backward()
    assert_same_state(ours, plain)


def test_saved_tensor_hooks() -> None:
    """What the backward keeps may live elsewhere: save_on_cpu, packing to another dtype and back."""
    plain, ours = pair()
    loss_of(plain, images()).backward()
    seen: list[torch.dtype] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return t.double() if t.dtype == torch.float32 else t

    def unpack(t: Tensor) -> Tensor:
        return t.float() if t.dtype == torch.float64 else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), torch.autograd.graph.save_on_cpu():
        loss = loss_of(ours, images())
    loss.backward()
    assert_same_state(ours, plain)


def test_partial_gradients() -> None:
    """torch.autograd.grad of some parameters; retain_graph; gradients added up over two batches."""
    plain, ours = pair()
    results = []
    for model in (plain, ours):
        loss = loss_of(model, images())
        some = [model.stem[0].weight, model.layer2[0].bn2.bias]
        first = torch.autograd.grad(loss, some, retain_graph=True)
        loss.backward()
        loss_of(model, images() + 1).backward()
        results.append(first)
    for mine, theirs in zip(results[1], results[0], strict=True):
        near(mine, theirs)
    assert_same_state(ours, plain)


def norm_first() -> nn.Module:
    """A batch norm and ReLU with no convolution before them, then a layer, frozen statistics in both or none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())


def both(make: Callable[[], nn.Module], train: bool) -> tuple[nn.Module, nn.Module]:
    """The original, and a fused copy."""
    plain = calibrated(make()).train(train)
    return plain, resnet_fast.fuse(copy.deepcopy(plain))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [small, norm_first], ids=lambda make: make.__name__)
def test_batches_of_gradients(make: Callable[[], nn.Module], train: bool) -> None:
    """A Jacobian in one go: the backward runs under vmap, the forward did not."""
    plain, ours = both(make, train)
    results = []
    for model in (plain, ours):
        x = images().requires_grad_()
        wanted = [x, next(model.parameters())]
        z = model(x).flatten()[:3]
        each = lambda v, z=z, wanted=wanted: torch.autograd.grad(z, wanted, v, retain_graph=True)  # noqa: E731
        looped = [torch.stack(g) for g in zip(*map(each, torch.eye(3)), strict=True)]
        mapped = vmap(each)(torch.eye(3))
        nested = vmap(vmap(each))(torch.eye(3)[None])
        batched = torch.autograd.grad(z, wanted, torch.eye(3), is_grads_batched=True)
        results.append([*looped, *mapped, *(g[0] for g in nested), *batched])
    for mine, theirs in zip(results[1], results[0], strict=True):
        near(mine, theirs)
    assert all(row.status == "fused" for row in resnet_fast.explain(ours))


@pytest.mark.parametrize("make", [small, norm_first], ids=lambda make: make.__name__)
def test_a_backward_is_of_the_statistics_of_its_forward(make: Callable[[], nn.Module]) -> None:
    """A pass by the running statistics, one that moves them, one backward: torch itself reads the moved ones."""
    plain, ours = both(make, train=False)
    twin = copy.deepcopy(plain).train()
    (loss_of(ours, images()) + loss_of(ours.train(), images() + 1)).backward()
    loss_of(plain, images()).backward()
    loss_of(twin, images() + 1).backward()
    for (name, p), other, mine in zip(plain.named_parameters(), twin.parameters(), ours.parameters(), strict=True):
        near(mine.grad, p.grad + other.grad, name)  # type: ignore[arg-type,operator]
    assert all(row.status == "fused" for row in resnet_fast.explain(ours))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_what_is_written_between_forward_and_backward(train: bool) -> None:
    """A weight: torch's error. What backward does not read any more: the gradients of the forward that was."""
    plain, ours = pair(train)
    loss_of(plain, images()).backward()
    loss = loss_of(ours, images())
    with torch.no_grad():
        for m in ours.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.mul_(3)
    loss.backward()
    for (name, p), mine in zip(plain.named_parameters(), ours.parameters(), strict=True):
        near(mine.grad, p.grad, name)  # type: ignore[arg-type]
    for model in (plain, ours):
        loss = loss_of(model, images())
        with torch.no_grad():
            model.layer1[1].conv2.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_double_backward_is_an_error_not_a_wrong_number() -> None:
    """A gradient penalty needs the unfused model, and hears so by torch's own error."""
    _, ours = pair()
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(ours, x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


def tripled(p: Tensor) -> None:
    p.grad.mul_(3)  # type: ignore[union-attr]


def test_anomaly_mode_and_parameter_hooks() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.layer1[0].conv1.weight.register_hook(lambda g: g * 2)
        model.layer2[0].bn1.weight.register_post_accumulate_grad_hook(tripled)
        with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
            warnings.simplefilter("ignore")  # it says that it is slow
            loss_of(model, images()).backward()
    assert_same_state(ours, plain)
    assert fused_rows(ours) == FUSED
