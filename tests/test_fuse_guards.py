"""When a fused block steps back to its original forward, and that torch's own tools see the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import resnet_fast
from resnet_fast import guards, models
from tests.fusing import X, net, run, statuses

# ---- guards: the block steps back -----------------------------------------------------------------------------------


def hooked(block: nn.Module) -> None:
    block.bn1.register_forward_hook(lambda m, args, out: out + 1)


def pre_hooked(block: nn.Module) -> None:
    block.conv2.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def backward_hooked(block: nn.Module) -> None:
    block.relu.register_full_backward_hook(lambda m, gi, go: None)


def parametrized(block: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.conv1)


def pruned(block: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(block.conv1, "weight", amount=0.5)


def other_norm(block: nn.Module) -> None:
    block.bn2 = nn.GroupNorm(4, 16)


def other_act(block: nn.Module) -> None:
    block.relu = nn.GELU()


def padding_mode(block: nn.Module) -> None:
    block.conv1.padding_mode = "reflect"


def own_forward(block: nn.Module) -> None:
    block.conv1.forward = lambda x: nn.functional.conv2d(x, block.conv1.weight, padding=1) * 3


@pytest.mark.parametrize(
    "change",
    [hooked, pre_hooked, backward_hooked, parametrized, pruned, other_norm, other_act, padding_mode, own_forward],
    ids=lambda c: c.__name__,
)
def test_guard(change) -> None:
    model = resnet_fast.fuse(net())
    run(model)
    change(model.layer1[1])
    row = next(r for r in resnet_fast.explain(model) if r.name == "layer1.1")
    assert row.status == "not"
    assert row.reason
    ours = run(model)
    assert torch.equal(ours, run(model))
    resnet_fast.unfuse(model)
    torch.testing.assert_close(ours, run(model), rtol=1e-4, atol=1e-3)


def test_mistakes_get_torchs_own_errors() -> None:
    plain, ours = net(), resnet_fast.fuse(net())
    for bad in (X[0, 0], X[:, :2], X.double(), X.long(), torch.empty(2, 3, 0, 0), "image"):
        with pytest.raises(Exception) as theirs:
            plain(bad)
        with pytest.raises(type(theirs.value)) as mine:
            ours(bad)
        assert str(mine.value) == str(theirs.value)


def test_empty_batch() -> None:
    assert run(resnet_fast.fuse(net()), X[:0]).shape == (0, 10)


def test_one_value_per_channel() -> None:
    block = resnet_fast.fuse(models.BasicBlock(4, 4).train())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_comes_out_as_in_torch(value: float, dtype: torch.dtype) -> None:
    x = X.clone()
    x[0, 1, 5, 5] = value
    plain, ours = net().to(dtype), resnet_fast.fuse(net().to(dtype))
    expected, found = run(plain, x.to(dtype)), run(ours, x.to(dtype))
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.equal(expected.isinf(), found.isinf())
    assert expected[1].isfinite().all()


def test_not_finite_weights_come_out_as_in_torch() -> None:
    plain = net()
    plain.layer2[0].conv1.weight.data[3, 2, 1, 1] = float("nan")
    assert run(plain).isnan().all()
    assert run(resnet_fast.fuse(plain)).isnan().all()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [int, list])
def test_a_stride_set_by_hand(kind: type, train: bool) -> None:
    """conv.stride = 1, or [1, 1]: torch takes one number for both sides, and any sequence."""
    block = net().layer2[0].train(train)
    before = copy.deepcopy(block)
    for conv in (block.conv1, block.conv2):
        for name in ("stride", "padding", "dilation"):
            first, _ = getattr(conv, name)
            setattr(conv, name, first if kind is int else [first, first])
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(resnet_fast.fuse(block)(x), before(x), rtol=1e-4, atol=1e-4)
    assert statuses(block) == {"partly"}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_norm_in_two_places(momentum: float | None) -> None:
    """Its running statistics move twice a forward, the second time from where the first one left them."""
    plain = net().layer1[0].train()
    plain.bn2 = plain.bn1
    plain.bn1.momentum = momentum
    ours = resnet_fast.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 16, 8, 8)
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=1e-4, atol=1e-5)
    assert "two places" in resnet_fast.explain(ours)[0].reason
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> float:
        return 0.5


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def projected(k: int, kernel: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, k, kernel, bias=False), nn.BatchNorm2d(k))


#: Shortcuts whose output eager PyTorch's ``out += shortcut(x)`` adds all the same, or refuses in its own words; and
#: channels of the block's input and output.
SHORTCUTS: dict[str, tuple[Callable[[], nn.Module | None], int, int]] = {
    "per channel": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)), 8, 8),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(8, 1, 1), nn.Dropout(0.5)), 8, 8),
    "statistics": (lambda: nn.Sequential(nn.MaxPool2d(9), nn.Tanh(), nn.BatchNorm2d(8)), 8, 8),
    "scalar": (Scalar, 8, 8),
    "wide": (Wide, 8, 8),
    "nothing": (Nothing, 8, 8),
    "small": (lambda: nn.Conv2d(8, 8, 3), 8, 8),
    "few channels": (lambda: nn.Conv2d(8, 4, 1), 8, 8),
    "identity of one channel": (lambda: None, 1, 8),
    "identity of more channels": (lambda: None, 8, 1),
    "identity": (lambda: None, 8, 8),
    "projection to one channel": (lambda: projected(1, 1), 8, 8),
    "projection to one pixel": (lambda: projected(8, 9), 8, 8),
    "projection to a few": (lambda: projected(8, 3), 8, 8),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make, c, k", SHORTCUTS.values(), ids=SHORTCUTS)
@pytest.mark.parametrize("stride", [1, 3])
def test_a_shortcut_that_torch_must_add(
    make: Callable[[], nn.Module | None], c: int, k: int, train: bool, stride: int
) -> None:
    """It is called once, and added by torch's rules. With a stride, most are larger than the main path."""
    torch.manual_seed(0)
    plain = models.BasicBlock(c, k)
    plain.downsample = make()
    plain.conv1.stride = plain.conv2.stride = (stride, stride)
    plain.train(train)
    fused = resnet_fast.fuse(copy.deepcopy(plain))
    with guards.any_size():
        for step, size in enumerate((9, 9, 12, 9)):  # the projection to one pixel fits, with the stride, at 9 alone
            x = torch.randn(2, c, size, size).to(memory_format=torch.channels_last)
            results: list[Any] = []
            for m in (plain, fused):
                at = x.clone().requires_grad_(train)
                m.zero_grad()
                torch.manual_seed(step)
                try:
                    with torch.set_grad_enabled(train):
                        z = m(at)
                except (RuntimeError, ValueError, TypeError) as error:
                    results.append((type(error), str(error).replace("+=", "+")))
                    continue
                results.append([z])
                if train:
                    z.square().sum().backward()
                    results[-1] += [at.grad, *(p.grad for p in m.parameters())]
                results[-1] += m.buffers()
            if isinstance(results[0], list):
                torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
            else:
                assert results[0] == results[1]


@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
def test_other_layouts_are_torchs_own_affair(layout: str) -> None:
    """Of a convolution by itself, of a norm by itself, and of a network: the same result, or the same error."""
    networks = [net(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval(), nn.Sequential(*list(net().children())[:2])]
    for plain in networks:
        results = []
        for model in (plain, resnet_fast.fuse(copy.deepcopy(plain))):
            try:
                results.append(run(model, getattr(X, layout)()).to_dense())
            except (RuntimeError, NotImplementedError) as error:
                results.append(str(error))
        if isinstance(results[0], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_statistics_of_the_swapped_norm_are_seen() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fast.fuse(net()))
    assert statuses(model) == {"fused", "partly"}  # in eval it is a batch norm like any other
    torch.testing.assert_close(run(model), run(net()), rtol=1e-4, atol=1e-3)
    model.train()
    assert statuses(model) == {"fused", "partly"}  # without a process group it is alone: test_sync.py has two


# ---- torch's own tools see the original -----------------------------------------------------------------------------


def test_compile_fullgraph() -> None:
    model = net()
    expected = run(model)
    compiled = torch.compile(resnet_fast.fuse(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), expected)


def test_export() -> None:
    model = net()
    expected = run(model)
    program = torch.export.export(resnet_fast.fuse(model), (X,))
    torch.testing.assert_close(run(program.module()), expected)


def test_functional_call_and_vmap() -> None:
    model = net()
    expected = run(model)
    resnet_fast.fuse(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(model, state, (X,)), expected, rtol=1e-4, atol=1e-3)
        mapped = torch.func.vmap(lambda x: torch.func.functional_call(model, state, (x[None],))[0])(X)
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-3)


def test_checkpointing_updates_statistics_as_torch_does() -> None:
    results = []
    for model in (net().train(), resnet_fast.fuse(net().train())):
        stem = model.relu(model.bn1(model.conv1(X)))
        out = torch.utils.checkpoint.checkpoint(model.layer1, stem, use_reentrant=False)
        out.square().mean().backward()
        results.append((model.layer1[0].bn1.num_batches_tracked.item(), model.layer1[0].bn1.running_mean.clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_macs_sees_through_fuse() -> None:
    model = net()
    count = models.macs(model, (3, 32, 32))
    assert models.macs(resnet_fast.fuse(model), (3, 32, 32)) == count
