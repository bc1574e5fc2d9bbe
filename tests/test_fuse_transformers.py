"""fuse() on transformers' ResNet, beyond the support table (test_support.py)."""

from __future__ import annotations

import pytest
import torch

import resnet_fast
from tests.fusing import assert_same_model
from tests.libraries import require

transformers = require("transformers")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [128, 256, 512, 1024]}


def make(layer_type: str, **options):
    config = transformers.ResNetConfig(
        layer_type=layer_type, depths=[2, 2, 2, 2], hidden_sizes=WIDTHS[layer_type], num_labels=100, **options
    )
    return transformers.ResNetForImageClassification(config)


def test_stride_in_the_first_convolution() -> None:
    assert_same_model(lambda: make("bottleneck", downsample_in_bottleneck=True), X, fused=9, train=False)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hooks_on_every_level_of_a_block_are_called(train: bool) -> None:
    """On the containers that the fused forward reaches through, and on what it leaves out, too."""
    model = resnet_fast.fuse(make("bottleneck")).train(train)
    block = model.resnet.encoder.stages[1].layers[0]
    inner = [(name, m) for name, m in block.named_modules() if name]
    assert {"layer", "layer.0", "layer.2.activation", "shortcut", "shortcut.convolution"} <= dict(inner).keys()
    x = torch.randn(2, 128, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = block(x).detach()
    for name, m in inner:
        seen: list[str] = []
        handles = [
            m.register_forward_pre_hook(lambda m, args, seen=seen: seen.append("before")),
            m.register_forward_hook(lambda m, args, out, seen=seen: seen.append("after")),
        ]
        z = block(x)
        for handle in handles:
            handle.remove()
        assert seen == ["before", "after"], name
        torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)
    block(x)  # without hooks: fused again
    rows = [row for row in resnet_fast.explain(model) if row.name.endswith("stages.1.layers.0")]
    assert [row.status for row in rows] == ["fused"], f"\n{rows}"


def test_other_activations_are_left_alone() -> None:
    rows = assert_same_model(lambda: make("basic", hidden_act="gelu"), X, fused=0, train=False)
    assert any("GELU" in row.reason for row in rows), f"\n{rows}"


def test_a_wrong_number_of_channels_gets_the_librarys_error() -> None:
    model = resnet_fast.fuse(make("basic"))
    with pytest.raises(ValueError, match="channel dimension"):
        model(X[:, :2])


def test_every_frozen_norm_of_the_detr_family_exists() -> None:
    """Their names are a list in the adapter: each is a class there, with the eps that its text has."""
    import importlib

    from resnet_fast.adapters.transformers import NORMS
    from resnet_fast.plan import norm_of

    for name in NORMS:
        module, _, cls = name.rpartition(".")
        norm = getattr(importlib.import_module(module), cls)(3)
        assert norm_of(type(norm)) == NORMS[name]
        norm.running_var.fill_(1e-5)
        torch.testing.assert_close(norm(torch.ones(1, 3, 1, 1)), torch.full((1, 3, 1, 1), (2e-5) ** -0.5))
