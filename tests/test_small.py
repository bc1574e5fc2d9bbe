"""A block too small to gain from fusing trains on a CPU as it was, and explain() says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import dispatch, guards
from resnet_fast.fuse import blocks
from resnet_fast.models import BasicBlock
from resnet_fast.tables import Candidate, Row
from tests.tolerance import assert_same_bits

CPU = torch.device("cpu")
#: 2 * (3 * 3 * 16 * 16) multiply-adds for each of 2 * 8 * 8 pixels.
X, MACS = (2, 16, 8, 8), 2 * 9 * 16 * 16 * 2 * 8 * 8


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> BasicBlock:
    """With as many multiply-adds as fusing needs by the rule, less one."""
    monkeypatch.setattr(guards, "_worth", (MACS + 1) / torch.get_num_threads())
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
