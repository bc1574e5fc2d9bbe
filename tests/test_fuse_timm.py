"""fuse() on timm's models, beyond the support table (test_support.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from tests.fusing import assert_same_model, calibrated, run
from tests.libraries import require

timm = require("timm")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = {"layers": [1, 1, 1, 1], "num_classes": 10}


def status(model: nn.Module, name: str) -> resnet_fast.fuse.Row:
    return next(row for row in resnet_fast.explain(model) if row.name == name)


@pytest.mark.parametrize(
    "options", [{"drop_path_rate": 0.5}, {"drop_block_rate": 0.5}, {"drop_rate": 0.5}], ids=lambda o: next(iter(o))
)
def test_the_same_random_numbers_are_drawn(options: dict) -> None:
    torch.manual_seed(0)
    plain = calibrated(timm.create_model("resnet18", num_classes=10, **options)).train()
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    outputs = []
    for model in (plain, ours, ours):
        torch.manual_seed(5)
        outputs.append(model(X).detach())
        assert torch.rand(1).item() == pytest.approx(torch.rand(1, generator=after(plain)).item()), "drawn after it"
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(outputs[1], outputs[2]), "and they are reproducible"
    torch.manual_seed(6)
    assert not torch.allclose(ours(X), outputs[1], rtol=1e-2, atol=1e-2), "they matter"


def after(model: nn.Module) -> torch.Generator:
    """A generator in the state in which ``model`` leaves torch's own."""
    kept = torch.get_rng_state()
    torch.manual_seed(5)
    copy.deepcopy(model)(X)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    torch.set_rng_state(kept)
    return generator


def test_drop_path_that_comes_later_is_seen() -> None:
    for options in ({}, {"block_args": {"attn_layer": "se"}}):  # a block as a whole, and one in parts
        model = resnet_fast.fuse(timm.create_model("resnet18", **options)).eval()
        run(model, X)
        assert status(model, "layer1.0").status == ("partly" if options else "fused")
        model.layer1[0].drop_path = timm.layers.DropPath(0.5)
        plain = resnet_fast.unfuse(copy.deepcopy(model)).train()
        for m in (model.train(), plain):
            torch.manual_seed(3)
            m.out = m(X)
        torch.testing.assert_close(model.out, plain.out, rtol=1e-3, atol=1e-3)
        assert status(model, "layer1.0").status == "not"


def test_hooks_on_attention_are_called() -> None:
    model = resnet_fast.fuse(timm.create_model("seresnet50", **SMALL)).eval()
    seen: list[int] = []
    model.layer1[0].se.register_forward_hook(lambda m, args, out: seen.append(1))
    run(model, X)
    assert seen == [1] and status(model, "layer1.0").status == "partly"


def test_frozen_and_synchronised_norms_after_fuse() -> None:
    """timm replaces norms inside: FrozenBatchNormAct2d for its own class, torchvision's for nn.BatchNorm2d."""
    from timm.layers.norm_act import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    torch.manual_seed(0)
    plain = calibrated(timm.create_model("regnetx_002", num_classes=10))
    ours = resnet_fast.fuse(copy.deepcopy(plain), generic=True)
    for change in (freeze_batch_norm_2d, unfreeze_batch_norm_2d):
        plain, ours = change(plain).eval(), change(ours).eval()
        torch.testing.assert_close(run(ours, X), run(plain, X), rtol=1e-3, atol=1e-3)
        assert {row.status for row in resnet_fast.explain(ours)} == {"fused"}, change
    # torch's converter makes of timm's class one that never calls its activation: so it must be, fused or not.
    plain, ours = (nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in (plain, ours))
    torch.testing.assert_close(run(ours, X), run(plain, X), rtol=1e-3, atol=1e-3)


def test_a_norm_with_an_activation_of_its_own() -> None:
    """BatchNormAct2d as the norm of a ResNet: its ReLU stands before the sum."""
    model = timm.create_model("resnet18", norm_layer=timm.layers.BatchNormAct2d, num_classes=10)
    rows = assert_same_model(lambda: copy.deepcopy(model), X, train=False)  # torch itself cannot train it
    assert {row.status for row in rows if row.kind == "basic"} <= {"fused", "partly"}, f"\n{rows}"


@pytest.mark.parametrize("name", ["resnetv2_50", "res2net50_26w_4s", "regnetx_002"])
def test_blocks_of_the_same_name_are_not_mistaken(name: str) -> None:
    options = {} if name.startswith("regnet") else {"layers": [1, 1, 1, 1]}
    model = resnet_fast.fuse(timm.create_model(name, **options))
    rows = resnet_fast.explain(model)
    assert not [r for r in rows if r.status != "not" and r.kind in ("basic", "bottleneck")], f"\n{rows}"


def test_grad_checkpointing_runs_the_original() -> None:
    model = resnet_fast.fuse(timm.create_model("resnet18")).train()
    model.set_grad_checkpointing(True)
    model(X).sum().backward()
    row = resnet_fast.explain(model)[0]
    assert (row.status, "grad_checkpointing" in row.reason) == ("not", True)
