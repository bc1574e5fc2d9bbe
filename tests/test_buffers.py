"""Memory that is kept: never handed out while anybody holds it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import buffers

pytestmark = pytest.mark.skipif(buffers._count is None, reason="this torch does not count references to a storage")
SHAPE = (1, 4, 8, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep blocks of any size, from an empty shelf."""
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    monkeypatch.setattr(buffers, "_kept", {})
    monkeypatch.setattr(buffers, "_most_in_use", 0)
    yield


def addresses() -> set[int]:
    return {block.memory.data_ptr() for blocks in buffers._kept.values() for block in blocks}


def kept() -> int:
    return sum(block.nbytes for blocks in buffers._kept.values() for block in blocks)


def test_memory_comes_back_when_nobody_holds_it() -> None:
    first = buffers.empty(SHAPE, torch.float32)
    address = first.data_ptr()
    assert first.shape == SHAPE and first.is_contiguous(memory_format=torch.channels_last)
    assert buffers.empty(SHAPE, torch.float32).data_ptr() != address
    del first
    assert {buffers.empty(SHAPE, torch.float32).data_ptr() for _ in range(3)} <= addresses() and address in addresses()


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t[0, 1:],
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: (t.requires_grad_() * 2, t.grad_fn)[0].sum(),
        lambda t: t.detach().view(torch.int32),
    ],
    ids=["view", "numpy", "storage", "autograd", "other dtype"],
)
def test_memory_that_is_held_in_any_way_stays(hold) -> None:
    tensor = buffers.empty(SHAPE, torch.float32).fill_(1)
    address = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    assert buffers.empty(SHAPE, torch.float32).data_ptr() != address
    del held
    assert buffers.empty(SHAPE, torch.float32).data_ptr() in addresses()


def test_shared_memory_is_let_go() -> None:
    tensor = buffers.empty(SHAPE, torch.float32)
    tensor.share_memory_()
    address = tensor.data_ptr()
    del tensor
    assert buffers.empty(SHAPE, torch.float32).data_ptr() != address


def test_only_fitting_blocks_are_reused() -> None:
    large = buffers.empty((4, 4, 8, 8), torch.float32)
    address = large.data_ptr()
    del large
    assert buffers.empty(SHAPE, torch.float32).data_ptr() != address, "a quarter of it would waste the rest"
    assert buffers.empty((4, 4, 8, 8), torch.bfloat16).data_ptr() == address


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "IDLE", 3000)
    for n in (1, 3, 9, 27):
        buffers.empty((n, 4, 8, 8), torch.float32)
    assert kept() <= 27 * 1024  # the most that was ever in use
    for n in (1, 3, 9):
        buffers.empty((n, 4, 8, 8), torch.float32)
    assert kept() <= 27 * 1024
    buffers.release()
    assert buffers._kept == {}
    for n in (1, 2, 1, 2):
        buffers.empty((n, 4, 8, 8), torch.float32)
    assert kept() <= 3000


def test_what_was_in_use_at_once_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from one training step to the next: all of it comes back, none of it anew."""
    monkeypatch.setattr(buffers, "IDLE", 0)
    step = [buffers.empty((n, 4, 8, 8), torch.float32) for n in (1, 1, 3, 9)]
    before = addresses()
    del step
    step = [buffers.empty((n, 4, 8, 8), torch.float32) for n in (9, 3, 1, 1)]
    assert addresses() == before == {t.data_ptr() for t in step}


def test_small_outputs_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 2**20)
    assert buffers.empty(SHAPE, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_on_kept_memory_alone(dtype: torch.dtype) -> None:
    """Every output of every layer in kept memory, twice, the first result held: equal, and not overwritten."""
    model = resnet_fast.models.resnet18(num_classes=10).eval().to(dtype)
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        features = nn.Sequential(*list(model.children())[:-2])
        resnet_fast.fuse(model)
        first, held = model(x), features(x)
        copy = held.clone()
        second = model(x.flip(0)).flip(0)
        again = features(x.flip(0)).flip(0)
    assert torch.equal(held, copy)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(held, again, rtol=tolerance, atol=tolerance)
    assert buffers._kept


def test_scratch_is_each_threads_own() -> None:
    mine = buffers.scratch(100)
    assert mine.dtype == torch.float32 and buffers.scratch(50).data_ptr() == mine.data_ptr()
    assert buffers.scratch(200).numel() >= 200
    others = []
    thread = threading.Thread(target=lambda: others.append(buffers.scratch(100)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != buffers.scratch(100).data_ptr()
    buffers.release()
    assert buffers.scratch(10).numel() == 10
