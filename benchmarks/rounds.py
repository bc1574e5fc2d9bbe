"""Time on a device: rounds for pytest-benchmark, and ``Timer`` for single calls with cold caches.

For pytest-benchmark a round on a GPU is N launches between two CUDA events, with one synchronisation. The CUDA parts
are not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from resnet_fast.commands.timing import quantile

#: A round lasts at least this long (s), so that a clock's grain and a launch's latency do not count.
SHORTEST = 1e-3


class Rounds(NamedTuple):
    """Seconds of one launch: p20, p50, p80 over ``rounds`` rounds of ``launches`` each, and of what ran beside them."""

    p20: float
    p50: float
    p80: float
    rounds: int
    launches: int
    #: p50 of the call that ran in turns with it.
    beside: float | None = None


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


class _Turns:
    """A clock that times a round of ``call`` before each round that it is read for, twice: both meet the same minutes
    of a machine that others use too.
    """

    def __init__(self, clock: Callable[[], float], call: Callable[[], Any]) -> None:
        self._clock, self._call = clock, call
        self._launches = _calibrated(clock, call)[1]
        self._begins = True
        self.times: list[float] = []

    def __call__(self) -> float:
        if self._begins:
            self.times.append(_round(self._clock, self._call, self._launches))
        self._begins = not self._begins
        return self._clock()

    def end(self) -> float:
        """p50 of the calls. Their operands are let go: pytest-benchmark keeps every clock that it has read."""
        del self._call
        return quantile(self.times, 0.5)


def _round(clock: Callable[[], float], call: Callable[[], Any], launches: int) -> float:
    """Seconds of a launch, of ``launches``."""
    begin = clock()
    for _ in range(launches):
        call()
    return (clock() - begin) / launches


def _calibrated(clock: Callable[[], float], call: Callable[[], Any]) -> tuple[float, int]:
    """After three calls, the seconds of one and how many a round needs."""
    for _ in range(3):
        once = max(_round(clock, call, 1), 1e-7)
    return once, max(1, round(SHORTEST / once))


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
    call: Callable[[], Any],
    device: str,
    *,
    seconds: float,
    benchmark: Any = None,
    inference: bool = False,
    beside: Callable[[], Any] | None = None,
) -> Rounds:
    """Warm up (and compile), then time about ``seconds`` of rounds, at least five, by ``benchmark`` if one is given.

    ``beside`` is timed in turns with it.
    """
    clock: Callable[[], float] = CudaClock() if device == "cuda" else time.perf_counter
    with _inference(inference, device):
        once, launches = _calibrated(clock, call)
        rounds = max(5, min(200, int(seconds / (once * launches))))
        turns = None if beside is None else _Turns(clock, beside)
        timer = turns or clock
        if benchmark is None:
            times = [_round(timer, call, launches) for _ in range(rounds)]
        else:
            benchmark._timer = timer
            benchmark.pedantic(call, rounds=rounds, iterations=launches)
            times = list(benchmark.stats.stats.data)  # of one launch: it has divided by the iterations
    p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
    return Rounds(p20, p50, p80, rounds, launches, turns and turns.end())


class Timer:
    """Times single calls on a device, with its cache cleared before each: by CUDA events there, by a clock on a CPU."""

    #: Clock cycles that a GPU spins before each timed call (about 0.15 ms), in which the CPU enqueues what the call
    #: launches: else a short kernel's time would be that of its launch.
    SPIN = 300_000

    def __init__(self, device: torch.device, cache: int | None = None) -> None:
        """``cache``: bytes written between calls; None: twice a GPU's L2, and 64 MiB on a CPU."""
        self.device = device
        if cache is None:
            cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 << 20
        self._cache = torch.empty(max(cache, 4) // 4, dtype=torch.int32, device=device)

    def _time(self, calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
        """Seconds of each of ``rounds`` calls, of ``calls`` in turn."""
        if self.device.type != "cuda":
            times = []
            for i in range(rounds):
                self._cache.zero_()
                begin = time.perf_counter()
                calls[i % len(calls)]()
                times.append(time.perf_counter() - begin)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for i, (begin_event, end_event) in enumerate(events):
            self._cache.zero_()
            torch.cuda._sleep(self.SPIN)
            begin_event.record()
            calls[i % len(calls)]()
            end_event.record()
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in events]

    def __call__(
        self, calls: Sequence[Callable[[], Any]], seconds: float, *, fewest: int = 7, most: int = 100
    ) -> Rounds:
        """Warm up each of ``calls`` (the same on inputs of their own), then time as many as fit in ``seconds``."""
        for call in calls:
            call()
        begin = time.perf_counter()
        self._time(calls, 2)
        whole = (time.perf_counter() - begin) / 2  # with what lies between the calls
        rounds = max(fewest, min(most, int(seconds / max(whole, 1e-7))))
        times = self._time(calls, rounds)
        p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        return Rounds(p20, p50, p80, rounds, 1)
