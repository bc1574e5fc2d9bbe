"""Rounds for pytest-benchmark: on a GPU a round is N launches between two CUDA events, with one synchronisation.

The CUDA part is not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from resnet_fast.commands.timing import quantile

#: A round lasts at least this long (s), so that a clock's grain and a launch's latency do not count.
SHORTEST = 1e-3


class Rounds(NamedTuple):
    """Seconds of one launch: p20, p50, p80 over ``rounds`` rounds of ``launches`` each."""

    p20: float
    p50: float
    p80: float
    rounds: int
    launches: int


class CudaClock:
    """A clock that reads the GPU's time: each reading records an event on the current stream and waits for it.

    Between two readings lie nothing but the launches: their difference is what two CUDA events measure.
    """

    def __init__(self) -> None:
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record()

    def __call__(self) -> float:
        """Seconds since this clock was made."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return self._zero.elapsed_time(event) / 1e3


@contextlib.contextmanager
def _inference(on: bool, device: str) -> Iterator[None]:
    """Inference mode, and on a CPU inductor's freezing, which folds and packs weights."""
    if not on:
        yield
        return
    import torch._inductor.config as inductor

    with torch.inference_mode(), inductor.patch(freezing=device == "cpu"):
        yield


def run_rounds(
    call: Callable[[], Any], device: str, *, seconds: float, benchmark: Any = None, inference: bool = False
) -> Rounds:
    """Warm up (and compile), then time about ``seconds`` of rounds, at least five, by ``benchmark`` if one is given."""
    clock: Callable[[], float] = CudaClock() if device == "cuda" else time.perf_counter
    with _inference(inference, device):
        for _ in range(3):
            begin = clock()
            call()
            once = max(clock() - begin, 1e-7)
        launches = max(1, round(SHORTEST / once))
        rounds = max(5, min(200, int(seconds / (once * launches))))
        times = []
        if benchmark is None:
            for _ in range(rounds):
                begin = clock()
                for _ in range(launches):
                    call()
                times.append((clock() - begin) / launches)
        else:
            benchmark._timer = clock
            benchmark.pedantic(call, rounds=rounds, iterations=launches)
            times = [t / launches for t in benchmark.stats.stats.data]
    p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    return Rounds(p20, p50, p80, rounds, launches)
