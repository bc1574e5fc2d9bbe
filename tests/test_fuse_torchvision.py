"""fuse() on torchvision's models, beyond the support table (test_support.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fast
from tests.fusing import assert_same_model, calibrated, measure
from tests.libraries import require

torchvision = require("torchvision")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    assert_same_model(torchvision.models.resnet18, X, fused=9, dtype=dtype, train=dtype == torch.bfloat16)


@pytest.mark.parametrize("learns", ["weights", "weights and affine"])
def test_norms_in_eval_while_the_rest_trains(learns: str) -> None:
    """The other way to freeze: batch norms in eval, with or without gradients for gamma and beta."""
    torch.manual_seed(0)
    plain = calibrated(torchvision.models.resnet18(num_classes=10))
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(learns == "weights and affine")
            m.train = lambda mode=True, m=m: m  # as many repositories do, so that model.train() leaves it
            m.eval()
    ours, judge = resnet_fast.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    for model in (plain, ours, judge):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.training = False
    mine, theirs, ref = (measure(m, X.double() if m is judge else X, True) for m in (ours, plain, judge))
    assert mine["grads"].keys() == theirs["grads"].keys()
    assert any("bn1.weight" in name for name in mine["grads"]) == (learns == "weights and affine")
    for name, grad in mine["grads"].items():
        scale = ref["grads"][name].norm()
        error, own = ((g.double() - ref["grads"][name]).norm() / scale for g in (grad, theirs["grads"][name]))
        assert error <= 2 * own + 1e-3, f"{name}: {error:.2g}, torch's own {own:.2g}"
    for name, value in ours.named_buffers():
        assert torch.equal(value, dict(plain.named_buffers())[name]), name


def test_quantizable_subclasses_are_left_alone() -> None:
    model = torchvision.models.quantization.resnet18(weights=None, quantize=False)
    rows = resnet_fast.explain(resnet_fast.fuse(model, generic=True))
    assert [(row.kind, row.status) for row in rows] == [("QuantizableResNet", "not")]
    assert "torch.ao.quantization" in rows[0].reason
    model.eval().fuse_model()  # which would fail on a class of ours


def test_other_norms_are_left_alone() -> None:
    model = torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c))
    rows = resnet_fast.explain(resnet_fast.fuse(model, generic=True))
    assert {r.status for r in rows} == {"not"}
    assert any("GroupNorm" in r.reason for r in rows)
    model(X)


def test_layers_that_are_returned_end_a_run() -> None:
    getter = torchvision.models._utils.IntermediateLayerGetter
    net = torchvision.models.resnet18()
    for returned in ({"bn1": "a", "layer1": "b"}, {"relu": "a"}, {"conv1": "a", "maxpool": "b"}):
        rows = assert_same_model(lambda r=returned: getter(copy.deepcopy(net), dict(r)), X)
        runs = [row.reason for row in rows if row.kind == "sequence"]
        assert len(runs) == 1, f"\n{rows}"
        assert ("conv1" in returned) != runs[0].startswith("conv1 + bn1"), f"\n{rows}"
    model = resnet_fast.fuse(getter(net, {"layer1": "b"})).eval()
    model.return_layers = {"relu": "a", "layer1": "b"}
    assert list(model(X)) == ["a", "b"]
    assert "return_layers changed" in resnet_fast.explain(model)[0].reason


@pytest.mark.parametrize(
    ("method", "name", "make"),
    [
        ("_forward_impl", "ResNet", lambda: torchvision.models.resnet18()),
        (
            "forward",
            "_utils.IntermediateLayerGetter",
            lambda: torchvision.models._utils.IntermediateLayerGetter(torchvision.models.resnet18(), {"layer4": "out"}),
        ),
    ],
    ids=["ResNet", "IntermediateLayerGetter"],
)
def test_a_forward_that_is_not_known_keeps_the_stem(
    method: str, name: str, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.conv1(x) * 2), 1).repeat(1, 8))

    module, _, cls = f"torchvision.models.{name}".rpartition(".")
    monkeypatch.setattr(getattr(__import__(module, fromlist=[cls]), cls), method, forward)
    rows = resnet_fast.explain(make())
    assert rows[0].status == "not"
    assert f"{method} is not the one" in rows[0].reason


def test_fuse_of_resnet152_is_quick() -> None:
    """What it costs is measured by the benchmarks; here: no block of a library is traced."""
    from resnet_fast.adapters import tracing

    def traced(*_: object) -> None:
        raise AssertionError("a block of a known class was traced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "plan", traced)
        model = resnet_fast.fuse(torchvision.models.resnet152())
    assert sum(row.status == "fused" for row in resnet_fast.explain(model)) == 51
