"""fuse() on torchvision's models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fast
from tests.fusing import assert_same_model
from tests.libraries import require

torchvision = require("torchvision")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("resnet18", 9),
        ("resnet50", 17),
        ("resnext50_32x4d", 17),
        ("wide_resnet50_2", 17),
        ("vgg11_bn", 1),
        ("mobilenet_v2", 52),
        ("googlenet", None),
    ],
)
def test_classification(name: str, fused: int | None) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    train = name.startswith("resn")
    rows = assert_same_model(lambda: getattr(torchvision.models, name)(**options), X, fused=fused, train=train)
    if fused is None:  # its convolution and norm lie in a block of its own, whose ReLU is a function
        assert {row.status for row in rows} == {"not"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    assert_same_model(torchvision.models.resnet18, X, fused=9, dtype=dtype, train=dtype == torch.bfloat16)


def test_dilated_segmentation_backbone() -> None:
    make = torchvision.models.segmentation.deeplabv3_resnet50
    rows = assert_same_model(lambda: make(weights=None, weights_backbone=None).eval(), X, train=False)
    assert sum(r.status == "fused" for r in rows if r.kind == "bottleneck") == 16


def test_frozen_batch_norm() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d

    def make() -> nn.Module:
        model = torchvision.models.resnet18(norm_layer=norm)
        for m in model.modules():
            if isinstance(m, norm):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
                m.weight.uniform_(0.5, 1)
        return model

    assert_same_model(make, X, fused=9)


def test_quantizable_subclasses_are_left_alone() -> None:
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False)
    rows = resnet_fast.explain(resnet_fast.fuse(model))
    assert not [r for r in rows if r.status == "fused" and r.kind in ("basic", "stem")]
    assert type(model.layer1[0]).__name__ == "QuantizableBasicBlock"


def test_other_norms_are_left_alone() -> None:
    model = torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c))
    rows = resnet_fast.explain(resnet_fast.fuse(model))
    assert {r.status for r in rows} == {"not"}
    assert any("GroupNorm" in r.reason for r in rows)
    model(X)


def test_a_forward_that_is_not_known_keeps_the_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    def _forward_impl(self, x):
        return self.fc(torch.flatten(self.avgpool(self.conv1(x) * 2), 1).repeat(1, 8))

    monkeypatch.setattr(torchvision.models.ResNet, "_forward_impl", _forward_impl)
    rows = resnet_fast.explain(torchvision.models.resnet18())
    assert rows[0].status == "not"
    assert "_forward_impl" in rows[0].reason
