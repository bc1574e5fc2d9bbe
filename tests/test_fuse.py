"""fuse(), unfuse(), fused(), explain(), register_block(): what a swap keeps, and what they say."""

from __future__ import annotations

import copy
import io
import pickletools
import zipfile

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import resnet_fast
from resnet_fast import BlockPlan, ConvBnPath, Opaque, models
from resnet_fast.commands.timing import saved
from tests.fusing import X, assert_same_model, calibrated, net, run, statuses

# ---- our own models, each in eval and in training -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("resnet18", {}, 9),
        ("resnet18", {"shortcut": "A"}, 6),  # the three subsampled identities run as they are
        ("resnet18", {"shortcut": "C"}, 9),
        ("resnet50", {}, 17),
        ("resnet50", {"version": "v1"}, 17),
        ("plain18", {}, 9),
        ("cifar_resnet20", {}, 8),
        ("cifar_plain20", {}, 10),
    ],
    ids=lambda v: str(v),
)
def test_our_models(name: str, options: dict, fused: int) -> None:
    x = torch.randn(4, 3, 32 if "cifar" in name else 64, 32 if "cifar" in name else 64)
    assert_same_model(lambda: models.create(name, num_classes=1000, **options), x, fused=fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    size = 64 if dtype == torch.bfloat16 else 32  # torch's float16 convolutions are slow on a CPU
    assert_same_model(models.resnet18, torch.randn(4, 3, size, size), fused=9, dtype=dtype)


def test_channels_last_and_nchw_agree() -> None:
    model = resnet_fast.fuse(net())
    torch.testing.assert_close(run(model), run(model, X.to(memory_format=torch.channels_last)))


def test_autocast_bfloat16() -> None:
    plain, ours = net().train(), resnet_fast.fuse(net().train())
    grads = []
    for model in (plain, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert grads[-1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.995
    assert statuses(ours) <= {"fused", "partly"}


# ---- what a swap keeps ----------------------------------------------------------------------------------------------


def test_fuse_is_in_place_and_unfuse_restores_bit_for_bit() -> None:
    model = net()
    before = run(model)
    ids = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    assert resnet_fast.fuse(model) is model
    assert [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    assert resnet_fast.unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(run(model), before)
    assert not any("_resnet_fast" in m.__dict__ for m in model.modules())


def test_fuse_twice_is_once() -> None:
    model = resnet_fast.fuse(resnet_fast.fuse(net()))
    assert [row.status for row in resnet_fast.explain(model)].count("fused") == 8
    assert type(resnet_fast.unfuse(model).layer1[0]) is models.BasicBlock


def test_fused_context_restores_what_was() -> None:
    model = net()
    resnet_fast.fuse(model, filter_fn=lambda name, _: name == "layer1.0")
    with resnet_fast.fused(model) as inside:
        assert inside is model
        assert statuses(model) == {"fused", "partly"}
    assert [r.name for r in resnet_fast.explain(model) if r.status == "fused"] == ["layer1.0"]
    with pytest.raises(RuntimeError, match="on purpose"), resnet_fast.fused(model):
        raise RuntimeError("on purpose")
    assert type(model.layer1[1]) is models.BasicBlock


def test_deepcopy_is_fused_and_independent() -> None:
    model = resnet_fast.fuse(net())
    twin = copy.deepcopy(model)
    assert statuses(twin) == {"fused", "partly"}
    expected = run(model)
    with torch.no_grad():
        twin.conv1.weight.mul_(2)
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(twin), expected)


def test_saved_file_names_nothing_of_ours() -> None:
    model = resnet_fast.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        strings = [str(arg) for _, arg, _ in pickletools.genops(archive.read(name)) if arg is not None]
    assert not any("resnet_fast" in s or "Fused" in s for s in strings)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is nn.Sequential
    torch.testing.assert_close(run(loaded), run(model))
    assert statuses(model) == {"fused"}, "saving must not unfuse"


def test_state_dict_round_trip() -> None:
    model, other = resnet_fast.fuse(net()), resnet_fast.fuse(calibrated(models.cifar_resnet20(), seed=7).eval())
    run(other)  # fills its cache with the weights that go away
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other), run(model))


def test_hooks_on_blocks_see_every_call() -> None:
    model = resnet_fast.fuse(net())
    seen = []
    handle = model.layer2[1].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    run(model)
    handle.remove()
    run(model)
    assert seen == [(2, 32, 16, 16)]
    assert statuses(model) == {"fused", "partly"}


def test_to_dtype_and_back() -> None:
    model = resnet_fast.fuse(net())
    expected = run(model)
    low = run(model.to(torch.bfloat16), X.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.5)
    double = run(model.double(), X.double())  # not fused, and right
    assert double.dtype == torch.float64
    assert "float64" in resnet_fast.explain(model)[0].reason


# ---- arguments, explain, register_block -----------------------------------------------------------------------------


def test_filter_backend_strict() -> None:
    model = resnet_fast.fuse(net(), filter_fn=lambda name, _: name.startswith("layer3"), backend="torch")
    rows = resnet_fast.explain(model)
    assert [r.name for r in rows if r.status == "fused"] == ["layer3.1", "layer3.2"]
    assert "left alone" in rows[0].reason
    torch.testing.assert_close(run(model), run(net()), rtol=1e-4, atol=1e-3)
    plain = net()
    with pytest.raises(resnet_fast.FuseError, match=r"layer2\.0 \(basic\)"):
        resnet_fast.fuse(plain, strict=True)
    assert type(plain.layer1[0]) is models.BasicBlock
    resnet_fast.fuse(models.resnet18(), strict=True)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("resnet50",), TypeError, "model: found str"),
        ((net(), lambda n, m: True), TypeError, "positional"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        resnet_fast.fuse(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="Did you mean 'native'"):
        resnet_fast.fuse(net(), backend="nativ")
    with pytest.raises(TypeError, match="filter_fn: found str"):
        resnet_fast.fuse(net(), filter_fn="layer1")
    with pytest.raises(TypeError, match="model: found NoneType"):
        resnet_fast.explain(None)
    with pytest.raises(TypeError, match="cls: found"):
        resnet_fast.register_block("Block", lambda b: None)
    with pytest.raises(TypeError, match="adapter: found NoneType"):
        resnet_fast.register_block(nn.Module, None)


def test_explain_before_and_after() -> None:
    model = net()
    before = resnet_fast.explain(model)
    assert "would be fused" in str(before)
    assert type(model.layer1[0]) is models.BasicBlock
    after = resnet_fast.explain(resnet_fast.fuse(model))
    assert list(before) == list(after)
    assert str(after).splitlines()[0] == "8 fused, 2 partly, 0 not"
    assert {row.kind for row in after} == {"stem", "basic"}
    assert "nothing to fuse" in str(resnet_fast.explain(nn.Linear(2, 2)))
    lone = resnet_fast.explain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert [(r.name, r.status) for r in lone] == [("0", "not")]


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 1, bias=True), nn.BatchNorm2d(8)
        self.side = nn.Sequential(nn.AvgPool2d(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm_a(self.a(x)))
        return torch.relu(self.norm_b(self.b(inner)) + self.side(x))


def test_register_block() -> None:
    plan = BlockPlan("mine", (ConvBnPath("a", "norm_a", True), ConvBnPath("b", "norm_b", True)), Opaque("side"))
    resnet_fast.register_block(Mine, lambda block: plan)
    rows = assert_same_model(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Mine(), Mine()), X)
    assert [r.status for r in rows if r.kind == "mine"] == ["partly", "partly"]
    resnet_fast.register_block(Mine, lambda block: "not on a Saturday")
    row = next(r for r in resnet_fast.explain(Mine()) if r.name == "")
    assert (row.status, row.reason) == ("not", "not on a Saturday")
    resnet_fast.register_block(Mine, lambda block: 3)
    with pytest.raises(TypeError, match="returned int"):
        resnet_fast.fuse(Mine())
    with pytest.raises(ValueError, match="shortcut: found 'side'"):
        BlockPlan("mine", (ConvBnPath("a", "norm_a"),), "side")


def test_sequence_that_changed_after_fuse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    resnet_fast.fuse(model).append(nn.Tanh())
    assert run(model).abs().max() <= 1
    assert "children were added or removed" in resnet_fast.explain(model)[0].reason


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_keeps_less_for_its_backward(name: str, low: bool) -> None:
    """At least 15 % fewer bytes than eager, counted exactly. Weights cast by autocast count, in both."""
    eager = getattr(models, name)(num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 224, 224).to(memory_format=torch.channels_last)

    def step(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model(x).sum()

    theirs = saved(lambda: step(eager))
    ours = saved(lambda: step(resnet_fast.fuse(eager)))
    assert 2 * 10**7 < ours < 0.85 * theirs
