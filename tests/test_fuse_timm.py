"""fuse() on timm's models."""

from __future__ import annotations

import pytest
import torch

import resnet_fast
from tests.fusing import assert_same_model
from tests.libraries import require

timm = require("timm")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "fused", "partly"),
    [
        ("resnet18", 9, 0),
        ("resnet26", 9, 0),
        ("resnet26d", 9, 3),  # three shortcuts begin with an average pool: what follows it is a sequence by itself
        ("resnext50_32x4d", 17, 0),
    ],
)
def test_plain_blocks(name: str, fused: int, partly: int) -> None:
    rows = assert_same_model(lambda: timm.create_model(name), X)
    counts = {s: [r.name for r in rows if r.status == s] for s in ("fused", "partly", "not")}
    assert (len(counts["fused"]), len(counts["partly"]), counts["not"]) == (fused, partly, []), f"\n{rows}"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("seresnet50", {}, "se (SEModule)"),
        ("ecaresnet26t", {}, "se (EcaModule)"),
        ("resnetblur50", {}, "aa (BlurPool2d)"),
        ("resnet18", {"drop_path_rate": 0.2}, "drop_path (DropPath)"),
    ],
)
def test_extras_keep_the_block_as_it_is(name: str, options: dict, reason: str) -> None:
    rows = assert_same_model(lambda: timm.create_model(name, **options), X, train=False)
    assert any(reason in row.reason and row.status == "not" for row in rows), f"\n{rows}"


def test_drop_path_that_comes_later_is_seen() -> None:
    model = resnet_fast.fuse(timm.create_model("resnet18")).eval()
    model.layer1[0].drop_path = timm.layers.DropPath(0.5)
    row = next(r for r in resnet_fast.explain(model) if r.name == "layer1.0")
    assert (row.status, "drop_path" in row.reason) == ("not", True)


@pytest.mark.parametrize("name", ["resnetv2_50", "res2net50_26w_4s", "regnetx_002"])
def test_blocks_of_the_same_name_are_not_mistaken(name: str) -> None:
    rows = assert_same_model(lambda: timm.create_model(name), X, train=False)
    assert not [r for r in rows if r.status != "not" and r.kind in ("basic", "bottleneck")], f"\n{rows}"


def test_grad_checkpointing_runs_the_original() -> None:
    model = resnet_fast.fuse(timm.create_model("resnet18")).train()
    model.set_grad_checkpointing(True)
    model(X).sum().backward()
    row = resnet_fast.explain(model)[0]
    assert (row.status, "grad_checkpointing" in row.reason) == ("not", True)
