"""What guards and dispatch cost: Python's share of one forward of a bottleneck so small that arithmetic is nothing.

``pytest --benchmark benchmarks/bench_overhead.py``; us a block, one thread, all in turns. Python is measured twice:

* by itself (``fused_alone``, ``eager_alone``): a forward whose kernels return at once. ``added_alone`` is the first
  less the second; the goal is below 15. Eager's holds the sum, ours autograd's function.
* as what kernels leave of a forward (``fused_python``, ``eager_python``): its time less that of the same kernels called
  one after the other, with nothing else: for eager torch's conv2d, batch_norm, relu and add; for a fused block the
  backends' functions that its forward called, in training holding all outputs to the end, as autograd's graph does,
  for memory that comes back at once is faster. This ``added`` also has what the caches lose between Python and kernels,
  and in training autograd's bookkeeping.

``guards`` is the part of a fused forward before the block's own function (functional.residual_block, or folding's) is
called. ``alone`` is one block, ``stage`` four behind each other, which in inference look at themselves once.
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
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
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


class Kernels:
    """Backends' functions, watched: every call as the package made it, and, once ``silence`` was called, no work."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._inside, self._turn = False, 0
        self._answers: list[Any] | None = None

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, watched."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._answers is not None:
                self._turn = (self._turn + 1) % len(self._answers)
                return self._answers[self._turn - 1]
            if self._inside:  # one function of a backend calls another
                return function(*args, **kwargs)
            self.calls.append((function, args, kwargs))
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return wrapper

    @torch.no_grad()
    def silence(self) -> None:
        """From here on every call returns at once what it returned before, in the order of ``calls``."""
        self._answers = [function(*args, **kwargs) for function, args, kwargs in list(self.calls)]


@contextmanager
def recorded(block: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Kernels]]:
    """A copy of ``block`` on watched kernels, and they; ``calls`` are those of one forward."""
    kernels = Kernels()
    with replaced(kernels.wrap):
        twin = copy.deepcopy(block)
        for _ in range(3):  # folds, lays out weights, makes a stage's program
            twin(x)
        kernels.calls.clear()
        twin(x)
        assert kernels.calls, "no kernel ran: the block is not fused here"
        yield twin, kernels


def without_kernels(block: nn.Module, x: Tensor) -> float:
    """us of a fused forward in which every kernel returns at once."""
    with recorded(block, x) as (twin, kernels):
        kernels.silence()
        once(lambda: twin(x))
        return statistics.median(once(lambda: twin(x)) for _ in range(ROUNDS))


def without_kernels_eager(block: nn.Module, x: Tensor) -> float:
    """The same of torch's own modules: what they call of torch returns at once, but for the sum."""

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    with (
        mock.patch.object(F, "conv2d", same),
        mock.patch.object(torch, "batch_norm", same),
        mock.patch.object(torch, "relu_", same),
        torch.no_grad(),
    ):
        x = torch.zeros_like(x)  # the sum writes over it
        once(lambda: block(x))
        return statistics.median(once(lambda: block(x)) for _ in range(ROUNDS))


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
    with recorded(block, x) as (_, kernels):
        calls = kernels.calls

    @torch.no_grad()
    def run() -> None:
        held = []
        for function, args, kwargs in calls:
            z = function(*args, **kwargs)
            if block.training:
                held.append(z)

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
    torch.set_num_threads(1)
    try:
        with guards.any_size(), torch.set_grad_enabled(train):
            pairs = [(without_kernels(fused, x), without_kernels_eager(eager, x)) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    alone, modules = (statistics.median(pair) / blocks for pair in zip(*pairs, strict=True))
    benchmark.extra_info.update(
        fused_alone=round(alone, 1), eager_alone=round(modules, 1), added_alone=round(alone - modules, 1)
    )
    if blocks == 1:
        benchmark.extra_info["guards"] = median(r[2] - r[4] for r in rounds)
    print(f"\n{benchmark.group}, us a block: {benchmark.extra_info}")
