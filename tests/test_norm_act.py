"""Batch norm and ReLU where no convolution stands before them: by the house's tolerance, and when it steps back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from tests import libraries
from tests.fusing import calibrated
from tests.tolerance import DTYPES, assert_close


def pair(train: bool, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(7, **options), nn.ReLU())
    if options.get("affine", True) and options.get("track_running_stats", True):
        calibrated(model)
    return model.train(train)


def image(n: int = 3, c: int = 7, h: int = 5, w: int = 6) -> Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def is_fused(model: nn.Module) -> bool:
    return resnet_fast.explain(model)[0].status == "fused"


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    z = model(x)
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(z.dtype)
    z.backward(dz)
    grads = {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"z": z.detach(), "dx": x.grad, **grads, **{n: b.clone() for n, b in model.named_buffers()}}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 0.1},
    {"momentum": 0.0},
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_original(options: dict[str, Any], train: bool, dtype: torch.dtype) -> None:
    plain = pair(train, **options).to(dtype)
    ours, judge = resnet_fast.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = image().to(dtype)
    for _ in range(2):
        mine, theirs, ref = step(ours, x), step(plain, x), step(judge, x.double())
        assert is_fused(ours)
        assert mine.keys() == theirs.keys()
        for name, value in ref.items():
            assert mine[name].dtype == theirs[name].dtype, name
            if value.is_floating_point():
                assert_close(mine[name], value, theirs[name])
            else:
                assert torch.equal(mine[name], value), name
    with torch.no_grad():
        assert_close(ours(x), judge(x.double()), plain(x))


def test_frozen_affine_and_partial_gradients() -> None:
    for learns in ((True, False), (False, True), (False, False)):
        plain = pair(True)
        for p, wanted in zip(plain.parameters(), learns, strict=True):
            p.requires_grad_(wanted)
        ours = resnet_fast.fuse(copy.deepcopy(plain))
        mine, theirs = step(ours, image()), step(plain, image())
        assert mine.keys() == theirs.keys() and is_fused(ours)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


def hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda m, args, out: out + 1)


def other_act(model: nn.Sequential) -> None:
    model[1] = nn.GELU()


def other_norm(model: nn.Sequential) -> None:
    model[0] = nn.GroupNorm(7, 7)


def wide(model: nn.Sequential) -> None:
    model.double()


@pytest.mark.parametrize("change", [hook, other_act, other_norm, wide], ids=lambda c: c.__name__)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_change_after_fuse(change: Any, train: bool) -> None:
    plain = pair(train)
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    for model in (plain, ours):
        change(model)
    x = image().to(next(plain.parameters()).dtype)
    for _ in range(2):
        mine, theirs = step(ours, x), step(plain, x)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value)
    assert not is_fused(ours)


def test_mistakes_get_torchs_own_errors() -> None:
    plain, ours = pair(True), resnet_fast.fuse(pair(True))
    for bad in (image()[0], image(c=6), image(1, 7, 1, 1), image().double(), image().long(), "x"):
        with pytest.raises(Exception) as theirs:
            plain(bad)
        with pytest.raises(type(theirs.value)) as mine:
            ours(bad)
        assert str(mine.value) == str(theirs.value)
    assert ours.eval()(image()[:0]).shape == (0, 7, 5, 6)


def test_nan_survives() -> None:
    x = image()
    x[0, 2, 1, 1] = float("nan")
    for train in (True, False):
        plain, ours = pair(train), resnet_fast.fuse(pair(train))
        with torch.no_grad():
            assert torch.equal(ours(x).isnan(), plain(x).isnan()) and plain(x).isnan().any()


@pytest.mark.parametrize("options", [{"drop_rate": 0.3}, {"memory_efficient": True}], ids=str)
def test_dense_layers(options: dict[str, Any]) -> None:
    """torchvision's own text: drop-out draws the same numbers; what checkpoints runs as it is, and says so."""
    densenet = libraries.require("torchvision").models.densenet
    torch.manual_seed(0)
    plain = calibrated(densenet.DenseNet(8, (2,), 16, num_classes=5, **options)).train()
    plain.to(memory_format=torch.channels_last)  # drop-out's numbers go by the places in memory
    x = image(2, 3, 32, 32)
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    results = []
    for model in (plain, ours):
        torch.manual_seed(3)
        model(x).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3 * results[0].abs().max().item())
    for (name, b), other in zip(plain.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    row = next(r for r in resnet_fast.explain(ours) if r.name.endswith("denselayer1"))
    assert (row.status == "fused") == ("drop_rate" in options)
    assert "drop_rate" in options or "memory_efficient" in row.reason
    with torch.no_grad():
        ours.eval()(x)
    row = next(r for r in resnet_fast.explain(ours) if r.name.endswith("denselayer1"))
    assert row.status == "not" and "in inference on a CPU" in row.reason
