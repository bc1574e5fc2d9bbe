"""What guards and dispatch cost: Python's share of one forward of a bottleneck so small that arithmetic is nothing.

``pytest --benchmark benchmarks/bench_overhead.py``. Python's share is the time of a forward less that of the same
kernels called one after the other, with nothing else: for eager torch's conv2d, batch_norm, relu and add; for a fused
block the backends' functions that its forward called, in training holding all outputs to the end, as autograd's graph
does, for memory that comes back at once is faster. In training the share holds autograd's bookkeeping too. All in us a
block: ``added`` is the fused share less eager's; ``guards`` is the part of it before the block's own function
(functional.residual_block, or folding's) is called, beside eager's ten module calls. The goal is 15 added. ``alone`` is
one block, ``stage`` four behind each other, which in inference look at themselves once. ``python_alone``, of one in
training, is the fused forward with kernels that return at once: without what the caches lose between Python and
kernels, which the difference above charges to Python. One thread; all in turns.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import dispatch, folding, functional, guards, models

ROUNDS, LAUNCHES = 31, 100
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def kernels_of_eager(block: Any) -> Callable[[Tensor, list[Any]], Tensor]:
    """What the modules of a bottleneck call, without the modules; in training what autograd keeps is held."""
    layers = []
    for conv, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)):
        norm = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps, True)
        layers.append((conv.weight, conv.stride, conv.padding, norm, bn.num_batches_tracked))
    training = block.training

    def run(x: Tensor, held: list[Any]) -> Tensor:
        z = x
        for w, stride, padding, norm, counter in layers:
            if z is not x:
                z.relu_()
            z = torch.conv2d(z, w, None, stride, padding)
            if training:
                counter.add_(1)
                held.append(z)
            z = torch.batch_norm(z, *norm)
            if training:
                held.append(z)
        z += x
        return z.relu_()

    return run


@contextmanager
def replaced(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, every function of a backend is ``wrap`` of it, for the package."""
    modules = [dispatch.backend("onednn"), dispatch.backend("native")]
    originals = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and name.startswith(tuple(dispatch.OPS))
    ]
    try:
        for module, name, value in originals:
            setattr(module, name, functools.wraps(value)(wrap(value)))
        dispatch._choose.cache_clear()
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)
        dispatch._choose.cache_clear()


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Every call of a backend's function inside, as it was made by the package."""
    calls: list[Call] = []
    inside = False

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # one function of a backend calls another
                return function(*args, **kwargs)
            calls.append((function, args, kwargs))
            inside = True
            try:
                return function(*args, **kwargs)
            finally:
                inside = False

        return wrapper

    with replaced(record):
        yield calls


def python_alone(block: nn.Module, x: Tensor) -> float:
    """us of a training forward in which every kernel returns at once what it returned before."""
    with recorded() as calls:
        twin = copy.deepcopy(block)
        for _ in range(3):
            twin(x)
        calls.clear()
        twin(x)
        made = list(calls)
    with torch.no_grad():
        answers = [function(*args, **kwargs) for function, args, kwargs in made]
    turn = 0

    def answer(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal turn
            turn = (turn + 1) % len(answers)
            return answers[turn - 1]

        return wrapper

    with replaced(answer):
        return statistics.median(once(lambda: twin(x)) for _ in range(ROUNDS))


def in_turn(calls: list[Callable[[Tensor, list[Any]], Tensor]], x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        z, held = x, list[Any]()
        for call in calls:
            z = call(z, held)
        return z

    return run


def kernels_of_fused(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """The backends' functions that a forward of ``block`` calls, with the same arguments; in training all is held."""
    twin = copy.deepcopy(block)
    with recorded() as calls:
        for _ in range(3):  # folds, lays out weights, makes a stage's program
            twin(x)
        calls.clear()
        twin(x)

    @torch.no_grad()
    def run() -> None:
        held = []
        for function, args, kwargs in calls:
            z = function(*args, **kwargs)
            if block.training:
                held.append(z)

    assert calls, "no kernel ran: the block is not fused here"
    return run


def once(call: Callable[[], Any]) -> float:
    """us."""
    begin = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    return (time.perf_counter() - begin) / LAUNCHES * 1e6


def behind_the_guards(block: Any, x: Tensor) -> Callable[[], Any]:
    """The function that a fused block's forward calls when its guards have passed."""
    state = block.__dict__["_resnet_fast"]
    if block.training:
        layers = guards.collect(block, state.plan)[0]
        return lambda: functional.residual_block(x, layers, identity=True)
    folded = state.caches[0]._entry.folded
    return lambda: folding.folded_block(x, folded, identity=True)


@pytest.mark.parametrize("blocks", [1, 4], ids=["alone", "stage"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "training"])
def bench_overhead(benchmark: Any, train: bool, blocks: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        parts = [models.Bottleneck(8, 2) for _ in range(blocks)]
        eager = nn.Sequential(*parts) if blocks > 1 else parts[0]
        eager.train(train).to(memory_format=torch.channels_last)
        fused = resnet_fast.fuse(copy.deepcopy(eager))
        x = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
        with guards.any_size(), torch.set_grad_enabled(train):
            calls: list[Callable[[], Any]] = [
                lambda: eager(x),
                in_turn([kernels_of_eager(part) for part in parts], x),
                lambda: fused(x),
                kernels_of_fused(fused, x),
            ]
            for call in calls:
                once(call)
            if blocks == 1:
                calls.append(behind_the_guards(fused, x))
            rounds = [[once(call) / blocks for call in calls] for _ in range(ROUNDS)]
            benchmark.group = f"overhead {'training' if train else 'eval'} {'stage' if blocks > 1 else 'alone'}"
            benchmark.pedantic(calls[2], rounds=ROUNDS, iterations=LAUNCHES)
    finally:
        torch.set_num_threads(threads)
    median = lambda values: round(statistics.median(values), 1)  # noqa: E731
    benchmark.extra_info.update(
        eager=median(r[0] for r in rounds),
        fused=median(r[2] for r in rounds),
        eager_python=median(r[0] - r[1] for r in rounds),
        fused_python=median(r[2] - r[3] for r in rounds),
        added=median((r[2] - r[3]) - (r[0] - r[1]) for r in rounds),
    )
    if train and blocks == 1:
        with guards.any_size():
            benchmark.extra_info["python_alone"] = round(python_alone(fused, x), 1)
    if blocks == 1:
        benchmark.extra_info["guards"] = median(r[2] - r[4] for r in rounds)
    print(f"\n{benchmark.group}, us a block: {benchmark.extra_info}")
