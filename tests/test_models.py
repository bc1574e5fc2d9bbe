"""resnet_fast.models against torchvision's networks and the paper's tables (arXiv 1512.03385); test_macs.py counts."""

from __future__ import annotations

import copy
import inspect
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import models
from resnet_fast.models import BasicBlock, Bottleneck, CifarResNet, PlainBasicBlock, ResNet, SubsamplePad
from tests import libraries

IMAGENET = [18, 34, 50, 101, 152]
CIFAR_PARAMETERS = {
    20: "0.27",
    32: "0.46",
    44: "0.66",
    56: "0.85",
    110: "1.7",
    1202: "19.4",
}  # table 6, millions


@pytest.fixture(scope="module")
def torchvision() -> Any:
    return libraries.require("torchvision")


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, **options)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return grads


def randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)


# Against torchvision


@pytest.mark.parametrize("depth", IMAGENET)
def test_torchvision_weights_give_torchvisions_bits(torchvision: Any, depth: int) -> None:
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    randomise_norms(theirs)
    ours = on_meta(f"resnet{depth}")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True, assign=True)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        z = ours.eval()(x)
        assert z.isfinite().all() and z.std() > 0
        assert torch.equal(z, theirs.eval()(x))
    with torch.set_grad_enabled(depth in (18, 50)):  # the gradients of one net of each block, for time
        z, expected = ours.train()(x), theirs.train()(x)
    assert torch.equal(z, expected)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())  # running statistics among them
    if z.requires_grad:
        for out in (z, expected):
            F.cross_entropy(out, torch.tensor([1, 2])).backward()
        assert_same_tensors(gradients(ours), gradients(theirs))


@pytest.mark.parametrize(("depth", "zero_init_residual"), [(18, False), (18, True), (50, True)])
def test_same_seed_same_weights_as_torchvision(torchvision: Any, depth: int, zero_init_residual: bool) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7, zero_init_residual=zero_init_residual)
    torch.manual_seed(0)
    ours = models.create(f"resnet{depth}", num_classes=7, zero_init_residual=zero_init_residual)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


def test_module_names_are_torchvisions(torchvision: Any) -> None:
    for depth in (34, 50):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        names = {n: type(m).__name__ for n, m in theirs.named_modules()}
        ours = models.create(f"resnet{depth}")
        assert {n: type(m).__name__ for n, m in ours.named_modules()} == names
        for name, module in ours.named_modules():
            if isinstance(module, nn.Conv2d):
                assert repr(module) == repr(theirs.get_submodule(name))
            elif isinstance(module, (BasicBlock, Bottleneck)):
                assert module.stride == theirs.get_submodule(name).stride
    resnet = torchvision.models.resnet
    assert not issubclass(BasicBlock, resnet.BasicBlock)
    assert not issubclass(Bottleneck, resnet.Bottleneck)


# The paper's counts


@pytest.mark.parametrize("name", [n for n in models.MODELS if n.startswith("cifar_")])
def test_cifar_depth_and_parameters(name: str) -> None:
    model = on_meta(name)
    depth = int(name.removeprefix("cifar_resnet").removeprefix("cifar_plain"))
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    n = (depth - 2) // 6
    assert isinstance(model, CifarResNet)
    assert len(model.layer1) == len(model.layer2) == len(model.layer3) == n
    assert len(layers) == depth == 6 * n + 2
    paper = CIFAR_PARAMETERS[depth]
    digits = len(paper.partition(".")[2])
    millions = parameter_count(model) / 1e6
    assert f"{millions:.{digits}f}" == paper


@pytest.mark.parametrize(("name", "depth"), [(f"resnet{d}", d) for d in IMAGENET] + [("plain18", 18), ("plain34", 34)])
def test_imagenet_depth(name: str, depth: int) -> None:
    model = on_meta(name)
    main_path = [m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(main_path) == depth


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "cifar_resnet20"])
def test_option_a_has_the_plain_nets_parameters(name: str) -> None:
    plain = on_meta(name.replace("resnet", "plain"))
    residual = on_meta(name, shortcut="A")
    assert {k: v.shape for k, v in residual.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


# Blocks and shortcuts


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "stride", "size"), [((4, 8), 2, (6, 6)), ((3, 7), 2, (5, 8)), ((4, 9), 1, (3, 3))]
)
def test_subsample_pad(
    channels: tuple[int, int], stride: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    in_channels, out_channels = channels
    x = torch.randn(2, in_channels, *size).to(memory_format=layout).requires_grad_()
    z = SubsamplePad(in_channels, out_channels, stride)(x)
    assert torch.equal(z[:, :in_channels], x[:, :, ::stride, ::stride])
    assert not z[:, in_channels:].any()
    assert z.shape == (2, out_channels, *(math.ceil(n / stride) for n in size))
    assert z.is_contiguous(memory_format=layout)
    z.sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::stride, ::stride] = 1
    assert x.grad is not None and torch.equal(x.grad, expected)
    assert not list(SubsamplePad(in_channels, out_channels, stride).parameters())


def small_networks() -> list[Any]:
    cases: list[Any] = []
    for shortcut in "ABC":
        basic = partial(ResNet, BasicBlock, (2, 1, 1, 1), shortcut=shortcut)
        cases.append(pytest.param(basic, id=f"basic{shortcut}"))
        cifar = partial(CifarResNet, BasicBlock, 2, shortcut=shortcut)
        cases.append(pytest.param(cifar, id=f"cifar{shortcut}"))
        for version in ("v1", "v1.5"):
            bottleneck = partial(ResNet, Bottleneck, (1, 2, 1, 1), shortcut=shortcut, version=version)
            cases.append(pytest.param(bottleneck, id=f"bottleneck{shortcut}{version}"))
    cases.append(pytest.param(models.plain18, id="plain18"))
    cases.append(pytest.param(models.cifar_plain20, id="cifar_plain20"))
    return cases


@pytest.mark.parametrize("constructor", small_networks())
def test_forward_and_backward(constructor: Any) -> None:
    torch.manual_seed(0)
    model = constructor(num_classes=5, in_channels=2)
    x = torch.randn(3, 2, 33, 39, requires_grad=True)
    out = model(x)
    assert out.shape == (3, 5)
    F.cross_entropy(out, torch.tensor([0, 1, 4])).backward()
    for name, grad in gradients(model).items():
        assert grad.isfinite().all() and grad.any(), name
    assert x.grad is not None and x.grad.any()
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))
    assert not any(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_where_the_shortcuts_are(block: Any, shortcut: str) -> None:
    model = ResNet(block, (2, 2, 1, 1), shortcut=shortcut)
    stages: tuple[Any, ...] = (model.layer1, model.layer2, model.layer3, model.layer4)
    for stage, blocks in enumerate(stages):
        for i, b in enumerate(blocks):
            changes = i == 0 and (stage > 0 or block is Bottleneck)
            if shortcut == "C" or (shortcut == "B" and changes):
                conv, bn = b.downsample
                assert conv.kernel_size == (1, 1) and conv.stride == (b.stride, b.stride) and conv.bias is None
                assert isinstance(bn, nn.BatchNorm2d)
            elif changes:
                assert type(b.downsample) is SubsamplePad and b.downsample.stride == b.stride
            else:
                assert b.downsample is None
            assert b.stride == (2 if i == 0 and stage > 0 else 1)


@pytest.mark.parametrize(("version", "strided"), [("v1", "conv1"), ("v1.5", "conv2")])
def test_version_places_the_stride(version: str, strided: str) -> None:
    model = models.resnet50(version=version, num_classes=1)
    seen = 0
    for block in model.modules():
        if isinstance(block, Bottleneck):
            for name in ("conv1", "conv2", "conv3"):
                stride = block.stride if name == strided else 1
                assert getattr(block, name).stride == (stride, stride)
            seen += block.stride == 2
    assert seen == 3
    assert model.layer2(torch.randn(1, 256, 9, 12)).shape == (1, 512, 5, 6)


def test_a_plain_block_is_a_basic_block_minus_its_input() -> None:
    torch.manual_seed(0)
    plain, basic = PlainBasicBlock(4, 4).eval(), BasicBlock(4, 4).eval()
    assert not issubclass(PlainBasicBlock, BasicBlock) and not hasattr(plain, "downsample")
    basic.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 5)
    branch = basic.bn2(basic.conv2(F.relu(basic.bn1(basic.conv1(x)))))
    assert torch.equal(plain(x), F.relu(branch))
    assert torch.equal(basic(x), F.relu(branch + x))


# Initialisation and options


def test_initialisation() -> None:
    torch.manual_seed(0)
    for model in (models.resnet18(), models.cifar_resnet20(shortcut="B")):
        for name, m in model.named_modules():
            if isinstance(m, nn.Conv2d) and m.weight.numel() > 10_000:
                std = math.sqrt(2 / (m.out_channels * math.prod(m.kernel_size)))
                assert m.weight.std().item() == pytest.approx(std, rel=0.05), name
                assert abs(m.weight.mean().item()) < 0.05 * std, name
            elif isinstance(m, nn.BatchNorm2d):
                assert (m.weight == 1).all() and not m.bias.any(), name


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
def test_zero_init_residual_starts_at_the_shortcut(name: str) -> None:
    model = models.create(name, zero_init_residual=True, shortcut="A").eval()
    block: Any = model.get_submodule("layer1.0")
    x = torch.randn(1, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), F.relu(x))


def test_norm_layer() -> None:
    norm_layer = partial(nn.GroupNorm, 8)
    model = ResNet(Bottleneck, (1, 1, 1, 1), norm_layer=norm_layer, zero_init_residual=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    bare = models.cifar_plain20(norm_layer=partial(nn.BatchNorm2d, affine=False))
    assert bare(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="zero_init_residual=True needs a norm_layer with a weight"):
        models.resnet18(norm_layer=partial(nn.BatchNorm2d, affine=False), zero_init_residual=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20"])
@pytest.mark.parametrize(
    ("option", "value", "supported"),
    [
        ("shortcut", "D", "'A', 'B', 'C'"),
        ("shortcut", "b", "'A', 'B', 'C'"),
        ("version", "v2", "'v1', 'v1.5'"),
        ("num_classes", 0, "integer of at least 1"),
        ("num_classes", -3, "integer of at least 1"),
        ("num_classes", 1.5, "integer of at least 1"),
        ("num_classes", True, "integer of at least 1"),
        ("in_channels", 0, "integer of at least 1"),
    ],
)
def test_bad_values_name_argument_value_and_choices(name: str, option: str, value: Any, supported: str) -> None:
    if name == "cifar_resnet20" and option == "version":
        return  # not an option there
    with pytest.raises(ValueError, match=f"{option}={value!r} is not supported; use .*{supported}"):
        models.create(name, **{option: value})


def test_bad_shapes_of_networks_and_blocks() -> None:
    with pytest.raises(ValueError, match=r"layers=\(2, 2, 2\).*four"):
        ResNet(BasicBlock, (2, 2, 2))
    with pytest.raises(ValueError, match="block count=0"):
        ResNet(BasicBlock, (2, 2, 0, 2))
    with pytest.raises(ValueError, match="n=0"):
        CifarResNet(BasicBlock, 0)
    with pytest.raises(ValueError, match="version='1'"):
        Bottleneck(4, 4, version="1")
    with pytest.raises(ValueError, match=r"out_channels=3.*at least in_channels=4"):
        SubsamplePad(4, 3)
    with pytest.raises(ValueError, match="stride=0"):
        SubsamplePad(4, 4, 0)


@pytest.mark.parametrize("name", ["plain18", "cifar_plain20"])
def test_plain_networks_take_no_shortcut(name: str) -> None:
    for option in ({"shortcut": "A"}, {"version": "v1"}, {"zero_init_residual": True}):
        with pytest.raises(TypeError, match=next(iter(option))):
            models.create(name, **option)
    with pytest.raises(ValueError, match="zero_init_residual=True is not supported by plain blocks"):
        ResNet(PlainBasicBlock, (1, 1, 1, 1), zero_init_residual=True)


# Names


def test_models_and_all_agree() -> None:
    constructors = {n for n in models.__all__ if n.startswith(("resnet", "plain", "cifar_"))}
    assert set(models.MODELS) == constructors
    for name in models.__all__:
        thing = getattr(models, name)
        assert name == "MODELS" or inspect.getdoc(thing), name
    for name, constructor in models.MODELS.items():
        assert constructor is getattr(models, name)
        with torch.device("meta"):
            model = constructor(num_classes=3, in_channels=2)
        assert isinstance(model, CifarResNet if name.startswith("cifar") else ResNet)
        assert model.fc.out_features == 3 and model.conv1.in_channels == 2


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [("resnet51", "resnet50"), ("ResNet18", "resnet18"), ("cifar_resnet120", "cifar_resnet")],
)
def test_create_suggests_a_name(wrong: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"name='{wrong}'.*did you mean '{suggestion}.*supported: resnet18, "):
        models.create(wrong)


def test_create_without_a_near_name() -> None:
    with pytest.raises(ValueError) as error:
        models.create("vgg")
    assert "did you mean" not in str(error.value) and "cifar_plain110" in str(error.value)
    with pytest.raises(TypeError, match="widht"):
        models.create("resnet18", widht=2)


# tests/libraries.py


def test_require_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries._IMPORTERS, "timm", lambda: libraries._import("no_such_library"))
    monkeypatch.delenv("RESNET_FAST_REQUIRE_LIBRARIES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_library"):
        libraries.require("timm")
    monkeypatch.setenv("RESNET_FAST_REQUIRE_LIBRARIES", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_library"):
        libraries.require("timm")
    with pytest.raises(ValueError, match="name='tim' is not supported"):
        libraries.require("tim")
