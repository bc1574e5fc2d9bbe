"""A block too small to gain from fusing trains on a CPU as it was, and explain() says so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import dispatch, guards, running, swap
from resnet_fast.fuse import blocks
from resnet_fast.models import BasicBlock, create
from resnet_fast.tables import Candidate, Row
from tests.tolerance import assert_same_bits

CPU = torch.device("cpu")
#: 2 * (3 * 3 * 16 * 16) multiply-adds for each of 2 * 8 * 8 pixels.
X, MACS = (2, 16, 8, 8), 2 * 9 * 16 * 16 * 2 * 8 * 8


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> BasicBlock:
    """With as many multiply-adds as fusing needs by the rule, less one."""
    monkeypatch.setattr(guards, "_worth", (MACS + 1) / guards._NARROW / torch.get_num_threads())
    return BasicBlock(16, 16).to(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """One training step's output, gradients and buffers."""
    z = block(x)
    gradients = torch.autograd.grad(z.square().mean(), list(block.parameters()))
    return [z, *gradients, *block.buffers()]


def ran_fused(block: nn.Module) -> bool:
    return all(row.status == "fused" for row in resnet_fast.explain(block))


def test_a_small_block_trains_as_it_was(block: BasicBlock) -> None:
    x = torch.randn(X)
    plain = copy.deepcopy(block)
    resnet_fast.fuse(block)
    for ours, theirs in zip(step(block, x), step(plain, x), strict=True):
        assert_same_bits(ours, theirs)
    assert not ran_fused(block)
    (row,) = resnet_fast.explain(block)
    assert "0.59 million multiply-adds for (2, 16, 8, 8)" in row.reason
    assert "warmup" in row.reason and "RESNET_FAST_MIN_MACS" in row.reason
    step(block, torch.randn(3, *X[1:]))
    assert ran_fused(block)


def test_inference_is_fused_at_any_size(block: BasicBlock) -> None:
    resnet_fast.fuse(block.eval())
    with torch.no_grad():
        block(torch.randn(X))
    assert ran_fused(block)


def test_more_threads_need_more_work(block: BasicBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    resnet_fast.fuse(block)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)
    step(block, torch.randn(3, *X[1:]))
    assert not ran_fused(block)
    step(block, torch.randn(4, *X[1:]).repeat(1, 1, 1, 2))
    assert ran_fused(block)


def test_what_was_asked_for_is_done(block: BasicBlock) -> None:
    pinned = resnet_fast.fuse(copy.deepcopy(block), backend="torch")
    step(pinned, torch.randn(X))
    assert ran_fused(pinned)
    resnet_fast.fuse(block)
    with guards.any_size():
        step(block, torch.randn(X))
    assert ran_fused(block)


@pytest.mark.parametrize("fastest", ["fused", "original"])
def test_what_was_measured_comes_first(block: BasicBlock, fastest: str) -> None:
    resnet_fast.fuse(block)
    x = torch.randn(X)
    ((_, _, blocks_plan, _),) = blocks(block)
    signature = guards.block_signature(x, *guards.collect(block, blocks_plan), blocks_plan, False)
    assert signature is not None
    candidates = [Candidate("fused", None, 1.0), Candidate("original", None, 2.0)]
    if fastest == "original":
        candidates = [candidates[1]._replace(seconds=0.5), candidates[0]]
    try:
        dispatch.add_rows(CPU, [Row(signature, tuple(candidates), "test")])
        step(block, x)
        assert ran_fused(block) is (fastest == "fused")
    finally:
        dispatch.forget()


def test_explain_at_a_size(block: BasicBlock) -> None:
    resnet_fast.fuse(block)
    (small,) = resnet_fast.explain(block, X)
    assert [(step.direction, step.runs) for step in small.steps] == [("block", "original")]
    assert "multiply-adds" in small.steps[0].reason
    (large,) = resnet_fast.explain(block, (4, *X[1:]))
    assert {step.direction for step in large.steps} == {"forward", "backward"}


def test_a_synchronised_norm_has_no_other_way(block: BasicBlock) -> None:
    """torch's own SyncBatchNorm trains on no CPU where ranks have to meet."""
    synced = resnet_fast.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(block))
    step(synced, torch.randn(X))
    assert ran_fused(synced)


def test_narrow_blocks_need_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_worth", 4 * MACS / guards._MEDIUM / torch.get_num_threads())
    wide = resnet_fast.fuse(BasicBlock(32, 32).to(memory_format=torch.channels_last))
    step(wide, torch.randn(2, 32, 8, 8))  # 4 * MACS
    assert ran_fused(wide)
    narrow = resnet_fast.fuse(BasicBlock(16, 16).to(memory_format=torch.channels_last))
    step(narrow, torch.randn(8, *X[1:]))
    assert not ran_fused(narrow)
    step(narrow, torch.randn(int(4 * guards._NARROW / guards._MEDIUM) + 1, *X[1:]).repeat(2, 1, 1, 1))
    assert ran_fused(narrow)


# ---- a network of such blocks is asked nothing


IMAGES = (4, 3, 8, 8)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Fused, all of its blocks too small, and known to be."""
    monkeypatch.setattr(guards, "_worth", 1e9)
    net = resnet_fast.fuse(create("cifar_resnet20").to(memory_format=torch.channels_last))
    step(net, torch.randn(IMAGES))
    return net


def asked(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks and chains were asked whether they run fused, in a forward with x."""
    calls = []
    with monkeypatch.context() as context:
        for home in (swap, running):
            original = running.run
            context.setattr(
                home, "run", lambda *args, _run=original, **kwargs: calls.append(1) or _run(*args, **kwargs)
            )
        net(x)
    return len(calls)


def test_a_network_of_small_blocks_is_asked_nothing(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(IMAGES)
    assert asked(net, x, monkeypatch) == 0
    assert asked(net, torch.randn(2, 3, 8, 8), monkeypatch) == 10  # nine blocks and the stem
    assert asked(net, torch.randn(2, 3, 8, 8), monkeypatch) == 0
    plain = resnet_fast.unfuse(copy.deepcopy(net))
    for ours, theirs in zip(step(net, x), step(plain, x), strict=True):
        assert_same_bits(ours, theirs)


def test_explain_knows_what_a_resting_network_did(net: nn.Module) -> None:
    assert not any(row.status != "not" for row in resnet_fast.explain(net))
    with torch.no_grad():
        net.eval()(torch.randn(IMAGES))
    assert ran_fused_everywhere(net)
    net.train()(torch.randn(IMAGES))
    rows = resnet_fast.explain(net)
    assert all("multiply-adds" in row.reason for row in rows)
    assert len({row.reason for row in rows}) > 1  # each block has its own


def ran_fused_everywhere(net: nn.Module) -> bool:
    return not any(row.status == "not" for row in resnet_fast.explain(net))


def frozen(net: nn.Module) -> None:
    net.eval().requires_grad_(False)


def synchronised(net: nn.Module) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(net)


def no_size(net: nn.Module) -> None:
    guards._worth = 0.0


@pytest.mark.parametrize("change", [frozen, synchronised, no_size])
def test_what_changes_the_answer_is_seen(
    net: nn.Module, change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = guards._worth
    try:
        change(net)
        assert asked(net, torch.randn(IMAGES), monkeypatch) == 10
        assert ran_fused_everywhere(net)
    finally:
        guards._worth = before


def test_threads_and_backends_are_seen(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(IMAGES)
    with dispatch.use_backend("torch"):
        net(x)
    assert ran_fused_everywhere(net)
    net(x)
    assert asked(net, x, monkeypatch) == 0
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)
    assert asked(net, x, monkeypatch) == 10


def test_hooks_see_a_resting_network(net: nn.Module) -> None:
    """On blocks and inside of them; one that comes later, too."""
    seen: list[str] = []
    modules = dict(net.named_modules())
    for name in ("layer1", "layer1.0", "layer2.0.conv1", "bn1"):
        modules[name].register_forward_hook(lambda *_, name=name: seen.append(name))
    net(torch.randn(IMAGES))
    assert sorted(seen) == ["bn1", "layer1", "layer1.0", "layer2.0.conv1"]


def test_a_network_that_is_fused_in_part_is_asked(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first stage runs as it was and rests, the others train fused."""
    monkeypatch.setattr(guards, "_worth", 1.2e6 / torch.get_num_threads())  # every stage takes 4.7 million a block
    x = torch.randn(16, *IMAGES[1:])
    net(x)
    status = {row.name: row.status for row in resnet_fast.explain(net)}
    assert status["layer1.1"] == "not" and status["layer2.1"] == "fused"
    first, again = asked(net, x, monkeypatch), asked(net, x, monkeypatch)
    assert first == again == 7
