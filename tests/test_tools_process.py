"""After fuse(): files, pickles, copies, threads, and processes that are forked or spawned."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from tests.tools import FUSED, Small, assert_same_state, fused_rows, images, loss_of, near, pair, small, steps

ROOT = Path(__file__).parents[1]


def test_state_dict_with_weights_only() -> None:
    """Saved fused, loaded with weights_only=True by either; the optimizer's state too."""
    plain, ours = pair()
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (plain, ours)]
    for model, optimizer in zip((plain, ours), optimizers, strict=True):
        loss_of(model, images()).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": ours.state_dict(), "optimizer": optimizers[1].state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state["model"]) == list(plain.state_dict())
    for target in (small(3), resnet_fast.fuse(small(4))):
        with torch.no_grad():
            target.eval()(images())
        target.load_state_dict(state["model"], strict=True)
        optimizer = torch.optim.Adam(target.parameters(), 0.01)
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            near(target(images()), ours.eval()(images()))


def test_load_with_assign_and_mmap(tmp_path: Path) -> None:
    """load_state_dict(assign=True) replaces every parameter, here by memory-mapped ones."""
    plain, _ = pair(train=False)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    ours = resnet_fast.fuse(small(9).eval())
    with torch.no_grad():
        ours(images())
        ours.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True), assign=True)
        near(ours(images()), plain(images()))
    assert fused_rows(ours) == FUSED


def test_meta_device_then_weights() -> None:
    """Built and fused without memory, then materialised: to_empty and load_state_dict."""
    plain, _ = pair(train=False)
    with torch.device("meta"):
        ours = resnet_fast.fuse(Small()).eval()
    assert ours(images().to("meta")).shape == (4, 5)
    ours.to_empty(device="cpu").load_state_dict(plain.state_dict())
    with torch.no_grad():
        near(ours(images()), plain(images()))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_a_whole_model(protocol: int) -> None:
    """Comes back as the original: with other weights it would have to be fused anew, and with none it is plain."""
    plain, ours = pair(train=False)
    with torch.no_grad():
        expected = ours(images())
    loaded = pickle.loads(pickle.dumps(ours, protocol))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        near(loaded(images()), expected)
        near(resnet_fast.fuse(loaded)(images()), expected)
    assert fused_rows(ours) == FUSED, "pickling must not unfuse"


def test_pickle_needs_nothing_of_ours(tmp_path: Path) -> None:
    """A process without this package loads the pickle of a fused torch model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    resnet_fast.fuse(model.eval())
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['resnet_fast'] = None; import torch; "
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "print(m(torch.ones(1, 3, 8, 8)).sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(model(torch.ones(1, 3, 8, 8)).sum().item(), rel=1e-4)


def test_deepcopy_while_training() -> None:
    """A copy made between two steps goes its own way."""
    _, ours = pair()
    steps(ours, 1)
    twin = copy.deepcopy(ours)
    assert fused_rows(twin) == FUSED
    assert steps(twin, 2) == pytest.approx(steps(ours, 2), rel=1e-5)
    assert_same_state(twin, ours)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in ours.parameters()}


def test_threads_in_inference() -> None:
    """Eight threads, one model, inputs of several sizes: everyone gets the answer to their own."""
    plain, ours = pair(train=False)
    inputs = [images(1 + i % 3, 8 + 2 * (i % 4)) for i in range(24)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]

    def answer(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return ours(x).clone()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for mine, theirs in zip(pool.map(answer, inputs), expected, strict=True):
                near(mine, theirs)
    assert fused_rows(ours) == FUSED


def test_inference_in_one_thread_training_in_another() -> None:
    """Each of its own model's copy, at the same time, on kernels and caches that are shared by the process."""
    plain, ours = pair(train=False)
    learner, judge = pair()
    wrong: list[float] = []
    stop = threading.Event()
    with torch.no_grad():
        expected = plain(images())

    def serve() -> None:
        while not stop.is_set():
            with torch.no_grad():
                wrong.append((ours(images()) - expected).abs().max().item())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        steps(judge, 5)
    finally:
        stop.set()
        thread.join()
    steps(learner, 5)
    assert_same_state(judge, learner)
    assert wrong and max(wrong) < 1e-4


def train_in_a_process(model: nn.Module, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        model.eval()
        out = model(images())
        model.train()
    losses = steps(model, 2)
    # As plain numbers: a tensor would be shared memory of a process that ends.
    queue.put((losses, out.tolist(), fused_rows(model), os.getpid()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method: str) -> None:
    """A model handed to another process: forked it is fused, pickled it is the original; trains and serves alike."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    _, ours = pair()
    with torch.no_grad():
        expected = ours.eval()(images())  # folded, before the process is made
        ours.train()
    # Of a copy: a spawned process gets the parameters in shared memory, and trains those of this one.
    losses_here = steps(copy.deepcopy(ours), 2)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=train_in_a_process, args=(ours, queue))
    worker.start()
    losses, out, fused, pid = queue.get(timeout=300)
    worker.join(300)
    assert worker.exitcode == 0 and pid != os.getpid()
    near(torch.tensor(out), expected)
    if method == "fork":
        assert fused == FUSED
    assert losses == pytest.approx(losses_here, rel=1e-3)


def write_weights(model: nn.Module, done: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        model.stem[0].weight.mul_(3)  # type: ignore[index,operator]
    done.set()


@pytest.mark.slow
def test_shared_memory_written_by_another_process() -> None:
    """share_memory_(): what another process writes, no counter here can show. The next forward sees it."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    _, ours = pair(train=False)
    ours.share_memory()
    with torch.no_grad():
        before = ours(images())
    context = multiprocessing.get_context("fork")
    done = context.Event()
    worker = context.Process(target=write_weights, args=(ours, done))
    worker.start()
    assert done.wait(300)
    worker.join(300)
    with torch.no_grad():
        after = ours(images())
        assert not torch.equal(after, before)
        near(after, resnet_fast.unfuse(ours)(images()))
