"""fuse() on transformers' ResNet."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_classification(layer_type: str) -> None:
    assert_same_model(lambda: make(layer_type), X, fused=9)


def test_stride_in_the_first_convolution() -> None:
    assert_same_model(lambda: make("bottleneck", downsample_in_bottleneck=True), X, fused=9, train=False)


def test_other_activations_are_left_alone() -> None:
    rows = assert_same_model(lambda: make("basic", hidden_act="gelu"), X, fused=0, train=False)
    assert any("GELU" in row.reason for row in rows), f"\n{rows}"
