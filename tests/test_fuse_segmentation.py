"""fuse() on segmentation_models_pytorch: torchvision's blocks in encoders of its own, decoders of Sequentials."""

from __future__ import annotations

import pytest
import torch

from tests.fusing import assert_same_model
from tests.libraries import require

smp = require("smp")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("decoder", "fused"), [("Unet", 19), ("FPN", None)])
def test_segmentation(decoder: str, fused: int | None) -> None:
    make = getattr(smp, decoder)
    rows = assert_same_model(lambda: make("resnet18", encoder_weights=None, classes=3), X, fused=fused)
    encoder = [r for r in rows if r.name.startswith("encoder")]
    assert [r.status for r in encoder] == ["fused"] * 9


@pytest.mark.parametrize("depth", [3, 4])
def test_shallow_encoder(depth: int) -> None:
    def make():
        return smp.Unet(
            "resnet18", encoder_weights=None, encoder_depth=depth, decoder_channels=[64, 32, 16, 8][:depth], classes=3
        )

    assert_same_model(make, X, train=False)
