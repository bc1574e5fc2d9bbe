"""fuse() on segmentation_models_pytorch, beyond the support table: encoders that are cut short."""

from __future__ import annotations

import pytest
import torch

from tests.fusing import assert_same_model
from tests.libraries import require

smp = require("smp")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [3, 4])
def test_shallow_encoder(depth: int) -> None:
    def make():
        return smp.Unet(
            "resnet18", encoder_weights=None, encoder_depth=depth, decoder_channels=[64, 32, 16, 8][:depth], classes=3
        )

    assert_same_model(make, X, train=False)
