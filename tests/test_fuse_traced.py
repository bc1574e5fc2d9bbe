"""Blocks that were traced: what a swap keeps, and what changes after it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import resnet_fast
from tests import standins
from tests.fusing import X, calibrated, run
from tests.tracing import fused, in_place_sum, made, options, parts

# ---- what a swap keeps ------------------------------------------------------------------------------------------


def test_unfuse_restores_bit_for_bit() -> None:
    model = calibrated(standins.UNet()).eval()
    before, keys, kinds = run(model), list(model.state_dict()), [type(m) for m in model.modules()]
    resnet_fast.fuse(model, generic=True)
    assert list(model.state_dict()) == keys and len(parts(model)) == 5
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    resnet_fast.unfuse(model)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(run(model), before)


def test_fuse_again_keeps_what_was_traced() -> None:
    model = fused(in_place_sum)
    found = parts(model)
    assert found and parts(resnet_fast.fuse(model)) == found == parts(resnet_fast.fuse(model, generic=True))


def test_copies_and_files() -> None:
    model = resnet_fast.fuse(calibrated(standins.UNet()).eval(), generic=True)
    expected = run(model)
    twin = copy.deepcopy(model)
    assert parts(twin) == parts(model)
    with torch.no_grad():
        twin.down1.conv1.weight.mul_(2)
    assert torch.equal(run(model), expected) and not torch.equal(run(twin), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not parts(loaded) and type(loaded.down1) is standins.Down
    torch.testing.assert_close(run(loaded), expected, rtol=1e-4, atol=1e-4)


def test_compile_fullgraph() -> None:
    model = made(in_place_sum).eval()
    expected = run(model)
    compiled = torch.compile(resnet_fast.fuse(model, generic=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), expected)


# ---- what changes after fuse() is seen --------------------------------------------------------------------------


def attribute(model: nn.Module) -> None:
    model.rate = 3.0


def removed(model: nn.Module) -> None:
    model.extra = None


def hooked(model: nn.Module) -> None:
    model.bn1.register_forward_hook(lambda m, args, out: out + 1)


def other_norm(model: nn.Module) -> None:
    model.bn2 = nn.GroupNorm(2, 8)


def other_function(model: nn.Module) -> None:
    model.function = torch.sigmoid


@pytest.mark.parametrize("change", [attribute, removed, hooked, other_norm, other_function], ids=lambda c: c.__name__)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_change(change: Callable[[nn.Module], None], train: bool) -> None:
    plain, ours = made(options).train(train), fused(options).train(train)
    assert torch.allclose(plain(X), ours(X), rtol=1e-4, atol=1e-4)
    for model in (plain, ours):
        change(model)
    torch.testing.assert_close(ours(X), plain(X), rtol=1e-4, atol=1e-4)
    assert not parts(ours), f"\n{resnet_fast.explain(ours)}"


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("where", ["layer2.0.shortcut", "layer1.0.shortcut"])
def test_a_shortcut_that_grows_is_seen(where: str, train: bool) -> None:
    """A Sequential that was traced through, and one that was empty and left out."""
    torch.manual_seed(0)
    plain = calibrated(standins.cifar()).train(train)
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    assert torch.allclose(run(plain), run(ours), rtol=1e-4, atol=1e-4)
    for model in (plain, ours):
        run(model)
        model.get_submodule(where).append(nn.Tanh())
    torch.testing.assert_close(run(ours), run(plain), rtol=1e-4, atol=1e-4)
    row = next(row for row in resnet_fast.explain(ours) if row.name == where.rpartition(".")[0])
    assert row.status == "not", row


def test_a_hook_on_a_container_that_was_traced_through() -> None:
    model = resnet_fast.fuse(calibrated(standins.cifar("ResidualBlock")))
    seen: list[int] = []
    model.layer2[0].residual_function.register_forward_hook(lambda m, args, out: seen.append(1))
    model(X)
    assert seen == [1]
