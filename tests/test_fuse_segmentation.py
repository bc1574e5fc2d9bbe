"""fuse() on segmentation_models_pytorch, beyond the support table: encoders that are cut short, decoders' blocks."""

from __future__ import annotations

import copy

import pytest
import torch

import resnet_fast
from tests.fusing import assert_same_model, calibrated
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


@pytest.mark.parametrize("attention", [None, "scse"])
@pytest.mark.parametrize("block", ["unet.decoder.UnetDecoderBlock", "unetplusplus.decoder.DecoderBlock"])
def test_decoder_blocks_with_and_without_a_skip(block: str, attention: str | None) -> None:
    """Traced once for each: what a block does with its skip is read off the call."""
    from tests.libraries import build

    arguments = {"in_channels": 16, "skip_channels": 16, "out_channels": 16, "attention_type": attention}
    torch.manual_seed(0)
    plain = calibrated(build(f"segmentation_models_pytorch.decoders.{block}", arguments))
    ours = resnet_fast.fuse(copy.deepcopy(plain), generic=True)
    sizes = (16, 16) if block.startswith("unet.") else ()
    for train in (True, False):
        for channels, skip in ((16, torch.randn(2, 16, 16, 16)), (32, None)):
            x = torch.randn(2, channels, 8, 8)
            results = []
            for model in (plain.train(train), ours.train(train)):
                model.zero_grad()
                z = model(x, *sizes, skip)
                z.square().mean().backward()
                results.append([z.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
                results[-1] += [b.clone() for b in model.buffers()]
            for theirs, mine in zip(*results, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    fused = [row.reason for row in resnet_fast.explain(ours) if row.status in ("fused", "partly")]
    assert fused and not any("original" in reason for reason in fused), f"\n{resnet_fast.explain(ours)}"
