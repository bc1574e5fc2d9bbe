"""The tools of test_tools_*.py once more, on models of the real libraries: each as the original takes them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import resnet_fast
from tests import libraries
from tests.fusing import calibrated, first_tensor
from tests.tools import assert_same_state, near

X = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


class Logits(nn.Module):
    """A model's logits, whatever it returns: what torch.compile and torch.export are asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return first_tensor(self.model(x))


def torchvisions() -> nn.Module:
    resnet = libraries.require("torchvision").models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def timms() -> nn.Module:
    timm = libraries.require("timm")
    return timm.create_model("seresnet50", layers=[1, 1, 1, 1], channels=[16, 16, 32, 32], num_classes=5)


def transformers_() -> nn.Module:
    transformers = libraries.require("transformers")
    config = transformers.ResNetConfig(
        layer_type="bottleneck", depths=[1, 2], hidden_sizes=[32, 64], embedding_size=16, num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


MODELS = [torchvisions, timms, transformers_]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__.strip("_"))
def made(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Logits(calibrated(request.param()).to(memory_format=torch.channels_last))


def fused_rows(model: nn.Module) -> int:
    return sum(row.status in ("fused", "partly") for row in resnet_fast.explain(model))


def loss_of(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def assert_same_step(ours: Any, plain: Any, x: Tensor = X, modules: tuple[nn.Module, nn.Module] | None = None) -> None:
    """Loss, gradients (as a whole: a rounding may move a ReLU) and statistics of a step."""
    mine, theirs = modules or (ours, plain)
    losses = []
    for model, module in ((ours, mine), (plain, theirs)):
        module.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        losses.append(loss.detach())
    near(*losses, "loss")
    flat = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (mine, theirs)]
    assert (flat[0] - flat[1]).norm() <= 5e-3 * flat[1].norm()
    for (name, b), other in zip(theirs.named_buffers(), mine.buffers(), strict=True):
        near(other, b, name)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("made", [torchvisions, timms], indirect=True, ids=["torchvision", "timm"])
def test_compile_with_dynamic_batch(made: nn.Module, train: bool) -> None:
    """fullgraph; what is not compiled stays fused."""
    plain, ours = made.train(train), resnet_fast.fuse(copy.deepcopy(made)).train(train)
    torch._dynamo.reset()
    fast = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager" if train else "eager")
    for n in (2, 3):
        if train:
            assert_same_step(fast, plain, X[:n], (ours, plain))
        else:
            with torch.no_grad():
                near(fast(X[:n]), plain(X[:n]), f"batch {n}")
    assert_same_step(ours, plain)
    assert fused_rows(ours) > 3


def test_export_with_dynamic_batch(made: nn.Module) -> None:
    plain, ours = made.eval(), resnet_fast.fuse(copy.deepcopy(made)).eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(ours, (X,), dynamic_shapes=shapes)
    assert not any("resnet_fast" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        near(program.module()(X[:3]), plain(X[:3]))


def test_functional_call(made: nn.Module) -> None:
    plain, ours = made.eval(), resnet_fast.fuse(copy.deepcopy(made)).eval()
    state = {n: t.detach() * 1.1 if t.is_floating_point() else t for n, t in made.state_dict().items()}
    with torch.no_grad():
        before = ours(X)
        near(functional_call(ours, state, (X,)), functional_call(plain, state, (X,)))
        assert torch.equal(ours(X), before)


def test_checkpointing(made: nn.Module) -> None:
    """The whole model, as a user wraps it; its statistics move twice, in torch as here."""
    plain, ours = made.train(), resnet_fast.fuse(copy.deepcopy(made)).train()
    calls = [lambda x, m=m: checkpoint(m, x, use_reentrant=False) for m in (ours, plain)]
    assert_same_step(*calls, modules=(ours, plain))
    assert fused_rows(ours) > 3


def test_averaged_model_and_update_bn(made: nn.Module) -> None:
    plain, ours = made.train(), resnet_fast.fuse(copy.deepcopy(made)).train()
    averages = []
    for model in (ours, plain):
        average = AveragedModel(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        average.update_parameters(model)
        update_bn([X, X + 1], average)
        with torch.no_grad():
            averages.append((average, average.eval()(X)))
    near(averages[0][1], averages[1][1])
    assert_same_state(averages[0][0], averages[1][0])
    assert fused_rows(averages[0][0]) > 3


def test_files_and_copies(made: nn.Module) -> None:
    """weights_only state_dicts; pickles, which are the original's; deep copies, which are fused."""
    plain, ours = made.eval(), resnet_fast.fuse(copy.deepcopy(made)).eval()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    loaded, twin = pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        for model in (ours, loaded, twin):
            near(model(X), plain(X))
    assert fused_rows(twin) == fused_rows(ours) > 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_are_replaced(made: nn.Module, when: str) -> None:
    """convert_sync_batchnorm, and timm's freeze_batch_norm_2d: a step as the original's, before and after fuse()."""
    libraries.require("timm")
    from timm.layers import freeze_batch_norm_2d

    for change in (nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d):
        ours = copy.deepcopy(made)
        ours = change(resnet_fast.fuse(ours)) if when == "after" else resnet_fast.fuse(change(ours))
        # SyncBatchNorm cannot train on a CPU without fuse(): there the original is plain batch norm.
        plain = copy.deepcopy(made) if change is not freeze_batch_norm_2d else change(copy.deepcopy(made))
        assert_same_step(ours.train(), plain.train())
        assert fused_rows(ours) > 3, f"\n{resnet_fast.explain(ours)}"


def test_hooks_on_every_inner_module(made: nn.Module) -> None:
    """Every convolution is seen, in its order; without the hooks the blocks are fused again."""
    plain, ours = made.eval(), resnet_fast.fuse(copy.deepcopy(made)).eval()
    seen: list[list[str]] = [[], []]
    handles = []
    for model, calls in zip((plain, ours), seen, strict=True):
        for name, m in model.named_modules():
            if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)):
                handles.append(m.register_forward_hook(lambda m, a, o, name=name, calls=calls: calls.append(name)))
    with torch.no_grad():
        near(ours(X), plain(X))
    assert seen[1] == seen[0] and seen[0]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        near(ours(X), plain(X))
    assert fused_rows(ours) > 3


def test_autocast_and_layouts(made: nn.Module) -> None:
    """bfloat16 autocast in training; NCHW images and weights."""
    plain, ours = made.train(), resnet_fast.fuse(copy.deepcopy(made)).train()
    outputs = []
    for model in (ours, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X)
        out.float().square().sum().backward()
        outputs.append(out)
    assert outputs[0].dtype == outputs[1].dtype
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (ours, plain)]
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.97
    ours, plain = (m.to(memory_format=torch.contiguous_format).eval() for m in (ours, plain))
    with torch.no_grad():
        plain.load_state_dict(ours.state_dict())
        near(ours(X.contiguous()), plain(X.contiguous()))
