"""fuse(model, generic=True): what is found, what is refused and why."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.functional import add_relu
from tests.fusing import X, assert_same_model, run
from tests.tolerance import DTYPES, assert_close
from tests.tracing import Base, fused, in_place_sum, made, options, parts

FLAG = True


# ---- what is found ----------------------------------------------------------------------------------------------


def functional(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.bn1(self.conv1(x)), inplace=True)
    return torch.relu(self.bn2(self.conv2(x)))


def through_a_method(self: Any, x: Tensor) -> Tensor:
    return self.bn2(self.conv2(self.inner(x))).relu_()


def identity(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    return self.relu(x + self.bn2(self.conv2(x)))


def sum_without_relu(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    return torch.add(x, self.bn2(self.conv2(x)))


def sum_behind_a_module(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    return self.relu(self.extra(self.bn2(self.conv2(x))) + x)


def two_outputs(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    one = self.inner(x)
    return one, self.bn2(self.conv2(one)).relu()


def uses_the_middle(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(x)
    return self.bn1(y) + y.mean()


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (functional, ["conv1 + bn1 + relu, conv2 + bn2 + relu"]),
        (through_a_method, ["conv1 + bn1 + relu, conv2 + bn2 + relu"]),
        (identity, ["conv1 + bn1 + relu; conv2 + bn2 + relu, identity"]),
        (in_place_sum, ["conv1 + bn1 + relu; conv2 + bn2 + relu, the sum; as it is: pool (AvgPool2d)"]),
        (sum_without_relu, ["conv1 + bn1 + relu; conv2 + bn2, identity"]),
        (sum_behind_a_module, ["conv1 + bn1 + relu; conv2 + bn2; sum + relu; as it is: extra (Conv2d)"]),
        (two_outputs, ["conv1 + bn1 + relu; conv2 + bn2 + relu"]),
        (options, ["conv1 + bn1 + relu, conv2 + bn2 + relu"]),
        (uses_the_middle, []),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_found(forward: Callable[..., Any], found: list[str]) -> None:
    rows = assert_same_model(lambda: made(forward), X, generic=True)
    assert [row.reason for row in rows if row.status != "not"] == found, f"\n{rows}"


def test_without_generic_nothing_is_traced() -> None:
    model = resnet_fast.fuse(made(functional))
    rows = resnet_fast.explain(model)
    assert {row.status for row in rows} == {"not"}
    assert any("fuse(model, generic=True) fuses it" in row.reason for row in rows)
    assert any("no convolution and batch norm follow each other" in row.reason for row in rows if row.name == "extra")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    assert_same_model(lambda: made(in_place_sum), X, dtype=dtype, generic=True)


def test_autocast_bfloat16() -> None:
    plain, ours = made(in_place_sum).train(), fused(in_place_sum).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(X), ours(X)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.1)
    assert parts(ours)


# ---- what is refused, with its reason ---------------------------------------------------------------------------


def on_shape(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) if x.shape[0] > 1 else x


def on_type(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) if isinstance(x, Tensor) else x


def on_mode(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) if self.training else self.inner(x) * 2


def on_grad(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) if torch.is_grad_enabled() else self.inner(x) * 2


def on_chance(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) * random.random()


def on_a_tensor_of_its_own(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) + torch.rand(1)


def on_a_global(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) if FLAG else x


def on_a_list(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) * self.items[0]


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.inner(x)


def with_try(self: Any, x: Tensor) -> Tensor:
    try:
        return self.inner(x)
    except ValueError:
        return x


def sets_an_attribute(self: Any, x: Tensor) -> Tensor:
    self.last = self.inner(x)
    return self.last


def changes_a_mode(self: Any, x: Tensor) -> Tensor:
    self.bn1.eval()
    return self.inner(x)


def past_call(self: Any, x: Tensor) -> Tensor:
    return self.relu.forward(self.bn1(self.conv1(x)))


class Parent(Base):
    def head(self, x: Tensor) -> Tensor:
        return self.inner(x) * random.random()


class Child(Parent):
    def head(self, x: Tensor) -> Tensor:
        return super().head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_what_super_calls_is_read() -> None:
    model = resnet_fast.fuse(Child(), generic=True)
    assert not parts(model)
    assert "Parent.head depends on random" in resnet_fast.explain(model)[0].reason


def only_by_keyword(self: Any, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return self.inner(x) * scale


def three_may_be_none(self: Any, x: Tensor, a: Any = None, b: Any = None, c: Any = None) -> Tensor:
    return self.inner(x)


def a_list_as_default(self: Any, x: Tensor, sizes: tuple[int, ...] = (1, 2)) -> Tensor:
    return self.inner(x) * sizes[0]


def same_object(self: Any, x: Tensor) -> Tensor:
    y = self.inner(x)
    return y if y is x else y * 2


def decorated(self: Any, x: Tensor) -> Tensor:
    raise NotImplementedError


def _decorated() -> Callable[..., Any]:
    scale = 2

    def decorated(self: Any, x: Tensor) -> Tensor:
        return self.inner(x) * scale

    return decorated


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (on_shape, "control flow"),
        (on_type, "isinstance"),
        (on_mode, "something else in training"),
        (on_grad, ".is_grad_enabled"),
        (on_chance, "random"),
        (on_a_tensor_of_its_own, "tensors of its own"),
        (on_a_global, "depends on FLAG"),
        (on_a_list, ".items, a list"),
        (without_gradients, "a with or a try"),
        (with_try, "a with or a try"),
        (sets_an_attribute, "sets last"),
        (changes_a_mode, ".eval"),
        (past_call, ".forward"),
        (only_by_keyword, "by keyword alone"),
        (three_may_be_none, "3 inputs that may be None"),
        (a_list_as_default, "a tuple as default"),
        (same_object, "two objects are one"),
        (_decorated(), "closes over"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_refused(forward: Callable[..., Any], reason: str) -> None:
    model = fused(forward).train()
    rows = resnet_fast.explain(model)
    assert not parts(model), f"\n{rows}"
    assert all("cannot be traced" in row.reason and reason in row.reason for row in rows if row.name == "conv1"), rows
    outputs = []
    for m in (made(forward).train(), model):
        torch.manual_seed(1)
        random.seed(1)
        outputs.append(m(X))
    assert torch.equal(*outputs)


def test_refusal_changes_nothing() -> None:
    model = made(on_a_tensor_of_its_own).train()
    before = {k: v for k, v in model.__dict__.items() if k != "_modules"}
    resnet_fast.fuse(model, generic=True)
    assert {k: v for k, v in model.__dict__.items() if k != "_modules"} == before
    assert model.training and model.bn1.training


# ---- several inputs ---------------------------------------------------------------------------------------------


def with_skip(self: Any, x: Tensor, skip: Tensor | None = None, scale: float = 2.0, sub: bool = False) -> Tensor:
    x = self.inner(x)
    if skip is not None:
        x = self.relu(self.bn2(self.conv2(x)) + skip)
    else:
        x = self.relu(self.bn2(self.conv2(x)))
    return x - scale if sub else x * scale


def needs_both(self: Any, x: Tensor, size: int, y: Tensor | None = None) -> Tensor:
    x = F.interpolate(self.inner(x), size=(size, size))
    return self.relu(self.bn2(self.conv2(torch.cat([x[:, :4], y[:, :4]], 1))))


Y = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_several_inputs(train: bool) -> None:
    """Every way of calling: by position and by keyword, with and without the skip, and with what was not traced."""
    plain, ours = made(with_skip).train(train), fused(with_skip).train(train)
    assert "the sum" in parts(ours)[0]
    calls: list[tuple[tuple, dict, bool]] = [
        ((X,), {}, True),
        ((X, Y), {}, True),
        ((X,), {"skip": Y}, True),
        ((X, None, 2.0), {"sub": False}, True),
        ((X, Y, 3.0), {}, False),
        ((X, Y), {"sub": True}, False),
        ((), {"x": X, "skip": Y}, False),
    ]
    for args, kwargs, is_fused in calls:
        for model in (plain, ours):
            model.zero_grad()
            model(*args, **kwargs).square().mean().backward()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)
        for a, b in zip(plain.buffers(), ours.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-4)
        assert bool(parts(ours)) == is_fused, f"{kwargs}\n{resnet_fast.explain(ours)}"


def test_mistakes_with_several_inputs_get_the_originals_error() -> None:
    for forward in (with_skip, needs_both):
        plain, ours = made(forward), fused(forward)
        assert parts(ours)
        for args, kwargs in (((), {}), ((X, 32, Y, 1, 2), {}), ((X, 32), {"z": 1}), ((None, 32, Y), {})):
            with pytest.raises(Exception) as theirs:
                plain(*args, **kwargs)
            with pytest.raises(type(theirs.value)) as mine:
                ours(*args, **kwargs)
            assert str(mine.value) == str(theirs.value)


def test_a_way_that_cannot_be_traced_has_its_reason() -> None:
    """Without y the text raises; with it, it is fused, whatever the size."""
    plain, ours = made(needs_both).eval(), fused(needs_both).eval()
    for size in (32, 16):
        y = Y[:, :, :size, :size]
        torch.testing.assert_close(ours(X, size, y), plain(X, size, y=y), rtol=1e-4, atol=1e-4)
        assert parts(ours)
    with pytest.raises(TypeError):
        ours(X, 32)
    assert "cannot be traced with x, size alone" in resnet_fast.explain(ours)[0].reason


def test_a_fused_module_keeps_its_signature() -> None:
    import inspect

    for generic in (False, True):
        model = resnet_fast.fuse(made(with_skip), generic=generic)
        assert list(inspect.signature(model.forward).parameters) == ["x", "skip", "scale", "sub"]
    sequence = resnet_fast.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert parts(sequence) and list(inspect.signature(sequence.forward).parameters) == ["input"]
    torch.testing.assert_close(sequence(input=X), sequence(X))


# ---- order, and writing in place --------------------------------------------------------------------------------


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def written_between(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    out = self.bn2(self.conv2(x))
    return self.relu(out + self.writes(x))


def written_by_a_function(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    out = self.bn2(self.conv2(x))
    return self.relu(out + x.mul_(2))


def written_shortcut(self: Any, x: Tensor) -> Tensor:
    x = self.inner(x)
    identity = x
    identity += self.bn2(self.conv2(x))
    return self.relu(identity) + x


@pytest.mark.parametrize("forward", [written_between, written_by_a_function, written_shortcut])
def test_what_is_written_in_place_is_read_in_time(forward: Callable[..., Any]) -> None:
    plain, ours = made(forward), made(forward)
    for model in (plain, ours):
        model.writes = Writes()
    resnet_fast.fuse(ours, generic=True)
    assert parts(ours)
    for model in (plain, ours):
        model.eval()
    torch.testing.assert_close(run(ours), run(plain), rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A block that adds what it is given to add."""

    def __init__(self, side: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.side = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), side

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.side(x))


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("side", [nn.AdaptiveAvgPool2d(1), Wide()], ids=["broadcast", "promoted"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_torchs_rules_of_sums(side: nn.Module, train: bool) -> None:
    torch.manual_seed(0)
    plain = Block(side).train(train)
    ours = resnet_fast.fuse(copy.deepcopy(plain), generic=True)
    assert parts(ours)
    expected, found = plain(X), ours(X)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "a summand is" in resnet_fast.explain(ours)[0].reason
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ---- a sum by itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(dtype: torch.dtype) -> None:
    a, b = (torch.randn(2, 5, 4, 3).to(dtype) for _ in range(2))
    a[0, 0, 0, 0] = float("nan")
    dz = torch.randn(2, 5, 4, 3).to(dtype)

    def results(cast: torch.dtype, forward: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.to(cast).detach().requires_grad_(True) for t in (a, b)]
        z = forward(*leaves)
        z.backward(dz.to(cast))
        return [z, *(t.grad for t in leaves if t.grad is not None)]

    ours, theirs = results(dtype, add_relu), results(dtype, lambda x, y: torch.relu(x + y))
    for mine, ref, torchs in zip(ours, results(torch.float64, lambda x, y: torch.relu(x + y)), theirs, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, ref, torchs)
    with torch.no_grad():
        assert_close(add_relu(a, b), torch.relu(a.double() + b.double()), torch.relu(a + b))
    only = b.clone().requires_grad_(True)
    add_relu(a, only).backward(dz)
    assert only.grad is not None and a.grad is None
