"""ConvBnAct2d, BasicBlock, Bottleneck and Stem against the same modules in plain torch, and as modules among others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import BasicBlock, Bottleneck, ConvBnAct2d, Stem, autograd, explain, fuse
from resnet_fast.fuse import blocks
from resnet_fast.guards import why_not_now
from tests import libraries
from tests.tolerance import DTYPES, assert_close, name_of

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "conv_bn_act": lambda: ConvBnAct2d(8, 12, 3, stride=2),
    "conv_bn": lambda: ConvBnAct2d(8, 12, 1, relu=False, bias=True, eps=1e-3, momentum=0.3),
    "grouped": lambda: ConvBnAct2d(8, 12, 3, groups=4, dilation=2),
    "basic": lambda: BasicBlock(8, 8),
    "basic_projection": lambda: BasicBlock(8, 12, stride=2),
    "bottleneck": lambda: Bottleneck(8, 2),
    "bottleneck_projection": lambda: Bottleneck(8, 4, stride=2),
    "bottleneck_v1": lambda: Bottleneck(8, 4, stride=2, version="v1"),
    "stem": lambda: Stem(8, 12),
}
every_module = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """Built, with norms that do something."""
    module = make()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """What the module computes, by its own submodules and torch's functions, written out here once more."""
    if isinstance(module, ConvBnAct2d):
        y = module.bn(module.conv(x))
        return F.relu(y) if module.relu else y
    if isinstance(module, Stem):
        return F.max_pool2d(F.relu(module.bn1(module.conv1(x))), 3, 2, 1)
    out = F.relu(module.bn1(module.conv1(x)))
    out = module.bn2(module.conv2(out))
    if isinstance(module, Bottleneck):
        out = module.bn3(module.conv3(F.relu(out)))
    side = x if module.downsample is None else module.downsample[1](module.downsample[0](x))
    return F.relu(out + side)


def image(dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    return torch.randn(3, 8, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


def step(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """z, the gradients and the buffers after one forward and backward on a copy of the module."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    z = forward(module, x)
    torch.manual_seed(3)
    z.backward(torch.randn_like(z, dtype=torch.float64).to(z.dtype))
    gradients = {f"d{n}": p.grad for n, p in module.named_parameters()}
    return {"z": z.detach(), "dx": x.grad, **gradients, **{n: b.detach() for n, b in module.named_buffers()}}


def near(ours: Tensor, torchs: Tensor) -> None:
    """Where the question is which values were used, not how well."""
    error, largest = (ours - torchs).abs().amax().item(), torchs.abs().amax().item()
    assert error <= 1e-4 * largest, f"{error} beside {largest}"


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def fused(module: nn.Module) -> bool:
    return why_not_now(module, module.plan) is None


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@every_module
def test_matches_torch(make: Callable[[], nn.Module], train: bool) -> None:
    module, x = build(make).train(train), image()
    assert fused(module)
    ours, torchs = step(module, call, x), step(module, plain, x)
    again = step(module, plain, x.contiguous())
    ref64 = step(copy.deepcopy(module).double(), plain, x.double())
    assert ours.keys() == torchs.keys()
    for name, t in ours.items():
        if name.endswith("tracked"):
            assert torch.equal(t, torchs[name])
        else:
            assert_close(t, ref64[name], torchs[name], name, again[name])
    assert ours["z"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_module
def test_inference(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """In eval without gradients, on folded weights; and the module moved to the dtype by .to()."""
    module, x = build(make).eval().to(dtype), image(dtype)
    with torch.no_grad():
        ref64 = plain(copy.deepcopy(module).double(), x.double())
        for _ in range(2):  # folding, and the folded
            assert_close(module(x), ref64, plain(module, x))


@every_module
def test_unfused_is_the_same(make: Callable[[], nn.Module]) -> None:
    module, x = build(make), image()
    near(module.unfused(x), plain(module, x))


@every_module
def test_small_images(make: Callable[[], nn.Module]) -> None:
    """1 x 1, where a layer's input is its padding; one value per channel is refused in torch's words."""
    module, x = build(make), image(size=1)
    for mode in (True, False):
        module.train(mode)
        near(module(x), plain(copy.deepcopy(module), x))
    module.train()
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        module(x[:1])


# ---- from_modules


class PlainBottleneck(nn.Module):
    """torchvision's keys."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))


def taken_over(p: PlainBottleneck) -> Bottleneck:
    return Bottleneck.from_modules(p.conv1, p.bn1, p.conv2, p.bn2, p.conv3, p.bn3, downsample=p.downsample)


def test_from_modules_shares_everything() -> None:
    theirs = PlainBottleneck().eval()
    ours = taken_over(theirs)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert ours.get_parameter(name) is p
    assert ours.bn3 is theirs.bn3 and not ours.training and fused(ours)
    x = image()
    with torch.no_grad():
        before = ours(x)
        theirs.conv2.weight.mul_(3)
        after = ours(x)
    assert not torch.equal(before, after)
    near(after, plain(ours, x))


def test_from_modules_of_the_others() -> None:
    x = image()
    conv, bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    for relu in (True, False):
        ours = ConvBnAct2d.from_modules(conv, bn, relu)
        near(ours(x), F.relu(bn(conv(x))) if relu else bn(conv(x)))
    stem = Stem.from_modules(conv, bn)
    near(stem(x), F.relu(bn(conv(x))))
    stem = Stem.from_modules(conv, bn, nn.AvgPool2d(2))
    near(stem(x), F.avg_pool2d(F.relu(bn(conv(x))), 2))
    basic = BasicBlock.from_modules(conv, bn, copy.deepcopy(conv), copy.deepcopy(bn))
    near(basic(x), plain(basic, x))


@pytest.mark.parametrize(
    "downsample",
    [
        nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)),
        nn.Sequential(),
        nn.Conv2d(8, 8, 1),
    ],
    ids=["three", "group_norm", "empty", "conv"],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_other_shortcuts(downsample: nn.Module, train: bool) -> None:
    block = build(lambda: BasicBlock(8, 8))
    parts = (block.conv1, block.bn1, block.conv2, block.bn2)
    ours, x = BasicBlock.from_modules(*parts, downsample=downsample).train(train), image()
    main = ours.bn2(ours.conv2(F.relu(ours.bn1(ours.conv1(x)))))
    near(ours(x), F.relu(main + downsample(x)))


def test_bad_arguments() -> None:
    conv, bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match=r"version: found 'v2', supported are 'v1' and 'v1.5'"):
        Bottleneck(8, 4, version="v2")
    with pytest.raises(TypeError, match="conv: found Linear, supported: Conv2d"):
        ConvBnAct2d.from_modules(nn.Linear(2, 2), bn)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bn: found NoneType, supported: Module"):
        ConvBnAct2d.from_modules(conv, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="modules: found 4, Bottleneck takes 6"):
        Bottleneck.from_modules(conv, bn, conv, bn)
    with pytest.raises(TypeError, match="conv2: found BatchNorm2d, supported: Conv2d"):
        BasicBlock.from_modules(conv, bn, bn, conv)
    with pytest.raises(TypeError, match="conv1: found BatchNorm2d"):
        Stem.from_modules(bn, conv)  # type: ignore[arg-type]


# ---- keys, copies, files


def test_keys_are_torchvisions() -> None:
    resnet = libraries.require("torchvision").models.resnet
    side = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    for ours, theirs in (
        (BasicBlock(8, 16, 2), resnet.BasicBlock(8, 16, 2, side)),
        (Bottleneck(8, 4, 2), resnet.Bottleneck(8, 4, 2, side)),
        (BasicBlock(8, 8), resnet.BasicBlock(8, 8)),
    ):
        theirs_state = theirs.state_dict()
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs_state.items()}
        ours.load_state_dict(theirs_state)
        x = image()
        near(ours(x), theirs(x))
    assert {k.partition(".")[0] for k in Stem().state_dict()} == {"conv1", "bn1"}
    assert {k.partition(".")[0] for k in ConvBnAct2d(3, 4, 1).state_dict()} == {"conv", "bn"}


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@every_module
def test_copies(make: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """Also of a module that has folded its weights; a copy is independent of its original."""
    module, x = build(make).eval(), image()
    with torch.no_grad():
        before = module(x)
        other = duplicate(module)
        assert torch.equal(other(x), before)
        for p in other.parameters():
            p.mul_(2)
        assert not torch.equal(other(x), before) and torch.equal(module(x), before)
        near(other(x), plain(other, x))


@every_module
def test_what_changes_is_seen(make: Callable[[], nn.Module]) -> None:
    """Folded weights follow load_state_dict, an optimizer's step, .data, a replaced parameter, and a changed eps."""
    module, other, x = build(make).eval(), build(make), image()
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))

    def optimize() -> None:
        with torch.enable_grad():
            module(x).square().sum().backward()
        torch.optim.SGD(module.parameters(), 0.1).step()

    def replace() -> None:
        conv.weight = nn.Parameter(conv.weight.detach() * 2)

    def scale_data() -> None:
        conv.weight.data.mul_(1.5)

    def other_eps() -> None:
        norm.eps = 0.5

    def train() -> None:
        module.train()
        module(x + 1)
        module.eval()

    changes = [lambda: module.load_state_dict(other.state_dict()), optimize, scale_data, replace, other_eps, train]
    with torch.no_grad():
        z = module(x)
        for change in changes:
            change()
            after = module(x)
            assert not torch.equal(after, z)
            near(after, plain(module, x))
            z = after


@every_module
def test_train_and_eval(make: Callable[[], nn.Module]) -> None:
    module, x = build(make), image()
    for mode in (True, False, True, False):
        reference = copy.deepcopy(module).train(mode)
        module.train(mode)
        near(module(x), plain(reference, x))
        for (name, ours), theirs in zip(module.named_buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_autocast_and_float32_by_turns() -> None:
    """One module in eval serves both; each from weights folded for it."""
    module, x = build(lambda: Bottleneck(8, 2)).eval(), image()
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        for enabled in (True, False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert torch.equal(module(x), copy.deepcopy(fresh)(x)), f"autocast {enabled}"


# ---- hooks


def _inner(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every submodule but activations and pools, which the blocks call as functions or by themselves."""
    return [(n, m) for n, m in module.named_modules() if n and not isinstance(m, nn.MaxPool2d)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@every_module
def test_forward_hooks_of_inner_modules_are_called(make: Callable[[], nn.Module], train: bool) -> None:
    """The original runs then: the hook sees its module's output, and may change it."""
    module, x = build(make).train(train), image()
    for name, inner in _inner(module):
        seen: list[Tensor] = []
        for register in (inner.register_forward_hook, inner.register_forward_pre_hook):
            handle = register(lambda m, args, out=None, seen=seen: seen.append(args[0]) or None)
            z = module(x)
            handle.remove()
            assert len(seen) == 1, f"{name}: called {len(seen)} times"
            seen.clear()
            near(z, plain(module, x))
        doubled = inner.register_forward_hook(lambda m, args, out: out + 3)
        changed = module(x)
        doubled.remove()
        assert not torch.equal(changed, module(x)), name


@every_module
def test_backward_hooks_of_inner_modules_are_called(make: Callable[[], nn.Module]) -> None:
    module = build(make)
    for name, inner in _inner(module):
        seen: list[Any] = []
        handle = inner.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(go))
        module(image().requires_grad_()).sum().backward()
        handle.remove()
        assert len(seen) == 1, name


@every_module
def test_hooks_of_the_module_itself(make: Callable[[], nn.Module]) -> None:
    """They cost nothing: the module stays fused."""
    module, seen = build(make), []
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    module.register_forward_pre_hook(lambda m, args: seen.append(args))
    assert fused(module)
    module(image())
    assert len(seen) == 2


def test_global_hooks_see_every_module() -> None:
    module, seen = build(lambda: BasicBlock(8, 8)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        module(image())
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "BasicBlock"]


@pytest.mark.parametrize("change", ["weight_norm", "group_norm", "reflect", "replaced_forward"])
def test_what_is_not_plain_runs_unfused(change: str) -> None:
    module, x = build(lambda: BasicBlock(8, 8)).eval(), image()
    if change == "weight_norm":
        nn.utils.parametrizations.weight_norm(module.conv2)
    elif change == "group_norm":
        module.bn1 = nn.GroupNorm(2, 8)
    elif change == "reflect":
        module.conv1.padding_mode = "reflect"
        module.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
    else:
        module.bn1.forward = lambda y: y * 2
    assert not fused(module)
    near(module(x), plain(module, x))


def test_an_error_inside_is_raised_and_nothing_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no mistake in the arguments comes out as it was: no second, slower forward hides it."""
    block = BasicBlock(8, 8).train()
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    block(x)
    before = {name: b.clone() for name, b in block.named_buffers()}
    calls = []

    def fails(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(autograd, "forward_block", fails)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        block(x)
    assert len(calls) == 1
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


def test_explain_knows_them() -> None:
    """By themselves and beside what fuse() swaps; warmup measures them; fuse() leaves them as they are."""
    net = nn.Sequential(Stem(3, 8), BasicBlock(8, 8), Bottleneck(8, 4, 2)).eval()
    rows = explain(net)
    assert [(r.name, r.status) for r in rows] == [("0", "fused"), ("1", "fused"), ("2", "fused")]
    assert "by itself: it is a resnet_fast.BasicBlock" in rows[1].reason and str(rows).startswith("3 fused, 0 partly")
    assert len(list(blocks(net))) == 3
    kinds = [type(m) for m in net]
    assert [type(m) for m in fuse(net)] == kinds and explain(net)[2].status == "fused"

    net[1].conv1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 16, 16)
    expected = net(x)
    assert explain(net)[1].status == "not" and "hook" in explain(net)[1].reason
    net[1].conv1._forward_hooks.clear()
    net.double()(x.double())
    assert "ran its modules one by one" in explain(net.float())[0].reason  # what the last call did
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert explain(net)[0].status == "fused"
    assert "refusal" not in net[0].__getstate__()


def test_generic_fuses_around_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.relu(self.bn(self.conv(x))))

    net, x = Net().eval(), torch.randn(2, 3, 16, 16)
    expected = net(x)
    assert [r.status for r in explain(fuse(net, generic=True))] == ["fused", "fused"]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
